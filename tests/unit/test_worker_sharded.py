"""Sharded models in `run.restore`, as one of two ranks sees it (nothing here communicates)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hpcft.checkpoint import load as loading
from hpcft.checkpoint.commit import Facts, commit
from hpcft.checkpoint.manifest import ShardReport
from hpcft.ids import Generation, Rank, RunId, Step, Term
from hpcft.rundir import RunDirectory
from hpcft.worker.link import Link
from hpcft.worker.restoring import RestoreError, put_back
from hpcft.worker.saving import Saving, named
from hpcft.worker.spec import WorkerSpec
from tests.unit.test_checkpoint_sharded import seen_by


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with seen_by(1, (2,)):
        yield


class _Listening(Link):
    __slots__ = ("said",)

    def say_shard(self, step: Step, report: ShardReport, **timing: float) -> None:
        self.said = report

    def say_save_failed(self, step: Step, reason: str) -> None:
        self.said = reason


def network(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def saved_by(spec: WorkerSpec, **objects: Any) -> Any:
    link = _Listening(spec)
    saving = Saving(spec, link, torch.device("cpu"))
    saving.remember(named(objects), None, None)
    saving.save(Step(3))
    return link.said


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, RunId, nn.Module, torch.optim.Optimizer]:
    """A checkpoint of a plain model, made by one rank."""
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    torch.manual_seed(0)
    model = network()
    optimizer = trained(model)
    spec = WorkerSpec(generation=Generation(1), nonce="00aa", run_directory=directory.path)
    report = saved_by(spec, model=model, optimizer=optimizer)
    facts = Facts(directory.run_id(), Term(1), None, 0.0)
    return commit(directory.checkpoints, [report], facts).directory, directory.run_id(), model, optimizer


def test_a_new_optimizers_values_come_back_as_its_parameters_lie(plain: Any) -> None:
    path, run, model, optimizer = plain
    cut = network()
    fully_shard(cut)
    new = torch.optim.Adam(cut.parameters(), lr=0.5)
    assert put_back(path, named({"model": cut, "optimizer": new}), run) == 3
    assert new.param_groups[0]["lr"] == 0.1
    for (name, ours), theirs in zip(cut.named_parameters(), model.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        assert torch.equal(ours.to_local(), theirs[3:]), name
        assert type(new.state[ours]["step"]) is Tensor
        for key in ("exp_avg", "exp_avg_sq"):
            value = new.state[ours][key]
            assert isinstance(value, DTensor) and value.placements == ours.placements and value.shape == theirs.shape
            assert torch.equal(value.to_local(), optimizer.state[theirs][key][3:])
    assert torch.equal(cut[1].running_mean, model[1].running_mean)


def test_what_does_not_fit_is_refused_before_a_tensor_is_read(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run, _, _ = plain
    wider = network(6)
    fully_shard(wider)
    before = [parameter.to_local().clone() for parameter in wider.parameters()]
    read: list[Any] = []
    original = loading.SavedState.read
    monkeypatch.setattr(loading.SavedState, "read", lambda *given: (read.append(given), original(*given))[1])
    with pytest.raises(RestoreError, match=r"0\.weight is \[6, 3\] and was \[5, 3\]"):
        put_back(path, named({"model": wider, "optimizer": torch.optim.Adam(wider.parameters())}), run)
    assert not read
    assert all(torch.equal(a, b.to_local()) for a, b in zip(before, wider.parameters(), strict=True))


class Local(torch.optim.Optimizer):
    """Keeps its own part of the parameters as plain tensors."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["moment"] = torch.zeros_like(parameter.to_local())


def test_an_optimizer_that_does_not_say_which_part_it_has_is_no_state(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    model = network(4)
    fully_shard(model)
    optimizer = Local(model.parameters())
    optimizer.step()
    spec = WorkerSpec(Rank(1), 2, generation=Generation(1), nonce="00aa", run_directory=directory.path)
    said = saved_by(spec, model=model, optimizer=optimizer)
    assert "state['optimizer']['state'][0]['moment'] is a plain tensor for a rank's part" in said
    assert not list(directory.checkpoints.iterdir()), "nothing was written"
