"""Which bytes of a file belong where in memory.

What is needed of a piece either lies together both there and here, and can be read to where it belongs; or there are
gaps (a tensor cut into columns), and it is copied out of a chunk that has been read elsewhere. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from hpcft.checkpoint.boxes import (
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
from hpcft.checkpoint.pieces import DTYPE_BYTES
from hpcft.checkpoint.share import raw

_WITHOUT_LOCK_BYTES = 16 * 1024
"""Copies of at least this size are numpy's, which lets other threads of Python run meanwhile."""


@dataclass(frozen=True, slots=True)
class Contiguous:
    """Bytes of a file that lie together in memory, too."""

    begin: int
    end: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class Scattered:
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


Need: TypeAlias = Contiguous | Scattered


def put_chunk(needs: Iterable[Need], begin: int, data: memoryview) -> None:
    """Copies what is needed of these bytes, the source's from `begin` on, to where it belongs."""
    for need in needs:
        first, last = max(need.begin, begin), min(need.end, begin + len(data))
        if first >= last:
            continue
        part = data[first - begin : last - begin]
        if isinstance(need, Scattered):
            need.put(first, part)
        else:
            target = need.memory[first - need.begin : last - need.begin]
            if len(target) < _WITHOUT_LOCK_BYTES:
                target[:] = part
            else:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(part, np.uint8))


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(*region, strict=True))


def need_of(item: Placed, wanted: Region, tensor: Tensor) -> Need | None:
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
        return Contiguous(begin, end, memory[target[0] * size : target[1] * size])
    places = np.frombuffer(memory, np.uint8).reshape((*wanted[1], size))
    return Scattered(
        begin=item.begin + first_position(piece.extent, here) * size,
        end=item.begin + (last_position(piece.extent, here) + 1) * size,
        piece=(item.begin, (*piece.extent, size)),
        part=((*here[0], 0), (*here[1], size)),
        memory=places[_slices(there)],
    )
