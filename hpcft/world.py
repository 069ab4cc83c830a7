"""The picture of a run: what a leader knows, and what can be read off it.

Theory of operation
-------------------
`World` is an immutable value; `transitions.apply` makes the next one of it and an event. All its times are on the
*run clock*: seconds for which the run has held nodes, without the time in the queue; the journal carries it from one
leader to the next. It is never compared with a clock of another machine.

The life of a start, by `Phase` (docs/architecture.md has the same table as a picture)::

    GATHERING ──propose──▶ FORMING ──commit──▶ RUNNING ──propose──▶ FORMING …
        │                     │                   ├──save and stop──▶ LEAVING ─┐
        └──────── requeue or conclude ────────────┴─────────────────▶ ENDED ◀──┘

Two kinds of facts live side by side: history (incidents, budgets, checkpoints, goodput), which the journal
carries over from one leader to the next, and presence (nodes, acknowledgements, ready workers), which is
forgotten whenever a term begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from hpcft.events import (
    Action,
    CheckpointDamaged,
    CheckpointKept,
    CheckpointRef,
    Commit,
    Conclude,
    FailureKind,
    Formation,
    Member,
    NodeReported,
    PeerAnswered,
    Propose,
    Requeue,
    SaveAndStop,
    TerminationAsked,
    Verdict,
    WorkerFailed,
)
from hpcft.holdings import Holdings
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term


class Phase(StrEnum):
    GATHERING = "gathering"
    """Waiting for nodes."""
    FORMING = "forming"
    """A world is proposed; its acknowledgements are awaited."""
    RUNNING = "running"
    """The workers of the generation have been started."""
    LEAVING = "leaving"
    """The last checkpoint of this start is being made, or Slurm was asked to requeue."""
    ENDED = "ended"


TRANSITIONS: Final[Mapping[type[Action], tuple[frozenset[Phase], Phase]]] = {
    Propose: (frozenset({Phase.GATHERING, Phase.FORMING, Phase.RUNNING}), Phase.FORMING),
    Commit: (frozenset({Phase.FORMING}), Phase.RUNNING),
    SaveAndStop: (frozenset({Phase.RUNNING}), Phase.LEAVING),
    Requeue: (frozenset(Phase) - {Phase.ENDED}, Phase.LEAVING),
    Conclude: (frozenset(Phase) - {Phase.ENDED}, Phase.ENDED),
}
"""From which phases an action may come, and where it leads; what is not listed changes no phase. The state diagram
of docs/architecture.md is printed from this."""


class Budget(StrEnum):
    """Who pays for a failure."""

    INFRASTRUCTURE = "infrastructure"
    USER_CODE = "user code"
    PREEMPTION = "preemption"


@dataclass(frozen=True, slots=True)
class Node:
    """An agent in office, as the leader sees it."""

    id: NodeId
    incarnation: Incarnation
    address: str
    workers: int
    port: int
    heard_at: float
    connected: bool = True
    workers_gone: bool = False
    keeper_gone: bool = False
    gone_at: float = 0.0
    """When the stream or the lifeline closed, if it did."""
    asked: NodeId = NodeId("")
    """Who was asked about it since it was last heard."""
    answer: PeerAnswered | None = None


@dataclass(frozen=True, slots=True)
class Incident:
    """One failure from first symptom to first step afterwards."""

    number: int
    cause: str
    culprit: str
    detected_at: float
    generation: Generation
    step: Step
    """Last step completed before it."""
    budget: Budget | None
    decision: str = ""
    resumed_at: float | None = None
    steps_lost: int | None = None
    tail: tuple[str, ...] = ()
    times: int = 1
    """How often the same has happened since; counted where nothing else came between."""

    @property
    def open(self) -> bool:
        return self.resumed_at is None

    @property
    def downtime(self) -> float | None:
        return None if self.resumed_at is None else self.resumed_at - self.detected_at


@dataclass(frozen=True, slots=True)
class Spent:
    """One unit taken from a budget."""

    budget: Budget
    at: float


@dataclass(frozen=True, slots=True)
class Strike:
    """An infrastructure failure that is held against a node."""

    node: NodeId
    at: float


@dataclass(frozen=True, slots=True)
class Save:
    """What a save took, in seconds: see CheckpointCommitted."""

    blocked: float
    lag: float


@dataclass(frozen=True, slots=True)
class Persisting:
    """A state in memory that is being written before the run leaves."""

    snapshot: CheckpointRef
    handed_by: tuple[NodeId, ...]
    """Who writes the copies, one for each member that has made them."""
    since: float
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Undone:
    """The last generation that trained before this one. How far it was is known when its workers have ended."""

    generation: Generation
    step: Step
    """The last one known to be completed by all when it was given up."""
    last_words: tuple[tuple[NodeId, Step], ...] = ()
    """From members that are left: they speak for those that are lost, for all take each step together."""

    @property
    def reached(self) -> Step:
        return max(self.step, min((step for _, step in self.last_words), default=self.step))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that one generation has trained, from `base` (not included) to `end`, and how long that took."""

    base: Step
    end: Step
    seconds: float

    def until(self, step: Step) -> Stretch:
        """The part that a return to `step` leaves."""
        end = min(self.end, max(self.base, step))
        share = (end - self.base) / (self.end - self.base) if self.end > self.base else 0.0
        return Stretch(self.base, end, self.seconds * share)


@dataclass(frozen=True, slots=True)
class Accounts:
    """Where the seconds of the run clock have gone."""

    kept: float
    """Training, on steps that were kept."""
    repeated: float
    """Training, on steps that a rollback has undone."""
    recovery: float
    """Not training, because of a failure."""
    other: float
    """Starting up, and leaving."""


@dataclass(frozen=True, slots=True)
class World:
    # who and where
    run: RunId = RunId("")
    allocation: str = ""
    term: Term = Term(0)
    leader: NodeId = NodeId("")
    expected: tuple[NodeId, ...] = ()
    takeover: bool = False
    lost_leader: NodeId = NodeId("")
    """Whom a takeover follows."""
    term_since: float = 0.0
    # presence: forgotten when a term begins
    phase: Phase = Phase.GATHERING
    phase_since: float = 0.0
    nodes: tuple[Node, ...] = ()
    formation: Formation | None = None
    acknowledged: frozenset[NodeId] = frozenset()
    refused: bool = False
    """A node can never acknowledge the current formation: its number, or a higher one, was promised elsewhere."""
    lease_renewed: bool = False
    ready: frozenset[NodeId] = frozenset()
    progress: Mapping[NodeId, Step] = field(default_factory=dict)
    reports: tuple[NodeReported, ...] = ()
    failures: tuple[WorkerFailed, ...] = ()
    """Of the current generation, in the order they were reported."""
    returned: frozenset[Rank] = frozenset()
    returned_at: float = 0.0
    """When the last of them did."""
    stopped: frozenset[Rank] = frozenset()
    holdings: Holdings = field(default_factory=Holdings)
    persisting: Persisting | None = None
    save_skipped: tuple[Step, str] | None = None
    """The last save of this generation that was left out, and why."""
    lost_members: tuple[NodeId, ...] = ()
    """Members of the current formation that are no longer in office."""
    broken_at: float | None = None
    """When the first worker or member of the current formation was lost."""
    termination: TerminationAsked | None = None
    termination_at: float = 0.0
    stop_asked: str = ""
    stop_asked_at: float = 0.0
    requeue_asked: str = ""
    requeue_accepted: bool = False
    requeue_refused: str = ""
    suspected: CheckpointRef | None = None
    """A rank found it damaged, and the leader is looking at it."""
    examined: CheckpointDamaged | CheckpointKept | None = None
    """What the leader has found of the checkpoint that this generation was to start from."""
    losses: Mapping[NodeId, float] = field(default_factory=dict)
    """Of each member's last step."""
    undone: Undone | None = None
    # history: carried by the journal
    generation: Generation = Generation(0)
    """The highest ever proposed or heard of."""
    previous: tuple[Member, ...] = ()
    """Members of the last world that took effect: a quorum of them must acknowledge the next."""
    previous_term: Term = Term(0)
    """The term in which it took effect."""
    checkpoints: tuple[CheckpointRef, ...] = ()
    """The lineage, oldest first."""
    turned_from: tuple[CheckpointRef, ...] | None = None
    """The lineage before an operator's `--from`, or before none of it was found on disk, until training from there has
    begun: a try that fails before that has changed nothing."""
    saved: CheckpointRef | None = None
    """The newest that has ever been in the lineage: with one, the run never starts from the beginning again."""
    verified: CheckpointRef | None = None
    """The newest that was read back after its commit, and found to be what was written."""
    saves: tuple[Save, ...] = ()
    """Of the latest saves that were measured, the newest last."""
    copies: tuple[float, ...] = ()
    """For how many seconds the latest copies that are not written stopped training."""
    asked: CheckpointRef | None = None
    """The checkpoint that an operator named to start from."""
    incidents: tuple[Incident, ...] = ()
    spent: tuple[Spent, ...] = ()
    strikes: tuple[Strike, ...] = ()
    known_bugs: frozenset[tuple[Step, tuple[str, str, str]]] = frozenset()
    """Steps and signatures at which earlier generations failed; forgotten once the step has been passed."""
    repeated_bug: WorkerFailed | None = None
    """A failure of the training code that came at the same step, with the same words, twice."""
    fruitless: int = 0
    """Generations in a row that failed without passing the highest step seen before."""
    advanced: bool = False
    """This generation has passed it."""
    high_step: Step = Step(0)
    starts: int = 0
    training_since: float | None = None
    """Since when every worker of the generation is ready."""
    base_step: Step = Step(0)
    """The step the generation started from."""
    kept: tuple[Stretch, ...] = ()
    """What generations that have ended have trained, and is not undone; in the order of steps."""
    undone_seconds: float = 0.0
    """Seconds spent in those generations on steps that had to be repeated."""
    recovering: float = 0.0
    """Seconds between generations that failures have cost."""
    idle_since: float = 0.0
    """When the last generation that trained was given up; 0 before the first."""
    skipped: int = 0
    """Saves that were left out because earlier ones were still being written."""
    total_steps: Step | None = None
    """How many steps the program means to make, if it said so."""
    last_reason: str = ""
    """The sentence of the last decision."""
    save_failed: tuple[Step, str] | None = None
    """The last save that did not become a checkpoint, and why."""
    verdict: Verdict | None = None

    def taken(self, step: Step) -> bool:
        """Whether every member has copied or written its share of this step."""
        return self.formation is not None and self.holdings.all_took(step, self.formation)

    def node(self, node: NodeId) -> Node | None:
        return next((known for known in self.nodes if known.id == node), None)

    @property
    def step(self) -> Step:
        """The last step completed by all workers of the generation."""
        if self.formation is None or not self.progress:
            return self.base_step
        complete = len(self.progress) == len(self.formation.members)
        return min(self.progress.values()) if complete else self.base_step

    @property
    def loss(self) -> float | None:
        """The mean over the ranks, as far as it is known."""
        if self.formation is None:
            return None
        members = {member.node: member.workers for member in self.formation.members}
        known = [(loss, members[node]) for node, loss in self.losses.items() if node in members]
        ranks = sum(workers for _, workers in known)
        return sum(loss * workers for loss, workers in known) / ranks if ranks else None

    @property
    def broken(self) -> bool:
        """The current formation has lost workers or members: what is still said of it changes nothing any more."""
        return bool(self.failures or self.lost_members)

    @property
    def fruitless_so_far(self) -> int:
        """Generations in a row without progress, this one included if it has failed."""
        # a damaged checkpoint was set aside, a copy in memory given up: the next try is another, and they are few
        forgotten = any(each.failure.kind is FailureKind.FORGOTTEN for each in self.failures)
        same_again = not (forgotten or isinstance(self.examined, CheckpointDamaged))
        return self.fruitless + (self.phase is Phase.RUNNING and self.broken and not self.advanced and same_again)

    @property
    def open_incident(self) -> Incident | None:
        return self.incidents[-1] if self.incidents and self.incidents[-1].open else None

    @property
    def standing(self) -> tuple[CheckpointRef, ...]:
        """The lineage as another term finds it."""
        return self.checkpoints if self.turned_from is None else self.turned_from

    @property
    def restore(self) -> CheckpointRef | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def goodput(self, now: float) -> float | None:
        """Share of the run clock spent on steps that were kept."""
        return min(1.0, self.accounts(now).kept / now) if now > 0 else None

    def accounts(self, now: float) -> Accounts:
        """Where the time has gone. Steps that are running now count as kept."""
        kept, recovery = sum(each.seconds for each in self.kept), self.recovering
        if self.training_since is None:
            recovery += self.waiting_to_recover(now)
        else:
            until = max(self.training_since, self.trained_until(now))
            kept += until - self.training_since
            recovery += now - until
        return Accounts(kept, self.undone_seconds, recovery, max(0.0, now - kept - self.undone_seconds - recovery))

    def trained_until(self, now: float) -> float:
        """When training ended, if it has: the first loss of a worker stops the others at their next collective."""
        return now if self.broken_at is None else min(now, self.broken_at)

    def waiting_to_recover(self, now: float) -> float:
        """Seconds that the open incident has cost while nothing trained."""
        incident = self.open_incident
        return 0.0 if incident is None else now - max(self.idle_since, incident.detected_at)


def takes_over(before: World, allocation: str, node: NodeId) -> bool:
    """Whether a term of `node` that follows `before` is a takeover: in the same start, from another node's agent."""
    return before.allocation == allocation and before.verdict is None and before.leader != node


def job_of(allocation: str) -> str:
    """An allocation is named after its job and the count of its restarts."""
    return allocation.rpartition(".")[0]
