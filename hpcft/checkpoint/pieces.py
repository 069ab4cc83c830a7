"""Tensors, how they are cut into pieces, who writes which, and whether pieces make up the whole again.

State that is sharded (FSDP2) is written as it lies: each rank its own box of every tensor.

State that every rank holds (DDP) is written once: each rank takes a share. The shares are a pure function of the
state's index and the number of ranks, so that no rank has to ask another. Large tensors are cut along their first
dimension: otherwise one embedding would make one rank slow and everyone waits for it. A safetensors file holds at
most one piece of a tensor (the stock readers know no more), so the pieces of one tensor go to different ranks.

Everything here is about shapes; no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

import orjson

from hpcft import durable
from hpcft.checkpoint.boxes import Box

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
}
"""The types of safetensors that stock readers know, with the size of one element. Others are stored as one of these
and their true type stands in `state.json`."""

CUT_BYTES = 64 * 1024 * 1024
"""Tensors above this are cut."""


@dataclass(frozen=True, slots=True)
class TensorShape:
    """What a tensor is, without its content."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: `extent` elements from `offsets` on, in each dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.extent) * DTYPE_BYTES[self.dtype]


def whole(name: str, tensor: TensorShape) -> Piece:
    return Piece(name, tensor.dtype, tensor.shape, (0,) * len(tensor.shape), tensor.shape)


def index_digest(index: Mapping[str, TensorShape]) -> str:
    """Equal on two ranks exactly when they hold the same tensors, and so computed the same shares."""
    rows = [(name, tensor.dtype, tensor.shape) for name, tensor in sorted(index.items())]
    return durable.digest(orjson.dumps(rows))


def owed(
    index: Mapping[str, TensorShape],
    boxes: Mapping[str, Box],
    rank: int,
    world_size: int,
    pinned: AbstractSet[str] = frozenset(),
    cut_above: int = CUT_BYTES,
) -> tuple[Piece, ...]:
    """The pieces that `rank` writes: of sharded tensors its own boxes, of the others its share (see `assign`).

    `index` is equal on all ranks and names every tensor; `boxes` are this rank's parts of those that are sharded.
    """
    replicated = {name: tensor for name, tensor in index.items() if name not in boxes}
    shared = assign(replicated, world_size, pinned - boxes.keys(), cut_above)[rank]
    return (*shared, *(_piece(name, index[name], box) for name, box in boxes.items() if box.writes))


def _piece(name: str, tensor: TensorShape, box: Box) -> Piece:
    if not tensor.nbytes:
        return whole(name, tensor)  # one rank writes that there is nothing
    return Piece(name, tensor.dtype, tensor.shape, box.offsets, box.extent)


def assign(
    index: Mapping[str, TensorShape],
    world_size: int,
    pinned: AbstractSet[str] = frozenset(),
    cut_above: int = CUT_BYTES,
) -> tuple[tuple[Piece, ...], ...]:
    """The pieces that each rank writes, by rank. Every tensor is covered exactly once.

    `pinned` tensors are rank 0's alone, whole: buffers, which replicas need not agree on. The others go, largest
    piece first, to the rank that has the fewest bytes so far.
    """
    shares: list[list[Piece]] = [[] for _ in range(world_size)]
    shares[0] = [whole(name, index[name]) for name in sorted(pinned)]
    load = [(sum(piece.nbytes for piece in share), rank) for rank, share in enumerate(shares)]
    heapq.heapify(load)
    free = ((name, tensor) for name, tensor in index.items() if name not in pinned)
    cut = [_cut(name, tensor, world_size, cut_above) for name, tensor in free]
    # All pieces of a tensor are given away at once, so that no two of them meet at one rank.
    for pieces in sorted(cut, key=lambda pieces: (-pieces[0].nbytes, pieces[0].name)):
        takers = [heapq.heappop(load) for _ in pieces]
        for (nbytes, rank), piece in zip(takers, pieces, strict=True):
            shares[rank].append(piece)
            heapq.heappush(load, (nbytes + piece.nbytes, rank))
    return tuple(tuple(share) for share in shares)


def _cut(name: str, tensor: TensorShape, ranks: int, cut_above: int) -> list[Piece]:
    dimension = next((d for d, length in enumerate(tensor.shape) if length > 1), None)
    if dimension is None or tensor.nbytes <= cut_above:
        return [whole(name, tensor)]
    length = tensor.shape[dimension]
    count = min(ranks, length, ceil(tensor.nbytes / cut_above))
    edges = [length * part // count for part in range(count + 1)]
    pieces = []
    for start, stop in pairwise(edges):
        offsets = tuple(start if d == dimension else 0 for d in range(len(tensor.shape)))
        extent = tuple(stop - start if d == dimension else n for d, n in enumerate(tensor.shape))
        pieces.append(Piece(name, tensor.dtype, tensor.shape, offsets, extent))
    return sorted(pieces, key=lambda piece: (-piece.nbytes, piece.offsets))


def find_gap(pieces: Iterable[Piece]) -> str:
    """Why these pieces are not every tensor exactly once; empty when they are."""
    tensors: dict[str, list[Piece]] = {}
    for piece in pieces:
        tensors.setdefault(piece.name, []).append(piece)
    for name, parts in tensors.items():
        first = parts[0]
        for part in parts:
            if (part.dtype, part.shape) != (first.dtype, first.shape):
                return (
                    f"tensor {name!r} is {first.dtype} {list(first.shape)} in one place "
                    f"and {part.dtype} {list(part.shape)} in another"
                )
        boxes = [(part.offsets, part.extent) for part in parts]
        if not _tiles(boxes, first.shape):
            return f"the {len(boxes)} pieces of tensor {name!r} do not cover {list(first.shape)} exactly once"
    return ""


_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _tiles(boxes: Sequence[_Box], shape: tuple[int, ...]) -> bool:
    if len(boxes) == 1:
        return boxes[0] == ((0,) * len(shape), shape)
    if any(
        len(offsets) != len(shape) or len(extent) != len(shape) or min((*offsets, *extent), default=0) < 0
        for offsets, extent in boxes
    ):
        return False
    if prod(shape) == 0 or not shape:
        return False  # nothing to cover, or a single number: stored once, as it is
    return all(prod(extent) for _, extent in boxes) and _tiles_from(boxes, shape)


def _tiles_from(boxes: Sequence[_Box], shape: tuple[int, ...]) -> bool:
    """Slabs along one dimension after another, which is how anybody cuts tensors: no pair is ever compared."""
    if not shape:
        return len(boxes) == 1
    slabs: dict[tuple[int, int], list[_Box]] = {}
    for offsets, extent in boxes:
        slabs.setdefault((offsets[0], extent[0]), []).append((offsets[1:], extent[1:]))
    reached = 0
    for start, length in sorted(slabs):
        if start != reached:
            return _tiles_pairwise(boxes, shape)
        reached += length
    if reached != shape[0]:
        return False
    return all(_tiles_from(slab, shape[1:]) for slab in slabs.values())


def _tiles_pairwise(boxes: Sequence[_Box], shape: tuple[int, ...]) -> bool:
    """Any other arrangement: all inside, none overlaps another, and the volumes add up. Needs no structure."""
    for offsets, extent in boxes:
        if any(start + length > limit for start, length, limit in zip(offsets, extent, shape, strict=True)):
            return False
    if sum(prod(extent) for _, extent in boxes) != prod(shape):
        return False
    return not any(
        all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))
        for index, one in enumerate(boxes)
        for other in boxes[:index]
    )
