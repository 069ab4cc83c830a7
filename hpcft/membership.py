"""Who is in, who leads, and when a worker must not take another step.

Theory of operation
-------------------
Three small machines, all pure: time is an argument, effects come back as values.

*The member* (`Membership`) is the agent's side. It promises itself to (term, generation) pairs that only grow,
and acknowledges a world only after every worker of earlier generations on its node is gone. From then on it
refuses everything lower. So of two leaders that both believe in themselves, at most one can gather a world's
acknowledgements, and a world that starts has no predecessor left among its members.

*The lease* covers the nodes that do not answer. A member's workers may train until `lease` seconds after the
*send* time of the last heartbeat that the leader confirmed; then they are killed. The leader evicts a node only
`timeout` seconds after it *received* its last heartbeat. Receipt is never before sending, clocks are only
compared with themselves, and `lease` + the time to kill < `timeout`: so at the moment of an eviction the evicted
workers are dead, whatever the network did. (Gray & Cheriton, "Leases", SOSP 1989; the same argument.)

*The term* decides who may lead at all: a file in the run directory that only one agent can create, renewed as a
lease. Another agent may claim the next term when it has watched the holder's record stand still for a full
lease on its own clock, or when the holder released it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from hpcft.events import (
    Confirm,
    End,
    Forget,
    Formation,
    Halt,
    Keep,
    Member,
    Order,
    OrderSave,
    Persist,
    Prepare,
    Probe,
    Start,
    Verdict,
)
from hpcft.ids import Generation, Incarnation, NodeId, Step, Term


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `lease` is what a member may rely on, `timeout` what the leader waits."""

    interval: float
    suspect: float
    timeout: float

    @property
    def lease(self) -> float:
        """Ends before `timeout` by a margin for killing the workers and for clock drift."""
        return self.timeout * 0.75

    @property
    def patience(self) -> float:
        """For how long a majority may stand in for a run directory that is silent. Who comes from another
        allocation, and asks nobody of that majority, has to wait longer than this."""
        return self.timeout * 12


# --- effects: what the member asks its agent to do ---


@dataclass(frozen=True, slots=True)
class KillWorkers:
    """SIGKILL, no grace; `WorkersGone` must follow when none is left."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopWorkers:
    """TERM, grace, KILL."""


@dataclass(frozen=True, slots=True)
class StartWorkers:
    formation: Formation


@dataclass(frozen=True, slots=True)
class Acknowledge:
    term: Term
    generation: Generation


@dataclass(frozen=True, slots=True)
class Refuse:
    term: Term
    generation: Generation


@dataclass(frozen=True, slots=True)
class ExtendLease:
    until: float


@dataclass(frozen=True, slots=True)
class SaveAt:
    step: Step
    stop: bool
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class KeepCopies:
    """Of this step, and no older ones."""

    generation: Generation
    step: Step


@dataclass(frozen=True, slots=True)
class ForgetCopies:
    generation: Generation
    step: Step
    written: bool
    """But for those that are being written, until they are."""


@dataclass(frozen=True, slots=True)
class WriteCopies:
    order: Persist


@dataclass(frozen=True, slots=True)
class LookAt:
    """See whether the suspect answers, and tell the leader."""

    probe: Probe


@dataclass(frozen=True, slots=True)
class Fence:
    """The lease is over: kill, and end this incarnation."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """The run's start has ended with this verdict."""

    verdict: Verdict


Effect: TypeAlias = (
    KillWorkers
    | StopWorkers
    | StartWorkers
    | Acknowledge
    | Refuse
    | ExtendLease
    | SaveAt
    | KeepCopies
    | ForgetCopies
    | WriteCopies
    | LookAt
    | Fence
    | Retire
)


@dataclass(frozen=True, slots=True)
class Membership:
    """One incarnation's part in the protocol."""

    node: NodeId
    incarnation: Incarnation
    timing: Timing
    term: Term = Term(0)
    promised: Generation = Generation(0)
    alive: bool = False
    """Workers may be running on this node."""
    preparing: Formation | None = None
    """Acknowledged as soon as the workers are gone."""
    prepared: Formation | None = None
    """Acknowledged; started when the leader says so."""
    ordered: bool = False
    """The leader has said start; workers follow as soon as there is a lease to run under."""
    running: Formation | None = None
    sequence: int = 0
    unconfirmed: tuple[tuple[int, float], ...] = ()
    """(sequence, send time) of heartbeats the leader has not confirmed yet, oldest first."""
    lease_until: float = 0.0
    lease_term: Term = Term(0)
    """Whose confirmation it rests on: a leader vouches for its own worlds only, for it alone knows whom it evicted."""

    def beat(self, now: float) -> Membership:
        """A heartbeat with `sequence` + 1 goes out at `now`."""
        sequence = self.sequence + 1
        # beyond one lease an unconfirmed heartbeat can extend nothing
        recent = tuple(sent for sent in self.unconfirmed if sent[1] > now - self.timing.lease)
        return replace(self, sequence=sequence, unconfirmed=(*recent, (sequence, now)))

    def obey(self, order: Order, now: float) -> tuple[Membership, tuple[Effect, ...]]:
        """What follows from a leader's order; orders of lower terms or generations are refused."""
        match order:
            case Prepare(formation):
                return self._prepare(formation)
            case Start(term, generation):
                prepared = self.prepared
                if prepared is None or (prepared.term, prepared.generation) != (term, generation):
                    return self, ()
                member = prepared.member(self.node)
                if member is None or member.incarnation != self.incarnation:
                    # a spare, or the ranks are those of an earlier life of this node: that world is broken
                    return replace(self, prepared=None, running=None), ()
                return replace(self, ordered=True)._start(now)
            case Confirm(term, sequence):
                confirmed, effects = self._confirm(term, sequence)
                started, more = confirmed._start(now)
                return started, (*effects, *more)
            case Probe(term):
                return self, (LookAt(order),) if term >= self.term else ()
            case OrderSave(term, generation, step, stop, in_memory):
                return self, (SaveAt(step, stop, in_memory),) if self._runs(term, generation) else ()
            case Keep(term, generation, step):
                return self, (KeepCopies(generation, step),) if self._runs(term, generation) else ()
            case Forget(term, generation, step, written):
                return self, (ForgetCopies(generation, step, written),) if self._runs(term, generation) else ()
            case Persist(term):
                # whatever has become of the workers: nothing changes a copy
                return self, (WriteCopies(order),) if term >= self.term else ()
            case Halt(term, generation):
                return self, (StopWorkers(),) if self._runs(term, generation) else ()
            case End(term, verdict):
                return self, (Retire(verdict),) if term >= self.term else ()
            case _:
                assert_never(order)

    def workers_gone(self) -> tuple[Membership, tuple[Effect, ...]]:
        """No worker is left on this node."""
        gone = replace(self, alive=False, running=None)
        if self.preparing is None:
            return gone, ()
        return replace(gone, preparing=None, prepared=self.preparing), (
            Acknowledge(self.preparing.term, self.preparing.generation),
        )

    def tick(self, now: float) -> tuple[Membership, tuple[Effect, ...]]:
        """Time went by; a lease that has run out fences the node."""
        if self.alive and self.preparing is None and now >= self.lease_until:  # else they are being killed already
            reason = f"no confirmation from the leader for {self.timing.lease:.1f} s: its lease is over"
            return replace(self, lease_until=0.0), (Fence(reason),)
        return self, ()

    def _start(self, now: float) -> tuple[Membership, tuple[Effect, ...]]:
        prepared = self.prepared
        if prepared is None or not self.ordered or now >= self.lease_until:
            return self, ()
        started = replace(self, prepared=None, ordered=False, running=prepared, alive=True)
        return started, (StartWorkers(prepared),)

    def _runs(self, term: Term, generation: Generation) -> bool:
        return self.running is not None and (self.running.term, self.running.generation) == (term, generation)

    def _prepare(self, formation: Formation) -> tuple[Membership, tuple[Effect, ...]]:
        if (formation.term, formation.generation) < (self.term, self.promised) or (
            formation.generation <= self.promised and formation.term != self.term
        ):
            return self, (Refuse(self.term, self.promised),)
        if formation.generation == self.promised:  # the same proposal once more: a repeated message
            if formation == self.prepared:
                return self, (Acknowledge(formation.term, formation.generation),)
            return self, ()
        bound = replace(
            self,
            term=formation.term,
            promised=formation.generation,
            preparing=formation,
            prepared=None,
            ordered=False,
        )
        if formation.term != self.lease_term:
            bound = replace(bound, lease_until=0.0, lease_term=formation.term)
        if not self.alive:
            return bound.workers_gone()
        if self.preparing is not None:
            return bound, ()  # they are being killed already
        return bound, (KillWorkers(f"generation {formation.generation} is being formed"),)

    def _confirm(self, term: Term, sequence: int) -> tuple[Membership, tuple[Effect, ...]]:
        sent_at = next((at for number, at in self.unconfirmed if number == sequence), None)
        bound = self.alive or self.preparing is not None or self.prepared is not None
        if sent_at is None or term < self.term or (bound and term != self.term):
            return self, ()
        later = tuple(sent for sent in self.unconfirmed if sent[0] > sequence)
        until = sent_at + self.timing.lease
        if term == self.lease_term and until <= self.lease_until:
            return replace(self, unconfirmed=later), ()
        return replace(self, unconfirmed=later, lease_until=until, lease_term=term), (ExtendLease(until),)


# --- the leader's side ---


def quorum(previous: tuple[Member, ...], acknowledged: frozenset[NodeId]) -> bool:
    """A majority of the last world's nodes has promised itself to the new one."""
    if not previous:
        return True
    agreed = sum(member.node in acknowledged for member in previous)
    return agreed * 2 > len(previous)


def takes_effect(
    formation: Formation,
    previous: tuple[Member, ...],
    acknowledged: frozenset[NodeId],
    *,
    in_office: frozenset[NodeId],
    lease_renewed: bool,
    leases_over: bool,
) -> tuple[bool, str]:
    """Whether a proposed world may start, and the sentence why (not).

    All members must have acknowledged it, and so must those of the last world that are in office but left out of this
    one (the world size does not fit, too many strikes): they may still train. Besides, either a majority of the last
    world, or, where no majority is left (two nodes of which one died), the run directory must have shown that this
    leader still holds its term. Members of the last world that do not answer must have stopped by themselves: in its
    own term the leader has evicted them, which waits for their leases; of an earlier term's leases it knows only how
    long they can last (`leases_over`).
    """
    asked = {member.node for member in formation.members} | {
        member.node for member in previous if member.node in in_office
    }
    missing = sorted(asked - acknowledged)
    if missing:
        return False, f"waiting for {', '.join(missing)} to end earlier workers and acknowledge"
    silent = [member.node for member in previous if member.node not in acknowledged]
    if silent and not leases_over:
        return False, f"waiting until workers that an earlier leader started on {', '.join(silent)} have stopped"
    if not previous:
        return True, "all its nodes have acknowledged it"
    if quorum(previous, acknowledged):
        return True, "all its nodes have acknowledged it, a majority of the last world among them"
    if lease_renewed:
        return True, "all its nodes have acknowledged it; most of the last world is gone, but the term was renewed"
    return False, "most of the last world is gone: waiting for the run directory to renew the term"


def may_lead(renewed_at: float, majority_at: float, now: float, timing: Timing) -> tuple[bool, str]:
    """Whether a leader may stay in office.

    `renewed_at` is when its last completed renewal of the term began, `majority_at` when it last had heard from a
    majority of the last world within a lease. A leader with neither stops by itself: another may have claimed the
    next term. A majority stands in for the run directory for `Timing.patience` at most.
    """
    if now < renewed_at + timing.lease:
        return True, "the term is renewed"
    if now < min(majority_at + timing.lease, renewed_at + timing.patience):
        return True, "the run directory is silent, but a majority answers"
    return False, f"the term could not be renewed for {now - renewed_at:.1f} s: another agent may lead by now"


def may_claim(
    *,
    holder: str | None,
    released: bool,
    unchanged_for: float,
    same_allocation: bool,
    turn: float,
    timing: Timing,
    own_past: bool = False,
) -> tuple[bool, str]:
    """Whether an agent without a leader may claim the next term.

    `unchanged_for`: seconds for which the holder's record has stood still on this agent's own clock; `turn`: how
    long this agent lets others of a fresh allocation go first (the first node has 0); `own_past`: the holder was an
    earlier life of this very agent, which its keeper has seen end before it started this one.
    """
    if own_past and not released:
        return True, "the leader was this node's agent, which has been restarted"
    if holder is None:
        ready = unchanged_for >= turn
        return ready, "the run has no leader yet" if ready else "the first node of the allocation claims first"
    if released:
        ready = unchanged_for >= turn
        return (
            ready,
            f"{holder} has released its term" if ready else "the first node of the allocation claims first",
        )
    full = timing.timeout if same_allocation else timing.patience + timing.timeout + turn
    if unchanged_for >= full:
        return True, f"{holder} has not renewed its term for {unchanged_for:.1f} s"
    return False, f"{holder} may still lead: its record changed {unchanged_for:.1f} s ago, {full:.1f} s are needed"
