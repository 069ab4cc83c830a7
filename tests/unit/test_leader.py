"""What a leader reckons before it leads, and which saves it orders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_samples import NONCE, RUN, save, training_state

from hpcft import stream, terms
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.manifest import ShardReport
from hpcft.checkpoint.tree import flatten
from hpcft.commits import Commits, Retention
from hpcft.events import (
    CheckpointCommitted,
    CheckpointRef,
    CheckpointsFound,
    CopiesKept,
    Event,
    Forget,
    Keep,
    KeeperVanished,
    NodeJoined,
    Persist,
    Prepare,
    SnapshotDropped,
    SnapshotTaken,
    Termination,
    WorkersVanished,
)
from hpcft.ids import Generation, Incarnation, NodeId, RunId, Step, Term
from hpcft.journal import PROGRESS_SECONDS, Replayed
from hpcft.leader import SILENT_SLACK_SECONDS, Leader, Office, SteppedDown, _missed
from hpcft.membership import Timing
from hpcft.notices import JobControl
from hpcft.policy import Rules
from hpcft.rundir import RunDirectory
from hpcft.store import import_torch
from hpcft.terms import TermRecord
from hpcft.wire import decode_order
from hpcft.world import Phase, World
from tests.unit.worlds import training


def office(leaderless: float, nodes: int = 2) -> Office:
    return Office(
        run=RunId("r"),
        directory=RunDirectory(Path("/nowhere")),
        record=TermRecord(Term(2), NodeId("a"), Incarnation("a2"), "10.0.0.1", 4711, "7.0"),
        allocation="7.0",
        nodes=tuple(NodeId(f"n{number}") for number in range(nodes)),
        checkpoints=(CheckpointsFound(()),),
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


SECRET = b"s" * 32


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


def a_leader(
    run: RunDirectory,
    control: JobControl,
    address: tuple[str, int] = ("127.0.0.1", 4711),
    retain: Callable[[tuple[CheckpointRef, ...]], None] = lambda lineage: None,
    commits: Callable[[Callable[[Event], None]], Commits] | None = None,
    minimum_nodes: int = 2,
) -> Leader:
    run.prepare()
    return Leader(
        replace(
            office(0.0),
            directory=run,
            record=TermRecord(Term(2), NodeId("a"), Incarnation("a2"), *address, "7.0"),
        ),
        Rules(Timing(1.0, 3.0, 5.0), minimum_nodes=minimum_nodes, join_timeout=0.2),
        Replayed(World(), 0.0, None, 0),
        control,
        commits=lambda deliver, held: (
            SimpleNamespace(  # type: ignore[arg-type, return-value]
                close=lambda: None, settled=lambda step: False, retain=retain
            )
            if commits is None
            else commits(deliver)
        ),
        view=lambda world, rules, now: {},
    )


async def test_a_deposed_leader_does_not_wait_for_its_requeue(tmp_path: Path) -> None:
    control = Busy()
    leader = a_leader(RunDirectory(tmp_path), control)
    leading = asyncio.create_task(leader.lead(SECRET, lambda: None))
    await asyncio.wait_for(control.asked.wait(), 30)
    leader._deposed("another agent has claimed a later term")
    with pytest.raises(SteppedDown, match="later term"):
        await asyncio.wait_for(leading, 30)


@pytest.mark.parametrize("succeeded", [False, True])
async def test_a_leader_that_has_slept_deletes_no_checkpoint(tmp_path: Path, succeeded: bool) -> None:
    """Its commit went on when it woke; its successor may have gone on from what that makes superfluous."""
    run, asked = RunDirectory(tmp_path), asyncio.Event()
    retained: list[tuple[CheckpointRef, ...]] = []

    def retain(lineage: tuple[CheckpointRef, ...]) -> None:
        retained.append(lineage)
        asked.set()

    leader = a_leader(run, Busy(), retain=retain)
    in_office = asyncio.Event()
    leading = asyncio.create_task(leader.lead(SECRET, in_office.set))
    await asyncio.wait_for(in_office.wait(), 30)
    leader.world = training(step=10)
    if succeeded:
        terms.claim(run.terms, TermRecord(Term(3), NodeId("b"), Incarnation("b1"), "10.0.0.2", 4711, "7.1"))
    checkpoint = CheckpointRef(Step(10), Generation(1))
    leader.feed(CheckpointCommitted(checkpoint, 0.1, 1))
    if not succeeded:
        await asyncio.wait_for(asked.wait(), 30)
        leader._deposed("enough")
    with pytest.raises(SteppedDown):
        await asyncio.wait_for(leading, 30)
    assert retained == ([] if succeeded else [(checkpoint,)])


class Slow(Busy):
    """Slurm says KillWait when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.said = asyncio.Event()

    async def kill_wait(self) -> float:
        await self.said.wait()
        return 300.0


async def test_who_was_welcomed_early_hears_later_how_long_slurm_waits(tmp_path: Path) -> None:
    import_torch()
    control = Slow()
    waiting: list[stream.Stream] = []
    server = await stream.serve("127.0.0.1", 0, SECRET, waiting.append)
    leader = a_leader(RunDirectory(tmp_path), control, server.address)
    hello = {"node": "n0", "incarnation": "i", "purpose": "agent", "address": "127.0.0.1", "port": 1, "workers": 1}
    agent = await stream.dial(server.address, SECRET, hello)

    def admit() -> None:
        for arrived in waiting:
            leader.admit(arrived)

    leading = asyncio.create_task(leader.lead(SECRET, admit))
    try:
        async with asyncio.timeout(60):
            while "welcome" not in (message := await agent.receive()):
                pass
            assert message["welcome"]["kill_wait"] is None
            control.said.set()
            while "kill_wait" not in (message := await agent.receive()):
                pass
            assert message == {"kill_wait": 300.0}
            leader._deposed("enough")
            with pytest.raises(SteppedDown):
                await leading
            closed: list[str] = []
            leader.admit(SimpleNamespace(close=closed.append))  # type: ignore[arg-type]
    finally:
        agent.close()
        await server.close()
    assert closed == ["this leader leaves office"]


async def test_whoever_joins_hears_of_the_last_formation_whatever_the_phase(tmp_path: Path) -> None:
    """It may have been evicted, and read only now that it was to start an earlier one."""
    leader = a_leader(RunDirectory(tmp_path), Busy())
    leader.world = replace(training(step=10), phase=Phase.LEAVING)
    said: list[Mapping[str, Any]] = []
    leader.join(NodeJoined(NodeId("late"), Incarnation("late/1"), "10.0.0.9", 1, 7000), said.append)
    leader._journal.close()
    orders = [decode_order(message["order"]) for message in said if "order" in message]
    assert [type(order) for order in orders] == [Prepare]


async def test_whoever_joins_hears_again_which_copies_are_of_use(tmp_path: Path) -> None:
    """An order that was lost with a connection would leave its node without memory for the next copy."""
    leader = a_leader(RunDirectory(tmp_path), Busy())
    leader.world = replace(training(step=10), phase=Phase.RUNNING)
    formation = leader.world.formation
    assert formation is not None
    nodes = [member.node for member in formation.members]
    for step, in_memory in ((10, True), (11, False)):
        for node in nodes:
            leader.feed(SnapshotTaken(node, formation.generation, Step(step), in_memory))
    leader.feed(SnapshotDropped(nodes[0], formation.generation, Step(12)))
    said: list[Mapping[str, Any]] = []
    leader.join(NodeJoined(nodes[0], formation.members[0].incarnation, "10.0.0.9", 1, 7000), said.append)
    leader._journal.close()
    orders = [decode_order(message["order"]) for message in said if "order" in message]
    term, generation = Term(2), formation.generation
    assert orders[-3:] == [
        Keep(term, generation, Step(10)),
        Forget(term, generation, Step(11), True),
        Forget(term, generation, Step(12), False),
    ]


@pytest.mark.parametrize("minimum_nodes", [1, 2])
@pytest.mark.parametrize("durable", [False, True])
async def test_what_a_lost_node_was_saving_is_written_from_its_neighbours_copy(
    tmp_path: Path, minimum_nodes: int, durable: bool
) -> None:
    """Its files of that save are there, and even reported. With enough nodes another generation starts meanwhile."""
    import_torch()
    run = RunDirectory(tmp_path)
    leader = a_leader(
        run,
        Busy(),
        commits=lambda deliver: Commits(run.checkpoints, RUN, Retention(2, 0), deliver),
        minimum_nodes=minimum_nodes,
    )
    in_office = asyncio.Event()
    leading = asyncio.create_task(leader.lead(SECRET, in_office.set))
    await asyncio.wait_for(in_office.wait(), 30)
    world = training(step=10, since=leader.now())
    assert world.formation is not None
    formation = replace(world.formation, nonce=NONCE, neighbours=True)
    a, b = formation.members
    leader._commits.follow(formation)
    leader.world = replace(world, formation=formation)
    snapshot, state = CheckpointRef(Step(10), Generation(1)), flatten(training_state(10))
    for made, keeper in ((a, b), (b, a)):
        leader.feed(SnapshotTaken(made.node, Generation(1), Step(10)))
        leader.feed(CopiesKept(keeper.node, Generation(1), Step(10), made.node))

    def report(shards: Sequence[ShardReport]) -> None:
        for each in shards:
            leader.shard_reported(1, 10, each.rank, each.to_json(), {})

    async def committed() -> None:
        async with asyncio.timeout(30):
            while snapshot not in leader.world.checkpoints:  # noqa: ASYNC110 the leader is all there is to look at
                await asyncio.sleep(0.01)

    first = save(run.checkpoints, state, 10, world_size=4)
    report(first if durable else first[b.first_rank :])
    if durable:
        await committed()
    leader.feed(WorkersVanished(b.node, b.incarnation))
    leader.feed(KeeperVanished(b.node, b.incarnation))
    assert leader.world.generation == (2 if minimum_nodes == 1 else 1)
    said: list[Mapping[str, Any]] = []
    leader.join(NodeJoined(a.node, a.incarnation, a.address, a.workers, a.port), said.append)
    orders = [decode_order(message["order"]) for message in said if "order" in message]
    asked = [order for order in orders if isinstance(order, Persist)]
    if durable:
        assert not asked, "it is a checkpoint already"
    else:
        (order,) = asked
        assert (order.snapshot, order.members, order.handed_by) == (snapshot, (a, b), (a.node, a.node))
        report(save(run.checkpoints, state, 10, world_size=4, nonce=order.nonce))
        await committed()
    leader._deposed("enough")
    with pytest.raises(SteppedDown):
        await asyncio.wait_for(leading, 30)
    assert sorted(path.name for path in run.checkpoints.iterdir() if path.name != ".trash") == [
        "LATEST",
        checkpoint_name(Step(10), Generation(1)),
    ]
