"""What an event does to the picture of a run."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from hpcft.cadence import SaveRules, plan
from hpcft.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRef,
    CheckpointsFound,
    CheckpointsRetired,
    CheckpointVerified,
    Conclude,
    Decided,
    Evict,
    FailureKind,
    NodeHeard,
    Outcome,
    StreamClosed,
    Termination,
    TerminationAsked,
    Verdict,
    WorkerReturned,
    WorkersReady,
    WorkersVanished,
    WorldAcknowledged,
    WorldRefused,
)
from hpcft.ids import Generation, Rank, Step, Term
from hpcft.transitions import LATEST_SAVES, UNWRITTEN, budget_of
from hpcft.wire import decode_event
from hpcft.world import Budget, Phase, Stretch, World
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


def ref(step: int, generation: int = 1) -> CheckpointRef:
    return CheckpointRef(Step(step), Generation(generation))


def saved(step: int, generation: int = 1) -> CheckpointCommitted:
    return CheckpointCommitted(ref(step, generation), 0.5, 100)


def spent(world: World) -> list[Budget]:
    return [each.budget for each in world.spent]


def test_the_step_of_a_world_is_that_of_its_slowest_node() -> None:
    world = happen(training(step=10), at_step("a", 15))
    assert world.step == 10
    assert happen(world, at_step("b", 13)).step == 13
    assert happen(world, at_step("b", 9)).step == 10, "steps do not go back within a generation"
    assert happen(world, at_step("b", 99, generation=7)).step == 10


def test_one_misfortune_is_charged_once() -> None:
    world = happen(training(), failed("a", 0), failed("a", 1), failed("b", 2), failed("a", 0))
    assert spent(world) == [Budget.INFRASTRUCTURE]
    assert [strike.node for strike in world.strikes] == ["a", "b"]
    assert len(world.failures) == 3


def test_it_is_charged_once_in_a_recovery_that_fails_too() -> None:
    world = happen(training(), failed("a", 0))
    world = happen(world, proposed(formation("ab", 2)), committed(2))
    world = happen(world, *(failed("ab"[rank // 2], rank, FailureKind.EXCEPTION, generation=2) for rank in range(4)))
    assert spent(world) == [Budget.INFRASTRUCTURE, Budget.USER_CODE]
    assert len(world.incidents) == 1


def test_a_node_that_is_lost_with_its_workers_is_charged_once() -> None:
    world = happen(training(), joined("b", number=2), failed("a", 0))
    assert spent(world) == [Budget.INFRASTRUCTURE]
    assert world.incidents[0].culprit == "b: its agent was restarted"


def test_a_broken_collective_is_never_charged_and_gives_way_to_its_cause() -> None:
    world = happen(training(), failed("b", 2, FailureKind.COLLECTIVE, what="connection closed"))
    assert spent(world) == []
    assert world.incidents[0].culprit == "rank 2 on b: connection closed"
    world = happen(world, failed("a", 0), failed("b", 3, FailureKind.COLLECTIVE))
    assert spent(world) == [Budget.INFRASTRUCTURE]
    assert world.incidents[0].culprit == "rank 0 on a: killed by SIGKILL"


@pytest.mark.parametrize("kind", FailureKind)
def test_every_kind_of_failure_has_its_budget(kind: FailureKind) -> None:
    free = kind in (FailureKind.COLLECTIVE, FailureKind.DAMAGED, FailureKind.FORGOTTEN)
    assert (budget_of(kind) is None) is free


def test_a_broken_world_closes_no_incident() -> None:
    world = happen(training(step=10), failed("a", 0), now=5.0)
    world = happen(world, at_step("a", 12), at_step("b", 12), ready("a"), ready("b"), now=6.0)
    assert world.open_incident is not None
    world = happen(world, proposed(formation("ab", 2)), committed(2), now=7.0)
    world = happen(world, at_step("a", 1, 2), at_step("b", 1, 2), now=8.0)
    (incident,) = world.incidents
    assert (incident.downtime, incident.steps_lost) == (3.0, 12)


def test_the_steps_lost_are_those_of_the_last_words() -> None:
    """The leader had heard of step 10; the workers that were ended for the next world had made 12, and then 13."""
    world = happen(training("abc", step=10), Decided((Evict(node("c"), life("c")),), "c is lost"), now=5.0)
    world = happen(world, proposed(formation("ab", 2)), now=5.1)
    world = happen(world, at_step("a", 13), at_step("b", 12), at_step("b", 9, 7), committed(2), now=5.3)
    world = happen(world, at_step("a", 1, 2), at_step("b", 1, 2), now=8.0)
    assert world.incidents[0].steps_lost == 12, "those that all have made that are left"
    world = happen(world, at_step("a", 20), at_step("b", 20), now=9.0)
    assert world.incidents[0].steps_lost == 12, "it is over"


def test_steps_lost_in_two_recoveries_count_once() -> None:
    """The second generation fails before its first step: what the first one had made is what is lost."""
    world = happen(training(step=10), failed("a", 0), proposed(formation("ab", 2)), now=5.0)
    world = happen(world, at_step("a", 12), at_step("b", 12), committed(2), ready("a", 2), ready("b", 2), now=6.0)
    world = happen(world, failed("a", 0, generation=2), proposed(formation("ab", 3)), now=7.0)
    world = happen(world, at_step("a", 0, 2), at_step("b", 0, 2), committed(3), now=8.0)
    world = happen(world, at_step("a", 1, 3), at_step("b", 1, 3), now=9.0)
    (incident,) = world.incidents
    assert (incident.generation, incident.steps_lost, incident.downtime) == (1, 12, 4.0)


def test_a_new_leader_learns_from_the_others_how_far_they_were() -> None:
    """Its journal had not been told of the last steps when its predecessor died."""
    world = happen(training("abc", step=10), began("abc", term=2, takeover=True), now=20.0)
    world = happen(world, joined("b", number=2), joined("c", number=2), now=20.1)
    world = happen(world, at_step("b", 14), at_step("c", 14), now=20.2)
    world = happen(world, proposed(formation("bc", 102, term=2)), committed(102), now=20.3)
    world = happen(world, at_step("b", 1, 102), at_step("c", 1, 102), now=21.0)
    (incident,) = world.incidents
    assert (incident.generation, incident.steps_lost) == (1, 14)


def test_an_echo_of_a_failure_changes_nothing() -> None:
    """One lost node of a thousand makes eight thousand collectives fail; the leader has other things to do."""
    world = happen(training(), failed("b", 2))
    assert happen(world, failed("a", 0, FailureKind.COLLECTIVE)) is world
    first = happen(training(), failed("a", 0, FailureKind.COLLECTIVE))
    assert happen(first, failed("a", 1, FailureKind.COLLECTIVE)) is first
    assert happen(first, failed("b", 2)).incidents[0].culprit == "rank 2 on b: killed by SIGKILL"


def test_a_plain_command_has_resumed_when_it_is_started() -> None:
    world = happen(training(), failed("a", 0), now=5.0)
    world = happen(world, proposed(formation("ab", 2)), committed(2), now=6.0)
    silent = [WorkersReady(node(name), Generation(2), counts_steps=False) for name in "ab"]
    world = happen(world, silent[0], now=7.0)
    assert world.open_incident is not None
    assert happen(world, silent[1], now=8.0).incidents[0].downtime == 3.0


def test_a_checkpoint_counts_for_its_own_generation() -> None:
    world = happen(training(), saved(5))
    # a stray refusal burns a number while training goes on
    world = happen(world, WorldRefused(node("c"), life("c"), Term(1), Generation(9)), saved(10))
    assert [each.step for each in world.checkpoints] == [5, 10]
    world = happen(world, proposed(formation("ab", 10, ref(5))), saved(12))
    assert [each.step for each in world.checkpoints] == [5, 10], "a straggler of a generation that is rolled back"
    assert happen(world, CheckpointsRetired((ref(5),))).checkpoints == (ref(10),)


def test_what_saves_took_is_remembered_across_starts_and_what_nobody_measured_is_not() -> None:
    world = training()
    for step in range(20):
        world = happen(world, CheckpointCommitted(ref(step), 0.5, 100, blocked=0.1 * step, lag=step))
    world = happen(world, saved(20))
    assert [each.lag for each in world.saves] == list(range(5, 20))
    world = happen(world, began("xy", term=2, allocation="7.1"))
    assert len(world.saves) == LATEST_SAVES
    world = happen(world, CheckpointCommitted(ref(99), 0.5, 100, blocked=9.0, lag=9.0))
    assert world.saves[-1].lag == 19, "a straggler says nothing of this world"
    before = {"kind": "CheckpointCommitted", "checkpoint": {"step": 5, "generation": 1}, "seconds": 0.5, "size": 100}
    assert decode_event(before) == saved(5), "a journal of an earlier version"
    asked = {"kind": "TerminationAsked", "why": "time limit", "seconds_left": 5.0}
    assert decode_event(asked) == TerminationAsked(Termination.TIME_LIMIT, 5.0)


def test_a_checkpoint_that_does_not_read_back_is_an_incident_and_stays() -> None:
    world = happen(training(), saved(5), saved(10), CheckpointVerified(ref(5)))
    assert world.verified == ref(5)
    assert happen(world, CheckpointVerified(ref(7))) is world, "it has gone meanwhile"
    world = happen(world, CheckpointVerified(ref(10), "shard-00000-of-00004: a digest differs"), now=3.0)
    assert (world.verified, world.restore) == (ref(5), ref(10))
    (incident,) = world.incidents
    assert (incident.cause, incident.downtime, incident.steps_lost) == ("checkpoint damaged", 0.0, 0)
    assert "step 10 does not read back as it was written: shard-00000-of-00004: a digest differs" in incident.culprit
    assert plan(SaveRules(), world, 10.0).failures == 0


def test_a_failed_save_is_an_incident_that_costs_nothing_and_is_forgotten() -> None:
    world = happen(training(), CheckpointFailed(Step(10), Generation(1), "disk full"), now=3.0)
    (incident,) = world.incidents
    assert (incident.downtime, incident.decision) == (0.0, "training goes on; the next save tries again")
    assert world.save_failed == (10, "disk full")
    world = happen(world, proposed(formation("ab", 2)))
    assert world.save_failed is None, "the next generation comes to this step again"
    assert happen(world, CheckpointFailed(Step(10), Generation(1), "late")) == world


def test_a_refused_number_is_burnt() -> None:
    world = happen(training(), proposed(formation("ab", 5)))
    same = happen(world, WorldRefused(node("b"), life("b"), Term(1), Generation(5)))
    assert (same.refused, same.generation) == (True, 5)
    higher = happen(world, WorldRefused(node("b"), life("b"), Term(1), Generation(8)))
    assert (higher.refused, higher.generation) == (True, 8)
    earlier = happen(world, WorldRefused(node("b"), life("b"), Term(1), Generation(4)))
    assert (earlier.refused, earlier.generation) == (False, 5)
    assert happen(world, WorldRefused(node("b"), life("b"), Term(2), Generation(8))) == world, "deposed: no use"
    assert not happen(same, proposed(formation("ab", 6))).refused


def test_an_acknowledgement_is_of_one_life_term_and_generation() -> None:
    world = happen(training(), proposed(formation("ab", 2)))

    def acknowledge(name: str, number: int, term: int, generation: int) -> World:
        return happen(world, WorldAcknowledged(node(name), life(name, number), Term(term), Generation(generation)))

    assert acknowledge("a", 1, 1, 2).acknowledged == {"a"}
    for wrong in (("a", 2, 1, 2), ("a", 1, 2, 2), ("a", 1, 1, 1), ("c", 1, 1, 2)):
        assert acknowledge(*wrong).acknowledged == frozenset()


def test_what_is_said_of_an_earlier_life_changes_nothing() -> None:
    world = happen(training(), joined("b", number=2), now=5.0)
    late = happen(
        world,
        NodeHeard(node("b"), life("b", 1), Generation(1), 99),
        StreamClosed(node("b"), life("b", 1), "reset"),
        WorkersVanished(node("b"), life("b", 1)),
        now=6.0,
    )
    assert late == world
    known = world.node(node("b"))
    assert known is not None
    assert (known.incarnation, known.connected, known.heard_at) == ("b2", True, 5.0)


def test_a_reconnected_agent_is_whole_again() -> None:
    world = happen(training(), StreamClosed(node("b"), life("b"), "reset"), now=5.0)
    lost = world.node(node("b"))
    assert lost is not None
    assert (lost.connected, lost.gone_at) == (False, 5.0)
    back = happen(world, joined("b"), now=6.0)
    found = back.node(node("b"))
    assert found is not None
    assert (found.connected, found.gone_at) == (True, 0.0)
    assert back.lost_members == ()


def test_an_exception_at_the_same_step_with_the_same_words_is_known() -> None:
    bug = failed("a", 0, FailureKind.EXCEPTION, step=10, what="ValueError: x")
    world = happen(training(step=10), bug, proposed(formation("ab", 2)), committed(2))
    again = failed("b", 3, FailureKind.EXCEPTION, generation=2, step=10, what="ValueError: x")
    assert happen(world, again).repeated_bug == again
    other = failed("b", 3, FailureKind.EXCEPTION, generation=2, step=10, what="ValueError: y")
    assert happen(world, other).repeated_bug is None
    beyond = happen(world, at_step("a", 11, 2), at_step("b", 11, 2))
    assert beyond.known_bugs == frozenset()


def test_generations_without_progress_are_counted() -> None:
    world = happen(training(step=10), failed("a", 0))
    assert world.fruitless_so_far == 0
    for generation in (2, 3):
        world = happen(world, proposed(formation("ab", generation)), committed(generation))
        world = happen(world, *(at_step(name, 10, generation) for name in "ab"))
        world = happen(world, failed("a", 0, generation=generation))
        assert world.fruitless_so_far == generation - 1
    world = happen(world, proposed(formation("ab", 4)), committed(4), at_step("a", 11, 4), at_step("b", 11, 4))
    assert (world.fruitless_so_far, world.high_step) == (0, 11)


def test_goodput_counts_what_was_kept() -> None:
    world = training(step=0, since=10.0)
    world = happen(world, at_step("a", 40), at_step("b", 40), saved(30), now=50.0)
    assert world.goodput(50.0) == pytest.approx(40 / 50)
    world = happen(world, failed("a", 0), now=50.0)
    world = happen(world, proposed(formation("ab", 2, ref(30))), now=60.0)
    assert world.kept == (Stretch(Step(0), Step(30), pytest.approx(30.0)),)
    assert world.goodput(100.0) == pytest.approx(30 / 100)
    # what passes before the next formation, a back-off say, is no training either
    assert astuple(world.accounts(100.0)) == pytest.approx((30.0, 10.0, 50.0, 10.0))


def test_steps_that_a_branch_leaves_behind_were_not_kept() -> None:
    world = happen(training(step=0, since=10.0), at_step("a", 40), at_step("b", 40), saved(20), saved(40), now=50.0)
    world = happen(world, Decided((Conclude(Verdict(Outcome.FINISHED, 0, "done")),), "done"), now=50.0)
    assert astuple(world.accounts(50.0)) == pytest.approx((40.0, 0.0, 0.0, 10.0))
    branch = CheckpointsFound((ref(20),), "--from 20")
    world = happen(world, began("ab", term=2, allocation="8.0"), branch, now=50.0)
    assert astuple(world.accounts(50.0)) == pytest.approx((40.0, 0.0, 0.0, 10.0)), "it may come to nothing"
    world = happen(world, proposed(formation("ab", 2, ref(20))), committed(2), ready("a", 2), ready("b", 2), now=50.0)
    assert astuple(world.accounts(50.0)) == pytest.approx((20.0, 20.0, 0.0, 10.0))


def test_a_worker_that_failed_before_the_others_were_ready_has_trained_nothing() -> None:
    world = happen(World(), began("ab"), joined("a"), joined("b"), proposed(formation("ab", 1)), committed(1), now=10.0)
    world = happen(world, ready("a"), failed("a", 0), now=11.0)
    world = happen(world, ready("b"), now=12.0)
    assert world.goodput(13.0) == 0.0


def test_what_nobody_led_was_no_training() -> None:
    """A start was killed, and the next one had to wait until the leader was surely gone."""
    world = happen(training(step=0, since=10.0), at_step("a", 40), at_step("b", 40), saved(40), now=50.0)
    world = happen(world, replace(began("ab", term=2, allocation="8.0"), leaderless=65.0), now=115.0)
    assert astuple(world.accounts(115.0)) == pytest.approx((40.0, 0.0, 0.0, 75.0))


def test_a_new_start_remembers_history_and_forgets_presence() -> None:
    world = happen(training(), saved(10), failed("a", 0), now=5.0)
    verdict = Verdict(Outcome.REQUEUED, 75, "time limit")
    world = happen(world, Decided((Conclude(verdict),), "time limit"), now=6.0)
    assert (world.phase, world.verdict) == (Phase.ENDED, verdict)
    world = happen(world, began("xy", term=2, allocation="7.1"), now=6.0)
    assert (world.phase, world.nodes, world.formation, world.failures) == (Phase.GATHERING, (), None, ())
    assert (world.checkpoints, world.generation, world.starts, world.verdict) == ((ref(10),), 1, 2, None)
    assert [member.node for member in world.previous] == ["a", "b"]
    assert (world.previous_term, world.term, world.term_since) == (1, 2, 6.0)
    assert spent(world) == [Budget.INFRASTRUCTURE]
    assert world.open_incident is not None


def test_numbers_that_a_lost_leader_may_have_used_are_skipped() -> None:
    world = training()
    lost = happen(world, began("ab", term=2, takeover=True), now=9.0)
    assert lost.generation == 1 + UNWRITTEN
    assert (lost.lost_leader, lost.incidents[0].cause) == ("a", "leader lost")
    concluded = happen(world, Decided((Conclude(Verdict(Outcome.REQUEUED, 75, "")),), ""))
    assert happen(concluded, began("ab", term=2, allocation="7.1")).generation == 1
    # a term in between has left no trace at all
    assert happen(concluded, began("ab", term=3, allocation="7.1")).generation == 1 + UNWRITTEN


def test_an_incident_of_the_leader_began_when_it_was_lost() -> None:
    lost = happen(training(), replace(began("ab", term=2, takeover=True), leaderless=6.0), now=30.0)
    assert lost.incidents[0].detected_at == 24.0


def test_a_takeover_names_the_leader_whatever_else_is_open() -> None:
    world = happen(training(), failed("b", 2), began("ab", term=2, takeover=True))
    assert world.lost_leader == "a"
    assert len(world.incidents) == 1


def test_the_warning_comes_first_and_the_reason_later() -> None:
    world = happen(training(), TerminationAsked(Termination.TIME_LIMIT, 90.0), now=10.0)
    world = happen(world, TerminationAsked(Termination.PREEMPTED, 200.0), now=20.0)
    assert world.termination is not None
    assert (world.termination.why, world.termination_at + world.termination.seconds_left) == (
        Termination.PREEMPTED,
        100.0,
    )
    world = happen(world, TerminationAsked(Termination.CANCELLED, 18.0), now=30.0)
    assert world.termination is not None
    assert world.termination_at + world.termination.seconds_left == 48.0
    assert happen(world, TerminationAsked(Termination.TIME_LIMIT, 5.0), now=31.0) == world


def test_returned_ranks_are_of_the_running_generation() -> None:
    world = happen(training(), WorkerReturned(node("a"), Generation(1), Rank(0), Step(10)))
    assert world.returned == {0}
    assert happen(world, WorkerReturned(node("a"), Generation(7), Rank(1), Step(10))).returned == {0}
    assert happen(world, proposed(formation("ab", 2))).returned == frozenset()
