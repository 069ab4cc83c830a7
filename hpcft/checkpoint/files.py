"""Reading a checkpoint's files: in threads, every byte verified on the way, and fetched from the storage once per node.

Theory of operation
-------------------
The unit is the chunk, for which there is a digest. A few threads take chunks in turn, so that the storage, the copy
into place and the digest are at work at the same time; all three run without Python's lock. A thread goes through its
chunk in slices, which are still in the processor's cache when they are digested.

Ranks of one node that load the same checkpoint share what they read through the page cache. The chunks are gone through
in *windows*, and of each window every rank begins with another part: its own. What is its own it asks the kernel for
one window ahead, so when the ranks come to a window, most of it is there or on its way, brought by one of them each. A
rank that is late, or has died, is not waited for: what it has not brought is read by who comes to it first. A window is
small, so nobody needs a page cache that holds the whole checkpoint.

The first error stops all threads at their next slice.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import xxhash

from hpcft.checkpoint.layout import CheckpointDamagedError
from hpcft.checkpoint.manifest import FileEntry
from hpcft.checkpoint.needs import Contiguous, Need, Scattered
from hpcft.checkpoint.read import content_damage, damage_of, read_chunk, stat_damage
from hpcft.durable import CHUNK_BYTES

_THREADS = 4
"""At most, since each may need a chunk of memory."""

_STRETCH = 4
"""Chunks of a window that are one rank's own."""

_SLICE_BYTES = 2 * 1024 * 1024

_FAULTS_BYTES = 256 * 1024
"""Memory below this is not worth a call of its own to have it mapped."""

_MADV_POPULATE_WRITE = 23


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks of this node, which load the same checkpoint at the same time: which one this is, and how many."""

    index: int
    count: int


ALONE = Peers(0, 1)


def read_files(
    directory: Path,
    entries: Sequence[FileEntry],
    needs: Sequence[Sequence[Need]],
    whole: bool,
    peers: Peers = ALONE,
) -> None:
    """Puts what is needed of each of the files, in the order of that file, where it belongs.

    All chunks that have a needed byte are verified; with `whole` all there are. Takes up to 64 MiB. After an error,
    some of the memory may have been written.

    Raises:
        CheckpointDamagedError: the first damage that was met: file, chunk and the tensors it costs.
        UnreadableError: an error of the system. NotFoundError: there is no such checkpoint.
    """
    chunks = [
        chunk
        for entry, needed in zip(entries, needs, strict=True)
        if needed or whole
        for chunk in _chunks(entry, needed)
        if chunk.needs or whole
    ]
    if not whole:
        peers = ALONE  # each needs others
    reading = _Reading(directory, _tasks(chunks, peers))
    threads = min(_THREADS, max(2, len(os.sched_getaffinity(0)) // peers.count), len(chunks))
    try:
        if threads <= 1:
            reading.work()
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="hpcft-read") as pool:
                try:
                    for each in [pool.submit(reading.work) for _ in range(threads)]:
                        each.result()
                finally:
                    reading.stopped = True
    finally:
        reading.close()
    if reading.errors:
        raise min(reading.errors, key=lambda found: found[0])[1]


def in_turn(count: int, peers: Peers) -> Iterator[tuple[int, bool]]:
    """The order in which one of the peers goes through so many chunks, and whether it is the one who is to bring them.

    Each chunk comes once, and is brought by one of them.
    """
    window = peers.count * _STRETCH
    index = peers.index % peers.count
    for start in range(0, count, window):
        length = min(window, count - start)
        first, end = (turn * length // peers.count for turn in (index, index + 1))
        for at in (*range(first, length), *range(first)):
            yield start + at, first <= at < end


@dataclass(frozen=True, slots=True)
class _Chunk:
    entry: FileEntry
    number: int
    needs: Sequence[Need]

    @property
    def begin(self) -> int:
        return self.number * CHUNK_BYTES

    @property
    def end(self) -> int:
        return min(self.begin + CHUNK_BYTES, self.entry.size)

    def buffers(self, scratch: memoryview) -> Iterator[memoryview]:
        """Where its bytes go, in order: each that goes to the scratch buffer has its place there."""
        reached = self.begin
        for need in self.needs:
            if isinstance(need, Contiguous):
                start, stop = max(need.begin, self.begin), min(need.end, self.end)
                yield scratch[reached - self.begin : start - self.begin]
                yield need.memory[start - need.begin : stop - need.begin]
                reached = stop
        yield scratch[reached - self.begin : self.end - self.begin]


def _chunks(entry: FileEntry, needs: Sequence[Need]) -> Iterator[_Chunk]:
    """The chunks of a file, each with what is needed of it."""
    first = 0
    for number in range(len(entry.digests)):
        begin, end = number * CHUNK_BYTES, (number + 1) * CHUNK_BYTES
        while first < len(needs) and needs[first].end <= begin:
            first += 1
        last = first
        while last < len(needs) and needs[last].begin < end:
            last += 1
        yield _Chunk(entry, number, needs[first:last])


@dataclass(frozen=True, slots=True)
class _Task:
    chunk: _Chunk
    ahead: Sequence[_Chunk]
    """What the kernel is to be asked for before."""


def _tasks(chunks: Sequence[_Chunk], peers: Peers) -> list[_Task]:
    order = list(in_turn(len(chunks), peers))
    own = [at for at, is_own in order if is_own]
    ahead = {at: own[place + _STRETCH : place + _STRETCH + 1] for place, at in enumerate(own)}
    if own:
        ahead[own[0]] = own[1 : _STRETCH + 1]
    return [_Task(chunks[at], [chunks[each] for each in ahead.get(at, ())]) for at, _ in order]


class _Reading:
    """What the threads share: which tasks are left, which files are open, and what went wrong."""

    def __init__(self, directory: Path, tasks: Sequence[_Task]) -> None:
        self.stopped = False
        self.errors: list[tuple[int, BaseException]] = []
        """With the place of the task at which they were met."""
        self._directory = directory
        self._tasks = tasks
        self._lock = threading.Lock()
        self._taken = 0
        self._fds: dict[str, int] = {}
        self._uses = Counter(each.entry.name for task in tasks for each in (task.chunk, *task.ahead))
        """Of the files, that are to come."""

    def work(self) -> None:
        """Do tasks until there are none left, or something is wrong."""
        scratch = np.empty(CHUNK_BYTES, np.uint8).data  # memory is given to it as far as it is used
        while (at := self._take()) is not None:
            task = self._tasks[at]
            try:
                for chunk in task.ahead:
                    with self._opened(chunk.entry) as fd:
                        os.posix_fadvise(fd, chunk.begin, chunk.end - chunk.begin, os.POSIX_FADV_WILLNEED)
                with self._opened(task.chunk.entry) as fd:
                    self._read(fd, task.chunk, scratch)
            except BaseException as error:
                self.errors.append((at, error))
                self.stopped = True

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _take(self) -> int | None:
        with self._lock:
            if self.stopped or self._taken == len(self._tasks):
                return None
            self._taken += 1
            return self._taken - 1

    @contextmanager
    def _opened(self, entry: FileEntry) -> Iterator[int]:
        """The file, which stays open until its last use."""
        try:
            fd = self._fds.get(entry.name)
            if fd is None:
                fd = self._open(entry)
            yield fd
        except OSError as error:
            raise CheckpointDamagedError(self._directory, damage_of(entry.name, error, self._directory)) from error
        with self._lock:
            self._uses[entry.name] -= 1
            if not self._uses[entry.name]:
                os.close(self._fds.pop(entry.name))

    def _open(self, entry: FileEntry) -> int:
        fd = os.open(self._directory / entry.name, os.O_RDONLY | os.O_CLOEXEC)
        kept = None
        try:
            if damage := stat_damage(entry, os.fstat(fd)):
                raise CheckpointDamagedError(self._directory, damage)
            with self._lock:
                kept = self._fds.setdefault(entry.name, fd)
        finally:
            if kept != fd:  # also when another thread was faster
                os.close(fd)
        return kept

    def _read(self, fd: int, chunk: _Chunk, scratch: memoryview) -> None:
        hasher = xxhash.xxh3_128()
        reached = chunk.begin
        for parts in _slices(chunk.buffers(scratch)):
            if self.stopped:
                return
            for part in parts:
                if len(part) >= _FAULTS_BYTES:
                    _map(part)
            length = sum(map(len, parts))
            count = read_chunk(fd, parts, reached)
            reached += count
            if count < length:
                break
            for part in parts:
                hasher.update(part)
        if damage := content_damage(chunk.entry, chunk.number, reached - chunk.begin, hasher.hexdigest()):
            raise CheckpointDamagedError(self._directory, damage)
        for need in chunk.needs:
            if isinstance(need, Scattered):
                first, last = max(need.begin, chunk.begin), min(need.end, chunk.end)
                need.put(first, scratch[first - chunk.begin : last - chunk.begin])


def _slices(buffers: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The buffers in groups of at most `_SLICE_BYTES`; large ones are cut."""
    group: list[memoryview] = []
    room = _SLICE_BYTES
    for buffer in buffers:
        while buffer:
            part, buffer = buffer[:room], buffer[room:]
            group.append(part)
            room -= len(part)
            if not room:
                yield group
                group, room = [], _SLICE_BYTES
    if group:
        yield group


_libc = ctypes.CDLL(None)


def _map(memory: memoryview) -> None:
    """Have the kernel map memory that has never been touched, all in one call: half the price of its page faults.

    Memory in use does not change. Kernels before 5.14 do not know this, and fault later.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin, end = start // PAGESIZE * PAGESIZE, start + len(memory)
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE)
