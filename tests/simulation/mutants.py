"""The protocol with one of its safeguards taken out. Each must be caught by the properties that the whole one has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from hpcft import policy
from hpcft.events import Formation, Reach
from hpcft.membership import Effect, KillWorkers, Membership, takes_effect
from hpcft.policy import Rules, silence
from hpcft.world import Node, World
from tests.simulation.cluster import Core
from tests.simulation.machine import Machine


class VotesTwice(Membership):
    """Promises itself to any world of another leader, whatever it has promised before."""

    def _prepare(self, formation: Formation) -> tuple[Membership, tuple[Effect, ...]]:
        if (formation.term, formation.generation) == (self.term, self.promised):
            return super()._prepare(formation)
        bound = replace(
            self,
            term=formation.term,
            promised=formation.generation,
            preparing=formation,
            prepared=None,
            ordered=False,
        )
        return (bound, (KillWorkers("another"),)) if self.alive else bound.workers_gone()


class NeverFences(Membership):
    def tick(self, now: float) -> tuple[Membership, tuple[Effect, ...]]:
        return self, ()


class IgnoresLease(Machine):
    lease_counts = False


class AcknowledgesEarly(Membership):
    """Acknowledges before the workers of the earlier generation are gone."""

    def _prepare(self, formation: Formation) -> tuple[Membership, tuple[Effect, ...]]:
        bound, effects = super()._prepare(formation)
        if bound.preparing is None or not self.alive:
            return bound, effects
        early, more = bound.workers_gone()
        return replace(early, alive=True), (*effects, *more)


@contextmanager
def votes_twice() -> Iterator[Core]:
    yield Core(membership=VotesTwice)


@contextmanager
def no_self_fencing() -> Iterator[Core]:
    yield Core(membership=NeverFences, machine=IgnoresLease)


@contextmanager
def acknowledges_early() -> Iterator[Core]:
    yield Core(membership=AcknowledgesEarly)


@contextmanager
def missing_acknowledgement() -> Iterator[Core]:
    """Starts a world when a majority of its members has acknowledged it."""

    def hasty(formation: Formation, previous: Any, acknowledged: Any, **more: Any) -> tuple[bool, str]:
        agreed = [member for member in formation.members if member.node in acknowledged]
        return len(agreed) * 2 > len(formation.members), "most have acknowledged"

    with patch.object(policy, "takes_effect", hasty):
        yield Core()


@contextmanager
def no_waiting_for_old_leases() -> Iterator[Core]:
    """A new leader does not wait for the leases that an earlier one has granted."""

    def hasty(*arguments: Any, leases_over: bool, **more: Any) -> tuple[bool, str]:
        return takes_effect(*arguments, leases_over=True, **more)

    with patch.object(policy, "takes_effect", hasty):
        yield Core()


@contextmanager
def forgets_those_left_out() -> Iterator[Core]:
    """Does not wait for nodes that are in office, had ranks, and get none."""

    def hasty(*arguments: Any, in_office: Any, **more: Any) -> tuple[bool, str]:
        return takes_effect(*arguments, in_office=frozenset(), **more)

    with patch.object(policy, "takes_effect", hasty):
        yield Core()


@contextmanager
def evicts_at_once() -> Iterator[Core]:
    """A suspect is evicted without waiting for the end of its lease."""

    def hasty(world: World, rules: Rules, now: float) -> list[tuple[Node, str]]:
        limit = rules.timing.suspect
        return [(node, "silent") for node in world.nodes if not node.connected or silence(node, now) >= limit]

    with patch.object(policy, "_gone", hasty):
        yield Core()


@contextmanager
def believes_the_dead() -> Iterator[Core]:
    """A node that a second agent does not reach either is evicted at once, as if it could not train there."""
    gone = policy._gone

    def hasty(world: World, rules: Rules, now: float) -> list[tuple[Node, str]]:
        unreached = [node for node in world.nodes if node.answer is not None and node.answer.found is Reach.SILENT]
        return [(node, "nobody reaches it") for node in unreached] or gone(world, rules, now)

    with patch.object(policy, "_gone", hasty):
        yield Core()


MUTANTS = {
    "double vote": votes_twice,
    "missing acknowledgement": missing_acknowledgement,
    "acknowledgement before the workers are gone": acknowledges_early,
    "no acknowledgement of nodes left out": forgets_those_left_out,
    "no self-fencing": no_self_fencing,
    "silence for two is taken for death": believes_the_dead,
    "eviction before the lease is over": evicts_at_once,
    "no waiting for an earlier leader's leases": no_waiting_for_old_leases,
}
