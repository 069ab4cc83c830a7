"""A node's hardware and its processes: page, pool, workers, keeper; and the shared disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, ClassVar

from hpcft import cadence
from hpcft.events import CheckpointRef, Event, Formation, Termination, Verdict
from hpcft.ids import Generation, NodeId, Rank, Step, Term
from hpcft.terms import TermLease, TermRecord
from tests.simulation.clock import Call, Clock

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent

POOL_KILL_SECONDS = 0.2
"""From the end of a lease, or of the agent, to the end of the workers, at most."""


class Process:
    """Something that can be stopped and killed. What reaches it while it is stopped waits."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.alive = True
        self.stopped = False
        self._waiting: list[tuple[bool, Call]] = []

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped and not self.machine.frozen

    def deliver(self, call: Call, *, timer: bool = False) -> None:
        if not self.alive:
            return
        if self.stopped or self.machine.frozen:
            self._waiting.append((timer, call))
        else:
            call()

    def resume(self) -> None:
        """All that waited happens now: messages in their order, timers before or after them."""
        waiting, self._waiting = self._waiting, []
        if self.machine.random.random() < 0.5:
            waiting.sort(key=lambda item: not item[0])
        for timer, call in waiting:
            self.deliver(call, timer=timer)

    def timer(self, seconds: float, call: Call) -> None:
        """After `seconds` of this machine's clock."""
        boot = self.machine.boots

        def ring() -> None:
            if self.machine.boots == boot:
                self.deliver(call, timer=True)

        self.machine.clock.after(seconds / self.machine.rate, ring)


@dataclass(slots=True)
class Crew:
    """The workers of one node in one generation."""

    formation: Formation
    ranks: set[Rank]
    """Living ones."""
    ready: bool = False
    step: Step = Step(0)
    page_order: cadence.Order | None = None
    """What the agent has written into the page; read at the end of a step, as `worker.run` does it."""
    order: cadence.Order | None = None
    holding: bool = False
    """It has saved where it is to stop, and waits for the leader's word."""
    saving: bool = False
    ended: bool = False
    muted: bool = False
    """The agent ends them on purpose: what becomes of them is no news."""

    waits: ClassVar[bool] = True
    """False only in a mutant: whoever has saved last ends at once."""

    @property
    def phase(self) -> str:
        return "done" if self.ended else "checkpoint" if self.holding or self.saving else "train"

    def see_order(self) -> None:
        """For whom the step is over, the order does not exist."""
        order = self.page_order
        if order is not None and order != cadence.LET_GO:
            self.order = order if order.step >= self.step else None

    @property
    def world(self) -> tuple[Term, Generation]:
        return self.formation.term, self.formation.generation


class Machine:
    """One node: power, clock, page, pool and keeper."""

    lease_counts = True
    """False only in a mutant: neither the pool nor the workers look at the lease."""

    def __init__(self, name: NodeId, clock: Clock, random: Random, workers: int, rate: float, offset: float) -> None:
        self.name = name
        self.clock = clock
        self.random = random
        self.workers = workers
        self.rate = rate
        self.offset = offset
        self.powered = True
        self.frozen = False
        self.disk_reachable = True
        self.boots = 0
        self.agent: SimulatedAgent | None = None
        self.lease_until: float | None = None
        """The page's: none is in force before the first one is written."""
        self.crew: Crew | None = None
        self.keeper = False
        self.signals: dict[Termination, float] = {}
        """When each came, on this machine's clock; in the page, where it outlives an agent."""
        self.disk_waits: list[Call] = []
        self._watched = False
        self.on_crew_lost: Callable[[Machine, Crew], None] = lambda machine, crew: None

    def now(self) -> float:
        return self.offset + self.rate * self.clock.now

    def trains(self) -> tuple[Term, Generation] | None:
        """The world whose next step a worker of this node could begin at this very moment."""
        crew = self.crew
        if crew is None or not crew.ranks or not self.powered or self.frozen:
            return None
        if self.lease_counts and self.lease_until is not None and self.now() >= self.lease_until:
            return None
        return crew.world

    # --- the pool ---

    def extend_lease(self, until: float) -> None:
        self.lease_until = until
        if not self._watched:
            self._watched = True
            self._watch(self.boots)

    def _watch(self, boot: int) -> None:
        """The pool's look at the lease; it does not need the agent."""
        if self.boots != boot:
            return
        self._watched = False
        if self.lease_until is None or self.crew is None:
            return
        left = (self.lease_until - self.now()) / self.rate
        if left > 0 or self.frozen:
            self._watched = True
            self.clock.after(max(left, 0.05), lambda: self._watch(boot))
        elif self.lease_counts:
            self.clock.after(self.random.uniform(0.0, POOL_KILL_SECONDS), lambda: self._fenced(boot))

    def _fenced(self, boot: int) -> None:
        if self.boots != boot or self.lease_until is None:
            return
        if self.now() >= self.lease_until:
            self.kill_crew()
        else:
            self.extend_lease(self.lease_until)

    def start_crew(self, formation: Formation) -> Crew:
        member = formation.member(self.name)
        assert member is not None
        crew = Crew(formation, {Rank(rank) for rank in member.ranks()})
        crew.step = formation.restore.step if formation.restore else Step(0)
        self.crew = crew
        if not self._watched:
            self._watched = True
            self._watch(self.boots)
        return crew

    def kill_crew(self) -> None:
        crew, self.crew = self.crew, None
        if crew is not None:
            crew.ranks.clear()
            crew.ended = True
            self.on_crew_lost(self, crew)


@dataclass(frozen=True, slots=True)
class Shard:
    """A node's ranks have written their files of a step, or could not."""

    node: NodeId
    generation: int
    step: Step
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Signalled:
    """What an agent says of a signal of Slurm's; why it was sent, Slurm itself would say when asked."""

    why: Termination
    age: float


@dataclass(slots=True)
class JournalFile:
    term: Term
    predecessor: JournalFile | None
    replayed: int
    lines: list[tuple[float, Event]] = field(default_factory=list)


@dataclass(slots=True)
class Disk:
    """The run directory. Operations of a machine that cannot reach it happen when it can again, or have happened
    just before, with the answer outstanding."""

    terms: list[TermRecord] = field(default_factory=list)
    leases: dict[Term, TermLease] = field(default_factory=dict)
    journals: list[JournalFile] = field(default_factory=list)
    checkpoints: set[CheckpointRef] = field(default_factory=set)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def newest(self) -> TermRecord | None:
        return self.terms[-1] if self.terms else None

    def claim(self, record: TermRecord) -> bool:
        if record.term != len(self.terms) + 1:
            return False
        self.terms.append(record)
        return True
