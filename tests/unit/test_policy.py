"""The guards one by one; whole stories are in tests/scenarios, everything at once in tests/simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import ExitCode
from hpcft.events import (
    Action,
    AskPeer,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRef,
    Conclude,
    Decided,
    Event,
    Evict,
    FailureKind,
    HaltWorkers,
    KeeperVanished,
    LeaseRenewed,
    NodeHeard,
    Outcome,
    PeerAnswered,
    Propose,
    Reach,
    Requeue,
    RequeueAccepted,
    SaveAndStop,
    StopAsked,
    StreamClosed,
    Termination,
    TerminationAsked,
    Ticked,
    WorkerReturned,
    WorkersVanished,
    WorldAcknowledged,
    WorldRefused,
)
from hpcft.ids import Generation, NodeId, Rank, Step, Term
from hpcft.membership import Timing
from hpcft.policy import NOTHING, Rules, assign, decide
from hpcft.transitions import apply
from hpcft.world import Budget, Node, Phase, World
from tests.search import sampled
from tests.unit.worlds import (
    at_step,
    began,
    committed,
    failed,
    formation,
    happen,
    joined,
    life,
    node,
    proposed,
    ready,
    training,
)

TIMING = Timing(0.5, 2.0, 5.0)
RULES = Rules(TIMING, minimum_nodes=2, budgets=((Budget.INFRASTRUCTURE, 2), (Budget.USER_CODE, 1)))


def heard(world: World, now: float, *silent: str) -> World:
    """All nodes but the silent ones have sent a heartbeat just now."""
    return happen(
        world,
        *(NodeHeard(each.id, each.incarnation, Generation(0), 0) for each in world.nodes if each.id not in silent),
        now=now,
    )


def only(decided: Decided) -> Action:
    (action,) = decided.actions
    return action


def verdict(decided: Decided) -> tuple[Outcome, int]:
    action = decided.actions[-1]
    assert isinstance(action, Conclude)
    return action.verdict.outcome, action.verdict.exit_code


def members(decided: Decided) -> str:
    action = only(decided)
    assert isinstance(action, Propose), decided
    return "".join(member.node for member in action.formation.members)


def test_nothing_is_decided_about_a_healthy_or_ended_world() -> None:
    assert decide(heard(training(), 2.0), RULES, 2.0) == NOTHING
    ended = replace(training(), phase=Phase.ENDED)
    assert decide(happen(ended, failed("a", 0)), RULES, 999.0) == NOTHING


def test_the_same_picture_leads_to_the_same_decision() -> None:
    world = happen(heard(training("abc"), 5.0), failed("a", 0), now=5.0)
    assert decide(world, RULES, 5.0) == decide(world, RULES, 5.0)
    assert decide(world, RULES, 5.0).actions


def test_the_lost_are_evicted_when_their_lease_is_over_and_not_before() -> None:
    world = heard(training("abc"), 20.0, "b")  # b was heard at 0.0 for the last time
    world = happen(world, decide(world, RULES, 2.0))
    assert decide(world, RULES, 4.9) == NOTHING
    assert only(decide(world, RULES, 5.0)) == Evict(node("b"), life("b"))


def silent(names: str, who: str) -> World:
    """At 10.0, and they were heard at 8.0."""
    return heard(heard(training(names), 8.0), 10.0, *who)


def test_a_second_agent_is_asked_about_a_silent_node_once() -> None:
    world = silent("abcd", "c")
    assert decide(world, RULES, 9.9) == NOTHING
    asked = decide(world, RULES, 10.0)
    assert only(asked) == AskPeer(node("c"), life("c"), node("b"))
    assert asked.reason == "c has been silent for 2s: b is asked about it"
    world = happen(world, asked, now=10.0)
    assert decide(world, RULES, 10.5) == NOTHING
    again = heard(heard(world, 11.0), 13.0, "c")
    assert only(decide(again, RULES, 13.0)) == AskPeer(node("c"), life("c"), node("b")), "another silence"


def test_neither_the_leader_nor_a_silent_node_is_a_second_agent() -> None:
    assert decide(silent("ab", "b"), RULES, 10.0) == NOTHING
    assert decide(silent("abc", "bc"), RULES, 10.0) == NOTHING
    asked = decide(silent("abcde", "bc"), RULES, 10.0)
    assert asked.actions == (
        AskPeer(node("b"), life("b"), node("d")),
        AskPeer(node("c"), life("c"), node("e")),
    )


def test_what_the_second_agent_says_counts_when_it_is_certain() -> None:
    world = silent("abc", "c")
    world = happen(world, decide(world, RULES, 10.0), now=10.0)

    def answer(found: Reach, number: int = 1) -> World:
        return happen(world, PeerAnswered(node("b"), node("c"), life("c", number), found, "no route"), now=10.5)

    assert decide(answer(Reach.SILENT), RULES, 12.9) == NOTHING
    assert decide(answer(Reach.ANSWERS), RULES, 12.9) == NOTHING
    assert decide(answer(Reach.ENDED, number=2), RULES, 12.9) == NOTHING, "said of another life"
    ended = decide(answer(Reach.ENDED), RULES, 10.5)
    assert only(ended) == Evict(node("c"), life("c"))
    assert ended.reason == "c is lost: it has told b that its workers have ended"
    late = {found: decide(answer(found), RULES, 13.0).reason for found in (Reach.SILENT, Reach.ANSWERS)}
    assert late == {
        Reach.SILENT: "c is lost: no heartbeat for 5s, so its lease is over (b does not reach it either: no route)",
        Reach.ANSWERS: "c is lost: no heartbeat for 5s, so its lease is over "
        "(it answers b: the way between it and the leader is broken)",
    }


def test_a_node_without_workers_is_waited_for_as_long_as_its_keeper_lives() -> None:
    world = happen(heard(training("abc"), 1.0), WorkersVanished(node("c"), life("c")), now=1.0)
    world = heard(world, 10.9, "c")
    assert decide(world, RULES, 10.9) == NOTHING
    gone = decide(world, RULES, 11.0)
    assert only(gone) == Evict(node("c"), life("c"))
    assert gone.reason == "c is lost: its agent ended and did not come back in 10s"
    world = happen(world, KeeperVanished(node("c"), life("c")), now=2.0)
    assert only(decide(world, RULES, 2.0)) == Evict(node("c"), life("c"))


@pytest.mark.parametrize("event", [StreamClosed(node("c"), life("c"), "reset"), WorkersVanished(node("c"), life("c"))])
def test_no_world_is_formed_while_a_node_is_in_doubt(event: Event) -> None:
    world = happen(heard(training("abc"), 1.0), event, failed("a", 0), now=1.0)
    assert decide(world, RULES, 1.5) == NOTHING
    back = happen(world, joined("c"), now=1.6)
    assert members(decide(back, RULES, 1.6)) == "abc"


def test_a_node_in_doubt_does_not_count_as_missing() -> None:
    """Two of two came in time; one of them is silent for a moment when the waiting ends."""
    world = happen(World(), began("abc"), joined("a"), joined("b"))
    world = heard(world, 59.0, "b")
    world = happen(world, NodeHeard(node("b"), life("b"), Generation(0), 0), now=57.5)
    assert decide(world, RULES, 60.0) == NOTHING
    assert members(decide(heard(world, 60.1), RULES, 60.1)) == "ab"


def test_former_members_keep_their_order_and_newcomers_follow() -> None:
    world = training("ba")
    world = happen(world, joined("A", workers=1), joined("c", workers=3), failed("a", 2), now=1.0)
    world = heard(world, 1.0)
    decided = decide(world, RULES, 1.0)
    action = only(decided)
    assert isinstance(action, Propose)
    assert members(decided) == "baAc"
    assert [list(member.ranks()) for member in action.formation.members] == [[0, 1], [2, 3], [4], [5, 6, 7]]


@given(st.lists(st.integers(1, 8), max_size=8), st.integers(1, 8))
def test_ranks_are_a_bijection_onto_whole_groups(workers: list[int], multiple: int) -> None:
    nodes = tuple(Node(NodeId(f"n{i}"), life("n"), "", count, 7000, 0.0) for i, count in enumerate(workers))
    assigned = assign(nodes, multiple)
    ranks = [rank for member in assigned for rank in member.ranks()]
    assert ranks == list(range(len(ranks)))
    assert len(ranks) % multiple == 0
    assert [member.node for member in assigned] == [each.id for each in nodes[: len(assigned)]]


@pytest.mark.parametrize(("nodes", "outcome"), [("ab", (Outcome.FAILED, ExitCode.BELOW_MINIMUM)), ("abc", None)])
def test_a_world_size_that_cannot_fit_stops_only_where_no_more_nodes_can_come(
    nodes: str, outcome: tuple[Outcome, int] | None
) -> None:
    rules = replace(RULES, multiple_of=8)
    world = happen(World(), began(nodes), joined("a"), joined("b"))
    decided = decide(heard(world, 61.0), rules, 61.0)
    if outcome is None:
        assert isinstance(only(decided), Requeue)
    else:
        assert verdict(decided) == outcome
    assert "no world of 2 nodes or more has a number of ranks divisible by 8" in decided.reason


def test_pauses_start_at_the_failure_and_grow() -> None:
    rules = replace(RULES, budgets=())
    world = training(step=10)
    waits = []
    now = 2.0
    for generation in range(1, 5):
        world = happen(heard(world, now), failed("a", 0, generation=generation), now=now)
        failed_at = now
        while not (decided := decide(heard(world, now), rules, now)).actions:
            now += 0.05
        waits.append(now - failed_at)
        if generation < 4:
            world = happen(world, decided, committed(generation + 1), now=now)
        now += 100.0  # however long it takes until the next failure
    assert waits[0] == 0.0
    assert 0.5 <= waits[1] <= 1.6
    assert 1.0 <= waits[2] <= 3.1
    assert waits[3] == 0.0, "no pause before giving up"
    assert verdict(decided) == (Outcome.FAILED, ExitCode.GAVE_UP)


def test_a_spent_budget_refills_with_time() -> None:
    world = training("ab")
    for generation, at in ((1, 100.0), (2, 200.0), (3, 300.0)):
        world = heard(happen(world, at_step("a", at, generation), at_step("b", at, generation)), at)  # type: ignore[arg-type]
        world = happen(world, failed("a", 0, generation=generation), now=at)
        if generation < 3:
            world = happen(world, proposed(formation("ab", generation + 1)), now=at)
            world = happen(world, committed(generation + 1), now=at)
    decided = decide(world, RULES, 300.0)
    assert verdict(decided) == (Outcome.FAILED, ExitCode.GAVE_UP)
    assert "3 failures of infrastructure within 3600 s, 2 are allowed" in decided.reason
    later = heard(world, 3701.0)
    assert isinstance(only(decide(later, RULES, 3701.0)), Propose)


def returned(world: World, step: int) -> World:
    assert world.formation is not None
    for member in world.formation.members:
        for rank in member.ranks():
            world = happen(world, WorkerReturned(member.node, Generation(1), Rank(rank), Step(step)))
    return world


@pytest.mark.parametrize("asked", [None, StopAsked("ada"), *(TerminationAsked(why, 18.0) for why in Termination)])
def test_a_finished_run_has_finished_whoever_asks_for_what(asked: Event | None) -> None:
    world = returned(heard(training(step=10), 2.0), 10)
    world = happen(world, CheckpointCommitted(CheckpointRef(Step(10), Generation(1)), 0.1, 1))
    if asked is not None:
        world = happen(world, asked, now=2.0)
    decided = decide(world, RULES, 2.0)
    assert verdict(decided) == (Outcome.FINISHED, 0)
    assert decided.reason == "the training function returned after step 10"


def test_the_last_checkpoint_is_waited_for_and_its_failure_is_the_runs() -> None:
    world = returned(heard(training(step=10), 2.0), 10)
    assert decide(world, RULES, 2.0) == NOTHING
    early = happen(world, CheckpointFailed(Step(8), Generation(1), "disk full"))
    assert decide(early, RULES, 2.0) == NOTHING
    last = happen(world, CheckpointFailed(Step(10), Generation(1), "disk full"))
    assert verdict(decide(last, RULES, 2.0)) == (Outcome.FAILED, ExitCode.UNUSABLE)


def test_some_ranks_returned_and_a_node_is_lost() -> None:
    world = happen(training("abc", step=10), WorkerReturned(node("a"), Generation(1), Rank(0), Step(10)), now=1.0)
    world = happen(heard(world, 1.0), joined("b", number=2), now=1.0)
    assert members(decide(world, RULES, 1.0)) == "abc"


def test_a_stop_saves_first_unless_the_world_is_broken() -> None:
    world = happen(heard(training(), 2.0), StopAsked("ada"), now=2.0)
    assert only(decide(world, RULES, 2.0)) == SaveAndStop(Generation(1))
    broken = happen(world, failed("a", 0), now=2.0)
    decided = decide(broken, RULES, 2.0)
    assert [type(action) for action in decided.actions] == [HaltWorkers, Conclude]
    plain = replace(RULES, saves=False)
    assert verdict(decide(world, plain, 2.0)) == (Outcome.CANCELLED, ExitCode.CANCELLED)


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        (replace(RULES, requeue=False), "slurm.requeue is off"),
        (replace(RULES, budgets=((Budget.PREEMPTION, 0),)), "1 preemptions within 3600 s, 0 are allowed"),
    ],
)
def test_what_may_not_be_requeued_stops(rules: Rules, word: str) -> None:
    world = happen(training(), TerminationAsked(Termination.PREEMPTED, 0.0), now=2.0)
    decided = decide(heard(world, 2.0), rules, 2.0)
    assert verdict(decided) == (Outcome.FAILED, ExitCode.GAVE_UP)
    assert word in decided.reason


def test_somebody_elses_requeue_is_not_asked_for_again() -> None:
    world = happen(training(), TerminationAsked(Termination.REQUEUED, 0.0), now=2.0)
    decided = decide(heard(world, 2.0), RULES, 2.0)
    assert [type(action) for action in decided.actions] == [HaltWorkers, Conclude]
    assert verdict(decided) == (Outcome.REQUEUED, ExitCode.REQUEUED)


def test_a_world_waits_for_leases_that_an_earlier_leader_granted() -> None:
    world = happen(training("abc"), began("ab", term=2, allocation="7.1"), now=100.0)
    world = happen(world, joined("a"), joined("b"), now=100.0)
    world = happen(world, decide(world, RULES, 100.0), now=100.0)
    for name in "ab":
        world = happen(world, WorldAcknowledged(node(name), life(name), Term(2), world.generation), now=100.5)
    assert decide(heard(world, 104.0), RULES, 104.0) == NOTHING
    decided = decide(heard(world, 105.0), RULES, 105.0)
    assert decided.reason.endswith(
        "starts: all its nodes have acknowledged it, a majority of the last world among them"
    )


NODES = st.sampled_from("abc")


def anything() -> st.SearchStrategy[Event]:
    """Events as edges could say them, in any order, of any generation."""
    generation = st.integers(1, 4)
    lives = st.integers(1, 2)

    def of(name: str, number: int) -> list[Event]:
        who = node(name), life(name, number)
        return [
            joined(name, number=number),
            StreamClosed(*who, "reset"),
            WorkersVanished(*who),
            KeeperVanished(*who),
            WorldRefused(*who, Term(1), Generation(number)),
        ]

    def about(name: str, number: int, step: int) -> list[Event]:
        rank = "abc".index(name) * 2
        return [
            *(failed(name, rank, kind, generation=number, step=step) for kind in FailureKind),
            ready(name, number),
            at_step(name, step, number),
            WorkerReturned(node(name), Generation(number), Rank(rank), Step(step)),
            WorkerReturned(node(name), Generation(number), Rank(rank + 1), Step(step)),
            CheckpointCommitted(CheckpointRef(Step(step), Generation(number)), 0.1, 1),
            CheckpointFailed(Step(step), Generation(number), "disk full"),
            *(WorldAcknowledged(node(name), life(name, each), Term(1), Generation(number)) for each in (1, 2)),
        ]

    asked: list[Event] = [StopAsked("ada"), RequeueAccepted(), LeaseRenewed(Term(1)), Ticked()]
    asked += [TerminationAsked(why, 5.0) for why in Termination]
    return st.one_of(
        st.builds(of, NODES, lives).flatmap(st.sampled_from),
        st.builds(about, NODES, generation, st.integers(0, 30)).flatmap(st.sampled_from),
        st.builds(about, NODES, generation, st.integers(0, 30)).flatmap(st.sampled_from),
        st.sampled_from(asked),
    )


@sampled(150)
@given(
    st.lists(st.tuples(anything(), st.sampled_from([0.0, 0.1, 1.0, 3.0])), max_size=40),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
)
def test_whatever_is_said_the_policy_settles(story: list[tuple[Event, float]], minimum: int, multiple: int) -> None:
    rules = replace(RULES, minimum_nodes=minimum, multiple_of=multiple, join_timeout=5.0)
    world, now, generation = World(), 0.0, 0
    opening: list[tuple[Event, float]] = [(began("abc"), 0.0), *((joined(name), 0.0) for name in "abc")]
    for event, pause in [*opening, *story, (Ticked(), 100.0), (Ticked(), 100.0), (Ticked(), 100.0)]:
        now += pause
        world = apply(world, event, now)
        for _ in range(20):
            decided = decide(world, rules, now)
            if not decided.actions:
                break
            assert decided.reason
            for action in decided.actions:
                if isinstance(action, Propose):
                    formed = action.formation
                    ranks = [rank for member in formed.members for rank in member.ranks()]
                    assert ranks == list(range(formed.world_size))
                    assert len(formed.members) >= minimum
                    assert formed.world_size % multiple == 0
                    assert formed.generation > generation
                    generation = formed.generation
            world = apply(world, decided, now)
        else:
            raise AssertionError(f"does not settle: {decided.reason}")
    # everybody has been silent for minutes: that cannot go without a consequence
    assert world.phase is Phase.ENDED or world.requeue_asked
