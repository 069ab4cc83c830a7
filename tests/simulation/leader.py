"""The loop of `leader.py`, retold without asyncio around the shipped `apply`, `decide` and `may_lead`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, assert_never

from hpcft import cadence, events, policy, wire
from hpcft.events import (
    Action,
    AskPeer,
    CheckpointCommitted,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointRef,
    CheckpointsFound,
    Commit,
    Conclude,
    Confirm,
    Event,
    Evict,
    Formation,
    Halt,
    HaltWorkers,
    LeaseRenewed,
    NodeHeard,
    NodeJoined,
    OrderSave,
    Prepare,
    Probe,
    Propose,
    Quarantine,
    Requeue,
    RequeueAccepted,
    RequeueRefused,
    SaveAndStop,
    Start,
    StreamClosed,
    TermBegan,
    Termination,
    TerminationAsked,
    Ticked,
    Verdict,
)
from hpcft.ids import NodeId, RunId, Step
from hpcft.journal import is_journaled
from hpcft.leader import PLENTIFUL
from hpcft.membership import may_lead
from hpcft.terms import TermLease, TermRecord
from hpcft.transitions import apply
from hpcft.world import Phase, World, takes_over
from tests.simulation.machine import JournalFile, Shard, Signalled
from tests.simulation.network import Connection, End

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent
    from tests.simulation.cluster import Cluster

TICK_SECONDS = 0.25
DECISIONS_PER_EVENT = 64
COMMIT_SECONDS = 0.1
LEAVE_SECONDS = 20.0
"""Between a signal of Slurm's and the end of all processes."""


class SimulatedLeader:
    def __init__(self, cluster: Cluster, agent: SimulatedAgent, record: TermRecord, head: JournalFile | None) -> None:
        self.cluster = cluster
        self.agent = agent
        self.record = record
        self.rules = cluster.rules
        replayed, clock, length = replay(head)
        self.base = replayed
        self.world = replayed
        self.proposed = replayed.generation
        self.history: list[tuple[float, Event]] = []
        self._clock_base = clock - agent.now()
        self._journal = JournalFile(record.term, head, length)
        self._unwritten: list[tuple[float, Event]] = []
        self._writing = False
        self._synced: list[Callable[[], None]] = []
        self._count = 0
        self._renewed_at = agent.now()
        self._renewal_wanted: float | None = None
        self._events: deque[Event] = deque()
        self._feeding = False
        self.streams: dict[NodeId, tuple[End, Connection]] = {}
        self._formation: Formation | None = None
        self._shards: dict[Step, set[NodeId]] = {}
        self._settled: set[Step] = set()
        self._saving = cadence.Saving()
        self._pace = cadence.Pace()
        self._signalled: set[Termination] = set()
        self.gone = False
        self.decisions = 0

    def now(self) -> float:
        return self._clock_base + self.agent.now()

    def lead(self, found: CheckpointsFound, nodes: tuple[NodeId, ...]) -> None:
        before = self.world
        self._renew()
        self.feed(
            TermBegan(
                RunId("run"),
                self.record.term,
                self.record.node,
                self.record.incarnation,
                self.record.allocation,
                nodes,
                takes_over(before, self.record.allocation, self.record.node) and not self.cluster.succession,
            )
        )
        self.feed(found)
        self._watch_limit()
        self._tick()

    # --- the loop ---

    def feed(self, event: Event) -> None:
        if self.gone or not self.agent.alive:
            return
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                self._take(self._events.popleft())
        finally:
            self._feeding = False

    def _take(self, event: Event) -> None:
        now, before = self.now(), self.world
        self._apply(event, now)
        if self.world is before and not isinstance(event, Ticked):
            return
        if isinstance(event, PLENTIFUL):
            return
        for _ in range(DECISIONS_PER_EVENT):
            decided = policy.decide(self.world, self.rules, now)
            if not decided.actions:
                return
            self.decisions += 1
            self.cluster.narrate(f"leader {self.record.node} t{self.record.term}: {decided.reason}")
            self._apply(decided, now)
            for action in decided.actions:
                self._perform(action)
        self.cluster.violate(f"the policy does not settle: {decided.reason}")

    def _apply(self, event: Event, now: float) -> None:
        self.world = apply(self.world, event, now)
        if is_journaled(event):
            self.history.append((now, event))
            self._unwritten.append((now, event))
            self._write()

    def replayed(self) -> World:
        """The world as a successor would know it, had every line reached the disk."""
        world = self.base
        for at, event in self.history:
            world = apply(world, wire.decode_event(wire.encode(event)), at)
        return world

    def _write(self) -> None:
        if self._writing or self.gone:
            return
        self._writing = True
        lines, self._unwritten = self._unwritten, []
        journal, disk = self._journal, self.cluster.disk

        def append() -> None:
            if journal not in disk.journals:
                disk.journals.append(journal)
            journal.lines.extend(lines)

        def written(_: None) -> None:
            self._writing = False
            if self._unwritten:
                self._write()
            else:
                synced, self._synced = self._synced, []
                for then in synced:
                    then()

        self.agent.disk(append, written)

    def _sync(self, then: Callable[[], None]) -> None:
        if self._writing or self._unwritten:
            self._synced.append(then)
        else:
            then()

    def _perform(self, action: Action) -> None:
        match action:
            case Propose(formation):
                self.cluster.proposed(self, formation)
                self._formation = formation
                self._shards = {}
                self._settled = set()
                self._saving = cadence.Saving(told_at=self.now())
                self._renewal_wanted = self.agent.now()
                self._renew(again=False)
                self._broadcast(Prepare(formation))
            case Commit(generation):
                self._broadcast(Start(self.record.term, generation))
            case AskPeer(suspect, incarnation, peer):
                stream = self.streams.get(peer)
                if stream is not None:
                    self._send(stream, Probe(self.record.term, suspect, incarnation, "", 0))
            case Evict(node, incarnation):
                self.cluster.evicted(self, node, incarnation)
                stream = self.streams.pop(node, None)
                if stream is not None:
                    stream[1].close(stream[0])
            case SaveAndStop():
                last = self._saving.ordered(self.world, self._pace, self.now(), stop=True)
                self._stand_by(last, last.order)
            case HaltWorkers(generation):
                self._broadcast(Halt(self.record.term, generation))
            case Quarantine(checkpoint, detail):
                self.feed(CheckpointDamaged(checkpoint, detail))
            case Requeue():
                asked = self.world.termination
                if asked is not None and asked.why is Termination.CANCELLED:
                    self.cluster.violate("a cancelled job is to be requeued")
                self._sync(self._requeue)
            case Conclude(verdict):
                self._sync(lambda: self._conclude(verdict))
            case _:
                assert_never(action)

    def _broadcast(self, order: Any) -> None:
        for stream in list(self.streams.values()):
            self._send(stream, order)

    def _send(self, stream: tuple[End, Connection], order: Any) -> None:
        end, connection = stream
        connection.send(end, order)
        if isinstance(order, Prepare | Start | Confirm) and self.cluster.random.random() < self.cluster.repeats:
            wait = self.cluster.random.uniform(0.0, 6.0)
            self.agent.timer(wait, lambda: connection.send(end, order))

    # --- agents ---

    def accept(self, client: End, agent: SimulatedAgent) -> Connection:
        joined = NodeJoined(agent.machine.name, agent.incarnation, "", agent.machine.workers, 0)
        server = End(self.agent, lambda message: self._hear(connection, joined, message), lambda reason: lost(reason))
        connection = Connection(self.cluster.network, client, server)

        def lost(reason: str) -> None:
            stream = self.streams.get(joined.node)
            if stream is not None and stream[1] is connection:
                del self.streams[joined.node]
                self.feed(StreamClosed(joined.node, joined.incarnation, reason))

        def serve() -> None:
            if self.gone:
                connection.close(server)
                return
            old = self.streams.get(joined.node)
            if old is not None:
                old[1].close(old[0])
            self.streams[joined.node] = (server, connection)
            self.feed(joined)
            formation = self.world.formation
            if formation is not None:
                connection.send(server, Prepare(formation))
                if self.world.phase is Phase.RUNNING:
                    connection.send(server, Start(formation.term, formation.generation))

        self.agent.deliver(serve)
        return connection

    def _hear(self, connection: Connection, joined: NodeJoined, message: Any) -> None:
        if self.gone:
            return
        if isinstance(message, NodeHeard):
            self.heard(message)
        elif isinstance(message, Shard):
            self._shard(message)
        elif isinstance(message, Signalled):
            if message.why not in self._signalled:
                self._signalled.add(message.why)
                self.feed(TerminationAsked(message.why, max(0.5, LEAVE_SECONDS - message.age)))
        else:
            self.feed(message)

    def heard(self, event: NodeHeard) -> None:
        node = self.world.node(event.node)
        if self.gone or node is None or node.incarnation != event.incarnation:
            return
        self.feed(event)
        stream = self.streams.get(event.node)
        if stream is not None:
            self._send(stream, Confirm(self.record.term, event.sequence))

    # --- edges ---

    def _tick(self) -> None:
        if self.gone:
            return
        stays, why = may_lead(self._renewed_at, self._majority_at(), self.agent.now(), self.rules.timing)
        if not stays:
            self._step_down(why)
            return
        self.feed(Ticked())
        self._keep_cadence()
        self.agent.timer(TICK_SECONDS, self._tick)

    def _majority_at(self) -> float:
        heard = sorted(
            (
                node.heard_at
                for member in self.world.previous
                if (node := self.world.node(member.node)) is not None and node.connected
            ),
            reverse=True,
        )
        needed = len(self.world.previous) // 2 + 1
        return heard[needed - 1] - self._clock_base if len(heard) >= needed else float("-inf")

    def _step_down(self, why: str) -> None:
        self.gone = True
        self.cluster.narrate(f"leader {self.record.node} t{self.record.term} steps down: {why}")
        self.cluster.end_agent(self.agent, why)

    def _renew(self, *, again: bool = True) -> None:
        if self.gone:
            return
        began = self.agent.now()
        self._count += 1
        sign, disk, term = TermLease(self._count), self.cluster.disk, self.record.term

        def write() -> bool:
            disk.leases[term] = sign
            newest = disk.newest()
            return newest is not None and newest.term == term

        def renewed(mine: bool) -> None:
            if self.gone:
                return
            if again:
                self.agent.timer(self.rules.timing.timeout / 5, self._renew)
            if not mine:
                self._step_down("another agent has claimed a later term")
                return
            self._renewed_at = max(self._renewed_at, began)
            if self._renewal_wanted is not None and began >= self._renewal_wanted:
                self._renewal_wanted = None
                self.feed(LeaseRenewed(term))

        self.agent.disk(write, renewed)

    def _watch_limit(self) -> None:
        """What `notices` does: the limit is near, and its warning came when no agent could hear it."""
        slurm, limit = self.cluster.slurm, Termination.TIME_LIMIT
        if slurm.to_end is limit and slurm.start == self.agent.start and limit not in self._signalled:
            self._signalled.add(limit)
            self.feed(TerminationAsked(limit, LEAVE_SECONDS / 2))
        elif not self.gone:
            self.agent.timer(LEAVE_SECONDS / 2, self._watch_limit)

    def _keep_cadence(self) -> None:
        now = self.now()
        self._pace = self._pace.seen(self.world, now)
        every = cadence.in_force(self.rules.saving, self.world, now)
        saving, told = self._saving.next(self.world, self._pace, now, every, self._settled.__contains__)
        self._stand_by(saving, told)

    def _stand_by(self, saving: cadence.Saving, told: cadence.Order | None) -> None:
        self._saving = saving
        formation = self.world.formation
        if told is not None and formation is not None:
            self._broadcast(OrderSave(self.record.term, formation.generation, told.step, told.stop))

    def _shard(self, shard: Shard) -> None:
        formation = self._formation
        if formation is None or formation.generation != shard.generation or shard.step in self._settled:
            return
        if shard.failed:
            self._settled.add(shard.step)
            self.feed(CheckpointFailed(shard.step, formation.generation, shard.failed))
            return
        reported = self._shards.setdefault(shard.step, set())
        reported.add(shard.node)
        if len(reported) < len(formation.members):
            return
        self._settled.add(shard.step)
        checkpoint = CheckpointRef(shard.step, formation.generation)

        def commit() -> None:
            self.cluster.disk.checkpoints.add(checkpoint)

        done = CheckpointCommitted(checkpoint, COMMIT_SECONDS, 1, blocked=COMMIT_SECONDS, lag=2 * COMMIT_SECONDS)
        self.agent.disk(commit, lambda _: self.feed(done))

    def _requeue(self) -> None:
        def answered(accepted: bool) -> None:
            self.feed(RequeueAccepted() if accepted else RequeueRefused("the job is not running"))

        self.cluster.slurm.requeue(self.agent, answered)

    def _conclude(self, verdict: Verdict) -> None:
        disk, allocation = self.cluster.disk, self.record.allocation

        def write() -> None:
            disk.verdicts.setdefault(allocation, verdict)

        def written(_: None) -> None:
            self._broadcast(events.End(self.record.term, verdict))
            self.agent.disk(release, lambda _: self._end())

        def release() -> None:
            disk.leases[self.record.term] = TermLease(self._count + 1_000_000, released=True)

        self.cluster.concluded(self, verdict)
        self.agent.disk(write, written)

    def _end(self) -> None:
        self.gone = True


def replay(head: JournalFile | None) -> tuple[World, float, int]:
    """As `journal.replay` does: the chain of predecessors, each as far as its successor had read it."""
    chain: list[tuple[JournalFile, int]] = []
    length = len(head.lines) if head is not None else 0
    limit, current = length, head
    while current is not None:
        chain.append((current, limit))
        limit, current = current.replayed, current.predecessor
    world, clock = World(), 0.0
    for file, end in reversed(chain):
        for at, event in file.lines[:end]:
            world, clock = apply(world, event, at), at
    return world, clock, length
