"""How two checkpoints differ, tensor by tensor and value by value, a slab of both in memory at a time.

Equal means: the same numbers. NaN equals NaN, 0.0 equals -0.0, and what lies on how many ranks does not matter. Every
byte that is compared is verified, so a difference is never a flipped bit on a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcft.checkpoint import values
from hpcft.checkpoint.chunks import Chunks, chunk_bytes, chunks_of, opened, slabs
from hpcft.checkpoint.pieces import TensorShape
from hpcft.checkpoint.read import Tally
from hpcft.checkpoint.tree import DTYPES
from hpcft.checkpoint.values import ValueDifference
from hpcft.ids import RunId

SLAB_BYTES = 4 * 1024 * 1024
"""Of each of the two; what is computed from them needs a few times as much."""

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Side:
    """A tensor as one of the two holds it."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """`a` or `b` is None where only the other has the tensor. The rest counts where type and shape are the same."""

    name: str
    a: Side | None
    b: Side | None
    elements: int = 0
    differing: int = 0
    max_abs: float | int | None = None
    """Largest absolute difference; exact for whole numbers. None: none of those that differ are finite in both."""
    not_finite: int = 0
    """Of those that differ, how many are infinite or NaN in one or both."""

    def __str__(self) -> str:
        if self.a is None or self.b is None:
            return f"{self.name}: only in {'B' if self.a is None else 'A'}, {self.a or self.b}"
        if self.a != self.b:
            return f"{self.name}: {self.a} → {self.b}"
        largest = f", by at most {self.max_abs:.6g}" if self.max_abs is not None else ""
        others = f", {self.not_finite} of them NaN or infinite" if self.not_finite else ""
        return f"{self.name}: {self.a}, {self.differing} of {self.elements} differ{largest}{others}"


@dataclass(frozen=True, slots=True)
class Comparison:
    a: str
    b: str
    equal_tensors: int
    """How many."""
    tensors: tuple[TensorDifference, ...]
    values: tuple[ValueDifference, ...]

    @property
    def equal(self) -> bool:
        return not self.tensors and not self.values

    def as_dict(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}

    def text(self) -> str:
        lines = [*map(str, self.tensors), *map(str, self.values)]
        if self.equal:
            lines.append(f"A and B are equal: {self.equal_tensors} tensors, and all that is no tensor")
        else:
            lines.append(
                f"{self.equal_tensors} tensors are equal, {len(self.tensors)} differ; "
                f"of what is no tensor, {len(self.values)} differ"
            )
        return "\n".join(["A: " + self.a, "B: " + self.b, *lines])


_MADE_BY = ("run.generation", "run.world_size")
"""What made a state is no part of it: a run that has recovered does the same as one that has not."""


def compare(
    a: Path,
    b: Path,
    *,
    only: Sequence[str] = (),
    runs: tuple[RunId | None, RunId | None] = (None, None),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compares two committed checkpoints, or the parts `only` of them.

    `progress` is told how many bytes have been read, and of how many. CheckpointDamagedError, NotFoundError: as in
    `chunks`. NotFoundError, too: one of them has no such part.
    """
    count = Tally(progress)
    with ExitStack() as stack:
        mine, theirs = (stack.enter_context(opened(each, run, count)) for each, run in zip((a, b), runs, strict=True))
        states = [values.select(each.state(), only) for each in (mine, theirs)]
        names = [
            dict.fromkeys(name for value in each.values() for name in values.tensor_names(value)) for each in states
        ]
        for chunks, wanted in zip((mine, theirs), names, strict=True):
            count.total += chunk_bytes(chunks.manifest, chunks_of(chunks.manifest, wanted.__contains__))
        count(0)
        differing = []
        equal = 0
        for name in [*_in_order(mine, names[0]), *(name for name in names[1] if name not in names[0])]:
            found = _compare_tensor(name, mine if name in names[0] else None, theirs if name in names[1] else None)
            if found is None:
                equal += 1
            else:
                differing.append(found)
        found_values = values.differences({"dict": states[0]}, {"dict": states[1]})
        others = tuple(each for each in found_values if each.path not in _MADE_BY)
        position = {name: number for number, name in enumerate(names[0] | names[1])}
    return Comparison(str(a), str(b), equal, tuple(sorted(differing, key=lambda each: position[each.name])), others)


def _in_order(chunks: Chunks, wanted: dict[str, None]) -> Iterator[str]:
    """As they lie in the files, so that these are read from front to back."""
    placed = (item.piece.name for entry in chunks.manifest.files for item in entry.tensors)
    return iter(dict.fromkeys(name for name in placed if name in wanted))


def _compare_tensor(name: str, mine: Chunks | None, theirs: Chunks | None) -> TensorDifference | None:
    """None: they are equal."""
    a, b = (_side(each.tensors[name]) if each is not None else None for each in (mine, theirs))
    if a != b or mine is None or theirs is None or a is None:
        return TensorDifference(name, a, b)
    differing = not_finite = 0
    largest: float | int | None = None
    for offsets, extent in slabs(mine.tensors[name], SLAB_BYTES):
        one, other = mine.box(name, offsets, extent), theirs.box(name, offsets, extent)
        if np.array_equal(one, other):
            continue
        count, most, odd = _compare_bytes(a.dtype, one, other)
        differing += count
        not_finite += odd
        if most is not None:
            largest = most if largest is None else max(largest, most)
    return TensorDifference(name, a, b, prod(a.shape), differing, largest, not_finite) if differing else None


def _side(tensor: TensorShape) -> Side:
    return Side(tensor.dtype, tensor.shape)


def _compare_bytes(dtype: str, one: _Bytes, other: _Bytes) -> tuple[int, float | int | None, int]:
    """Elements that differ, by how much at most where they are finite, and how many of them are not."""
    kind = DTYPES[dtype]
    if not (kind.is_floating_point or kind.is_complex):
        return _compare_integers(dtype, one, other)
    wide = torch.complex128 if kind.is_complex else torch.float64
    a, b = (torch.from_numpy(each.reshape(-1)).view(kind).to(wide) for each in (one, other))
    differ = (a != b) & ~(torch.isnan(a) & torch.isnan(b))
    delta = (a[differ] - b[differ]).abs()
    finite = torch.isfinite(delta)
    largest = delta[finite].max().item() if finite.any() else None
    return int(differ.sum()), largest, int((~finite).sum())


def _compare_integers(dtype: str, one: _Bytes, other: _Bytes) -> tuple[int, int | None, int]:
    kind = np.dtype("u1" if dtype == "BOOL" else f"<{dtype[0].lower()}{one.shape[-1]}")
    a, b = (each.reshape(-1).view(kind) for each in (one, other))
    differ = a != b
    a, b = a[differ], b[differ]
    if not len(a):
        return 0, None, 0
    # As unsigned numbers of 64 bits the difference of any two is exact, also where it overflows a signed one.
    high, low = (np.where(a > b, x, y).astype(np.int64 if kind.kind == "i" else np.uint64) for x, y in ((a, b), (b, a)))
    return len(a), int((high.view(np.uint64) - low.view(np.uint64)).max()), 0
