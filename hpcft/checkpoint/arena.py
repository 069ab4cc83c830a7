"""Arenas: shared memory in which a rank leaves a copy of its share, and which outlives it.

An arena is a memfd: it has no name that could collide with another job's or be left behind, and is gone with the last
process that holds it. The agent makes it, once, and touches all its pages: a copy into fresh pages takes ten times as
long as one into pages that are there (docs/decisions/0014-copies-in-memory.md). The worker gets it by descriptor and
maps it.

What lies in it is the image of a shard (see `image`), byte by byte the file that it becomes. What is said once in a
save, and may be long, goes into a memory file of its own (`memory_file`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from hpcft.prefault import POPULATE_WRITE

_TOUCHED_AT_ONCE: Final = 64 * 1024 * 1024
"""Python holds its lock while pages are touched: other threads get their turn between two such parts."""


class Arena:
    """`size` bytes of shared memory, mapped; `fd` can be handed to another process."""

    __slots__ = ("_map", "fd", "size", "view")

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor. OSError: it is no memory file, or cannot be mapped."""
        self.fd: Final = fd
        self.size: Final = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size)
        self.view = memoryview(self._map)

    @classmethod
    def reserve(cls, size: int, told: Callable[[int], None] = lambda made: None) -> Arena:
        """New memory, every page of it there. Takes about a second per GiB. `told` hears of the bytes that are there.

        OSError: there is none. Where a cgroup's limit is passed, the kernel kills a process instead: look at
        `memory.headroom` before.
        """
        fd = os.memfd_create("hpcft-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # nobody can shorten it: a mapping beyond the end of its file answers with SIGBUS
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            for start in range(0, size, _TOUCHED_AT_ONCE):
                length = min(_TOUCHED_AT_ONCE, size - start)
                os.posix_fallocate(fd, start, length)  # ENOSPC or ENOMEM here, not a signal later
                told(start + length)
            arena = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        arena.touch()
        return arena

    def touch(self) -> None:
        """Have every page in this process's tables, so that the first copy is as fast as the others."""
        for start in range(0, self.size, _TOUCHED_AT_ONCE):
            length = min(_TOUCHED_AT_ONCE, self.size - start)
            try:
                self._map.madvise(POPULATE_WRITE, start, length)
            except OSError:  # an older kernel
                for page in range(start, start + length, mmap.PAGESIZE):
                    self._map[page] = self._map[page]

    def close(self) -> None:
        """Give back mapping and descriptor; the memory itself is free when nobody else holds it."""
        self.view.release()
        with suppress(BufferError):  # tensors still look at it: it goes with them
            self._map.close()
        os.close(self.fd)


def content_of(fd: int) -> bytes:
    """All bytes of a memory file."""
    size = os.fstat(fd).st_size
    if not size:
        return b""
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as mapped:
        return bytes(mapped)


def memory_file(name: str, content: bytes) -> int:
    """The inverse: a memory file that can be handed to another process. The caller owns the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
    except BaseException:
        os.close(fd)
        raise
    return fd
