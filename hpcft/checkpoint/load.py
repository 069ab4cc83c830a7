"""From a checkpoint to tensors: each byte is read once, to where it belongs, and digested on the way.

The manifest says where each piece lies, so neither headers nor other files are looked at. Of a sharded tensor a rank
wants a box, and reads the chunks that have bytes of it, whichever world has written them. Bytes that lie together
both in the file and in memory are read to where they belong, many tensors by one system call; others (a tensor cut
into columns) go through a scratch buffer of one chunk. So loading takes the memory of what is loaded, and 16 MiB.

What does not match its digest raises before anything is returned: no caller sees half a state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
import torch
from torch import Tensor

from hpcft.checkpoint.boxes import (
    Box,
    Lengths,
    Region,
    cover,
    first_position,
    flat_range,
    last_position,
    overlap,
    within,
)
from hpcft.checkpoint.image import Placed
from hpcft.checkpoint.layout import STATE, CheckpointDamagedError, Damage
from hpcft.checkpoint.manifest import FileEntry
from hpcft.checkpoint.pieces import DTYPE_BYTES, TensorShape
from hpcft.checkpoint.read import chunk_damage, damage_of, read_chunk, read_manifest, stat_damage
from hpcft.checkpoint.share import raw
from hpcft.checkpoint.tree import DTYPES, FlatState, Json, unflatten
from hpcft.durable import CHUNK_BYTES
from hpcft.ids import RunId


def load(directory: Path, *, run: RunId | None = None) -> FlatState:
    """The state of a committed checkpoint, on the CPU, whole.

    Every byte is verified. CheckpointDamagedError: the file, the chunk and the tensors it costs; or it is not one of
    `run`. NotFoundError: no such checkpoint.
    """
    return SavedState.open(directory, run).read()


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state of which no tensor has been read yet."""

    name: str
    """For messages: which one it is."""
    index: Mapping[str, TensorShape]
    values: Json
    sources: tuple[tuple[Sequence[Placed], Fetch], ...]
    """What the files, or copies in memory, hold, and how it is had."""

    @classmethod
    def open(cls, directory: Path, run: RunId | None = None) -> SavedState:
        """That of a committed checkpoint: reads the manifest and the values. Errors as of `load`."""
        manifest, _ = read_manifest(directory, run)
        entry = manifest.file(STATE)
        assert entry is not None, "a manifest without it is refused"
        data = bytearray(entry.size)
        _read(directory, entry, [_Run(0, entry.size, memoryview(data))], True)
        try:
            values = orjson.loads(data)["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamagedError(directory, Damage(STATE, f"it holds no state: {error!r}")) from error
        shards = [entry for entry in manifest.files if entry.name != STATE]
        sources = tuple((entry.tensors, partial(_read, directory, entry)) for entry in shards)
        return cls(directory.name, manifest.tensors(), values, sources)

    def outline(self) -> dict[str, Any]:
        """The state, with tensors that have a shape and a type but no content (`meta`)."""
        tensors = {
            name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
            for name, tensor in self.index.items()
        }
        return unflatten(FlatState(tensors, self.values))

    def read(self, boxes: Mapping[str, Box] | None = None) -> FlatState:
        """The state on the CPU: of tensors that are in `boxes` that part, the others whole. Errors as of `load`.

        Without `boxes` every byte is verified; with them, every byte of the chunks that are read.
        """
        boxes = boxes or {}
        wanted = {
            name: box.region if (box := boxes.get(name)) is not None else ((0,) * len(tensor.shape), tensor.shape)
            for name, tensor in self.index.items()
        }
        tensors = {
            name: torch.empty(wanted[name][1], dtype=DTYPES[tensor.dtype]) for name, tensor in self.index.items()
        }
        for placed, fetch in self.sources:
            needs = [
                need
                for item in placed
                if (need := _need(item, wanted[item.piece.name], tensors[item.piece.name])) is not None
            ]
            fetch(needs, not boxes)
        return FlatState(tensors, self.values, boxes)


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of a file that lie together in memory, too."""

    begin: int
    end: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class _Scattered:
    """Bytes of a file between which there are gaps, there or in memory."""

    begin: int
    end: int
    piece: tuple[int, Lengths]
    """Where the piece begins in the file, and its extent in bytes: with a last dimension that is one element's."""
    part: Region
    """Of the piece."""
    memory: np.ndarray[Any, np.dtype[np.uint8]]
    """Where the part goes; of its shape."""

    def put(self, begin: int, data: memoryview) -> None:
        """Puts what is needed of the file's bytes from `begin` on into its place."""
        start, extent = self.piece
        position = begin - start
        reached = 0
        for region in cover(extent, position, position + len(data)):
            count = int(np.prod(region[1]))
            if (common := overlap(region, self.part)) is not None:
                source = np.frombuffer(data[reached : reached + count], np.uint8).reshape(region[1])
                self.memory[_slices(within(common, self.part))] = source[_slices(within(common, region))]
            reached += count


Need: TypeAlias = _Run | _Scattered

Fetch: TypeAlias = Callable[[Sequence[Need], bool], None]
"""Puts what is needed of a source where it belongs; with True, all the rest of it is verified as well."""


def put_chunk(needs: Iterable[Need], begin: int, data: memoryview) -> None:
    """Copies what is needed of these bytes, the source's from `begin` on, to where it belongs."""
    for need in needs:
        first, last = max(need.begin, begin), min(need.end, begin + len(data))
        part = data[first - begin : last - begin]
        if isinstance(need, _Scattered):
            need.put(first, part)
        else:
            need.memory[first - need.begin : last - need.begin] = part


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(*region, strict=True))


def _need(item: Placed, wanted: Region, tensor: Tensor) -> Need | None:
    """What is to be read of a piece, for a tensor that holds the region `wanted` of the whole."""
    piece = item.piece
    common = overlap((piece.offsets, piece.extent), wanted)
    if common is None:
        return None
    size = DTYPE_BYTES[piece.dtype]
    here, there = within(common, (piece.offsets, piece.extent)), within(common, wanted)
    source, target = flat_range(piece.extent, here), flat_range(wanted[1], there)
    memory = raw(tensor)
    if source is not None and target is not None:
        begin, end = (item.begin + position * size for position in source)
        return _Run(begin, end, memory[target[0] * size : target[1] * size])
    places = np.frombuffer(memory, np.uint8).reshape((*wanted[1], size))
    return _Scattered(
        begin=item.begin + first_position(piece.extent, here) * size,
        end=item.begin + (last_position(piece.extent, here) + 1) * size,
        piece=(item.begin, (*piece.extent, size)),
        part=((*here[0], 0), (*here[1], size)),
        memory=places[_slices(there)],
    )


def _read(directory: Path, entry: FileEntry, needs: Sequence[Need], whole: bool) -> None:
    """Reads what is needed, in the order of the file; and all the rest if it is to be verified, too."""
    if not needs and not whole:
        return
    scratch = memoryview(bytearray(min(CHUNK_BYTES, entry.size)))
    try:
        fd = os.open(directory / entry.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if damage := stat_damage(entry, os.fstat(fd)):
                raise CheckpointDamagedError(directory, damage)
            for chunk, inside in _by_chunk(entry, needs):
                if not inside and not whole:
                    continue
                begin, end = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, entry.size)
                buffers = list(_buffers(begin, end, inside, scratch))
                length = read_chunk(fd, buffers, begin)
                if found := chunk_damage(entry, chunk, length, buffers):
                    raise CheckpointDamagedError(directory, found)
                for need in inside:
                    if isinstance(need, _Scattered):
                        first, last = max(need.begin, begin), min(need.end, end)
                        need.put(first, scratch[first - begin : last - begin])
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointDamagedError(directory, damage_of(entry.name, error, directory)) from error


def _by_chunk(entry: FileEntry, needs: Sequence[Need]) -> Iterator[tuple[int, Sequence[Need]]]:
    """For each chunk of the file, what is needed of it."""
    first = 0
    for chunk in range(len(entry.digests)):
        begin, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
        while first < len(needs) and needs[first].end <= begin:
            first += 1
        last = first
        while last < len(needs) and needs[last].begin < end:
            last += 1
        yield chunk, needs[first:last]


def _buffers(begin: int, end: int, needs: Sequence[Need], scratch: memoryview) -> Iterator[memoryview]:
    """Where the bytes of a chunk go, in order: each that goes to the scratch buffer has its place there."""
    reached = begin
    for need in needs:
        if isinstance(need, _Run):
            start, stop = max(need.begin, begin), min(need.end, end)
            yield scratch[reached - begin : start - begin]
            yield need.memory[start - need.begin : stop - need.begin]
            reached = stop
    yield scratch[reached - begin : end - begin]
