"""Batches: each sample once per epoch in any world, and gradients that do not depend on the world."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcft.data.batches import (
    GlobalBatch,
    Position,
    advance,
    global_batch,
    micro_batches,
    slice_for,
    steps_per_epoch,
)

WORLDS = (1, 2, 3, 4, 5, 7)


@given(st.integers(1, 200), st.integers(1, 250))
def test_an_epoch_is_cut_into_batches_without_gap_or_overlap(n: int, batch: int) -> None:
    position, places, sizes = Position(), [], []
    while position.epoch == 0:
        taken = global_batch(position, n, batch)
        assert taken.epoch == 0
        places += range(taken.start, taken.stop)
        sizes.append(taken.size)
        position = advance(taken, n)
    assert places == list(range(n))
    assert position == Position(1, 0)
    assert len(sizes) == steps_per_epoch(n, batch)
    assert all(size == batch for size in sizes[:-1]) and 0 < sizes[-1] <= batch


@given(st.integers(0, 100), st.integers(0, 60), st.integers(1, 20))
def test_slices_tile_the_batch_and_differ_by_one_at_most(start: int, size: int, world: int) -> None:
    batch = GlobalBatch(0, start, start + size)
    slices = [slice_for(batch, rank, world) for rank in range(world)]
    assert [place for first, end in slices for place in range(first, end)] == list(range(start, start + size))
    sizes = [end - first for first, end in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 60), st.integers(1, 20), st.none() | st.integers(1, 9))
def test_micro_batches_are_equally_many_and_count_each_sample_once(size: int, world: int, micro: int | None) -> None:
    batch = GlobalBatch(2, 100, 100 + size)
    ranks = [micro_batches(batch, rank, world, micro) for rank in range(world)]
    assert len({len(passes) for passes in ranks}) == 1
    counted = []
    for passes in ranks:
        assert [each.index for each in passes] == list(range(len(passes)))
        assert [each.last for each in passes] == [False] * (len(passes) - 1) + [True]
        for each in passes:
            assert each.stop > each.start  # something to run through the model, so that collectives stay aligned
            assert micro is None or each.stop - each.start <= micro
            assert batch.start <= each.start and each.stop <= batch.stop
            if each.stand_in:
                assert each.weight == 0.0
            else:
                counted += range(each.start, each.stop)
    assert counted == list(range(batch.start, batch.stop))
    assert sum(each.weight for passes in ranks for each in passes) == pytest.approx(world)


def test_no_rank_runs_a_pass_more_than_needed() -> None:
    assert len(micro_batches(GlobalBatch(0, 0, 32), 0, 4, 8)) == 1
    assert len(micro_batches(GlobalBatch(0, 0, 33), 3, 4, 8)) == 2


def test_an_even_world_has_weights_of_exactly_one() -> None:
    for world in WORLDS:
        assert [each.weight for each in micro_batches(GlobalBatch(0, 0, 6 * world), world - 1, world)] == [1.0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no rank 4 in a world of 4"):
        slice_for(GlobalBatch(0, 0, 8), 4, 4)
    with pytest.raises(ValueError, match="not a position in epochs of 10"):
        global_batch(Position(0, 10), 10, 4)
    with pytest.raises(ValueError, match="no batches of 0"):
        global_batch(Position(), 10, 0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 6, 13, 16])
def test_gradients_are_those_of_one_process(world: int, micro: int | None, size: int) -> None:
    """What DDP computes, the average over ranks of the gradients summed over passes, by hand and in float64."""
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def gradient(first: int, end: int, weight: float) -> torch.Tensor:
        leaf = weights.clone().requires_grad_()
        loss = torch.nn.functional.mse_loss(torch.tanh(inputs[first:end] @ leaf), targets[first:end])
        (loss * weight).backward()
        assert leaf.grad is not None
        return leaf.grad

    alone = gradient(0, size, 1.0)
    together = torch.zeros_like(alone)
    for rank in range(world):
        for each in micro_batches(GlobalBatch(0, 0, size), rank, world, micro):
            together += gradient(each.start, each.stop, each.weight) / world
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
