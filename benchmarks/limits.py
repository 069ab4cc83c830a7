"""What this machine can do at best, measured beside what is compared with it: copies, files, digests."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from hpcft.checkpoint.arena import Arena
from hpcft.durable import CHUNK_BYTES

_COPIED_AT_ONCE = 1 << 20
"""Of smaller tensors, memory that lies together is copied instead: that many calls would be no limit."""

WAYS = tuple((direct, count) for direct in (False, True) for count in (1, 2))
"""Of raw reading and writing: around the page cache or not, by so many threads."""


class Took(NamedTuple):
    """Seconds on the clock, and of CPU time in this thread."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> Took:
        return cls(time.perf_counter(), time.thread_time())

    def __sub__(self, began: Took) -> Took:
        return Took(self.clock - began.clock, self.cpu - began.cpu)


class Copy:
    """memcpy(3) of a state into shared memory that is there; on a GPU, into memory that is pinned."""

    def __init__(self, sources: Sequence[Tensor], size: int) -> None:
        """Of `sources`, as many bytes as there are; into `size` bytes, from the beginning again when they are full."""
        self.arena = Arena.reserve(size)
        memory = torch.frombuffer(self.arena.view, dtype=torch.uint8)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._on_device = bool(sources) and sources[0].is_cuda
        if self._on_device:
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
            assert status == 0, f"cudaHostRegister: {status}"
        parts = [each.detach().reshape(-1).view(torch.uint8) for each in sources]
        if parts and parts[0].numel() < _COPIED_AT_ONCE:
            parts = [torch.cat(parts)]
        reached = 0
        for part in parts:
            done = 0
            while done < part.numel():
                if reached == size:
                    reached = 0
                length = min(part.numel() - done, size - reached)
                self._pairs.append((memory[reached : reached + length], part[done : done + length]))
                reached, done = reached + length, done + length

    def run(self) -> Took:
        began = Took.now()
        if self._on_device:
            for target, source in self._pairs:
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
        else:
            for target, source in self._pairs:
                ctypes.memmove(target.data_ptr(), source.data_ptr(), target.numel())
        return Took.now() - began

    def run_digested(self) -> float:
        """Seconds of copying and taking the digest of every chunk."""
        began = time.perf_counter()
        for target, source in self._pairs:
            for start in range(0, target.numel(), CHUNK_BYTES):
                part = source[start : start + CHUNK_BYTES]
                ctypes.memmove(target.data_ptr() + start, part.data_ptr(), part.numel())
                xxhash.xxh3_128(part.numpy().data).digest()
        return time.perf_counter() - began


def write_raw(path: Path, image: memoryview, size: int, way: tuple[bool, int]) -> float:
    """Seconds until `size` bytes are written to a new file and fsynced. OSError: this way is not to be had here."""
    direct, writers = way

    def write(fd: int, start: int, stop: int) -> None:
        while start < stop:
            at = start % len(image)
            start += os.pwrite(fd, image[at : at + min(CHUNK_BYTES, stop - start)], start)

    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0), 0o644)
    try:
        _side_by_side(size, writers, lambda start, stop: write(fd, start, stop))
        os.fsync(fd)
    finally:
        os.close(fd)
    return time.perf_counter() - began


def read_raw(path: Path, memory: memoryview, way: tuple[bool, int]) -> float:
    """Seconds until the whole file, which is not in the page cache, has been read. OSError as of `write_raw`."""
    direct, readers = way
    forget(path)

    def read(fd: int, start: int, stop: int) -> None:
        while start < stop:
            at = start % len(memory)
            start += os.preadv(fd, [memory[at : at + min(CHUNK_BYTES, stop - start)]], start)

    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        _side_by_side(os.fstat(fd).st_size, readers, lambda start, stop: read(fd, start, stop))
    finally:
        os.close(fd)
    return time.perf_counter() - began


def _side_by_side(size: int, count: int, work: Callable[[int, int], None]) -> None:
    edges = [size // CHUNK_BYTES * part // count * CHUNK_BYTES for part in range(count)] + [size]
    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(work, start, stop) for start, stop in pairwise(edges)]:
            done.result()


def forget(path: Path) -> None:
    """Out of the page cache with a file, or all files below a directory."""
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            fd = os.open(each, os.O_RDONLY)
            try:
                os.fsync(fd)  # what is dirty would stay
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
