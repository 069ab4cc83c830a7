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

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from hpcft import prefault
from hpcft.checkpoint.layout import CheckpointDamagedError
from hpcft.checkpoint.manifest import FileEntry
from hpcft.checkpoint.needs import Contiguous, Need, Scattered
from hpcft.checkpoint.read import content_damage, damage_of, open_file, read_chunk, stat_damage
from hpcft.checkpoint.turns import do_in_turn
from hpcft.durable import CHUNK_BYTES

_STRETCH = 4
"""Chunks of a window that are one rank's own."""

SLICE_BYTES = 2 * 1024 * 1024
"""Copied, and digested while it is in the processor's cache."""


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
    tasks = _tasks(chunks, peers)
    reading = _Reading(directory, tasks)
    try:
        do_in_turn(tasks, reading.do, peers.count)
    finally:
        reading.close()


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
    """What the threads share: which files are open, and how long they have to be."""

    def __init__(self, directory: Path, tasks: Sequence[_Task]) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._own = threading.local()
        self._fds: dict[str, int] = {}
        self._uses = Counter(each.entry.name for task in tasks for each in (task.chunk, *task.ahead))
        """Of the files, that are to come."""

    def do(self, task: _Task, stopped: Callable[[], bool]) -> None:
        for chunk in task.ahead:
            with self._opened(chunk.entry) as fd:
                os.posix_fadvise(fd, chunk.begin, chunk.end - chunk.begin, os.POSIX_FADV_WILLNEED)
        with self._opened(task.chunk.entry) as fd:
            self._read(fd, task.chunk, stopped)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

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
        fd = open_file(self._directory / entry.name)
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

    def _scratch(self) -> memoryview:
        """A chunk of memory of this thread, which is given to it as far as it is used."""
        found: memoryview | None = getattr(self._own, "scratch", None)
        if found is None:
            found = self._own.scratch = np.empty(CHUNK_BYTES, np.uint8).data
        return found

    def _read(self, fd: int, chunk: _Chunk, stopped: Callable[[], bool]) -> None:
        scratch = self._scratch()
        hasher = xxhash.xxh3_128()
        reached = chunk.begin
        for parts in _slices(chunk.buffers(scratch)):
            if stopped():
                return
            for part in parts:
                prefault.for_writing(part)
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
    """The buffers in groups of at most `SLICE_BYTES`; large ones are cut."""
    group: list[memoryview] = []
    room = SLICE_BYTES
    for buffer in buffers:
        while buffer:
            part, buffer = buffer[:room], buffer[room:]
            group.append(part)
            room -= len(part)
            if not room:
                yield group
                group, room = [], SLICE_BYTES
    if group:
        yield group
