"""Faults at the k-th system call, in code that knows nothing of them.

`sys.setprofile` is called before every call of a C function, so also before each of those in the module `posix`. An
exception raised there takes the place of the call. No production code has a hook for this and nothing is patched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

DURABLE = frozenset({"open", "write", "pwrite", "fsync", "close", "rename", "link", "unlink", "mkdir", "rmdir"})
"""Calls after each of which the disk may look different."""


@contextmanager
def interrupted(number: int, act: Callable[[str], None]) -> Iterator[list[str]]:
    """Calls `act` in place of the `number`-th of these calls (from 1); collects the names of all that came by."""
    seen: list[str] = []

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__module__", None) == "posix" and function.__name__ in DURABLE:
            seen.append(function.__name__)
            if len(seen) == number:
                act(function.__name__)

    sys.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(None)
