"""Why a run did what it did: `hpcft explain`, for an operator who was not there.

`explain` makes of the journal's records one paragraph for each matter that something was decided about: what was seen,
what was decided, in the policy's own words, and what it cost. It is pure. `History` is the command's answer: these
paragraphs, and the reasons of the cadence, which the leader puts into its status.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from hpcft import journal, status
from hpcft.events import (
    AskPeer,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointKept,
    CheckpointsFound,
    CheckpointSkipped,
    Commit,
    Conclude,
    Decided,
    Evict,
    Formation,
    HaltWorkers,
    PeerAnswered,
    PersistCopies,
    Progressed,
    Propose,
    Reach,
    Requeue,
    RequeueAccepted,
    RequeueRefused,
    SaveAndStop,
    StopAsked,
    TermBegan,
    TerminationAsked,
    WorkerFailed,
    WorkersReady,
)
from hpcft.ids import Generation, NodeId, Step
from hpcft.journal import Record
from hpcft.rundir import RunDirectory
from hpcft.transitions import apply
from hpcft.units import counted, human_duration
from hpcft.world import Incident, World

SCHEMA = 1
_AT_ONCE_SECONDS = 0.1
"""What comes this soon after the beginning of its matter is said without a time."""
_SHOWN_FAILURES = 3
"""Of the further failures in a recovery; the others are counted."""


class Kind(StrEnum):
    """What a paragraph is about."""

    START = "start"
    """An allocation begins to train, or to go on."""
    FAILURE = "failure"
    """Training was interrupted, and what was done about it."""
    NOTICE = "notice"
    """An incident that cost no time."""
    NODE = "node"
    """A node was silent, or went, and no training was interrupted."""
    SKIPPED = "skipped"
    """Saves that were left out."""
    LEAVING = "leaving"
    """The run was asked to leave its allocation."""
    END = "end"
    """The verdict of a start."""


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that was seen."""

    at: float
    """On the run clock, in seconds."""
    what: str


@dataclass(frozen=True, slots=True)
class Decision:
    at: float
    """On the run clock, in seconds."""
    actions: tuple[str, ...]
    """As the journal names them."""
    reason: str
    """The policy's sentence."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a world."""

    nodes: int
    ranks: int

    @classmethod
    def of(cls, formation: Formation) -> Size:
        return cls(len(formation.members), formation.world_size)

    def __str__(self) -> str:
        return f"{counted(self.ranks, 'rank')} on {counted(self.nodes, 'node')}"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """One matter, from its first sign to its end."""

    kind: Kind
    at: float
    """On the run clock, in seconds."""
    wall: datetime
    start: int
    """The number of the start it belongs to."""
    title: str
    seen: tuple[Sign, ...] = ()
    """Beside what the title says."""
    decisions: tuple[Decision, ...] = ()
    cost: str = ""
    seconds: float | None = None
    """Of a start: until it trained; a failure: until training went on; leaving: until the end; an end: in all."""
    steps: int | None = None
    """Of a failure: that were lost; an end: that are completed; or saves that were left out."""
    before: Size | None = None
    after: Size | None = None
    """The world before it, and the one that was formed because of it."""
    restored: Mapping[str, Any] | None = None
    """The state that one began from, as `hpcft status --json` has it; None also where no world was formed."""
    incident: Mapping[str, Any] | None = None
    verdict: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "at_seconds": self.at,
            "time": self.wall.isoformat(timespec="milliseconds"),
            "start": self.start,
            "title": self.title,
            "seen": [{"at_seconds": each.at, "what": each.what} for each in self.seen],
            "decisions": [
                {"at_seconds": each.at, "actions": list(each.actions), "reason": each.reason} for each in self.decisions
            ],
            "cost": self.cost,
            "seconds": self.seconds,
            "steps": self.steps,
            "world_before": None if self.before is None else asdict(self.before),
            "world_after": None if self.after is None else asdict(self.after),
            "restored": self.restored,
            "incident": self.incident,
            "verdict": self.verdict,
        }

    def lines(self, width: int) -> Iterator[str]:
        began = time.strftime("%Y-%m-%d %H:%M:%S", self.wall.astimezone().timetuple())
        yield from status.wrapped(f"{began}  {self.title}", width, 2, hang=3)
        rows = [(each.at, "seen", each.what) for each in self.seen if each.what not in self.title]
        # that a proposal took effect is in the cost; what the title says need not be said twice
        told = [each for each in self.decisions if each.actions != ("commit",) and each.reason not in self.title]
        if self.verdict is None:
            rows += [(each.at, "decided", each.reason) for each in told]
        for at, name, text in sorted(rows, key=lambda row: row[0]):
            yield from _row(name, f"{_later(at - self.at)}{text}", width)
        if self.before is not None and self.after is not None and self.before != self.after:
            yield from _row("world", f"{self.after}, before it {self.before}", width)
        if self.cost:
            yield from _row("cost", self.cost, width)


def _row(name: str, text: str, width: int) -> list[str]:
    return status.wrapped(f"{name:<9} {text}", width, 5, hang=10)


def _later(seconds: float) -> str:
    return f"after {human_duration(seconds)}: " if seconds >= _AT_ONCE_SECONDS else ""


# --- from the journal to paragraphs ---


def explain(records: Iterable[Record]) -> tuple[Paragraph, ...]:
    """What the journal tells, in the order in which the matters began. Pure."""
    story = _Story()
    for record in records:
        story.hear(record)
    return story.told()


@dataclass(slots=True, eq=False)
class _Matter:
    """A paragraph that is being written."""

    place: int
    """Among all of them."""
    kind: Kind
    at: float
    wall: datetime
    start: int
    title: str
    seen: list[Sign] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    failures: list[Sign] = field(default_factory=list)
    """Further ones, after the one that began it."""
    number: int | None = None
    """Of the incident."""
    before: Size | None = None
    formed: Formation | None = None
    committed_at: float | None = None
    """When the latest world that was decided here took effect."""
    until: float | None = None
    steps: int | None = None
    first: Step | None = None
    """That was skipped."""
    generation: Generation | None = None
    newest: Step | None = None
    """Of the checkpoints there were then."""
    cost: str = ""
    verdict: Mapping[str, Any] | None = None

    def see(self, at: float, what: str) -> None:
        self.seen.append(Sign(at, what))


class _Story:
    """Follows the world from record to record, and notes what each matter consists of."""

    def __init__(self) -> None:
        self._world = World()
        self._matters: list[_Matter] = []
        self._start: _Matter | None = None
        """That has not trained yet."""
        self._leaving: _Matter | None = None
        self._incidents: dict[int, _Matter] = {}
        self._silent: dict[NodeId, _Matter] = {}
        self._plain = False
        """A plain command: of its steps nothing is known."""

    def hear(self, record: Record) -> None:
        before, event = self._world, record.event
        self._world = apply(before, event, record.at)
        self._see_incidents(before, record)
        match event:
            case TermBegan():
                self._begin_term(before, record, event)
            case CheckpointsFound() if self._start is not None:
                newest = self._world.restore
                if event.branch:
                    self._start.see(record.at, event.branch)
                if newest is not None:
                    self._start.see(record.at, f"the newest checkpoint of its lineage is of step {newest.step}")
            case WorkersReady(counts_steps=False):
                self._plain = True
            case WorkerFailed() if len(self._world.failures) > len(before.failures):
                matter = self._open_failure()
                if matter is not None:
                    matter.failures.append(Sign(record.at, f"rank {event.rank} on {event.node}: {event.failure.what}"))
            case Progressed() if event.node in self._silent:
                # heartbeats are not journaled: this is the first sign that what happens to it later is another matter
                self._silent.pop(event.node).see(record.at, f"{event.node} trains on: step {event.step}")
            case PeerAnswered():
                matter = self._silent.get(event.suspect) or self._open_failure()
                if matter is not None:
                    matter.see(record.at, _answer(event))
            case CheckpointSkipped() if self._world is not before:
                self._skip(record, event)
            case CheckpointFailed() | CheckpointDamaged() | CheckpointKept():
                self._see_checkpoint(before, record, event)
            case TerminationAsked():
                self._leave(record, f"{event.why.value}, {human_duration(event.seconds_left)} left")
            case StopAsked():
                self._leave(record, f"stopped by {event.by}")
            case RequeueAccepted():
                self._see_requeue(record, "Slurm requeues the job")
            case RequeueRefused():
                self._see_requeue(record, f"Slurm refused to requeue the job: {event.reason}")
            case Decided():
                self._decide(before, record, event)
            case _:
                pass
        if self._start is not None and self._world.training_since is not None:
            self._start.until = self._world.training_since
            self._start = None

    def _open(self, kind: Kind, record: Record, title: str) -> _Matter:
        matter = _Matter(len(self._matters), kind, record.at, record.wall, self._world.starts, title)
        self._matters.append(matter)
        return matter

    def _open_failure(self) -> _Matter | None:
        incident = self._world.open_incident
        return None if incident is None else self._incidents.get(incident.number)

    # --- what is seen ---

    def _begin_term(self, before: World, record: Record, event: TermBegan) -> None:
        self._silent.clear()
        led = f"{event.node} leads (term {event.term})"
        if event.allocation == before.allocation and before.verdict is None:
            matter = self._open_failure() or self._start
            if matter is not None:
                alone = f", after {human_duration(event.leaderless)} without a leader" if event.leaderless else ""
                matter.see(record.at, f"{led}{alone}")
            return
        self._leaving = None
        self._start = matter = self._open(Kind.START, record, f"start {self._world.starts}: {event.allocation}")
        # the run clock has run since the allocation had its nodes
        matter.at -= event.leaderless
        matter.wall -= timedelta(seconds=event.leaderless)
        matter.see(matter.at, f"{counted(len(event.nodes), 'node')} in the allocation; {led}")

    def _see_incidents(self, before: World, record: Record) -> None:
        for incident in self._world.incidents[len(before.incidents) :]:
            evicted = record.event.actions if isinstance(record.event, Decided) else ()
            silences = [self._silent.pop(each.node, None) for each in evicted if isinstance(each, Evict)]
            matter = next((each for each in silences if each is not None), None)
            if matter is None:
                matter = self._open(Kind.FAILURE, record, "")
            matter.kind = Kind.FAILURE if incident.open else Kind.NOTICE
            matter.number, matter.generation = incident.number, incident.generation
            matter.before = None if before.formation is None else Size.of(before.formation)
            self._incidents[incident.number] = matter

    def _see_checkpoint(
        self, before: World, record: Record, event: CheckpointFailed | CheckpointDamaged | CheckpointKept
    ) -> None:
        """In the middle of a failure; else it is an incident of its own."""
        matter = self._open_failure()
        if matter is None or self._world is before:
            return
        match event:
            case CheckpointFailed():
                matter.see(record.at, f"the checkpoint of step {event.step} failed: {event.reason}")
            case CheckpointDamaged():
                step = event.checkpoint.step
                matter.see(record.at, f"the checkpoint of step {step} is damaged ({event.detail}), and is set aside")
            case CheckpointKept():
                matter.see(record.at, f"the checkpoint of step {event.checkpoint.step} stays: {event.why}")

    def _skip(self, record: Record, event: CheckpointSkipped) -> None:
        matter = self._matters[-1] if self._matters else None
        if matter is None or matter.kind is not Kind.SKIPPED or matter.generation != event.generation:
            matter = self._open(Kind.SKIPPED, record, "")
            matter.first, matter.generation, matter.steps = event.step, event.generation, 0
        assert matter.first is not None and matter.steps is not None
        matter.steps += 1
        which = f"step {event.step}" if event.step == matter.first else f"steps {matter.first} to {event.step}"
        matter.title = f"{counted(matter.steps, 'save')} left out, of {which}"
        matter.seen = [Sign(record.at, event.reason)]
        newest = self._world.restore
        matter.cost = "training went on; a failure then would have gone back to " + (
            "the beginning" if newest is None else f"the checkpoint of step {newest.step}"
        )
        matter.cost += ", or to a newer copy in memory"

    def _leave(self, record: Record, why: str) -> None:
        """A clearer word may follow the first one."""
        if self._leaving is None:
            self._leaving = self._open(Kind.LEAVING, record, f"the run is to leave: {why}")
        else:
            self._leaving.see(record.at, why)

    def _see_requeue(self, record: Record, what: str) -> None:
        matter = self._leaving or self._open_failure() or self._start
        if matter is not None:
            matter.see(record.at, what)

    # --- what is decided ---

    def _decide(self, before: World, record: Record, decided: Decided) -> None:
        decision = Decision(record.at, tuple(each.action for each in decided.actions), decided.reason)
        matter = self._matter_of(record, decided)
        matter.decisions.append(decision)
        for action in decided.actions:
            match action:
                case Propose():
                    if matter.before is None and before.previous:
                        ranks = sum(member.workers for member in before.previous)
                        matter.before = Size(len(before.previous), ranks)
                    matter.formed, matter.committed_at = action.formation, None
                case Commit():
                    matter.committed_at = record.at
                case Conclude():
                    self._end(record, matter, action)
                case _:
                    pass

    def _matter_of(self, record: Record, decided: Decided) -> _Matter:
        """What the decision is about."""
        actions = decided.actions
        if any(isinstance(each, Conclude) for each in actions):
            return self._open(Kind.END, record, "")
        failure = self._open_failure()
        if asked := [each.suspect for each in actions if isinstance(each, AskPeer)]:
            matter = failure or self._open(Kind.NODE, record, decided.reason)
            self._silent |= dict.fromkeys(asked, matter)
            return matter
        if gone := [each.node for each in actions if isinstance(each, Evict)]:
            silences = [self._silent.pop(node) for node in gone if node in self._silent]
            return failure or (silences[0] if silences else self._open(Kind.NODE, record, decided.reason))
        leaves = SaveAndStop | PersistCopies | HaltWorkers | Requeue
        if self._leaving is not None and all(isinstance(each, leaves) for each in actions):
            return self._leaving
        # a start takes over what the one before could not recover from; what fails in it is its own
        latest = [each for each in (failure, self._start) if each is not None]
        if latest:
            return max(latest, key=lambda each: each.place)
        return self._open(Kind.NODE, record, decided.reason)

    def _end(self, record: Record, matter: _Matter, action: Conclude) -> None:
        world, verdict = self._world, action.verdict
        if self._leaving is not None:
            self._leaving.until = record.at
        self._start = self._leaving = None
        matter.title = f"{verdict.outcome.value} (exit code {verdict.exit_code}): {verdict.reason}"
        matter.verdict = status.verdict_as_dict(verdict)
        matter.until = record.at
        counts = counted(len(world.incidents), "incident")
        if self._plain:
            matter.cost = f"{human_duration(record.at)} in all, {counts}"
            return
        matter.steps = world.step
        seconds = asdict(world.accounts(record.at))
        goodput = {"goodput": world.goodput(record.at), "seconds": seconds, "elapsed_seconds": record.at}
        matter.cost = f"step {world.step}; goodput {status.goodput(goodput)}; {counts}"

    # --- what is told ---

    def told(self) -> tuple[Paragraph, ...]:
        return tuple(self._paragraph(each) for each in self._matters)

    def _paragraph(self, matter: _Matter) -> Paragraph:
        told = Paragraph(
            matter.kind,
            matter.at,
            matter.wall,
            matter.start,
            matter.title,
            tuple(matter.seen),
            tuple(matter.decisions),
            matter.cost,
            steps=matter.steps,
            before=matter.before,
            after=None if matter.formed is None else Size.of(matter.formed),
            restored=None if matter.formed is None else status.restored(matter.formed),
            verdict=matter.verdict,
        )
        match matter.kind:
            case Kind.START:
                took = None if matter.until is None else matter.until - matter.at
                over = matter.start < self._world.starts or self._world.verdict is not None
                none = "it did not train" if over else "it does not train yet"
                cost = none if took is None else f"training began after {human_duration(took)}"
                return replace(told, cost=cost, seconds=took)
            case Kind.LEAVING:
                took = None if matter.until is None else matter.until - matter.at
                return replace(
                    told, cost="" if took is None else f"it ended after {human_duration(took)}", seconds=took
                )
            case Kind.END:
                return replace(told, seconds=matter.until)
            case Kind.FAILURE | Kind.NOTICE:
                assert matter.number is not None
                return self._of_incident(told, matter, self._world.incidents[matter.number - 1])
            case Kind.NODE | Kind.SKIPPED:
                return told

    def _of_incident(self, told: Paragraph, matter: _Matter, incident: Incident) -> Paragraph:
        facts = status.incident_as_dict(incident)
        title = status.title_of(facts)
        others = [each for each in matter.failures if each.what not in title]
        if len(others) > _SHOWN_FAILURES:
            more = counted(len(others) - _SHOWN_FAILURES, "more rank")
            others = [*others[:_SHOWN_FAILURES], Sign(others[_SHOWN_FAILURES].at, f"{more} failed")]
        decided = told.decisions
        if matter.kind is Kind.NOTICE:  # nothing had to be done about it
            decided = (Decision(incident.detected_at, (), incident.decision),)
        return replace(
            told,
            title=title,
            seen=tuple(sorted((*told.seen, *others), key=lambda sign: sign.at)),
            decisions=decided,
            cost=_cost(facts, matter, incident, ended=self._world.verdict is not None),
            seconds=incident.downtime,
            steps=incident.steps_lost,
            incident=facts,
        )


def _answer(event: PeerAnswered) -> str:
    match event.found:
        case Reach.ANSWERS:
            return f"{event.suspect} answers {event.node}: the way between it and the leader is broken"
        case Reach.ENDED:
            return f"{event.suspect} has told {event.node} that its workers have ended"
        case Reach.SILENT:
            return f"{event.node} does not reach {event.suspect} either: {event.detail}"


def _cost(facts: Mapping[str, Any], matter: _Matter, incident: Incident, *, ended: bool) -> str:
    """With how long it took until workers were started again, and who pays."""
    cost = status.cost_of(facts, ended=ended)
    if matter.kind is Kind.NOTICE:
        return cost
    if matter.committed_at is not None:
        cost += f" (workers started after {human_duration(matter.committed_at - incident.detected_at)})"
    paid = "it counts for no budget" if incident.budget is None else f"it counts as a failure of {incident.budget}"
    return f"{cost}; {paid}"


# --- the command ---


@dataclass(frozen=True, slots=True)
class History:
    """A run and its reasons."""

    run: Mapping[str, Any]
    """Its status, as `hpcft status` has it."""
    paragraphs: tuple[Paragraph, ...]
    """The newest last."""
    earlier: int = 0
    """So many before them were not asked for."""

    def last(self, number: int) -> History:
        left = max(0, len(self.paragraphs) - number)
        return replace(self, paragraphs=self.paragraphs[left:], earlier=self.earlier + left)

    def as_dict(self) -> dict[str, Any]:
        about = {key: self.run[key] for key in ("run", "name", "directory", "state")}
        return {
            "schema": SCHEMA,
            **about,
            "earlier": self.earlier,
            "paragraphs": [each.as_dict() for each in self.paragraphs],
            "cadence": self.run.get("cadence"),
        }

    def text(self, width: int) -> str:
        return "\n".join(self._lines(width))

    def _lines(self, width: int) -> Iterator[str]:
        yield status.headline(self.run)
        if self.earlier:
            yield f"  {self.earlier} earlier"
        for each in self.paragraphs:
            yield ""
            yield from each.lines(width)
        cadence = self.run.get("cadence")
        if cadence is None:
            return
        yield ""
        yield "  how often is saved"
        # an earlier version's file does not have them one by one
        reasons: Mapping[str, str] = cadence.get("because") or {"interval": cadence["reason"]}
        for name, sentence in reasons.items():
            if sentence:
                yield from _row(name, sentence, width)


def read(run: RunDirectory) -> History:
    """All that the run's journal and status tell.

    Raises:
        DamagedError: a line of the journal is not what was written.
        UnusableError: the status file cannot be read. OSError: the journal cannot.
    """
    return History(status.read(run), explain(journal.records(run.journal)))
