"""Which samples a step trains on, and which of them belong to a rank: arithmetic, for any world.

Theory of operation
-------------------
An epoch is a row of `n` places (see `order`). A step takes the next `batch` of them, the *global batch*, whatever
the world: so the position in a run is the number of places that completed steps have consumed. The last batch of an
epoch is what is left, and no batch crosses into the next epoch: every sample exactly once per epoch.

The ranks of a world share a global batch in contiguous slices whose sizes differ by one at most, and work them off
in the same number of *micro-batches*, for each may contain a collective that all must enter. Where there is nothing
left for a rank, it runs a *stand-in*: one sample of weight 0, which neither counts nor changes a gradient.

Weights: DDP averages gradients over the ranks with equal weights, while slices are not equal. A rank's loss is a mean
over its n_micro samples; times n_micro * world_size / n_global, the sum over micro-batches and the average over ranks
give the mean over the global batch, the same as one process would compute:

    1/W * sum_r sum_m (n_rm * W / N) * mean_rm  =  1/N * sum over all samples

In an even world without micro-batches the weight is exactly 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Places consumed by completed steps: all of the epochs before `epoch`, and `offset` (< n) of that one."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """Places `start` … `stop`-1 in the order of an epoch: what all ranks train on in one step."""

    epoch: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's share of one pass of a step: places `start` … `stop`-1, at least one.

    A stand-in has weight 0: its samples are loaded and run through the model, and count for nothing.
    """

    batch: GlobalBatch
    index: int
    """Number of this pass within the step, from 0."""
    count: int
    """Passes in the step, the same on every rank."""
    start: int
    stop: int
    weight: float

    @property
    def stand_in(self) -> bool:
        return self.weight == 0.0

    @property
    def last(self) -> bool:
        """Whether the optimizer steps after this one."""
        return self.index == self.count - 1


def global_batch(position: Position, n: int, batch: int) -> GlobalBatch:
    """The batch of the step that comes next at `position`.

    ValueError: no such position in epochs of `n` samples.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"no batches of {batch} out of {n} samples")
    if position.epoch < 0 or not 0 <= position.offset < n:
        raise ValueError(f"{position} is not a position in epochs of {n} samples")
    return GlobalBatch(position.epoch, position.offset, min(position.offset + batch, n))


def advance(done: GlobalBatch, n: int) -> Position:
    """The position after this batch."""
    return Position(done.epoch, done.stop) if done.stop < n else Position(done.epoch + 1, 0)


def steps_per_epoch(n: int, batch: int) -> int:
    return -(-n // batch)


def slice_for(batch: GlobalBatch, rank: int, world_size: int) -> tuple[int, int]:
    """The places [start, stop) that belong to this rank; empty when there are more ranks than samples.

    Slices are contiguous, in the order of ranks, and the larger ones come first.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"there is no rank {rank} in a world of {world_size}")
    return _part(batch.start, batch.stop, rank, world_size)


def micro_batches(batch: GlobalBatch, rank: int, world_size: int, micro: int | None = None) -> tuple[MicroBatch, ...]:
    """The passes of this rank in the step: of at most `micro` samples each, equally many on every rank."""
    start, stop = slice_for(batch, rank, world_size)
    largest = -(-batch.size // world_size)
    count = 1 if micro is None else -(-largest // micro)
    passes = []
    for index in range(count):
        first, end = _part(start, stop, index, count)
        weight = (end - first) * world_size / batch.size
        if first == end:
            first, end = batch.start, batch.start + 1
        passes.append(MicroBatch(batch, index, count, first, end, weight))
    return tuple(passes)


def _part(start: int, stop: int, index: int, parts: int) -> tuple[int, int]:
    """Part `index` of [start, stop), cut into contiguous parts whose sizes differ by one at most, larger ones first."""
    each, larger = divmod(stop - start, parts)
    first = start + index * each + min(index, larger)
    return first, first + each + (index < larger)
