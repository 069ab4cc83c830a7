"""What a node says of its ranks, and says again when it may not have been heard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from hpcft.config import Config
from hpcft.events import (
    Event,
    FailureKind,
    Formation,
    Member,
    Progressed,
    SnapshotDropped,
    WorkerReturned,
    WorkersReady,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.page import NodePage, Phase
from hpcft.ranks import Assignment, Ranks, failure_of, worker_spec
from hpcft.snapshots import SaveSettings, Snapshots
from hpcft.worker.spec import WorkerSpec
from hpcft.workers import WorkerExited, WorkerSaid, WorkerSpawned

NODE = NodeId("node1")
FORMATION = Formation(
    Term(1),
    Generation(3),
    (
        Member(NodeId("node0"), Incarnation("x"), "10.0.0.1", 2, Rank(0)),
        Member(NODE, Incarnation("a"), "10.0.0.2", 2, Rank(2)),
    ),
    None,
    "0",
)


class Agent:
    """One life of an agent, which keeps what its ranks let it say."""

    def __init__(self, page: NodePage) -> None:
        config = Config.model_validate({"run": {"name": "r"}, "job": {"script": "train.py"}})
        self.events: list[Event] = []
        self.messages: list[Mapping[str, Any]] = []
        assignment = Assignment(RunId("r"), Path("/runs/r"), NODE, "10.0.0.2", (), config)
        settings = SaveSettings(Path("/runs/r/checkpoints"), "10.0.0.2", memory=None, slots=2, bandwidth=None)
        snapshots = Snapshots(settings, NODE, lambda worker, message, fds: None, lambda work, name: None, None)  # type: ignore[arg-type, return-value]
        self.ranks = Ranks(assignment, Incarnation("a"), page, snapshots, self.events.append, self.messages.append)

    def begin(self, formation: Formation = FORMATION) -> list[str]:
        names = list(self.ranks.begin(formation, ("10.0.0.1", 1)))
        for pid, name in enumerate(names, start=100):
            self.ranks.see(WorkerSpawned(name, pid))
        return names


@pytest.fixture
def page() -> Iterator[NodePage]:
    page = NodePage.create(2)
    yield page
    page.close()


def reach(page: NodePage, *steps: int) -> None:
    for slot, step in enumerate(steps):
        page.slot(slot).set_phase(Phase.TRAIN)
        page.slot(slot).end_update(step, 0.5, 1, 1)


@pytest.mark.parametrize(("limit", "part"), [("1000B", 250.0), (None, None)])
def test_ranks_that_write_themselves_share_the_nodes_bandwidth(limit: str | None, part: float | None) -> None:
    checkpoint = {} if limit is None else {"max_bandwidth": limit}
    config = Config.model_validate({"run": {"name": "r"}, "job": {"script": "train.py"}, "checkpoint": checkpoint})
    assignment = Assignment(RunId("r"), Path("/runs/r"), NODE, "10.0.0.2", (), config)
    told = worker_spec(assignment, FORMATION, 0, Rank(2), 4, ("10.0.0.1", 1))
    assert WorkerSpec.parse(orjson.dumps({**told, "page_fd": 8, "control_fd": 9})).bandwidth == part


def test_all_that_counts_is_said_again(page: NodePage) -> None:
    agent = Agent(page)
    first, second = agent.begin()
    for name in (first, second):
        agent.ranks.see(WorkerSaid(name, {"kind": "ready"}))
    reach(page, 9, 9)
    for step in (5, 9):
        agent.ranks.see(WorkerSaid(first, {"kind": "shard", "step": step, "report": {"step": step}, "blocked": 0.5}))
    agent.ranks.see(WorkerSaid(second, {"kind": "save_failed", "step": 9, "reason": "disk full"}))
    agent.ranks.see(WorkerExited(first, 100, 0, "exit 0"))
    agent.events.clear()
    agent.messages.clear()

    agent.ranks.repeat()
    assert [type(event) for event in agent.events] == [Progressed, SnapshotDropped, WorkersReady, WorkerReturned]
    assert agent.messages == [
        {"shard": {"generation": 3, "rank": 2, "step": 9, "report": {"step": 9}, "blocked": 0.5}},
        {"save_failed": {"generation": 3, "rank": 3, "step": 9, "reason": "disk full"}},
    ]


def test_the_ended_are_silent_but_for_how_far_they_were(page: NodePage) -> None:
    agent = Agent(page)
    first, _ = agent.begin()
    reach(page, 12, 11)
    agent.ranks.forget()
    agent.ranks.see(WorkerExited(first, 100, -9, "SIGKILL", asked=True))
    assert agent.events == []
    agent.ranks.report_last()
    assert agent.events == [Progressed(NODE, Generation(3), Step(11), None)]


def test_the_next_agent_knows_how_far_the_workers_of_the_last_one_were(page: NodePage) -> None:
    killed = Agent(page)
    killed.begin()
    reach(page, 12, 12)
    again = Agent(page)
    again.ranks.repeat()
    assert again.events == [Progressed(NODE, Generation(3), Step(12), None)]


def test_a_node_that_never_trained_has_nothing_to_say(page: NodePage) -> None:
    agent = Agent(page)
    agent.ranks.repeat()
    agent.ranks.report_last()
    assert agent.events == [] and agent.messages == []


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        ({"collective": False, "fault": ""}, FailureKind.EXCEPTION, "OSError: no"),
        ({"collective": True, "fault": ""}, FailureKind.COLLECTIVE, "OSError: no"),
        (
            {"collective": False, "fault": "EIO"},
            FailureKind.SURROUNDINGS,
            "OSError: no; EIO comes from around the program, not from it",
        ),
        (
            {"collective": True, "fault": "uncorrectable ECC error"},
            FailureKind.SURROUNDINGS,
            "OSError: no; uncorrectable ECC error comes from around the program, not from it",
        ),
    ],
)
def test_who_is_to_blame_for_an_exception(said: dict[str, Any], kind: FailureKind, what: str) -> None:
    words = {"exception": {"type": "OSError", "message": "no", "step": 7, "where": "train.py:3", **said}}
    failure = failure_of(WorkerExited("g0001-rank0000", 100, 1, "exit 1"), words, Step(6))
    assert (failure.kind, failure.what, failure.step, failure.where) == (kind, what, 7, "train.py:3")
