"""Threads for calls that may never return.

A TCPStore call on a server that is stopped or cut off never returns, whatever time-out was set, and its client can
serve no other call meanwhile. So every such call happens on a *lane*: a named daemon thread with a client of its own.
Its owner watches it from outside. A lane that failed, or is stuck, is left behind for good: a fresh thread with a
fresh client goes on, and should the old one ever wake up it finds that it no longer counts, and ends. Nothing waits
for a lane. Nor may the end of the process trip over one: a thread that comes back from C++ while Python is being taken
down aborts the process, so one that has had lanes ends by `end_process`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Final, NoReturn

from hpcft.tcp import Address, named

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_log = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 3.0
"""torch's own limit for connecting; it does not hold on a server that accepts and then says nothing."""


class Lane:
    """A disposable thread with a client of its own, working until it is told to stop, fails, or is left behind."""

    def __init__(self, name: str, lanes: Lanes, delay: float) -> None:
        self.left_behind = False
        self.calling_since: float | None = None
        self._lanes = lanes
        self._delay = delay
        self._stopping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around everything that may never return."""
        self.calling_since = time.monotonic()
        try:
            yield
        finally:
            self.calling_since = None

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def rest(self, seconds: float | None = None) -> bool:
        """Until woken, or for so long; False when the lane is to end."""
        self._wake.wait(seconds)
        self._wake.clear()
        return not self._stopping

    def _run(self) -> None:
        if self._delay:
            deadline = time.monotonic() + self._delay
            while (left := deadline - time.monotonic()) > 0:
                if not self.rest(left):
                    return
        # Not under `calling`: from a cold file system this may take many seconds, and a second thread would only wait
        # for the same import.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:
            with self.calling():
                client = TCPStore(
                    *self._lanes.address,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=CONNECT_SECONDS),
                )
            self._lanes.work(self, client)
        except RuntimeError as error:  # torch's DistError and its kin; after it a client is of no use
            self._lanes.replace(self, f"failed ({first_line(error)})")


class Lanes:
    """Keeps one lane at work on `work`, replacing one that failed or is stuck."""

    def __init__(self, name: str, address: Address, work: Callable[[Lane, TCPStore], None], patience: float) -> None:
        self.address: Final = address
        self.work: Final = work
        self._name = name
        self._patience = patience
        self._lock = threading.Lock()
        self._closed = False
        self._in_a_row = 0
        self._made = 1
        self._lane = Lane(name, self, 0)

    def start(self) -> None:
        self._lane.start()

    def wake(self) -> None:
        self._lane.wake()

    def succeeded(self) -> None:
        self._in_a_row = 0

    def tend(self) -> None:
        """Called now and then by the event loop: leaves a stuck lane behind.

        The more in a row, the longer the next one gets: a server that is stopped for an hour costs some ten threads,
        not thousands. Patience costs nothing when it comes back: then the call that waits is answered, or fails.
        """
        lane, patience = self._lane, self._patience * 2 ** min(self._in_a_row, 8)
        since = lane.calling_since
        if since is not None and time.monotonic() - since > patience:
            self.replace(lane, f"got no answer for {patience:.1f} s")

    def replace(self, lane: Lane, why: str) -> None:
        with self._lock:
            if lane is not self._lane or self._closed:
                return
            lane.left_behind = True
            lane.stop()
            # Who was stuck has waited already; who failed would fail again at once.
            delay = 0.0 if lane.calling_since is not None else min(0.1 * 2**self._in_a_row, 5.0)
            self._in_a_row += 1
            self._made += 1
            self._lane = Lane(f"{self._name}-{self._made}", self, delay)
            self._lane.start()
        _log.warning("%s to %s: %s, connecting anew", self._name, named(self.address), why)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lane.left_behind = True
            self._lane.stop()


def end_process(status: int) -> NoReturn:
    """End at once, with all output written, without taking Python down around threads that are stuck in a call.

    Not `logging.shutdown`: it waits for the lock of a handler whose thread may be one of them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it was closed
            stream.flush()
    os._exit(status)


def first_line(error: Exception) -> str:
    """What torch has to say, without its stack trace."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
