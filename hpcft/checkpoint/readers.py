"""Who reads a checkpoint says so with a shared lock on its directory (flock), which ends with the process.

It is a courtesy among the commands of operators: `hpcft ckpt prune` passes over what another command reads, and does
not begin to delete what one has begun to read. Processes on other nodes see it where the file system carries locks
between nodes; where it has none, nobody is hindered. The leader's retention does not ask: `hpcft ckpt pin` does that.

Whoever restores a checkpoint from a mirror holds the same lock on its unfinished directory. Every sweeper asks for it,
because no generation tells it from a leftover.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcft.errors import NotFoundError


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Says that this process reads the checkpoint. NotFoundError: it is just being deleted."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # whoever reads will find out what is wrong with it
        return
    try:
        if not _lock(fd, fcntl.LOCK_SH):
            raise NotFoundError(f"{directory.name} is just being deleted", "`hpcft ckpt ls` lists the others")
        yield
    finally:
        _release(fd)


@contextmanager
def excluded(directory: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint, and as long as the block runs, nobody begins to."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        yield _lock(fd, fcntl.LOCK_EX)
    finally:
        _release(fd)


def _release(fd: int) -> None:
    """A process that is just being started has a copy of the descriptor until it is another program: closing ours alone
    would leave the lock to it for that long."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    with suppress(OSError):  # a file system without locks, or one that wants the file to be open for writing
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
