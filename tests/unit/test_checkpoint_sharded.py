"""DTensors in checkpoints, as each rank of a world sees them: worlds of many ranks in one process, which say nothing
to one another (torch's `fake` back end), since nothing that is tested here communicates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hpcft.checkpoint.boxes import shard
from hpcft.checkpoint.commit import CommitError, commit
from hpcft.checkpoint.layout import CheckpointDamagedError, checkpoint_name
from hpcft.checkpoint.load import SavedState, load
from hpcft.checkpoint.manifest import ShardReport
from hpcft.checkpoint.pieces import index_digest
from hpcft.checkpoint.read import verify
from hpcft.checkpoint.share import save_share
from hpcft.checkpoint.tree import FlatState, StateError, flatten, unflatten
from hpcft.ids import Generation, Rank, Step
from tests.unit.checkpoint_samples import NONCE, bits, facts

torch.set_num_threads(1)

Placements = tuple[Placement, ...]
HSDP: Placements = (Replicate(), Shard(0))
WORLDS: Sequence[tuple[tuple[int, ...], Sequence[Placements]]] = (
    ((1,), [(Shard(0),)]),
    ((3,), [(Shard(0),), (Shard(1),), (Replicate(),)]),
    ((5,), [(Shard(0),), (Shard(1),)]),
    ((8,), [(Shard(0),)]),
    ((2, 2), [HSDP, (Shard(0), Replicate()), (Shard(1), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Replicate())]),
    ((2, 3), [(Shard(0), Shard(1)), (_StridedShard(0, split_factor=3), Shard(0)), HSDP]),
)


@contextmanager
def seen_by(rank: int, shape: tuple[int, ...]) -> Iterator[DeviceMesh]:
    """A world as one of its ranks sees it."""
    size = torch.Size(shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    finally:
        dist.destroy_process_group()


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "weight": some(7, 3),
        "bias": some(5),
        "one": some(1, 1),
        "half": some(9, 4).bfloat16(),
        "double": some(6, 7).double(),
        "complex": torch.complex(some(4, 5).double(), some(4, 5).double()),
        "flags": some(11, 2) > 0,
        "wide": some(2, 12, 3),
        "empty": torch.empty(0, 4),
        "number": some(),
    }


def local_of(whole: Tensor, mesh: DeviceMesh, placements: Placements) -> Tensor:
    """This rank's part, by indices."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    indices = [torch.arange(length) for length in whole.shape]
    for placement, at, size in zip(placements, coordinate, mesh.shape, strict=True):
        if not isinstance(placement, Replicate):
            groups = getattr(placement, "split_factor", 1)
            runs = shard(((0, len(indices[placement.dim])),), size, at, groups)
            kept = [torch.arange(start, stop) for start, stop in runs]
            indices[placement.dim] = indices[placement.dim][torch.cat(kept) if kept else slice(0, 0)]
    for dimension, kept in enumerate(indices):
        whole = whole.index_select(dimension, kept)
    return whole.clone()


def sharded(whole: Tensor, mesh: DeviceMesh, placements: Placements) -> Tensor:
    fitting = tuple(
        Replicate() if getattr(placement, "dim", -1) >= whole.dim() else placement for placement in placements
    )
    local = local_of(whole, mesh, fitting)
    return DTensor.from_local(local, mesh, fitting, run_check=False, shape=whole.shape, stride=whole.stride())


def state_on(mesh: DeviceMesh, ways: Sequence[Placements]) -> dict[str, Any]:
    """Every tensor in every way, and some that are on all ranks."""
    found: dict[str, Any] = {"step": torch.tensor(4.0), "plain": torch.arange(30.0).reshape(5, 6), "lr": 0.1}
    for number, placements in enumerate(ways):
        found[f"way{number}"] = {name: sharded(whole, mesh, placements) for name, whole in wholes().items()}
    return found


def saved_by(root: Path, shape: tuple[int, ...], ways: Sequence[Placements], step: int) -> Path:
    reports: list[ShardReport] = []
    size = torch.Size(shape).numel()
    name = checkpoint_name(Step(step), Generation(1))
    for rank in range(size):
        with seen_by(rank, shape) as mesh:
            flat = flatten(state_on(mesh, ways))
            pinned = frozenset({"step", "way0.flags"})
            reports.append(save_share(root, name, NONCE, Rank(rank), size, flat, pinned=pinned, cut_above=64))
    return commit(root, reports, facts()).directory


@pytest.mark.parametrize(("shape", "ways"), WORLDS, ids=lambda value: str(value) if isinstance(value[0], int) else "")
def test_what_a_world_has_cut_comes_back_whole_and_in_any_other_world(
    tmp_path: Path, shape: tuple[int, ...], ways: Sequence[Placements]
) -> None:
    directory = saved_by(tmp_path, shape, ways, 5)
    assert verify(directory) == []
    everything = unflatten(load(directory))
    for number in range(len(ways)):
        for name, whole in wholes().items():
            assert bits(everything[f"way{number}"][name]) == bits(whole), (number, name)
            assert everything[f"way{number}"][name].dtype == whole.dtype
    saved = SavedState.open(directory)
    assert saved.outline()["way0"]["complex"].shape == (4, 5)
    for other, others in WORLDS:
        rank = torch.Size(other).numel() - 1
        with seen_by(rank, other) as mesh:
            placements = others[len(ways) % len(others)]
            target = flatten({f"way{n}": state_on(mesh, [placements])["way0"] for n in range(len(ways))})
            flat = saved.read(target.boxes)
            state = unflatten(FlatState(flat.tensors, flat.values, flat.boxes, target.layouts))
            assert flat.index() == {**target.index(), **{name: flat.index()[name] for name in ("step", "plain")}}
            for name, whole in wholes().items():
                found = state["way0"][name]
                expected = sharded(whole, mesh, placements)
                assert isinstance(found, DTensor) and found.placements == expected.placements
                assert found.shape == whole.shape and found.dtype == whole.dtype
                assert bits(found.to_local()) == bits(expected.to_local()), (other, name)
            assert type(state["step"]) is Tensor and state["step"].item() == 4.0


@pytest.mark.parametrize(("rows", "shape"), [(9, (4, 2)), (13, (3, 2)), (5, (2, 4)), (16, (4, 2)), (3, (4, 2))])
def test_what_fsdp2_leaves_of_tensor_parallelism_is_kept_where_lengths_do_not_divide(
    tmp_path: Path, rows: int, shape: tuple[int, int]
) -> None:
    """torch's own cuts of a real layer, by rows and by columns. Each rank cuts what it has: nobody communicates."""
    whole = torch.arange(3.0 * rows).reshape(rows, 3)
    size = torch.Size(shape).numel()
    directory = checkpoint_name(Step(1), Generation(1))
    reports, parts, targets = [], [], []

    def seen_from(mesh: DeviceMesh, cut: DTensor) -> DTensor:
        """torch keeps meshes, and of several ranks in one process the first one's."""
        stride = torch.empty(cut.shape).stride()
        return DTensor.from_local(cut.to_local(), mesh, cut.placements, run_check=False, shape=cut.shape, stride=stride)

    for rank in range(size):
        with seen_by(rank, shape) as mesh:
            model = torch.nn.Sequential(torch.nn.Linear(3, rows, bias=False), torch.nn.Linear(rows, 3, bias=False))
            model.load_state_dict({"0.weight": whole, "1.weight": whole.T.contiguous()})
            plan: dict[str, ParallelStyle] = {"0": ColwiseParallel(), "1": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
            fully_shard(model, mesh=mesh["dp"])
            flat = flatten({name: seen_from(mesh, each) for name, each in model.state_dict().items()})
            reports.append(save_share(tmp_path, directory, NONCE, Rank(rank), size, flat))
            parts.append({each: tensor.clone() for each, tensor in flat.tensors.items()})
            targets.append(flat.boxes)
    saved = SavedState.open(commit(tmp_path, reports, facts()).directory)
    everything = saved.read().tensors
    assert torch.equal(everything["0.weight"], whole) and torch.equal(everything["1.weight"], whole.T)
    for mine, boxes in zip(parts, targets, strict=True):
        found = saved.read(boxes).tensors
        assert all(torch.equal(found[each], tensor) for each, tensor in mine.items())


def test_replicas_write_each_part_once_and_share_the_bytes(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(40)]
    written: dict[int, int] = {}
    indexes = set()
    for rank in range(4):
        with seen_by(rank, (2, 2)) as mesh:
            whole = torch.ones(6, 4)
            flat = flatten({name: sharded(whole, mesh, HSDP) for name in names})
            indexes.add(index_digest(flat.index()))
            assert set(flat.boxes) == set(names)
            assert all(flat.tensors[name].shape == (3, 4) for name in names)
            written[rank] = sum(box.writes for box in flat.boxes.values())
    assert len(indexes) == 1
    assert written[0] + written[2] == written[1] + written[3] == 40, "one of two replicas"
    assert min(written.values()) >= 10
    assert index_digest(flatten({name: torch.ones(6, 4) for name in names}).index()) in indexes


def test_local_parts_are_not_copied() -> None:
    with seen_by(1, (2,)) as mesh:
        local = torch.ones(3, 2)
        given = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 2)), stride=(2, 1))
        flat = flatten({"w": torch.nn.Parameter(given)})
        assert flat.tensors["w"].data_ptr() == local.data_ptr()
        back = unflatten(flat)["w"]
        assert isinstance(back, DTensor) and back.to_local().data_ptr() == local.data_ptr()


def test_what_is_no_box_of_the_whole_is_refused() -> None:
    def refused(tensor: Tensor) -> str:
        with pytest.raises(StateError, match=r"state\['model'\]\['w'\] is a sharded tensor") as caught:
            flatten({"model": {"w": tensor}})
        assert caught.value.hint
        return caught.value.message

    with seen_by(0, (2,)) as mesh:
        whole = torch.ones(8, 2)
        summed = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
        assert "has the placement" in refused(summed) and "Partial" in refused(summed)
        strided = sharded(whole, mesh, (_StridedShard(0, split_factor=2),))
        assert "not in one piece" in refused(strided)
        short = DTensor.from_local(
            torch.ones(3, 2), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=(2, 1)
        )
        assert "holds [3, 2], and should hold [4, 2]" in refused(short)
        sparse = torch.eye(2).to_sparse()
        with pytest.raises(StateError, match=r"torch\.sparse_coo"):
            flatten({"w": sparse})
    with seen_by(3, (2, 2)):
        beside = DeviceMesh("cpu", [0, 1])
        elsewhere = DTensor.from_local(torch.ones(0), beside, [Shard(0)], run_check=False)
        assert "a mesh that this rank has no part in" in refused(elsewhere)


def test_of_meshes_beside_one_another_the_first_one_writes(tmp_path: Path) -> None:
    whole = torch.arange(10.0).reshape(5, 2)
    reports = []
    for rank in range(4):
        with seen_by(rank, (2, 2)) as mesh:
            flat = flatten(
                {"w": sharded(whole, mesh["tp"], (Shard(0),)), "all": sharded(whole, mesh["dp"], (Replicate(),))}
            )
            assert flat.boxes["w"].writes == (rank < 2)
            reports.append(save_share(tmp_path, checkpoint_name(Step(1), Generation(1)), NONCE, Rank(rank), 4, flat))
    found = load(commit(tmp_path, reports, facts()).directory)
    assert torch.equal(found.tensors["w"], whole) and torch.equal(found.tensors["all"], whole)


def test_ranks_that_disagree_on_what_is_sharded_are_not_committed(tmp_path: Path) -> None:
    name = checkpoint_name(Step(1), Generation(1))
    reports = []
    for rank in range(2):
        with seen_by(rank, (2,)) as mesh:
            whole = torch.ones(4, 2)
            state = {"w": sharded(whole, mesh, (Shard(0),)) if rank == 0 else whole}
            reports.append(save_share(tmp_path, name, NONCE, Rank(rank), 2, flatten(state)))
    with pytest.raises(CommitError, match="do not cover"):
        commit(tmp_path, reports, facts())


def test_a_rank_reads_only_what_it_needs_and_misses_only_that(tmp_path: Path) -> None:
    reports = []
    for rank in range(3):
        with seen_by(rank, (3,)) as mesh:
            flat = flatten({"w": sharded(torch.arange(12.0), mesh, (Shard(0),))})
            name = checkpoint_name(Step(1), Generation(1))
            reports.append(save_share(tmp_path, name, NONCE, Rank(rank), 3, flat))
    directory = commit(tmp_path, reports, facts()).directory
    saved = SavedState.open(directory)
    last = directory / "shard-00002-of-00003.safetensors"
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)

    def read_by(rank: int, shape: tuple[int, ...]) -> list[float]:
        with seen_by(rank, shape) as mesh:
            boxes = flatten({"w": sharded(torch.zeros(12), mesh, (Shard(0),))}).boxes
        return saved.read(boxes).tensors["w"].tolist()

    assert read_by(0, (2,)) == [0, 1, 2, 3, 4, 5]
    assert read_by(1, (3,)) == [4, 5, 6, 7]
    with pytest.raises(CheckpointDamagedError, match=r"shard-00002-of-00003.*digest.*tensors w"):
        read_by(1, (2,))
