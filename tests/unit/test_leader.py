"""What a leader reckons before it leads, and which saves it orders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcft.events import CheckpointRef, CheckpointsFound, NodeReported, OrderSave, Termination, WorkerReport
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.journal import PROGRESS_SECONDS, Replayed
from hpcft.leader import SILENT_SLACK_SECONDS, Leader, Office, SteppedDown, _missed
from hpcft.membership import Timing
from hpcft.policy import Rules
from hpcft.rundir import RunDirectory
from hpcft.terms import TermRecord
from hpcft.units import EverySeconds, Never
from hpcft.wire import decode_order
from hpcft.world import World
from tests.unit.worlds import training


def office(leaderless: float, nodes: int = 2) -> Office:
    return Office(
        run=RunId("r"),
        directory=RunDirectory(Path("/nowhere")),
        record=TermRecord(Term(2), NodeId("a"), Incarnation("a2"), "10.0.0.1", 4711, "7.0"),
        allocation="7.0",
        nodes=tuple(NodeId(f"n{number}") for number in range(nodes)),
        checkpoints=CheckpointsFound(()),
        save_every=Never(),
        end_lead=60.0,
        leaderless=leaderless,
    )


def replayed(seconds_ago: float, allocation: str = "7.0") -> Replayed:
    written = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    return Replayed(World(allocation=allocation), 100.0, "head", 10, written)


@pytest.mark.parametrize(
    ("seconds_ago", "leaderless", "missed"),
    [
        (30.0, 20.0, 30.0),  # the former leader's last line was 10 s old when it was lost
        (5.0, 20.0, 20.0),  # its clock was ahead
        (-3600.0, 20.0, 20.0),
        (3600.0, 20.0, 20.0 + PROGRESS_SECONDS + SILENT_SLACK_SECONDS),  # ours is
    ],
)
def test_the_run_clock_makes_up_for_the_time_between_two_leaders(
    seconds_ago: float, leaderless: float, missed: float
) -> None:
    assert _missed(office(leaderless), replayed(seconds_ago)) == pytest.approx(missed, abs=1.0)


def test_with_many_nodes_a_leader_may_be_silent_for_longer() -> None:
    assert _missed(office(20.0, nodes=1000), replayed(900.0)) == pytest.approx(900.0, abs=1.0)
    assert _missed(office(20.0, nodes=1000), replayed(1e6)) == pytest.approx(1080.0, abs=1.0)


def test_time_in_the_queue_is_not_the_runs() -> None:
    assert _missed(office(3.0), replayed(3600.0, allocation="7.1")) == 3.0
    assert _missed(office(3.0), Replayed(World(), 0.0, None, 0)) == 3.0


class Scene:
    """A leader whose world is set by the test, with what it tells its agents."""

    def __init__(self, directory: Path) -> None:
        run = RunDirectory(directory)
        run.prepare()
        self.settled: set[int] = set()
        """Steps that all ranks have reported."""
        self.said: list[tuple[int, bool]] = []
        self.leader = Leader(
            replace(office(0.0), directory=run, save_every=EverySeconds(600.0)),
            Rules(Timing(1.0, 3.0, 5.0), minimum_nodes=1),
            Replayed(World(), 0.0, None, 0),
            control=None,  # type: ignore[arg-type]
            commits=lambda deliver: SimpleNamespace(settled=self.settled.__contains__),  # type: ignore[arg-type, return-value]
            view=lambda world, rules, now: {},
        )
        self.leader._reception.tell_all = self._hear  # type: ignore[method-assign]

    def _hear(self, message: Mapping[str, Any]) -> None:
        order = decode_order(message["order"])
        assert isinstance(order, OrderSave)
        self.said.append((order.step, order.stop))

    def look(self, world: World, later: float = 0.0) -> list[tuple[int, bool]]:
        """What is said when the leader looks at this world, `later` seconds after the last look."""
        self.said.clear()
        self.leader._clock_base += later
        self.leader.world = world
        self.leader._keep_cadence()
        return list(self.said)


def ranks(world: World, *phases: tuple[int, str]) -> World:
    workers = tuple(
        WorkerReport(Rank(rank), 100 + rank, phase, Step(step), 0.1, None, None, None)
        for rank, (step, phase) in enumerate(phases)
    )
    return replace(world, reports=(NodeReported(NodeId("a"), Generation(1), workers),))


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.leader._journal.close()


async def test_the_last_save_is_repeated_for_a_late_rank_and_then_its_ranks_are_let_go(scene: Scene) -> None:
    world = training(step=10)
    assert scene.look(world) == []
    scene.leader._order_save(stop=True)
    assert scene.said == [(12, True)]
    assert scene.look(ranks(world, (12, "checkpoint"), (11, "train")), later=9.0) == [], "a slow step"
    assert scene.look(ranks(world, (12, "checkpoint"), (12, "train"))) == [(14, True)], "one has missed it"
    saved = replace(world, checkpoints=(CheckpointRef(Step(14), Generation(1)),))
    waiting = ranks(saved, (14, "checkpoint"), (14, "checkpoint"))
    assert scene.look(waiting) == [(0, True)]
    assert scene.look(waiting, later=1.0) == []
    assert scene.look(waiting, later=2.0) == [(0, True)], "who was not connected hears it now"


async def test_after_a_last_save_that_failed_nobody_waits(scene: Scene) -> None:
    world = training(step=10)
    scene.look(world)
    scene.leader._order_save(stop=True)
    assert scene.look(replace(world, save_failed=(Step(12), "disk full"))) == [(0, True)]


async def test_a_save_by_the_clock_is_repeated_only_if_a_rank_has_missed_it(scene: Scene) -> None:
    world = training(step=10)
    assert scene.look(world) == []
    assert scene.look(world, later=601.0) == [(12, False)]
    scene.settled.add(12)
    assert scene.look(training(step=15), later=60.0) == [], "it is being committed, slowly"
    scene.settled.clear()
    (again,) = scene.look(training(step=15), later=1.0)
    assert again[0] > 15 and not again[1]
    assert scene.look(replace(training(step=15), checkpoints=(CheckpointRef(Step(again[0]), Generation(1)),))) == []
    assert scene.look(training(step=15), later=601.0) != [], "the next one is due"


class Busy:
    """A resource manager that takes its time with a requeue."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def requeue(self) -> None:
        self.asked.set()
        await asyncio.Event().wait()

    async def why_terminated(self) -> Termination:
        return Termination.REQUEUED

    async def seconds_left(self) -> float | None:
        return None

    async def kill_wait(self) -> float:
        return 30.0


async def test_a_deposed_leader_does_not_wait_for_its_requeue(tmp_path: Path) -> None:
    run, control = RunDirectory(tmp_path), Busy()
    run.prepare()
    record = TermRecord(Term(2), NodeId("a"), Incarnation("a2"), "127.0.0.1", 4711, "7.0")
    leader = Leader(
        replace(office(0.0), directory=run, record=record),
        Rules(Timing(1.0, 3.0, 5.0), minimum_nodes=2, join_timeout=0.2),
        Replayed(World(), 0.0, None, 0),
        control,
        commits=lambda deliver: SimpleNamespace(close=lambda: None),  # type: ignore[arg-type, return-value]
        view=lambda world, rules, now: {},
    )
    leading = asyncio.create_task(leader.lead(b"s" * 32, lambda: None))
    await asyncio.wait_for(control.asked.wait(), 30)
    leader._deposed("another agent has claimed a later term")
    with pytest.raises(SteppedDown, match="later term"):
        await asyncio.wait_for(leading, 30)
