"""The three machines of membership, one promise at a time; tests/simulation has them all at once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.events import Confirm, End, Formation, Halt, Member, OrderSave, Outcome, Prepare, Start, Verdict
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step, Term
from hpcft.membership import (
    Acknowledge,
    Effect,
    ExtendLease,
    Fence,
    KillWorkers,
    Membership,
    Refuse,
    Retire,
    SaveAt,
    StartWorkers,
    StopWorkers,
    Timing,
    may_claim,
    may_lead,
    quorum,
    takes_effect,
)

TIMING = Timing(interval=0.5, suspect=2.0, timeout=4.0)
LEASE = 3.0


def formation(term: int, generation: int, nodes: str = "ab", life: int = 1) -> Formation:
    members = tuple(
        Member(NodeId(node), Incarnation(f"{node}{life}"), "", 2, Rank(2 * index)) for index, node in enumerate(nodes)
    )
    return Formation(Term(term), Generation(generation), members, None, "0")


class Agent:
    """A membership and what it has asked for."""

    def __init__(self, node: str = "a", life: int = 1) -> None:
        self.membership = Membership(NodeId(node), Incarnation(f"{node}{life}"), TIMING)
        self.now = 100.0

    def _take(self, result: tuple[Membership, tuple[Effect, ...]]) -> tuple[Effect, ...]:
        self.membership, effects = result
        return effects

    def prepare(self, formed: Formation) -> tuple[Effect, ...]:
        return self._take(self.membership.obey(Prepare(formed), self.now))

    def start(self, formed: Formation) -> tuple[Effect, ...]:
        return self._take(self.membership.obey(Start(formed.term, formed.generation), self.now))

    def beat(self) -> int:
        self.membership = self.membership.beat(self.now)
        return self.membership.sequence

    def confirm(self, term: int, sequence: int) -> tuple[Effect, ...]:
        return self._take(self.membership.obey(Confirm(Term(term), sequence), self.now))

    def gone(self) -> tuple[Effect, ...]:
        return self._take(self.membership.workers_gone())

    def tick(self) -> tuple[Effect, ...]:
        return self._take(self.membership.tick(self.now))

    def running(self, formed: Formation) -> Agent:
        """With workers of `formed`, confirmed just now."""
        self.prepare(formed)
        self.confirm(formed.term, self.beat())
        assert self.start(formed) == (StartWorkers(formed),)
        return self


def test_from_promise_to_start() -> None:
    agent, formed = Agent(), formation(1, 1)
    assert agent.prepare(formed) == (Acknowledge(Term(1), Generation(1)),)
    assert agent.start(formed) == ()  # there is no lease to run under yet
    sequence = agent.beat()
    agent.now += 0.2
    assert agent.confirm(1, sequence) == (ExtendLease(100.0 + LEASE), StartWorkers(formed))
    assert agent.start(formed) == ()
    assert agent.prepare(formed) == ()


def test_acknowledged_only_when_the_workers_are_gone() -> None:
    agent = Agent().running(formation(1, 1))
    (kill,) = agent.prepare(formation(1, 2))
    assert kill == KillWorkers("generation 2 is being formed")
    assert agent.prepare(formation(1, 3)) == ()  # they are being killed already
    assert agent.gone() == (Acknowledge(Term(1), Generation(3)),)
    assert agent.gone() == ()
    assert agent.start(formation(1, 2)) == ()
    assert agent.start(formation(1, 3)) == (StartWorkers(formation(1, 3)),)


def test_a_repeated_proposal_is_acknowledged_again() -> None:
    agent, formed = Agent(), formation(1, 1)
    assert agent.prepare(formed) == agent.prepare(formed) == (Acknowledge(Term(1), Generation(1)),)


@pytest.mark.parametrize(
    ("term", "generation", "accepted"),
    [
        (2, 6, True),
        (3, 6, True),
        (2, 5, True),
        (3, 5, False),
        (1, 5, False),
        (2, 4, False),
        (1, 9, False),
        (3, 4, False),
    ],
)
def test_one_promise_for_each_generation(term: int, generation: int, accepted: bool) -> None:
    agent = Agent()
    agent.prepare(formation(2, 5))
    effects = agent.prepare(formation(term, generation))
    expected = Acknowledge(Term(term), Generation(generation)) if accepted else Refuse(Term(2), Generation(5))
    assert effects == (expected,)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.booleans()), max_size=12))
def test_promises_only_grow(proposals: list[tuple[int, int, bool]]) -> None:
    agent, voted = Agent(), list[tuple[int, int]]()
    for term, generation, start in proposals:
        effects = agent.prepare(formation(term, generation))
        if KillWorkers(f"generation {generation} is being formed") in effects:
            effects += agent.gone()
        voted += [(each.generation, each.term) for each in effects if isinstance(each, Acknowledge)]
        if start:
            agent.confirm(term, agent.beat())
            agent.start(formation(term, generation))
    assert voted == sorted(voted)
    for one, two in itertools.pairwise(voted):
        assert one == two or (one[0] < two[0] and one[1] <= two[1])


def test_a_spare_promises_but_starts_nothing() -> None:
    agent = Agent("c")
    assert agent.prepare(formation(1, 1)) == (Acknowledge(Term(1), Generation(1)),)
    agent.confirm(1, agent.beat())
    assert agent.start(formation(1, 1)) == ()
    assert agent.prepare(formation(1, 1)) == ()
    assert agent.tick() == ()


def test_ranks_of_an_earlier_life_are_not_started() -> None:
    """A restarted agent hears of the world in which its node still had ranks; that world is broken."""
    agent = Agent("a", life=2)
    agent.prepare(formation(1, 1, life=1))
    agent.confirm(1, agent.beat())
    assert agent.start(formation(1, 1, life=1)) == ()
    assert not agent.membership.alive


def test_a_lease_runs_from_the_moment_the_heartbeat_was_sent() -> None:
    agent = Agent().running(formation(1, 1))
    sequence = agent.beat()
    agent.now += 2.0
    assert agent.confirm(1, sequence) == ()  # this very heartbeat time had been confirmed: 100.0
    later = agent.beat()
    agent.now += 0.9
    assert agent.confirm(1, later) == (ExtendLease(102.0 + LEASE),)
    agent.now = 102.0 + LEASE - 0.01
    assert agent.tick() == ()
    agent.now = 102.0 + LEASE
    (fence,) = agent.tick()
    assert fence == Fence("no confirmation from the leader for 3.0 s: its lease is over")


def test_confirmations_may_come_late_twice_or_out_of_order() -> None:
    agent = Agent().running(formation(1, 1))
    first = agent.beat()
    agent.now += 1.0
    second = agent.beat()
    assert agent.confirm(1, second) == (ExtendLease(101.0 + LEASE),)
    assert agent.confirm(1, second) == agent.confirm(1, first) == agent.confirm(1, 999) == ()
    assert agent.membership.lease_until == 101.0 + LEASE


def test_an_old_confirmation_does_not_bring_a_lease_back() -> None:
    agent = Agent().running(formation(1, 1))
    sequence = agent.beat()
    agent.now += LEASE + 1
    agent.confirm(1, sequence)
    assert [type(each) for each in agent.tick()] == [Fence]


def test_heartbeats_older_than_a_lease_are_forgotten() -> None:
    agent = Agent()
    for _ in range(1000):
        agent.beat()
        agent.now += 0.5
    assert len(agent.membership.unconfirmed) <= LEASE / 0.5 + 1


@pytest.mark.parametrize("term", [1, 3])
def test_only_the_leader_of_its_world_vouches_for_it(term: int) -> None:
    """Another leader may confirm a heartbeat while this one has evicted the node, or may have evicted it itself."""
    agent = Agent().running(formation(2, 1))
    agent.now += 1.0
    assert agent.confirm(term, agent.beat()) == ()
    agent.now = 100.0 + LEASE
    assert [type(each) for each in agent.tick()] == [Fence]


def test_a_lease_of_one_leader_starts_nothing_for_the_next() -> None:
    agent = Agent()
    agent.prepare(formation(1, 1))
    agent.confirm(1, agent.beat())
    agent.prepare(formation(2, 2))
    assert agent.start(formation(2, 2)) == ()
    agent.now += 0.5
    assert agent.confirm(2, agent.beat()) == (ExtendLease(100.5 + LEASE), StartWorkers(formation(2, 2)))


def test_workers_that_are_being_killed_are_not_fenced_as_well() -> None:
    """The next leader's proposal ends the lease of the last one, and killing takes a moment: no new life is needed."""
    agent = Agent().running(formation(1, 1))
    assert [type(each) for each in agent.prepare(formation(2, 2))] == [KillWorkers]
    agent.now += 2 * LEASE
    assert agent.tick() == ()
    assert agent.gone() == (Acknowledge(Term(2), Generation(2)),)


def test_a_lease_granted_before_the_first_promise_counts() -> None:
    agent, formed = Agent(), formation(1, 1)
    agent.confirm(1, agent.beat())
    agent.prepare(formed)
    assert agent.start(formed) == (StartWorkers(formed),)


def test_orders_are_for_the_running_generation() -> None:
    agent = Agent().running(formation(2, 3))
    verdict = Verdict(Outcome.FINISHED, 0, "done")
    obey = agent.membership.obey
    assert obey(OrderSave(Term(2), Generation(3), Step(9), stop=True), 100.0)[1] == (SaveAt(Step(9), True),)
    assert obey(Halt(Term(2), Generation(3)), 100.0)[1] == (StopWorkers(),)
    assert obey(End(Term(2), verdict), 100.0)[1] == (Retire(verdict),)
    for order in (
        OrderSave(Term(2), Generation(2), Step(9), stop=True),
        OrderSave(Term(1), Generation(3), Step(9), stop=True),
        Halt(Term(1), Generation(3)),
        Halt(Term(2), Generation(4)),
        End(Term(1), verdict),
    ):
        assert obey(order, 100.0) == (agent.membership, ())


# --- the leader's side ---


def nodes(names: str) -> frozenset[NodeId]:
    return frozenset(map(NodeId, names))


@pytest.mark.parametrize(
    ("previous", "acknowledged", "enough"),
    [
        ("", "", True),
        ("a", "", False),
        ("a", "a", True),
        ("ab", "a", False),
        ("abc", "ac", True),
        ("abcd", "abxy", False),
    ],
)
def test_a_majority_of_the_last_world(previous: str, acknowledged: str, enough: bool) -> None:
    assert quorum(formation(1, 1, previous).members, nodes(acknowledged)) is enough


@pytest.mark.parametrize(
    ("members", "previous", "acknowledged", "renewed", "leases_over", "starts", "word"),
    [
        ("ab", "", "ab", False, False, True, "all its nodes"),
        ("ab", "", "a", True, True, False, "waiting for b to end"),
        ("ab", "abc", "abx", False, True, True, "a majority"),
        ("ab", "abc", "ab", False, False, False, "an earlier leader started on c"),
        ("abc", "abc", "abc", False, False, True, "a majority"),
        ("a", "ac", "a", False, True, False, "waiting for the run directory"),
        ("a", "ac", "a", True, True, True, "the term was renewed"),
        ("a", "ac", "a", True, False, False, "started on c"),
        ("a", "ab", "a", True, True, False, "waiting for b to end earlier workers"),
        ("a", "ab", "ab", False, True, True, "a majority"),
    ],
)
def test_when_a_world_takes_effect(
    members: str, previous: str, acknowledged: str, renewed: bool, leases_over: bool, starts: bool, word: str
) -> None:
    effective, why = takes_effect(
        formation(2, 2, members),
        formation(1, 1, previous).members,
        nodes(acknowledged),
        in_office=nodes("abx"),
        lease_renewed=renewed,
        leases_over=leases_over,
    )
    assert effective is starts
    assert word in why


@pytest.mark.parametrize(
    ("renewed_at", "majority_at", "stays", "word"),
    [
        (98.0, float("-inf"), True, "the term is renewed"),
        (90.0, 98.0, True, "the run directory is silent, but a majority answers"),
        (90.0, 96.9, False, "could not be renewed for 10.0 s"),
        (97.0, float("-inf"), False, "another agent may lead by now"),
    ],
)
def test_who_stays_in_office(renewed_at: float, majority_at: float, stays: bool, word: str) -> None:
    decided, why = may_lead(renewed_at, majority_at, 100.0, TIMING)
    assert (decided, word in why) == (stays, True)


def test_a_leader_leaves_before_anybody_may_follow() -> None:
    now = 100.0 + LEASE
    assert not may_lead(100.0, float("-inf"), now, TIMING)[0]
    claim = may_claim(holder="a", released=False, unchanged_for=LEASE, same_allocation=True, turn=0.0, timing=TIMING)
    assert not claim[0]


def test_a_majority_does_not_keep_a_leader_for_longer_than_another_allocation_waits() -> None:
    """The two know nothing of each other: only the clock of the silent run directory is common to them."""
    stays = lambda silent: may_lead(0.0, silent, silent, TIMING)[0]
    assert stays(TIMING.patience - 0.1) and not stays(TIMING.patience)
    claim = may_claim(
        holder="a", released=False, unchanged_for=TIMING.patience, same_allocation=False, turn=0.0, timing=TIMING
    )
    assert not claim[0]


def test_the_next_life_of_the_leaders_agent_claims_at_once() -> None:
    again = {"holder": "a", "unchanged_for": 0.0, "same_allocation": True, "turn": 10.0, "timing": TIMING}
    assert may_claim(**again, released=False, own_past=True)[0]
    assert not may_claim(**again, released=False)[0]


@pytest.mark.parametrize(
    ("holder", "released", "unchanged", "same", "turn", "claims", "word"),
    [
        (None, False, 0.0, False, 0.0, True, "no leader yet"),
        (None, False, 5.0, False, 10.0, False, "first node"),
        (None, False, 10.0, False, 10.0, True, "no leader yet"),
        ("a", True, 0.0, False, 0.0, True, "a has released its term"),
        ("a", True, 1.0, False, 10.0, False, "first node"),
        ("a", False, 3.9, True, 10.0, False, "a may still lead: its record changed 3.9 s ago, 4.0 s are needed"),
        ("a", False, 4.0, True, 10.0, True, "a has not renewed its term for 4.0 s"),
        ("a", False, 61.9, False, 10.0, False, "62.0 s are needed"),
        ("a", False, 62.0, False, 10.0, True, "a has not renewed its term for 62.0 s"),
    ],
)
def test_who_may_claim(
    holder: str | None, released: bool, unchanged: float, same: bool, turn: float, claims: bool, word: str
) -> None:
    decided, why = may_claim(
        holder=holder, released=released, unchanged_for=unchanged, same_allocation=same, turn=turn, timing=TIMING
    )
    assert (decided, word in why) == (claims, True), why


def test_the_lease_ends_before_the_timeout_with_time_to_kill() -> None:
    assert TIMING.lease == LEASE < TIMING.timeout
    assert replace(TIMING, timeout=8.0).lease == 6.0
