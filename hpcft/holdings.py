"""Which steps' state is complete in the memory of agents, and where. Pure.

A step is *taken* by a node when all its ranks have copied, or written, their shares: they will not come back to it. It
is *held* when every member of the generation has sealed copies in memory. Where a formation has neighbours, each
member's copies go to another one as well; when that is settled for all of them, done or given up, the step is *safe*.
The newest one that is safe is never given up before a newer one is (orders `Keep` and `Forget`), so there is always one
to start from, as long as of each share somebody lives who has it. What can never be held is `useless`: it must not
occupy anybody's memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from hpcft.events import (
    CheckpointRef,
    CopiesAlone,
    CopiesKept,
    Formation,
    Member,
    SnapshotDoubtful,
    SnapshotDropped,
    SnapshotTaken,
)
from hpcft.ids import Incarnation, NodeId, Rank, Step

Holder: TypeAlias = tuple[NodeId, Incarnation]

KNOWN = 4
"""Of so many steps it is remembered who has taken them."""

STANDSTILL_STEPS = 20
"""So many steps without a change are an alarm. A gradient scaler passes over steps whose gradients are not finite, and
halves its scale each time: from the usual 2**16 it has found one after 16 of them."""


@dataclass(frozen=True, slots=True)
class Held:
    """A state that could be started from: the ranks' shares of it, in the memory of nodes."""

    snapshot: CheckpointRef
    members: tuple[Member, ...]
    """Who has made the copies."""
    holders: Mapping[NodeId, tuple[Holder, ...]]
    """Of each of them: who has its copies now, itself first."""
    safe: bool
    blocked: float = 0.0
    """For how many seconds the copies stopped training, if that was said."""

    def lost(self, gone: Collection[Holder]) -> Held | None:
        """Without what these agents have. None: of some share nobody has a copy any more."""
        return self._with({node: tuple(e for e in known if e not in gone) for node, known in self.holders.items()})

    def dropped(self, node: NodeId) -> Held | None:
        """Without the copies that this node has of its own share."""
        return self._with({**self.holders, node: tuple(e for e in self.holders.get(node, ()) if e[0] != node)})

    def _with(self, holders: Mapping[NodeId, tuple[Holder, ...]]) -> Held | None:
        return replace(self, holders=holders) if all(holders.values()) else None

    def has(self, handed_by: tuple[NodeId, ...]) -> bool:
        """Whether these nodes still have the copies that they were to hand out, one for each of `self.members`."""
        pairs = zip(self.members, handed_by, strict=True)
        return all(node in [holder for holder, _ in self.holders[made.node]] for made, node in pairs)

    def handed_by(self, members: tuple[Member, ...]) -> tuple[NodeId, ...] | None:
        """Which of these members is to hand out whose copies, in the order of `self.members`; None: not all are there.

        A node that lives hands out its own."""
        there = {(member.node, member.incarnation) for member in members}
        found = [next((each for each in self.holders[made.node] if each in there), None) for made in self.members]
        nodes = tuple(holder[0] for holder in found if holder is not None)
        return nodes if len(nodes) == len(found) else None


@dataclass(frozen=True, slots=True)
class Holdings:
    taken: Mapping[Step, Mapping[NodeId, bool]] = field(default_factory=dict)
    """Of the running generation's latest steps: who has taken them, and whether copies are in its memory."""
    settled: Mapping[Step, Mapping[NodeId, Holder | None]] = field(default_factory=dict)
    """Of the same steps: whose copies a neighbour has, and which one; None: it could not take them."""
    failed: frozenset[Step] = frozenset()
    """Those of the same steps of which some rank has no copy, and will have none."""
    gone: frozenset[Holder] = frozenset()
    """Agents that were lost in this generation: what is said late of its steps brings nothing of theirs back."""
    whole: tuple[Held, ...] = ()
    """What could be started from, oldest first: the newest that is safe, and newer ones."""
    blocked: Mapping[Step, float] = field(default_factory=dict)
    """Of the same steps: for how long their copies stopped training, as far as it was said."""
    words: tuple[SnapshotTaken, ...] = ()
    """What was said of the newest step."""
    digests: Mapping[Rank, str] = field(default_factory=dict)
    """Of the newest step that everybody has taken."""
    unchanged_since: Step = Step(0)
    """The first of the steps, up to that one, whose copies had these digests."""
    doubt: SnapshotDoubtful | None = None
    """What is wrong with the newest step that everybody has taken."""

    def begin(self, formation: Formation) -> Holdings:
        """A generation begins. If it starts from what is held, that is kept until something newer is; else it goes."""
        origin = formation.restore if formation.memory else None
        return Holdings(whole=tuple(replace(each, safe=True) for each in self.whole if each.snapshot == origin))

    @property
    def held(self) -> Held | None:
        """The newest."""
        return self.whole[-1] if self.whole else None

    @property
    def safe(self) -> Held | None:
        """The newest that is not given up before a newer one is safe."""
        return self.whole[0] if self.whole and self.whole[0].safe else None

    def took(self, event: SnapshotTaken, formation: Formation) -> Holdings:
        nodes = {**self.taken.get(event.step, {}), event.node: event.in_memory}
        taken = {**self.taken, event.step: nodes}
        blocked = {**self.blocked, event.step: max(event.blocked, self.blocked.get(event.step, 0.0))}
        steps = sorted(taken)[-KNOWN:]
        known = replace(
            self,
            taken={step: taken[step] for step in steps},
            failed=self.failed & frozenset(steps),
            blocked={step: blocked.get(step, 0.0) for step in steps},
        )._listen(event, formation)
        if event.step in self.failed or not all(nodes.get(member.node) for member in formation.members):
            return known
        snapshot = CheckpointRef(event.step, formation.generation)
        if self.held is not None and _order(self.held.snapshot) >= _order(snapshot):
            return known
        holders = {member.node: ((member.node, member.incarnation),) for member in formation.members}
        held = Held(snapshot, formation.members, holders, safe=False, blocked=blocked[event.step])
        return replace(known, whole=(*known.whole, held))._settle(formation)

    def kept(self, event: CopiesKept | CopiesAlone, formation: Formation) -> Holdings:
        """A member's copies are with its neighbour as well, or they will not be."""
        keeper = formation.member(event.node) if isinstance(event, CopiesKept) else None
        made_by = event.of if isinstance(event, CopiesKept) else event.node
        holder = None if keeper is None else (keeper.node, keeper.incarnation)
        nodes = self.settled.get(event.step, {})
        if nodes.get(made_by):
            return self  # said once more
        settled = {**self.settled, event.step: {**nodes, made_by: holder}}
        known = replace(self, settled={step: settled[step] for step in sorted(settled)[-KNOWN:]})
        return known._settle(formation)

    def _settle(self, formation: Formation) -> Holdings:
        """Where everybody's copies have a second holder, or will have none, older ones are of no use any more."""
        whole = []
        for held in self.whole:
            if held.snapshot.generation != formation.generation:
                whole.append(held)
                continue
            settled = self.settled.get(held.snapshot.step, {})
            holders = {
                node: (*known, second) if (second := settled.get(node)) and second not in known else known
                for node, known in held.holders.items()
            }
            safe = all(formation.neighbour(member.node) is None or member.node in settled for member in held.members)
            left = replace(held, holders=holders, safe=held.safe or safe).lost(self.gone)
            if left is not None:
                whole.append(left)
        newest = max((number for number, held in enumerate(whole) if held.safe), default=0)
        return replace(self, whole=tuple(whole[newest:]))

    def _listen(self, event: SnapshotTaken, formation: Formation) -> Holdings:
        """Compare what was said of this step, once all members have spoken."""
        others = tuple(each for each in self.words if each.step == event.step and each.node != event.node)
        if self.words and event.step < self.words[-1].step:
            return self
        heard = replace(self, words=(*others, event))
        if {each.node for each in heard.words} != {member.node for member in formation.members}:
            return heard
        digests = {rank: digest for each in heard.words for rank, digest in each.digests}
        since = self.unchanged_since if digests and digests == self.digests else event.step
        reason = _difference(heard.words, digests) or _standstill(since, event.step)
        doubt = SnapshotDoubtful(formation.generation, event.step, reason) if reason else None
        return replace(heard, words=(), digests=digests, unchanged_since=since, doubt=doubt)

    def useless(self, formation: Formation) -> Mapping[Step, bool]:
        """The latest steps of which copies were made that nobody will start from; True: all have saved it all the same.

        Ranks come to steps in order: who has taken a newer one will not come back to this.
        """
        members = [member.node for member in formation.members]
        reached = {
            node: max((step for step, nodes in self.taken.items() if node in nodes), default=0) for node in members
        }
        found = dict.fromkeys(self.failed, False)
        for step, nodes in self.taken.items():
            if any(node not in nodes and reached[node] > step for node in members):
                found[step] = False
            elif self.all_took(step, formation) and not all(nodes[node] for node in members):
                found.setdefault(step, True)
        return found

    def dropped(self, event: SnapshotDropped) -> Holdings:
        taken = {**self.taken, event.step: {**self.taken.get(event.step, {}), event.node: False}}
        taken = {step: taken[step] for step in sorted(taken)[-KNOWN:]}
        failed = frozenset(step for step in (*self.failed, event.step) if step in taken)
        gone = CheckpointRef(event.step, event.generation)
        left = [held.dropped(event.node) if held.snapshot == gone else held for held in self.whole]
        return replace(self, taken=taken, failed=failed, whole=tuple(each for each in left if each is not None))

    def lost(self, node: NodeId, incarnation: Incarnation) -> Holdings:
        """An agent is gone, and its memory with it."""
        gone = self.gone | {(node, incarnation)}
        left = [held.lost(gone) for held in self.whole]
        return replace(self, gone=gone, whole=tuple(each for each in left if each is not None))

    def all_took(self, step: Step, formation: Formation) -> bool:
        nodes = self.taken.get(step, {})
        return all(member.node in nodes for member in formation.members)

    def usable(self, members: tuple[Member, ...], durable: CheckpointRef | None) -> Held | None:
        """What a generation of these members can start from, if it is not older than what is durable."""
        for held in reversed(self.whole):
            if durable is not None and _order(held.snapshot) < _order(durable):
                return None
            if held.handed_by(members) is not None:
                return held
        return None


def _difference(words: tuple[SnapshotTaken, ...], digests: Mapping[Rank, str]) -> str:
    """Replicas hold the same parameters, bit by bit: where they do not, one of them has gone wrong silently."""
    at = {rank: each.node for each in words for rank, _ in each.digests}
    for each in words:
        for rank, other, digest in each.replicas:
            if other in digests and digests[other] != digest:
                return (
                    f"rank {rank} on {each.node} and rank {other} on {at[other]} hold different parameters, and should "
                    "hold the same: bad memory or a broken device there, or a program that lets its ranks drift"
                )
    return ""


def _standstill(since: Step, step: Step) -> str:
    """An optimizer counts its steps, so two steps have the same state only where it was not called."""
    if step - since >= STANDSTILL_STEPS:
        return f"the copies are the same as those of step {since}: what is given to run.restore does not train"
    return ""


def _order(snapshot: CheckpointRef) -> tuple[int, int]:
    return snapshot.generation, snapshot.step
