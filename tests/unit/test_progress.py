"""What `hpcft run` says while a run goes on: lines made of one snapshot after the other."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from worlds import at_step, began, committed, formation, joined, life, proposed, ready

from hpcft import progress, status
from hpcft.events import (
    CheckpointCommitted,
    CheckpointRef,
    Event,
    Failure,
    FailureKind,
    WorkerFailed,
    WorkerReturned,
)
from hpcft.ids import Generation, NodeId, Rank, Step
from hpcft.membership import Timing
from hpcft.policy import Rules, decide
from hpcft.transitions import apply
from hpcft.world import Budget, World

BUDGETS = ((Budget.INFRASTRUCTURE, 20), (Budget.USER_CODE, 5), (Budget.PREEMPTION, 100))


class Watched:
    """A run of two nodes that is looked at twice a second, as `hpcft run` does; the clocks are the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, command: bool) -> None:
        self.said: list[str] = []
        self.now = 0.0
        self.world = World()
        self.command = command
        self.rules = Rules(
            timing=Timing(0.5, 2.0, 5.0), minimum_nodes=1, budgets=BUDGETS, backoff=0.0, saves=not command
        )
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 5000.0 + self.now))
        self.reporter = progress.Reporter(self.said.append, counts_steps=not command)

    def happen(self, *events: Event) -> None:
        for event in events:
            self.world = apply(self.world, event, self.now)

    def train(self) -> None:
        self.happen(began(), joined("a"), joined("b"), proposed(formation("ab", 1)), committed(1))
        self.happen(ready("a"), ready("b"))

    def look(self, seconds: float, step: int = 0, steps_per_second: int = 0) -> None:
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            if steps_per_second:
                step += steps_per_second // 2
                self.happen(at_step("a", step), at_step("b", step))
            self.reporter.see(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        return status.snapshot(self.world, self.rules, self.now)

    def end(self) -> None:
        for number in range(4):
            node = NodeId("ab"[number // 2])
            self.happen(WorkerReturned(node, Generation(1), Rank(number), Step(0)))
        while (decided := decide(self.world, self.rules, self.now)).actions:
            self.happen(decided)


def test_a_training_is_seen_by_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, command=False)
    run.train()
    run.look(10, steps_per_second=20)
    lines = [line for line in run.said if line.startswith("step ")]
    assert 4 <= len(lines) <= 5
    steps = [int(line.split()[1]) for line in lines]
    assert all(before < after for before, after in itertools.pairwise(steps))
    assert not any(line.startswith("training") for line in run.said)


def test_a_generation_is_said_after_its_cause_and_with_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, command=False)
    run.train()
    run.look(2, steps_per_second=20)
    run.happen(CheckpointCommitted(CheckpointRef(Step(30), Generation(1)), 0.1, 1000))
    failure = Failure(FailureKind.KILLED, "SIGKILL", Step(40))
    run.happen(WorkerFailed(NodeId("b"), life("b"), Generation(1), Rank(3), failure))
    run.happen(proposed(formation("ab", 2, CheckpointRef(Step(30), Generation(1)))), committed(2))
    run.look(1)
    lines = [line for line in run.said if line.startswith(("generation", "incident"))]
    assert lines[0] == "generation 1  4 ranks on 2 nodes, from the beginning"
    assert lines[1].startswith("incident #1  worker failed")
    assert lines[2] == "generation 2  4 ranks on 2 nodes, from the checkpoint of step 30"


def test_a_command_is_seen_by_its_state_and_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, command=True)
    run.train()
    run.look(31)
    assert run.said == [
        "generation 1  4 ranks on 2 nodes",
        "training  500ms",
        "training  10.5s",
        "training  20.5s",
        "training  30.5s",
    ]
    run.said.clear()
    failure = Failure(FailureKind.KILLED, "SIGKILL", Step(0))
    run.happen(WorkerFailed(NodeId("b"), life("b"), Generation(1), Rank(3), failure))
    run.look(1)
    assert run.said[-1] == "recovering  31.5s", "a new state is said at once"
    assert len(run.said) == 2 and run.said[0].startswith("incident #1  worker failed")


def test_the_end_of_a_command_says_nothing_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, command=True)
    run.train()
    run.look(2)
    run.end()
    run.look(2)
    assert run.said[-1] == "finished  the command has ended on all ranks, with status 0, in 2.5s, 0 incidents"
    assert sum(line.startswith("finished") for line in run.said) == 1
    assert not any(word in line for line in run.said for word in ("step", "loss", "goodput"))
