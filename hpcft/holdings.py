"""Which steps' state is complete in the memory of agents, and where. Pure.

A step is *taken* by a node when all its ranks have copied, or written, their shares: they will not come back to it. It
is *held* when every member of the generation has sealed copies in memory. The newest one that is held is never given
up before a newer one is (orders `Keep` and `Forget`), so there is always one to start from, as long as all who hold it
live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hpcft.events import CheckpointRef, Formation, Member, SnapshotDoubtful, SnapshotDropped, SnapshotTaken
from hpcft.ids import Incarnation, NodeId, Rank, Step

KNOWN = 4
"""Of so many steps it is remembered who has taken them."""


@dataclass(frozen=True, slots=True)
class Held:
    """A state that could be started from: the ranks' shares of it, in the memory of these nodes."""

    snapshot: CheckpointRef
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Holdings:
    taken: Mapping[Step, Mapping[NodeId, bool]] = field(default_factory=dict)
    """Of the running generation's latest steps: who has taken them, and whether copies are in its memory."""
    held: Held | None = None
    words: tuple[SnapshotTaken, ...] = ()
    """What was said of the newest step."""
    digests: Mapping[Rank, str] = field(default_factory=dict)
    """Of the step before that everybody had taken."""
    doubt: SnapshotDoubtful | None = None
    """What is wrong with the newest step that everybody has taken."""

    def begin(self, formation: Formation) -> Holdings:
        """A generation begins. If it starts from what is held, that is kept until something newer is; else it goes."""
        return Holdings(held=self.held if formation.memory else None)

    def took(self, event: SnapshotTaken, formation: Formation) -> Holdings:
        nodes = {**self.taken.get(event.step, {}), event.node: event.in_memory}
        taken = {**self.taken, event.step: nodes}
        known = replace(self, taken={step: taken[step] for step in sorted(taken)[-KNOWN:]})._listen(event, formation)
        if not all(nodes.get(member.node) for member in formation.members):
            return known
        snapshot = CheckpointRef(event.step, formation.generation)
        if self.held is not None and _order(self.held.snapshot) >= _order(snapshot):
            return known
        return replace(known, held=Held(snapshot, formation.members))

    def _listen(self, event: SnapshotTaken, formation: Formation) -> Holdings:
        """Compare what was said of this step, once all members have spoken."""
        others = tuple(each for each in self.words if each.step == event.step and each.node != event.node)
        if self.words and event.step < self.words[-1].step:
            return self
        heard = replace(self, words=(*others, event))
        if {each.node for each in heard.words} != {member.node for member in formation.members}:
            return heard
        digests = {rank: digest for each in heard.words for rank, digest in each.digests}
        reason = _difference(heard.words, digests) or _standstill(digests, self.digests)
        doubt = SnapshotDoubtful(formation.generation, event.step, reason) if reason else None
        return replace(heard, words=(), digests=digests, doubt=doubt)

    def dropped(self, event: SnapshotDropped) -> Holdings:
        nodes = self.taken.get(event.step)
        taken = self.taken
        if nodes is not None and event.node in nodes:
            taken = {**self.taken, event.step: {**nodes, event.node: False}}
        held = self.held
        if held is not None and held.snapshot == CheckpointRef(event.step, event.generation):
            held = None
        return replace(self, taken=taken, held=held)

    def lost(self, node: NodeId, incarnation: Incarnation) -> Holdings:
        """An agent is gone, and its memory with it."""
        if self.held is None:
            return self
        gone = any((member.node, member.incarnation) == (node, incarnation) for member in self.held.members)
        return replace(self, held=None) if gone else self

    def all_took(self, step: Step, formation: Formation) -> bool:
        nodes = self.taken.get(step, {})
        return all(member.node in nodes for member in formation.members)

    def usable(self, members: tuple[Member, ...], durable: CheckpointRef | None) -> Held | None:
        """What a generation of these members can start from, if it is not older than what is durable."""
        held = self.held
        if held is None or (durable is not None and _order(held.snapshot) < _order(durable)):
            return None
        there = {(member.node, member.incarnation) for member in members}
        return held if all((each.node, each.incarnation) in there for each in held.members) else None


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


def _standstill(digests: Mapping[Rank, str], before: Mapping[Rank, str]) -> str:
    """An optimizer counts its steps, so no two steps have the same state."""
    if digests and digests == before:
        return "the copies are the same as those of the step before them: what is given to run.restore does not train"
    return ""


def _order(snapshot: CheckpointRef) -> tuple[int, int]:
    return snapshot.generation, snapshot.step
