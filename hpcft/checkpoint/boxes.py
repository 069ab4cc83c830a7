"""Boxes: which part of a tensor a rank holds, a piece covers, or a range of bytes is. Arithmetic, no torch.

A box is `extent` elements from `offsets` on in each dimension. A *flat range* is a range of positions when elements
are counted row by row, as they lie in memory and in files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from math import prod
from typing import TypeAlias

Lengths: TypeAlias = tuple[int, ...]
Region: TypeAlias = tuple[Lengths, Lengths]
"""Offsets and extent."""
Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Indices of one dimension as ranges (start, stop), in order."""


@dataclass(frozen=True, slots=True)
class Box:
    """The part of a sharded tensor that one rank holds."""

    shape: Lengths
    """Of the whole tensor."""
    offsets: Lengths
    extent: Lengths
    """Zeros in it: this rank holds nothing of the tensor."""
    writes: bool = True
    """Whether this rank is the one that writes it, among those that hold the same part."""

    @property
    def region(self) -> Region:
        return self.offsets, self.extent


def overlap(one: Region, other: Region) -> Region | None:
    """What two boxes of one tensor have in common; None: nothing."""
    offsets = tuple(map(max, one[0], other[0]))
    ends = (min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))
    extent = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return None if any(length <= 0 for length in extent) else (offsets, extent)


def within(part: Region, whole: Region) -> Region:
    """The same box with its offsets counted from the beginning of `whole`, in which it lies."""
    return tuple(a - b for a, b in zip(part[0], whole[0], strict=True)), part[1]


def flat_range(extent: Lengths, part: Region) -> tuple[int, int] | None:
    """The flat range that a part of a box of `extent` is, if it is one; None: there are gaps in it."""
    sizes = list(dropwhile(lambda pair: pair[0] == 1, zip(part[1], extent, strict=True)))
    if any(taken != length for taken, length in sizes[1:]):
        return None
    start = _position(extent, part[0])
    return start, start + prod(part[1])


def last_position(extent: Lengths, part: Region) -> int:
    """The flat position of a part's last element, in a box of `extent`."""
    return _position(extent, tuple(a + n - 1 for a, n in zip(*part, strict=True)))


def first_position(extent: Lengths, part: Region) -> int:
    return _position(extent, part[0])


def _position(extent: Lengths, index: Lengths) -> int:
    position = 0
    for length, at in zip(extent, index, strict=True):
        position = position * length + at
    return position


def cover(extent: Lengths, start: int, stop: int) -> Iterator[Region]:
    """The boxes, in order, that a flat range of a box of `extent` consists of; each of them a flat range itself.

    At most two for each dimension: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if not extent:
        yield (), ()
        return
    row = prod(extent[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from _in_row(extent, first, start - first * row, stop - first * row)
        return
    if start % row:
        yield from _in_row(extent, first, start % row, row)
        first += 1
    whole = stop // row
    if first < whole:
        yield (first, *(0 for _ in extent[1:])), (whole - first, *extent[1:])
    if stop % row:
        yield from _in_row(extent, whole, 0, stop % row)


def _in_row(extent: Lengths, row: int, start: int, stop: int) -> Iterator[Region]:
    for offsets, lengths in cover(extent[1:], start, stop):
        yield (row, *offsets), (1, *lengths)


def shard(runs: Runs, parts: int, index: int, groups: int = 1) -> Runs:
    """Part `index` of `parts` of these indices, as torch's `Shard` cuts them: the last parts are shorter, or empty.

    With `groups`, as `_StridedShard` does: cut into groups first, and the same part of each is taken.
    """
    total = sum(stop - start for start, stop in runs)
    found: list[tuple[int, int]] = []
    for group in range(groups):
        begin, end = _chunk(total, groups, group)
        start, stop = _chunk(end - begin, parts, index)
        for run in _take(runs, begin + start, begin + stop):
            if found and found[-1][1] == run[0]:
                found[-1] = found[-1][0], run[1]
            else:
                found.append(run)
    return tuple(found)


def _chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    size = -(-length // parts)
    return min(index * size, length), min((index + 1) * size, length)


def _take(runs: Runs, start: int, stop: int) -> Iterator[tuple[int, int]]:
    passed = 0
    for first, end in runs:
        a, b = max(start - passed, 0), min(stop - passed, end - first)
        if a < b:
            yield first + a, first + b
        passed += end - first
