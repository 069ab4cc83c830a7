"""The loop of `agent.py`, retold without asyncio around the shipped `Membership`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from hpcft import cadence, events
from hpcft.events import (
    Confirm,
    Event,
    Failure,
    FailureKind,
    Formation,
    NodeHeard,
    NodeReported,
    PeerAnswered,
    Probe,
    Progressed,
    Reach,
    Termination,
    WorkerFailed,
    WorkerReport,
    WorkerReturned,
    WorkersReady,
    WorkerStopped,
    WorldAcknowledged,
    WorldRefused,
)
from hpcft.ids import Generation, Incarnation, Term
from hpcft.membership import (
    Acknowledge,
    Effect,
    ExtendLease,
    Fence,
    KillWorkers,
    LookAt,
    Membership,
    Refuse,
    Retire,
    SaveAt,
    StartWorkers,
    StopWorkers,
    may_claim,
)
from hpcft.terms import TermLease, TermRecord
from tests.simulation.machine import Crew, Machine, Process, Shard, Signalled
from tests.simulation.network import Connection, End

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.leader import SimulatedLeader

T = TypeVar("T")

TICK_SECONDS = 0.25
SEEK_SECONDS = 0.5
FIRST_CLAIM_TURN_SECONDS = 10.0
DIAL_SECONDS = 5.0
PROBE_SECONDS = 1.5
REPORT_SECONDS = 1.0


class Link:
    """This agent's connection to one leader."""

    def __init__(self, record: TermRecord, leader: SimulatedLeader) -> None:
        self.record = record
        self.leader = leader
        self.connection: Connection
        self.end: End


class SimulatedAgent(Process):
    """One incarnation on one node. The leader, if this agent is one, lives and dies with it."""

    def __init__(self, cluster: Cluster, machine: Machine, start: int, index: int) -> None:
        super().__init__(machine)
        self.cluster = cluster
        self.start = start
        self.index = index
        self.incarnation = Incarnation(f"{machine.name}-{cluster.next_incarnation()}")
        self.membership = cluster.membership(machine.name, self.incarnation, cluster.rules.timing)
        self.links: dict[Term, Link] = {}
        """One; several only where succession is rehearsed."""
        self.dialling: set[Term] = set()
        self.leader: SimulatedLeader | None = None
        self.inquiries: list[tuple[End, Connection]] = []
        """Of peers that ask for the leader."""
        self.confirmed_at = 0.0
        self.news: list[Event | Shard] = []
        """What was said of the current crew: repeated whenever a leader is joined."""
        self._seen: tuple[TermRecord | None, TermLease] | None = None
        self._since = 0.0
        self._beat_at = 0.0
        self._voted = Term(0), Generation(0)
        self._claiming = False

    def live(self) -> None:
        self.machine.lease_until = None
        self._attend()
        self._seek()
        self._report_workers()

    def now(self) -> float:
        return self.machine.now()

    # --- disk ---

    def disk(self, operation: Callable[[], T], then: Callable[[T], None]) -> None:
        """On a thread of its own: a hanging run directory stops nothing else."""
        machine, boot = self.machine, self.machine.boots
        slow = self.cluster.shape.disk_seconds

        def perform() -> None:
            if self.alive and machine.boots == boot:
                result = operation()
                answer(lambda: self.deliver(lambda: then(result)))

        def answer(call: Callable[[], None]) -> None:
            if machine.disk_reachable:
                machine.clock.after(machine.random.uniform(0.001, slow), call)
            else:
                machine.disk_waits.append(call)

        if machine.disk_reachable or machine.random.random() < 0.3:
            machine.clock.after(machine.random.uniform(0.001, slow), perform)
        else:
            machine.disk_waits.append(perform)

    # --- who leads ---

    def _seek(self) -> None:
        if self.links and not self.cluster.succession:
            self.timer(SEEK_SECONDS, self._seek)
            return
        disk, began = self.cluster.disk, self.now()

        def look() -> tuple[TermRecord | None, TermLease]:
            holder = disk.newest()
            return holder, disk.leases.get(holder.term, TermLease()) if holder is not None else TermLease()

        self.disk(look, lambda seen: self._saw(seen, began))

    def _saw(self, seen: tuple[TermRecord | None, TermLease], began: float) -> None:
        self.timer(SEEK_SECONDS, self._seek)
        if seen != self._seen:
            self._seen, self._since = seen, self.now()
        holder, lease = seen
        here = holder is not None and holder.allocation == str(self.start)
        if holder is not None and here and not lease.released:
            self._dial(holder)
        if self.links and not self.cluster.succession:
            return
        if self._claiming or self.leader is not None or (holder is not None and holder.term in self.links):
            return
        claims, _ = may_claim(
            holder=holder.node if holder is not None else None,
            released=lease.released,
            unchanged_for=began - self._since,
            same_allocation=here,
            turn=self.index and FIRST_CLAIM_TURN_SECONDS + self.index * SEEK_SECONDS,
            timing=self.cluster.rules.timing,
            own_past=here and holder is not None and holder.node == self.machine.name,
        )
        if claims:
            term = Term(holder.term + 1 if holder is not None else 1)
            record = TermRecord(term, self.machine.name, self.incarnation, "", 0, str(self.start))
            disk = self.cluster.disk
            self._claiming = True
            self.disk(lambda: disk.claim(record), lambda won: self._claimed(record, won))

    def _claimed(self, record: TermRecord, won: bool) -> None:
        self._claiming = False
        if won:
            self.leader = self.cluster.lead(self, record)

    def _dial(self, record: TermRecord) -> None:
        if record.term in self.links or record.term in self.dialling:
            return
        self.dialling.add(record.term)
        self.timer(
            DIAL_SECONDS if not self.cluster.reaches(self, record) else 2 * self.cluster.network.delay(),
            lambda: self._connect(record),
        )

    def _connect(self, record: TermRecord) -> None:
        self.dialling.discard(record.term)
        leader = self.cluster.leaders.get(record.term)
        if leader is None or leader.gone or not leader.agent.alive:
            return
        if not self.cluster.reaches(self, record) or (self.links and not self.cluster.succession):
            return
        link = Link(record, leader)
        link.end = End(self, lambda message: self._hear(link, message), lambda reason: self._lost(link))
        link.connection = leader.accept(link.end, self)
        self.links[record.term] = link
        self.cluster.lifeline(self, leader)
        self._tell_signals()
        self._beat()
        for event in self.news:
            link.connection.send(link.end, event)

    def signalled(self, why: Termination) -> None:
        self.machine.signals.setdefault(why, self.now())
        self._tell_signals()

    def _tell_signals(self) -> None:
        for why, at in self.machine.signals.items():
            for link in self.links.values():
                link.connection.send(link.end, Signalled(why, self.now() - at))

    def saved(self, crew: Crew, shard: Shard) -> None:
        if not crew.muted:
            self.news = [known for known in self.news if not isinstance(known, Shard)]
            self.news.append(shard)
            self.say(shard)

    def _lost(self, link: Link) -> None:
        if self.links.get(link.record.term) is link:
            del self.links[link.record.term]

    def _hear(self, link: Link, order: Any) -> None:
        if isinstance(order, Confirm):
            self.confirmed_at = self.now()
        if isinstance(order, events.End) and order.term < self.membership.term:
            return
        self._perform(*self.membership.obey(order, self.now()))

    def say(self, event: Event | Shard) -> None:
        for link in self.links.values():
            link.connection.send(link.end, event)

    def report(self, crew: Crew, event: Event) -> None:
        """Of the crew; forgotten when it is ended on purpose."""
        if crew.muted:
            return
        if isinstance(event, Progressed):
            self.news = [known for known in self.news if not isinstance(known, Progressed)]
        self.news.append(event)
        self.say(event)

    # --- the member ---

    def _perform(self, membership: Membership, effects: tuple[Effect, ...]) -> None:
        self.membership = membership
        random, machine = self.machine.random, self.machine
        for effect in effects:
            if not self.alive:
                return
            match effect:
                case KillWorkers():
                    self._forget()
                    self.timer(random.uniform(0.01, 0.3), self._kill)
                case StopWorkers():
                    self._forget()
                    self.timer(random.uniform(0.01, 2.0), machine.kill_crew)
                case StartWorkers(formation):
                    self._start(formation)
                case Acknowledge(term, generation):
                    self._vote(term, generation)
                    self.say(WorldAcknowledged(machine.name, self.incarnation, term, generation))
                case Refuse(term, generation):
                    self.say(WorldRefused(machine.name, self.incarnation, term, generation))
                case ExtendLease(until):
                    machine.extend_lease(until)
                    self.cluster.look()
                case SaveAt(step, stop):
                    if machine.crew is not None:
                        self._order(machine.crew, cadence.Order(step, stop))
                case LookAt(probe):
                    self._look_at(probe)
                case Fence(reason):
                    machine.kill_crew()
                    for end, connection in self.inquiries:
                        connection.send(end, Reach.ENDED)
                    self.cluster.end_agent(self, reason)
                case Retire():
                    machine.kill_crew()
                    machine.keeper = False
                    self.cluster.end_agent(self, "retired")
                case _:
                    assert_never(effect)

    def _order(self, crew: Crew, order: cadence.Order) -> None:
        changed, crew.page_order = order != crew.page_order, order
        if not crew.holding or not changed:
            return
        if order == cadence.LET_GO:
            self.timer(0.1, lambda: self.left(crew, returned=False))
        else:
            crew.holding = False
            crew.see_order()

    def _look_at(self, probe: Probe) -> None:
        network, machine = self.cluster.network, self.machine
        suspect = self.cluster.machines[probe.suspect]

        def answering() -> SimulatedAgent | None:
            agent = suspect.agent
            if agent is None or not agent.runs or agent.incarnation != probe.incarnation or not suspect.powered:
                return None
            return agent if network.reachable(machine.name, probe.suspect) else None

        def say(found: Reach) -> None:
            self.say(PeerAnswered(machine.name, probe.suspect, probe.incarnation, found, "no answer"))

        def connect() -> None:
            agent = answering()
            if agent is None:
                say(Reach.SILENT)
                return
            here, there = End(self, say, lambda reason: None), End(agent, lambda message: None, lambda reason: None)
            connection = Connection(network, here, there)
            agent.inquiries.append((there, connection))
            connection.send(there, Reach.ANSWERS)

        self.timer(PROBE_SECONDS if answering() is None else 2 * network.delay(), connect)

    def _vote(self, term: Term, generation: Generation) -> None:
        if generation < self._voted[1] or (generation == self._voted[1] and term != self._voted[0]):
            self.cluster.violate(f"{self.incarnation} acknowledges {(term, generation)} after {self._voted}")
        self._voted = term, generation

    def _forget(self) -> None:
        self.news = []
        if self.machine.crew is not None:
            self.machine.crew.muted = True

    def _kill(self) -> None:
        self.machine.kill_crew()
        self._perform(*self.membership.workers_gone())

    def _start(self, formation: Formation) -> None:
        self.news = []
        crew = self.machine.start_crew(formation)
        self.cluster.started(self.machine, crew)
        self.timer(self.machine.random.uniform(0.1, 1.0), lambda: self._ready(crew))

    def _ready(self, crew: Crew) -> None:
        if not crew.ended and self.machine.crew is crew:
            crew.ready = True
            self.report(crew, WorkersReady(self.machine.name, crew.formation.generation))

    def worker_failed(self, crew: Crew, kind: FailureKind, what: str) -> None:
        rank = min(crew.ranks)
        crew.ranks.discard(rank)
        failure = Failure(kind, what, crew.step)
        event = WorkerFailed(self.machine.name, self.incarnation, crew.formation.generation, rank, failure)
        self.timer(0.01, lambda: self.report(crew, event))

    def progressed(self, crew: Crew) -> None:
        event = Progressed(self.machine.name, crew.formation.generation, crew.step, None)
        self.timer(0.02, lambda: self.report(crew, event))

    def left(self, crew: Crew, *, returned: bool) -> None:
        """All workers ended well."""
        name, generation = self.machine.name, crew.formation.generation
        for rank in sorted(crew.ranks):
            if returned:
                self.report(crew, WorkerReturned(name, generation, rank, crew.step))
            else:
                self.report(crew, WorkerStopped(name, generation, rank))
        crew.ranks.clear()
        crew.ended = True

    def _report_workers(self) -> None:
        crew = self.machine.crew
        member = crew.formation.member(self.machine.name) if crew is not None else None
        if crew is not None and member is not None and not crew.muted:
            workers = (WorkerReport(rank, 0, crew.phase, crew.step, 0.0, None, None, None) for rank in member.ranks())
            self.say(NodeReported(self.machine.name, crew.formation.generation, tuple(workers)))
        self.timer(REPORT_SECONDS, self._report_workers)

    def _beat(self) -> None:
        at = self.now()
        self._beat_at = at + self.cluster.rules.timing.interval
        self.membership = self.membership.beat(at)
        beat = NodeHeard(self.machine.name, self.incarnation, self.membership.promised, self.membership.sequence)
        for link in self.links.values():
            self.cluster.heartbeat(self, link.leader, beat)
            if at - self.confirmed_at > 2 * self.cluster.rules.timing.interval:
                link.connection.send(link.end, beat)

    def _attend(self) -> None:
        self._perform(*self.membership.tick(self.now()))
        if not self.alive:
            return
        if self.links and self.now() >= self._beat_at:
            self._beat()
        self.timer(TICK_SECONDS, self._attend)
