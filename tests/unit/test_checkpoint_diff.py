"""`hpcft ckpt diff`: what differs between two checkpoints, and by how much."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_samples import RUN, facts, save, training_state

from hpcft.checkpoint import diff
from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.diff import Comparison, Side, TensorDifference, compare
from hpcft.checkpoint.layout import CheckpointDamagedError
from hpcft.checkpoint.tree import flatten
from hpcft.errors import NotFoundError

torch.set_num_threads(1)


def kept(root: Path, state: Mapping[str, object], step: int = 1, world_size: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return commit(root, save(root, flatten(state), step, world_size=world_size, cut_above=512), facts()).directory


def compared(tmp_path: Path, a: Mapping[str, object], b: Mapping[str, object], **more: object) -> Comparison:
    return compare(kept(tmp_path / "a", a), kept(tmp_path / "b", b, world_size=2), **more)  # type: ignore[arg-type]


def test_the_same_state_on_other_ranks_is_equal(tmp_path: Path) -> None:
    a, b = kept(tmp_path / "a", training_state(3)), kept(tmp_path / "b", training_state(3), world_size=5)
    seen: list[tuple[int, int]] = []
    found = compare(a, b, runs=(RUN, RUN), progress=lambda done, total: seen.append((done, total)))
    assert found.equal and found.as_dict()["equal"] is True
    assert found.equal_tensors == len(flatten(training_state(3)).tensors)
    assert "A and B are equal" in found.text()
    assert seen[-1][0] == seen[-1][1] > 0, "all was read, and nothing counted twice"


F8 = torch.float8_e4m3fn
CASES = {
    "f32": (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 2.0]), 2, 1.0, 0),
    "bf16": (torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16(), 1, 1.0, 0),
    "f8": (torch.tensor([1.0, 2.0]).to(F8), torch.tensor([1.5, 2.0]).to(F8), 1, 0.5, 0),
    "c64": (torch.tensor([3 + 4j]), torch.tensor([0j]), 1, 5.0, 0),
    "bool": (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1, 0),
    "u8": (torch.tensor([0, 9], dtype=torch.uint8), torch.tensor([255, 9], dtype=torch.uint8), 1, 255, 0),
    "i64": (torch.tensor([2**62 + 1, -(2**63)]), torch.tensor([2**62, 2**63 - 1]), 2, 2**64 - 1, 0),
    "u64": (torch.tensor([2**63], dtype=torch.uint64), torch.tensor([2**63 + 1], dtype=torch.uint64), 1, 1, 0),
    "scalar": (torch.tensor(1.0), torch.tensor(1.25), 1, 0.25, 0),
    "nan": (torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, 4.0]), 2, 3.0, 1),
    "inf": (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), 1, None, 1),
}  # fmt: skip


def test_how_much_tensors_of_each_type_differ(tmp_path: Path) -> None:
    found = compared(tmp_path, {k: v[0] for k, v in CASES.items()}, {k: v[1] for k, v in CASES.items()})
    assert (found.equal_tensors, found.values, [each.name for each in found.tensors]) == (0, (), list(CASES))
    for each in found.tensors:
        _, _, differing, largest, odd = CASES[each.name]
        assert (each.differing, each.max_abs, each.not_finite) == (differing, largest, odd), each.name
        assert type(each.max_abs) is type(largest), each.name
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["equal"] is False


def test_the_same_numbers_are_equal_whatever_their_bits(tmp_path: Path) -> None:
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = {
        "nan": torch.tensor([float("nan"), 1.0]),
        "payload": payload,
        "zero": torch.tensor([0.0]),
        "empty": torch.empty(0, 2),
    }
    b = {**a, "payload": torch.tensor([float("nan")]), "zero": torch.tensor([-0.0])}
    assert compared(tmp_path, a, b).equal


def test_shapes_types_and_what_only_one_has(tmp_path: Path) -> None:
    a = {"shape": torch.ones(2, 3), "type": torch.ones(2), "old": torch.ones(1), "same": torch.ones(1)}
    b = {"shape": torch.ones(3, 2), "type": torch.ones(2).half(), "same": torch.ones(1), "new": torch.ones(2)}
    found = compared(tmp_path, a, b)
    assert found.tensors == (
        TensorDifference("shape", Side("F32", (2, 3)), Side("F32", (3, 2))),
        TensorDifference("type", Side("F32", (2,)), Side("F16", (2,))),
        TensorDifference("old", Side("F32", (1,)), None),
        TensorDifference("new", None, Side("F32", (2,))),
    )
    text = found.text()
    assert "type: F32 [2] → F16 [2]" in text and "old: only in A, F32 [1]" in text and "new: only in B" in text
    assert found.values == (), "what is said of a tensor is not said again"


def test_what_made_a_state_is_no_difference(tmp_path: Path) -> None:
    """A run that has recovered, on other ranks perhaps, has done the same as one that has not."""
    one, other = ({"run": {"step": 5, "seed": 1, "generation": g, "world_size": w}} for g, w in ((1, 4), (3, 2)))
    assert compared(tmp_path / "one", one, other).equal
    assert not compared(tmp_path / "two", one, {"run": {**other["run"], "seed": 2}}).equal


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    a = {"s": {"epoch": 1, "best": float("inf"), "flag": True, "gone": 0, "lrs": [0.1, 0.2], 3: "x", "t": (1, 2)}}
    b = {"s": {"t": (1, 2), "epoch": 1.0, "best": 0.5, "flag": 1, "lrs": [0.1, 0.3, 0.4], 3: "y", "more": None}}
    found = compared(tmp_path, a, b)
    assert {each.path: (each.a, each.b) for each in found.values} == {
        "s.epoch": ("1", "1.0"), "s.best": ("inf", "0.5"), "s.flag": ("true", "1"), "s.gone": ("0", None),
        "s.lrs.1": ("0.2", "0.3"), "s.lrs.2": (None, "0.4"), "s.3": ('"x"', '"y"'), "s.more": (None, "null"),
    }  # fmt: skip
    assert "s.best: inf → 0.5" in found.text() and "s.gone: only in A: 0" in found.text()


def test_a_part_of_the_state(tmp_path: Path) -> None:
    one, other = training_state(1), {**training_state(1), "optimizer": training_state(2)["optimizer"]}
    a, b = kept(tmp_path / "a", one), kept(tmp_path / "b", other)
    assert not compare(a, b).equal
    assert compare(a, b, only=("model", "scheduler")).equal
    with pytest.raises(NotFoundError) as caught:
        compare(a, b, only=("modle",))
    assert caught.value.hint == "it holds: model, optimizer, scheduler, extra"


def test_large_tensors_go_slab_by_slab_and_a_flipped_bit_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "SLAB_BYTES", 256)
    torch.manual_seed(0)
    one = torch.randn(3, 50, 7)
    other = one.clone()
    other[2, 49, 6] += 8
    other[0, 0, 0] -= 1
    a, b = kept(tmp_path / "a", {"w": one}), kept(tmp_path / "b", {"w": other}, world_size=2)
    (found,) = compare(a, b).tensors
    assert (found.elements, found.differing, found.max_abs) == (1050, 2, pytest.approx(8.0, abs=1e-5))
    shard = max(b.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=f"{shard.name}, chunk 0"):
        compare(a, b)
