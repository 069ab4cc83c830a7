"""Any part of a checkpoint, verified, without holding the whole of it. No torch.

A digest covers 16 MiB of a file, so that is what is read at a time: `Chunks` gives out no byte of a chunk before
all of it has matched. The last few chunks are kept, for many small tensors lie in one. `box` puts a part of a tensor
together from the pieces that hold it, `runs` says where the bytes of a piece belong in the whole tensor.

Whoever reads says so (`readers`), so that an operator's `hpcft ckpt prune` passes the checkpoint over.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from hpcft.checkpoint.boxes import Region, first_position, overlap, within
from hpcft.checkpoint.image import Placed
from hpcft.checkpoint.layout import STATE, CheckpointDamagedError, Damage
from hpcft.checkpoint.manifest import FileEntry, Manifest
from hpcft.checkpoint.pieces import DTYPE_BYTES, Piece, TensorShape
from hpcft.checkpoint.read import chunk_damage, damage_of, open_file, read_chunk, read_manifest, stat_damage
from hpcft.checkpoint.readers import reading
from hpcft.durable import CHUNK_BYTES
from hpcft.errors import NotFoundError
from hpcft.ids import RunId

_KEPT = 8
"""Chunks in memory."""


class Chunks:
    """The verified bytes of one checkpoint. `read_bytes`: how many have been read so far, none counted twice.

    Raises, wherever it reads: CheckpointDamagedError with file, chunk and tensors; NotFoundError when the checkpoint
    has been retired meanwhile; UnreadableError when this node cannot read it.
    """

    def __init__(self, directory: Path, manifest: Manifest, progress: Callable[[int], None]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.tensors = manifest.tensors()
        self._progress = progress
        self._kept: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._seen: set[tuple[str, int]] = set()
        self._pieces: dict[str, list[tuple[FileEntry, Placed]]] = {}
        for entry in manifest.files:
            for item in entry.tensors:
                self._pieces.setdefault(item.piece.name, []).append((entry, item))

    def chunk(self, entry: FileEntry, number: int) -> memoryview:
        """All bytes of a chunk. What it gives out never changes, but is kept only as long as the caller keeps it."""
        key = (entry.name, number)
        if (known := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return known
        start = number * CHUNK_BYTES
        data = memoryview(bytearray(min(CHUNK_BYTES, entry.size - start)))
        try:
            self._fill(entry, number, data)
        except OSError as error:
            try:
                damage = damage_of(entry.name, error, self.directory)
            except NotFoundError:
                raise _retired(self.directory) from error
            raise CheckpointDamagedError(self.directory, damage) from error
        self._kept[key] = data.toreadonly()
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        if key not in self._seen:
            self._seen.add(key)
            self._progress(len(data))
        return self._kept[key]

    def _fill(self, entry: FileEntry, number: int, data: memoryview) -> None:
        fd = open_file(self.directory / entry.name)
        try:
            damage = stat_damage(entry, os.fstat(fd))
            if damage is None:
                length = read_chunk(fd, [data], number * CHUNK_BYTES)
                damage = chunk_damage(entry, number, length, [data])
            if damage is not None:
                raise CheckpointDamagedError(self.directory, damage)
        finally:
            os.close(fd)

    def parts(self, entry: FileEntry, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of a file from `begin` up to `end`, in pieces of at most a chunk."""
        while begin < end:
            number, offset = divmod(begin, CHUNK_BYTES)
            part = self.chunk(entry, number)[offset : offset + end - begin]
            yield part
            begin += len(part)

    def read(self, entry: FileEntry, begin: int, end: int) -> bytearray:
        data = bytearray()
        for part in self.parts(entry, begin, end):
            data += part
        return data

    def state(self) -> Any:
        """Everything that is no tensor, as it stands in `state.json`."""
        entry = self.manifest.file(STATE)
        assert entry is not None  # no manifest is parsed without one
        try:
            return orjson.loads(self.read(entry, 0, entry.size))["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamagedError(self.directory, Damage(STATE, f"it holds no state: {error!r}")) from error

    def box(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A part of a tensor as bytes: an array of shape `(*extent, bytes of an element)`."""
        tensor = self.tensors[name]
        itemsize = DTYPE_BYTES[tensor.dtype]
        out = np.empty((*extent, itemsize), np.uint8)
        if out.size == 0:
            return out
        for entry, item in self._pieces[name]:
            piece = item.piece
            common = overlap((offsets, extent), (piece.offsets, piece.extent))
            if common is None:
                continue
            # What is wanted of the piece lies in `count` of its rows, one after another, of the first dimension in
            # which more than one element is wanted. They are read whole.
            start, size = within(common, (piece.offsets, piece.extent))
            lead = next((d for d, length in enumerate(size) if length > 1), len(size) - 1) + 1
            count = size[lead - 1] if lead else 1
            row = prod(piece.extent[lead:]) * itemsize
            begin = item.begin + first_position(piece.extent[:lead], (start[:lead], size[:lead])) * row
            data = np.frombuffer(self.read(entry, begin, begin + count * row), np.uint8)
            block = data.reshape((*size[:lead], *piece.extent[lead:], itemsize))
            wanted = tuple(slice(at, at + n) for at, n in zip(start[lead:], size[lead:], strict=True))
            place = tuple(slice(a - b, a - b + n) for a, b, n in zip(common[0], offsets, size, strict=True))
            out[place] = block[(slice(None),) * lead + wanted]
        return out


@contextmanager
def opened(
    directory: Path, run: RunId | None = None, progress: Callable[[int], None] = lambda nbytes: None
) -> Iterator[Chunks]:
    """The bytes of a committed checkpoint. `progress` is told the bytes that were read since the last call.

    CheckpointDamagedError: its manifest is, or it is not one of `run`. NotFoundError: no such checkpoint.
    """
    with reading(directory):
        manifest, _ = read_manifest(directory, run)
        yield Chunks(directory, manifest, progress)


def chunks_of(manifest: Manifest, wanted: Callable[[str], bool]) -> dict[str, list[int]]:
    """By file, the numbers of the chunks that hold bytes of the tensors that are `wanted`."""
    found: dict[str, list[int]] = {}
    for entry in manifest.files:
        numbers: set[int] = set()
        for item in entry.tensors:
            if item.begin < item.end and wanted(item.piece.name):
                numbers.update(range(item.begin // CHUNK_BYTES, -(-item.end // CHUNK_BYTES)))
        found[entry.name] = sorted(numbers)
    return found


def chunk_bytes(manifest: Manifest, chunks: dict[str, list[int]]) -> int:
    """How much reading these chunks, and `state.json`, is."""
    state = sum(entry.size for entry in manifest.files if entry.name == STATE)
    return state + sum(
        min(CHUNK_BYTES, entry.size - number * CHUNK_BYTES) for entry in manifest.files for number in chunks[entry.name]
    )


def runs(piece: Piece, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Where the bytes from `begin` up to `end` of a piece belong: (start in the piece, start in the tensor, length)."""
    size = DTYPE_BYTES[piece.dtype]
    inner, run = len(piece.shape), size
    while inner and piece.extent[inner - 1] == piece.shape[inner - 1]:
        inner -= 1
        run *= piece.shape[inner]
    if inner:  # the last dimension in which the piece is cut
        inner -= 1
        run *= piece.extent[inner]
    strides = [size * prod(piece.shape[d + 1 :]) for d in range(len(piece.shape))]
    base = sum(offset * stride for offset, stride in zip(piece.offsets, strides, strict=True))
    while begin < end:
        number, within = divmod(begin, run)
        place = base + within
        for d in reversed(range(inner)):
            number, index = divmod(number, piece.extent[d])
            place += index * strides[d]
        length = min(run - within, end - begin)
        yield begin, place, length
        begin += length


def slabs(tensor: TensorShape, limit: int) -> Iterator[Region]:
    """Boxes (offsets, extent) of at most `limit` bytes, or one element, that make up the tensor, in its order."""
    yield from _slabs((0,) * len(tensor.shape), tensor.shape, DTYPE_BYTES[tensor.dtype], limit)


def _slabs(offsets: tuple[int, ...], extent: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Region]:
    size = prod(extent) * itemsize
    lead = next((d for d, length in enumerate(extent) if length > 1), None)
    if size <= limit or lead is None:
        if size:
            yield offsets, extent
        return
    at_once = max(1, limit * extent[lead] // size)
    for start in range(0, extent[lead], at_once):
        count = min(at_once, extent[lead] - start)
        part = (*offsets[:lead], offsets[lead] + start, *offsets[lead + 1 :])
        yield from _slabs(part, (*extent[:lead], count, *extent[lead + 1 :]), itemsize, limit)


def _retired(directory: Path) -> NotFoundError:
    return NotFoundError(
        f"{directory.name} was retired while it was being read",
        "`hpcft ckpt pin` keeps one for as long as it is needed; `hpcft ckpt ls` lists those that there are",
    )
