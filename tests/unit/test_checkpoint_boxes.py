"""Any tiling of a tensor, any box of it: the arithmetic against numpy's."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcft.checkpoint import files
from hpcft.checkpoint.boxes import Box, Region, cover, first_position, flat_range, last_position, overlap, shard, within
from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.load import SavedState
from hpcft.checkpoint.share import save_share
from hpcft.checkpoint.tree import FlatState, flatten
from hpcft.ids import Generation, Rank, Step
from tests.search import sampled
from tests.unit.checkpoint_samples import NONCE, facts, quick_directory

shapes = st.lists(st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...], least: int = 1) -> Region:
    lengths = [draw(st.integers(min(least, n), n)) for n in shape]
    offsets = [draw(st.integers(0, n - length)) for n, length in zip(shape, lengths, strict=True)]
    return tuple(offsets), tuple(lengths)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], depth: int = 4) -> list[Region]:
    """Cut in two at any place along any dimension, and the parts again."""
    found: list[Region] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, depth))):
        offsets, extent = found.pop(draw(st.integers(0, len(found) - 1)))
        dimensions = [d for d, n in enumerate(extent) if n > 1]
        if not dimensions:
            found.append((offsets, extent))
            continue
        d = draw(st.sampled_from(dimensions))
        at = draw(st.integers(1, extent[d] - 1))
        found.append((offsets, (*extent[:d], at, *extent[d + 1 :])))
        found.append(
            ((*offsets[:d], offsets[d] + at, *offsets[d + 1 :]), (*extent[:d], extent[d] - at, *extent[d + 1 :]))
        )
    return found


def slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(*region, strict=True))


def positions(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(prod(shape)).reshape(shape)


@sampled(300)
@given(shapes, st.data())
def test_what_boxes_have_in_common(shape: tuple[int, ...], data: st.DataObject) -> None:
    one, other = data.draw(regions(shape, 0)), data.draw(regions(shape, 0))
    marked = np.zeros(shape, np.int8)
    marked[slices(one)] += 1
    marked[slices(other)] += 1
    common = overlap(one, other)
    assert overlap(other, one) == common
    assert (0 if common is None else prod(common[1])) == int((marked == 2).sum())
    if common is not None:
        assert (marked[slices(common)] == 2).all()
        assert (positions(shape)[slices(one)][slices(within(common, one))] == positions(shape)[slices(common)]).all()


@sampled(300)
@given(shapes, st.data())
def test_a_box_is_a_flat_range_exactly_when_its_elements_lie_together(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    part = data.draw(regions(shape))
    inside = positions(shape)[slices(part)].ravel().tolist()
    assert first_position(shape, part) == inside[0] and last_position(shape, part) == inside[-1]
    together = all(b == a + 1 for a, b in pairwise(inside))
    assert flat_range(shape, part) == ((inside[0], inside[-1] + 1) if together else None)


@sampled(300)
@given(shapes, st.data())
def test_a_flat_range_is_cut_into_few_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    found = list(cover(shape, start, stop))
    assert [int(at) for part in found for at in positions(shape)[slices(part)].ravel()] == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@sampled(300)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_shards_are_torchs(length: int, parts: int, others: int, groups: int) -> None:
    everything = torch.arange(length)

    def cut(indices: torch.Tensor, count: int) -> list[torch.Tensor]:
        found = list(torch.chunk(indices, count)) if len(indices) else []
        return found + [indices[:0]] * (count - len(found))

    for index in range(parts):
        expected = torch.cat([cut(group, parts)[index] for group in cut(everything, groups)])
        runs = shard(((0, length),), parts, index, groups)
        assert [at for start, stop in runs for at in range(start, stop)] == expected.tolist()
        assert all(start < stop for start, stop in runs) and all(a[1] < b[0] for a, b in pairwise(runs))
        for second in range(others):  # cut once more, along the same dimension
            again = shard(runs, others, second)
            assert [at for start, stop in again for at in range(start, stop)] == cut(expected, others)[second].tolist()


@sampled(60)
@given(st.data())
def test_any_box_is_read_from_any_tiling(data: st.DataObject) -> None:
    """Ranks that each hold a box of every tensor write them; whoever comes wants other boxes."""
    generator = torch.Generator().manual_seed(1)
    wholes, tiles = {}, {}
    for number in range(3):
        shape = data.draw(shapes)
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64]))
        wholes[f"t{number}"] = torch.randint(-99, 99, shape, generator=generator).to(dtype)
        tiles[f"t{number}"] = data.draw(tilings(shape))
    world_size = max(len(each) for each in tiles.values())
    with quick_directory() as root:
        reports = []
        for rank in range(world_size):
            state = flatten(wholes)
            boxes = {}
            for name, tensor in wholes.items():
                if rank < len(tiles[name]):
                    boxes[name] = Box(tuple(tensor.shape), *tiles[name][rank])
                else:  # this rank holds nothing of it
                    boxes[name] = Box(tuple(tensor.shape), (0,) * tensor.dim(), (0,) * tensor.dim(), False)
                state.tensors[name] = tensor[slices(boxes[name].region)].clone()
            name = checkpoint_name(Step(3), Generation(1))
            mine = FlatState(state.tensors, state.values, boxes)
            reports.append(save_share(root, name, NONCE, Rank(rank), world_size, mine))
        saved = SavedState.open(commit(root, reports, facts()).directory)
        wanted = {
            name: Box(tuple(tensor.shape), *data.draw(regions(tuple(tensor.shape), 0)))
            for name, tensor in wholes.items()
        }
        part, everything = saved.read(wanted), saved.read()
    for name, tensor in wholes.items():
        assert torch.equal(part.tensors[name], tensor[slices(wanted[name].region)])
        assert part.tensors[name].dtype == tensor.dtype
        assert torch.equal(everything.tensors[name], tensor)


def test_boxes_across_chunks_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of tensors that lie in several chunks; what has no byte in a chunk does not read it."""
    whole = torch.randn(3000, 1501, generator=torch.Generator().manual_seed(0))  # 17.2 MiB, rows across the chunk's end
    state = flatten({"first": whole, "second": whole.flip(0)})
    name = checkpoint_name(Step(3), Generation(1))
    saved = SavedState.open(commit(tmp_path, [save_share(tmp_path, name, NONCE, Rank(0), 1, state)], facts()).directory)
    read: list[int] = []
    original = files.read_chunk
    monkeypatch.setattr(
        files, "read_chunk", lambda fd, buffers, offset: (read.append(offset >> 24), original(fd, buffers, offset))[1]
    )
    for region, chunks in (
        (((2900, 0), (100, 1501)), [1]),
        (((0, 700), (3000, 3)), [0, 1]),
        (((2700, 1), (200, 1500)), [0, 1]),
        (((0, 0), (0, 1501)), []),
    ):
        read.clear()
        boxes = {"first": Box((3000, 1501), *region), "second": Box((3000, 1501), (0, 0), (0, 0))}
        assert torch.equal(saved.read(boxes).tensors["first"], whole[slices(region)])
        assert sorted(set(read)) == chunks
