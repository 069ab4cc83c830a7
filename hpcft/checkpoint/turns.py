"""Tasks that a few threads take in turn, until they are done or one of them has failed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")

_THREADS = 4
"""At most, since each may need a chunk of memory."""


def do_in_turn(tasks: Sequence[_T], work: Callable[[_T, Callable[[], bool]], None], sharing: int = 1) -> None:
    """Call `work` with each task, in threads; with as many processes (`sharing`) that do the same on this machine.

    The second argument says whether somebody has failed, so that nothing more needs to be done. Raises the error of
    the first task, in the order of `tasks`, that had one; the others have ended by then.
    """
    errors: list[tuple[int, BaseException]] = []
    lock = threading.Lock()
    left = iter(range(len(tasks)))
    stopped = threading.Event()

    def take_turns() -> None:
        while not stopped.is_set():
            with lock:
                at = next(left, None)
            if at is None:
                return
            try:
                work(tasks[at], stopped.is_set)
            except BaseException as error:
                errors.append((at, error))
                stopped.set()

    threads = min(_THREADS, max(2, len(os.sched_getaffinity(0)) // sharing), len(tasks))
    if threads <= 1:
        take_turns()
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="hpcft-read") as pool:
            try:
                for each in [pool.submit(take_turns) for _ in range(threads)]:
                    each.result()
            finally:
                stopped.set()
    if errors:
        raise min(errors, key=lambda found: found[0])[1]
