"""What belongs to a run's state, its way into a checkpoint and back, and what does not fit."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from torch import nn

from hpcft.checkpoint.commit import Facts, commit
from hpcft.checkpoint.load import SavedState
from hpcft.checkpoint.manifest import Metric, ShardReport
from hpcft.checkpoint.read import read_manifest
from hpcft.checkpoint.tree import StateError
from hpcft.data import Data
from hpcft.errors import UsageError
from hpcft.ids import Generation, Rank, RunId, Step, Term
from hpcft.page import NodePage, Phase
from hpcft.rundir import RunDirectory
from hpcft.worker import group
from hpcft.worker.link import Link
from hpcft.worker.replicas import Replica
from hpcft.worker.restoring import RestoreError, put_back
from hpcft.worker.run import Run, Unusable
from hpcft.worker.saving import Saving, named
from hpcft.worker.spec import Restore, WorkerSpec

torch.set_num_threads(1)


@dataclass
class Bench:
    """One worker's saving, with somebody who listens at the other end."""

    directory: RunDirectory
    page: NodePage
    channel: socket.socket
    saving: Saving
    spec: WorkerSpec

    @property
    def run(self) -> RunId:
        return self.directory.run_id()

    def said(self) -> list[dict[str, Any]]:
        found = []
        while True:
            try:
                found.append(orjson.loads(self.channel.recv(1 << 17)))
            except BlockingIOError:
                return found

    def save(self, step: int, **objects: Any) -> Path:
        self.saving.remember(named(objects), next((x for x in objects.values() if isinstance(x, Data)), None), None)
        self.saving.save(Step(step))
        (message,) = self.said()
        assert message["kind"] == "shard", message
        report = ShardReport.parse(message["report"])
        facts = Facts(self.run, Term(1), None, 0.0)
        return commit(self.directory.checkpoints, [report], facts).directory


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    page = NodePage.create(1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    spec = WorkerSpec(
        generation=Generation(4),
        nonce="00aa",
        run=directory.run_id(),
        run_directory=directory.path,
        page_fd=page.fd,
        control_fd=theirs.fileno(),
    )
    link = Link(spec)
    with ours, theirs:
        yield Bench(directory, page, ours, Saving(spec, link, torch.device("cpu")), spec)
    link.close()
    page.close()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Counted:
    def __init__(self) -> None:
        self.state: object = {"seen": 3, "ratio": 0.5, "names": ("a", "b")}

    def state_dict(self) -> dict[str, object]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.state = state["state"]


def test_everything_comes_back_as_it_was(bench: Bench) -> None:
    model, counted, data = network(), Counted(), Data(range(10), batch_size=3)
    optimizer = trained(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=9)
    optimizer.step()
    scheduler.step()
    data.bind(0, 0, 1)
    next(iter(data))
    data.end_pass()
    data.complete_step(1)
    path = bench.save(3, model=model, optimizer=optimizer, scheduler=scheduler, data=data, own=counted)
    assert path.name == "step-00000003-g0004"

    fresh = network()
    others: dict[str, Any] = {
        "model": fresh,
        "optimizer": (new := torch.optim.Adam(fresh.parameters(), lr=0.7)),
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(new, 0.3, total_steps=9),
        "data": Data(range(10), batch_size=3),
        "own": Counted(),
    }
    others["own"].state = None
    assert put_back(path, named(others), bench.run) == 3
    assert same(fresh.state_dict(), model.state_dict())
    assert others["own"].state == counted.state
    assert others["data"].position.offset == 3
    assert others["scheduler"].state_dict() == scheduler.state_dict()
    for ours, theirs in zip(new.state.values(), optimizer.state.values(), strict=True):
        assert same(ours, theirs)
    assert new.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    manifest, _ = read_manifest(path)
    assert manifest.position == data.state_dict()


def test_another_runs_checkpoint_is_not_trained_from(bench: Bench) -> None:
    path = bench.save(2, model=network())
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def restored_by(run: RunId) -> int:
        spec = replace(bench.spec, run=run, restore=Restore(Step(2), path))
        with closing(Link(spec)) as link:
            return Run(spec, link, torch.device("cpu"), {}).restore(model=model)

    with pytest.raises(Unusable, match=f"manifest.json: it belongs to run {bench.run}, not to another"):
        restored_by(RunId("another"))
    assert same(model.state_dict(), before)
    assert restored_by(bench.run) == 2


def test_a_state_does_not_depend_on_wrappers(bench: Bench) -> None:
    model = network()
    group.form(WorkerSpec(), torch.device("cpu"))
    try:
        wrapped = torch.compile(Replica(torch.compile(model, backend="eager"), lambda: None), backend="eager")
        path = bench.save(1, model=wrapped)
    finally:
        group.leave()
    plain = network()
    put_back(path, named({"model": plain}), bench.run)
    assert same(plain.state_dict(), model.state_dict())


class Renamed(nn.Linear):
    """Swaps two of its tensors on their way in, as a model may that was changed since."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = f"{prefix}weight", f"{prefix}bias"
        state[names[0]], state[names[1]] = state[names[1]].reshape(1, -1), state[names[0]].reshape(-1)
        super()._load_from_state_dict(state, prefix, *rest)


class Awkward(nn.Module):
    """Tensors that cannot simply be read to where they are, beside one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(3, 3)
        self.normal = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.plain.weight
        self.across = nn.Parameter(torch.rand(4, 5).T)
        self.phase = nn.Parameter(torch.rand(3, dtype=torch.complex128))
        self.empty = nn.Parameter(torch.rand(0, 3))
        self.swapped = Renamed(3, 1, bias=True)
        self.swapped.bias = nn.Parameter(torch.rand(3))
        self.register_buffer("passing", torch.rand(2), persistent=False)
        self.short = nn.Parameter(torch.rand(5).bfloat16())


def test_a_model_is_read_to_where_it_lies_unless_its_own_code_comes_between(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Awkward()
    path = bench.save(1, model=model)
    places: set[str] = set()
    read = SavedState.read
    monkeypatch.setattr(
        SavedState, "read", lambda saved, boxes, given: (places.update(given), read(saved, boxes, given))[1]
    )
    other = Awkward()
    own = {name: tensor.data_ptr() for name, tensor in other.named_parameters()}
    put_back(path, named({"model": other}), bench.run)
    assert places == {"model.plain.weight", "model.plain.bias", "model.short"}
    assert {name: tensor.data_ptr() for name, tensor in other.named_parameters()} == own
    swapped = {"swapped.weight": model.swapped.bias[None], "swapped.bias": model.swapped.weight[0]}
    assert same(other.state_dict(), {**model.state_dict(), **swapped})
    assert other.plain.weight is other.tied.weight

    places.clear()
    hooked = Awkward()
    hooked.register_load_state_dict_pre_hook(lambda _, state, *__: state.update({"short": state["short"] * 2}))
    put_back(path, named({"model": hooked}), bench.run)
    assert not places
    assert torch.equal(hooked.short, model.short * 2)


def test_parameters_are_shared_out_and_the_rest_is_rank_0s(tmp_path: Path) -> None:
    """Four ranks whose buffers differ: what is restored is rank 0's, and nobody writes everything."""
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    reports, models = [], []
    for rank in range(4):
        torch.manual_seed(0)
        model = network()
        optimizer = trained(model)
        model[1].running_mean.fill_(rank)
        own = Counted()
        own.state = torch.full((3,), float(rank))
        spec = WorkerSpec(Rank(rank), 4, generation=Generation(1), nonce="00aa", run_directory=directory.path)
        link = _Listening(spec)
        saving = Saving(spec, link, torch.device("cpu"))
        saving.remember(named({"model": model, "optimizer": optimizer, "own": own}), None, None)
        saving.save(Step(3))
        reports.append(link.report)
        models.append(model)
    path = commit(directory.checkpoints, reports, Facts(directory.run_id(), Term(1), None, 0.0)).directory
    manifest, _ = read_manifest(path)
    by_rank = [
        {item.piece.name for item in manifest.file(f"shard-{r:05d}-of-00004.safetensors").tensors} for r in range(4)
    ]
    buffers = {"model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked", "own.state"}
    assert buffers <= by_rank[0]
    assert any(name.startswith("model.") for name in by_rank[3] | by_rank[2])
    assert any(name.startswith("optimizer.") for name in by_rank[3] | by_rank[2])
    fresh, own = network(), Counted()
    objects = named({"model": fresh, "optimizer": torch.optim.Adam(fresh.parameters()), "own": own})
    put_back(path, objects, directory.run_id())
    assert same(fresh.state_dict(), models[0].state_dict())
    assert own.state.tolist() == [0, 0, 0]


def test_what_is_reported_goes_into_the_next_checkpoint_and_how_long_it_took_to_the_agent(bench: Bench) -> None:
    def metrics(path: Path) -> Mapping[str, Metric]:
        manifest, _ = read_manifest(path, bench.run)
        return manifest.metrics

    first = {"val_loss": Metric(1.25, Step(2)), "accuracy": Metric(0.5, Step(3))}
    bench.saving.metrics.update(first)
    bench.saving.remember(named({"model": network()}), None, None)
    bench.saving.save(Step(3))
    (message,) = bench.said()
    assert 0 < message["blocked"] <= message["took"]
    facts = Facts(bench.run, Term(1), None, 0.0)
    report = ShardReport.parse(message["report"])
    assert metrics(commit(bench.directory.checkpoints, [report], facts).directory) == first
    assert metrics(bench.save(4, model=network())) == {}, "it is the value of the checkpoint before"


@pytest.mark.parametrize(
    "wrong",
    [
        math.nan,
        -math.inf,
        "0.5",
        True,
        None,
        10**400,
        [1.0],
        1j,
        torch.ones(2),
        torch.tensor(math.nan),
        torch.tensor(1j),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_only_finite_numbers_are_reported(wrong: Any) -> None:
    run = Run(WorkerSpec(), Link(WorkerSpec()), torch.device("cpu"), {})
    run.report(val_loss=torch.tensor(2.0, requires_grad=True), accuracy=np.float32(0.5), samples=3)
    with pytest.raises(UsageError, match=r"run.report\(other=…\): .* is not a finite number"):
        run.report(val_loss=1.0, other=wrong)
    run.report(accuracy=0.75)
    expected = {"val_loss": Metric(2.0, Step(0)), "accuracy": Metric(0.75, Step(0)), "samples": Metric(3.0, Step(0))}
    assert run._saving.metrics == expected


def test_what_is_reported_between_two_checkpoints_is_limited() -> None:
    run = Run(WorkerSpec(), Link(WorkerSpec()), torch.device("cpu"), {})
    run.report(**{f"m{number}": 1.0 for number in range(64)})
    run.report(m0=2.0)
    for more in ({"another": 1.0}, {"m" * 65: 1.0}):
        with pytest.raises(UsageError, match="64 names of up to 64 characters"):
            run.report(**more)
    assert len(run._saving.metrics) == 64


class _Listening(Link):
    __slots__ = ("report",)

    def say_shard(self, step: Step, report: ShardReport, blocked: float = 0.0, took: float = 0.0) -> None:
        self.report = report


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(4, 6))
        self.add_module("1", nn.BatchNorm1d(4))
        self.add_module("head", nn.Linear(4, 2))


def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_is_touched(bench: Bench) -> None:
    model = network()
    optimizer = trained(model)
    path = bench.save(2, model=model, optimizer=optimizer)

    def refused(**objects: Any) -> str:
        with pytest.raises(RestoreError) as caught:
            put_back(path, named(objects), bench.run)
        assert "step-00000002-g0004" in caught.value.message
        assert caught.value.hint
        return caught.value.message

    assert "only in the checkpoint: 'optimizer'" in refused(model=network())
    assert "not in the checkpoint: 'ema'" in refused(model=network(), optimizer=optimizer, ema=network())
    wider = Wider()
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    message = refused(model=wider, optimizer=trained(network()))
    assert "not in the checkpoint: 'head.weight', 'head.bias'" in message
    assert "only in the checkpoint: '2.weight', '2.bias'" in message
    assert "0.weight is [6, 4] and was [4, 4]" in message
    assert same(wider.state_dict(), before)
    few = torch.optim.Adam(nn.Linear(1, 1).parameters())
    message = refused(model=network(), optimizer=few)
    assert "the state of optimizer does not fit this Adam" in message
    assert "parameter group" in message


def test_a_state_that_cannot_be_kept_is_refused_before_training(bench: Bench) -> None:
    own = Counted()
    own.state = object()
    with pytest.raises(StateError, match=r"state\['own'\]\['state'\] is a builtins.object"):
        bench.saving.remember(named({"own": own}), None, None)


def test_a_failure_in_a_state_dict_of_the_users_is_told_and_not_raised(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Counted()
    bench.saving.remember(named({"own": own}), None, None)

    def broken() -> dict[str, object]:
        raise ArithmeticError("broken")

    own.state_dict = broken  # type: ignore[method-assign]
    bench.saving.save(Step(4))
    (message,) = bench.said()
    assert message == {"kind": "save_failed", "step": 4, "reason": "ArithmeticError: broken"}
    assert "in broken" in capfd.readouterr().err
    assert bench.page.slot(0).read().phase is Phase.CHECKPOINT

    bench.saving.save(Step(4))  # tried already
    assert bench.said() == []


def test_nothing_given_to_restore_cannot_be_saved(bench: Bench) -> None:
    bench.saving.save(Step(1))
    (message,) = bench.said()
    assert message["kind"] == "save_failed"
    assert "nothing was given to run.restore" in message["reason"]


def test_an_agent_that_is_gone_costs_a_line(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.channel.close()
    bench.saving.save(Step(1))
    assert "the agent was not told 'save_failed'" in capfd.readouterr().err


def test_objects_without_a_state_are_refused() -> None:
    with pytest.raises(UsageError, match="a function has no state_dict"):
        named({"model": lambda: None})
