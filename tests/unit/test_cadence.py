from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft import page
from hpcft.cadence import (
    LET_GO,
    Pace,
    SaveRules,
    Saving,
    best_interval,
    due,
    failure_rate,
    in_force,
    last_save,
    meeting_step,
    missed,
    plan,
    step_seconds,
)
from hpcft.events import CheckpointRef, Formation, Member, NodeReported, SaveReport, SnapshotTaken, WorkerReport
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step, Term
from hpcft.transitions import apply
from hpcft.units import Auto, EverySeconds, EverySteps, Never
from hpcft.world import Budget, Incident, Phase, Save, Stretch, World

MEMBER = Member(NodeId("a"), Incarnation("a1"), "", 1, Rank(0))
FORMATION = Formation(Term(1), Generation(1), (MEMBER,), None, "0")


def at(step: int, *, base: int = 0, since: float | None = 0.0) -> World:
    progress = {NodeId("a"): Step(step)}
    return World(
        generation=Generation(1), formation=FORMATION, progress=progress, base_step=Step(base), training_since=since
    )


def test_only_a_cadence_by_the_clock_is_ordered() -> None:
    assert not due(EverySeconds(60.0), at(5), now=159.9, last_save=100.0)
    assert due(EverySeconds(60.0), at(5), now=160.0, last_save=100.0)
    assert not due(EverySteps(1), at(5), now=1e6, last_save=0.0)
    assert not due(Never(), at(5), now=1e6, last_save=0.0)


def test_steps_are_timed_within_their_generation() -> None:
    assert step_seconds(at(150, base=100, since=10.0), 20.0) == pytest.approx(0.2)
    assert step_seconds(at(100, base=100, since=10.0), 20.0) is None
    assert step_seconds(at(150, since=None), 20.0) is None


def paced(seconds: Callable[[int], float], steps: int, tick: float = 0.1, late: float = 0.0) -> tuple[Pace, float]:
    """What a leader that looks every `tick` seconds knows when step `steps` was completed `late` seconds ago."""
    pace, now, done, ends = Pace(), 0.0, 0, seconds(1)
    pace = pace.seen(at(0), now)
    while True:
        now += tick
        while ends <= now and done < steps:
            done += 1
            ends += seconds(done + 1)
        pace = pace.seen(at(done), now)
        if done == steps:
            return pace, now + late


@pytest.mark.parametrize("seconds", [1.0, 8.0, 60.0])
def test_slow_steps_are_saved_at_the_next_one_that_all_have_heard_of(seconds: float) -> None:
    pace, now = paced(lambda step: seconds, 7)
    assert pace.seconds == pytest.approx(seconds, rel=0.1)
    assert meeting_step(at(7), pace, now, 0.6) == 8
    assert meeting_step(at(7), pace, now + seconds - 0.3, 0.6) == 9, "the next one ends too soon"
    assert meeting_step(at(7), pace, now + 10 * seconds, 0.6) == 9, "it is late, and may end at any time"


def test_fast_steps_are_not_timed_by_the_saves_between_them() -> None:
    """Of 10 ms, with a save of 10 s every 100 steps: their mean is ten times as long."""
    pace, now = paced(lambda step: 10.01 if step % 100 == 1 and step > 1 else 0.01, 950)
    meeting = meeting_step(at(950), pace, now, 0.6)
    assert 950 + 60 <= meeting <= 950 + 70
    during, then = paced(lambda step: 10.01 if step % 100 == 1 and step > 1 else 0.01, 900, late=5.0)
    assert 900 + 60 <= meeting_step(at(900), during, then, 0.6) <= 900 + 70, "also while one is made"


def test_of_the_first_step_nothing_is_known() -> None:
    assert meeting_step(at(0), Pace(), 5.0, 0.6) == 2
    assert meeting_step(at(0), Pace().seen(at(0), 5.0), 6.0, 0.6) == 2


def test_a_new_generation_is_timed_anew() -> None:
    pace, now = paced(lambda step: 1.0, 7)
    back = replace(at(5, base=5, since=now), generation=Generation(2))
    assert pace.seen(back, now) == Pace(Generation(2), Step(5), now)
    unready = replace(at(5, base=5, since=None), generation=Generation(2))
    assert pace.seen(unready, now).seen(back, now + 9.0).since == now


@given(
    done=st.integers(1, 40),
    seconds=st.floats(1e-3, 60.0),
    lead=st.floats(0.05, 5.0),
    late=st.floats(0.0, 1.0),
)
def test_the_meeting_lies_the_lead_ahead_and_no_further_than_needed(
    done: int, seconds: float, lead: float, late: float
) -> None:
    tick = seconds / 10
    pace, now = paced(lambda step: seconds, done, tick, late * seconds)
    meeting = meeting_step(at(done), pace, now, lead)
    ends = seconds * meeting  # when that step is completed
    unknown = tick * (2 + meeting - done)  # each step is timed as well as the leader's looks allow
    assert ends - now > lead - unknown
    assert ends - now < lead + 2 * seconds + unknown


def test_a_rank_that_is_ahead_is_not_asked_to_come_back() -> None:
    """A program runs some steps ahead of its GPU, while another rank waits at its last save."""
    pace, now = paced(lambda step: 1.0, 7)
    ahead = replace(at(7), reports=(reported((7, "checkpoint"), (11, "train")),))
    assert meeting_step(ahead, pace, now, 0.6) == 12


def reported(*ranks: tuple[int, str]) -> NodeReported:
    workers = tuple(
        WorkerReport(Rank(rank), 100 + rank, phase, Step(step), 0.1, None, 1.0, None)
        for rank, (step, phase) in enumerate(ranks)
    )
    return NodeReported(NodeId("a"), Generation(1), workers)


@pytest.mark.parametrize(
    ("ranks", "stop", "late"),
    [
        ([(6, "train"), (6, "train")], True, False),
        ([(7, "checkpoint"), (6, "train")], True, False),
        ([(7, "checkpoint"), (7, "checkpoint")], True, False),
        ([(7, "checkpoint"), (7, "train")], True, True),
        ([(7, "checkpoint"), (7, "eval")], True, True),
        ([(8, "train"), (8, "train")], True, True),
        ([(7, "checkpoint"), (7, "train")], False, False),
        ([(8, "train"), (8, "train")], False, True),
        ([(9, "done"), (9, "done")], True, False),
    ],
)
def test_who_has_gone_on_without_saving(ranks: list[tuple[int, str]], stop: bool, late: bool) -> None:
    world = replace(at(min(step for step, _ in ranks)), reports=(reported(*ranks),))
    assert missed(world, Step(7), stop=stop) is late


class Scene:
    """What is told when a leader looks at one world after the other."""

    def __init__(self) -> None:
        self.now = 100.0
        self.settled: set[int] = set()
        """Steps that all ranks have reported."""
        self.pace = Pace()
        self.saving = Saving(told_at=self.now)

    def look(self, world: World, later: float = 0.0) -> list[tuple[int, bool]]:
        self.now += later
        self.pace = self.pace.seen(world, self.now)
        self.saving, told = self.saving.next(world, self.pace, self.now, EverySeconds(600.0), self.settled.__contains__)
        return [] if told is None else [(told.step, told.stop)]

    def order_last(self, world: World) -> int:
        self.look(world)
        self.saving = self.saving.ordered(world, self.pace, self.now, stop=True)
        assert self.saving.order is not None and self.saving.order.stop
        return self.saving.order.step


def training(step: int) -> World:
    return replace(at(step), phase=Phase.RUNNING)


def ranks(world: World, *phases: tuple[int, str]) -> World:
    return replace(world, reports=(reported(*phases),))


def saved(world: World, step: int) -> World:
    return replace(world, checkpoints=(CheckpointRef(Step(step), Generation(1)),))


def copied(world: World, step: int) -> World:
    """All members have a copy of it, of which nothing is durable yet."""
    assert world.formation is not None
    for member in world.formation.members:
        world = apply(world, SnapshotTaken(member.node, world.generation, Step(step)), 0.0)
    return world


LET_THEM_GO = [tuple(LET_GO)]


def test_to_let_go_is_said_alike_to_agents_and_in_the_page() -> None:
    assert page.Order(LET_GO.step, LET_GO.stop) == page.LET_GO


def test_the_last_save_is_ordered_anew_for_a_late_rank_and_then_its_ranks_are_let_go() -> None:
    scene, world = Scene(), training(10)
    assert scene.order_last(world) == 12
    assert scene.look(ranks(world, (12, "checkpoint"), (11, "train")), later=1.0) == [], "a slow step"
    assert scene.look(ranks(world, (12, "checkpoint"), (12, "train")), later=2.0) == [(14, True)], "one has missed it"
    world = saved(world, 14)
    waiting = ranks(world, (14, "checkpoint"), (14, "checkpoint"))
    assert scene.look(waiting) == LET_THEM_GO
    assert scene.look(waiting, later=1.0) == []
    assert scene.look(waiting, later=2.0) == LET_THEM_GO, "who was not connected hears it now"


def test_a_last_save_is_told_again_to_those_who_may_not_have_heard_of_it() -> None:
    """One has missed the first order; another, who waits there, was not connected when the second one came."""
    scene, world = Scene(), training(10)
    assert scene.order_last(world) == 12
    assert scene.look(ranks(world, (12, "checkpoint"), (12, "train")), later=2.1) == [(14, True)]
    for _ in range(3):
        assert scene.look(ranks(world, (12, "checkpoint"), (12, "train")), later=1.0) == []
        assert scene.look(ranks(world, (12, "checkpoint"), (13, "train")), later=1.1) == [(14, True)]


def test_after_a_last_save_that_failed_nobody_waits() -> None:
    scene, world = Scene(), training(10)
    step = scene.order_last(world)
    assert scene.look(replace(world, save_failed=(Step(step), "disk full"))) == LET_THEM_GO


def test_after_a_save_by_the_clock_that_was_left_out_comes_the_next_one() -> None:
    scene, world = Scene(), training(10)
    scene.look(world)
    assert scene.look(world, later=601.0) == [(12, False)]
    scene.settled.add(12)
    left_out = replace(training(13), save_skipped=(Step(12), "the copies of earlier saves are still being written"))
    assert scene.look(left_out, later=1.0) == []
    ((step, stop),) = scene.look(left_out, later=600.0)
    assert step > 13 and not stop


def test_a_save_by_the_clock_is_repeated_only_if_a_rank_has_missed_it() -> None:
    scene, world = Scene(), training(10)
    assert scene.look(world) == []
    assert scene.look(world, later=601.0) == [(12, False)]
    scene.settled.add(12)
    assert scene.look(training(15), later=60.0) == [], "it is being committed, slowly"
    scene.settled.clear()
    assert scene.look(copied(training(15), 12), later=60.0) == [], "all have a copy of it: it is being written"
    nodes = training(15).formation
    assert nodes is not None
    reports = tuple(
        replace(
            reported(),
            node=member.node,
            saves=tuple(SaveReport(rank, Step(12), 9.0, 0, 1, 0.0) for rank in member.ranks()),
        )
        for member in nodes.members
    )
    writing = replace(training(15), reports=reports)
    assert scene.look(writing, later=60.0) == [], "it is being sealed and written, which takes long"
    (again,) = scene.look(replace(writing, reports=reports[:-1]), later=1.0)
    assert again[0] > 15 and not again[1]
    assert scene.look(saved(training(15), again[0])) == []
    assert scene.look(training(15), later=601.0) != [], "the next one is due"


# --- how often ---


def efficiency(gaps: np.ndarray, interval: float, cost: float) -> float:
    """Share of the time that goes into kept work, over failures so many seconds apart: only whole intervals count."""
    return float(np.floor(gaps / interval).sum() * (interval - cost) / gaps.sum())


@pytest.mark.parametrize("cost", [0.001, 0.02, 0.1, 0.5])
def test_no_other_interval_loses_less_among_simulated_failures(cost: float) -> None:
    """One is the mean time between failures."""
    gaps = np.random.default_rng(7).exponential(1.0, 200_000)
    chosen = efficiency(gaps, best_interval(cost, 1.0), cost)
    others = [efficiency(gaps, cost * factor, cost) for factor in np.geomspace(1.05, 10 / cost, 400)]
    assert chosen >= max(others) - 0.002
    assert efficiency(gaps, 2 * best_interval(cost, 1.0), cost) < chosen - 0.01 * math.sqrt(cost)
    assert efficiency(gaps, 0.5 * best_interval(cost, 1.0) + 0.5 * cost, cost) < chosen - 0.01 * math.sqrt(cost)


@pytest.mark.parametrize("cost", [1e-6, 1e-3, 0.1, 1.0, 1.9])
def test_the_interval_is_that_of_the_exact_expectation(cost: float) -> None:
    """A stretch of length p is tried until no failure strikes in it: (exp(p) - 1) seconds on average."""
    candidates = cost + np.geomspace(1e-4, 10, 20_000)
    best = np.min(np.expm1(candidates) / (candidates - cost))
    chosen = best_interval(cost, 1.0)
    assert math.expm1(chosen) / (chosen - cost) <= best * 1.01
    assert best_interval(cost, 1.0) * 3600 == pytest.approx(best_interval(cost * 3600, 3600.0))


def test_a_save_that_costs_more_than_it_saves_is_not_made_more_often() -> None:
    assert best_interval(2.0, 1.0) == 3.0
    assert best_interval(50.0, 1.0) == 51.0


@given(st.floats(60, 1e7), st.integers(0, 1000), st.floats(0, 1e8))
def test_failures_are_expected_between_belief_and_experience(mtbf: float, failures: int, trained: float) -> None:
    rate = failure_rate(mtbf, failures, trained)
    assert failure_rate(mtbf, failures + 1, trained) > rate > 0
    assert failure_rate(mtbf, failures, trained + 1.0) <= rate
    if trained > 0:
        low, high = sorted((1 / mtbf, failures / trained))
        assert low * (1 - 1e-9) <= rate <= high * (1 + 1e-9)
    else:
        assert rate == pytest.approx((1 + failures) / mtbf)


def incident(downtime: float | None) -> Incident:
    over = None if downtime is None else 100.0 + downtime
    return Incident(1, "worker failed", "", 100.0, Generation(1), Step(1), Budget.INFRASTRUCTURE, resumed_at=over)


def seen(*saves: Save, trained: float = 3600.0, incidents: tuple[Incident, ...] = ()) -> World:
    kept = (Stretch(Step(0), Step(100), trained),)
    return replace(at(0, since=None), saves=saves, kept=kept, incidents=incidents)


AUTO = SaveRules(Auto(), mtbf=3600.0, shortest=1.0, longest=1000.0)


def test_auto_follows_what_was_measured_and_says_so() -> None:
    world = seen(Save(9.0, 9.0), Save(2.0, 3.0), Save(1.0, 2.5), incidents=(incident(5.0), incident(0.0)))
    found = plan(AUTO, world, 3600.0)
    assert (found.cost, found.lag, found.saves, found.failures) == (2.0, 3.0, 3, 1), "a note is no failure"
    assert found.interval == pytest.approx(best_interval(2.0, 3600.0)) and 120 < found.interval < 122
    assert found.loss == pytest.approx(2.0 / found.interval + (found.interval / 2 + 3.0) / 3600.0)
    assert in_force(AUTO, world, 3600.0) == EverySeconds(found.interval)
    assert found.reason == (
        "every 2m 01s: a save stops training for 2s and is durable after 3s (median of 3); "
        "1 failure in 1h 00m of training, and one in 1h 00m expected beforehand, make one in 1h 00m; "
        "so 3.4% of the time is expected to be lost, 1.7% saving and 1.8% repeating steps"
    )


def test_auto_begins_with_a_measurement() -> None:
    assert in_force(AUTO, seen(), 0.0) == EverySeconds(60.0)
    assert in_force(replace(AUTO, longest=20.0), seen(), 0.0) == EverySeconds(20.0)
    assert in_force(replace(AUTO, shortest=90.0), seen(), 0.0) == EverySeconds(90.0)
    assert plan(AUTO, seen(), 0.0).reason == (
        "every 1m 00s; what a save costs has not been measured yet: the first one shows it"
    )


def test_auto_keeps_within_its_bounds_and_lets_one_save_end_before_the_next() -> None:
    cheap, dear, slow = seen(Save(1e-6, 0.1)), seen(Save(300.0, 300.0)), seen(Save(0.01, 500.0))
    assert plan(AUTO, cheap, 3600.0).interval == 1.0
    assert "every 1s, the shortest that checkpoint.every_min allows (best would be " in plan(AUTO, cheap, 3600.0).reason
    assert plan(AUTO, dear, 3600.0).interval == 1000.0
    assert "the longest that checkpoint.every_max allows (best would be 36m 23s): " in plan(AUTO, dear, 3600.0).reason
    assert plan(AUTO, slow, 3600.0).interval == 500.0
    assert plan(AUTO, slow, 3600.0).reason.startswith("every 8m 20s, for it takes 8m 20s until a save is durable: ")


@given(
    st.lists(st.builds(Save, st.floats(1e-6, 1e4), st.floats(1e-6, 1e4)), max_size=15),
    st.lists(st.sampled_from([0.0, 3.0, None]), max_size=4),
    st.floats(1, 1e7),
    st.floats(1, 1e6),
)
def test_every_plan_is_one(saves: list[Save], downtimes: list[float | None], trained: float, mtbf: float) -> None:
    rules = SaveRules(Auto(), mtbf, 30.0, 3600.0)
    found = plan(rules, seen(*saves, trained=trained, incidents=tuple(map(incident, downtimes))), trained + 100.0)
    assert found.interval is not None
    assert 30.0 <= found.interval <= max(3600.0, found.lag or 0.0)
    assert found.interval >= (found.lag or 0.0)
    assert (found.loss is not None) == bool(saves)
    assert found.loss is None or 0 <= found.loss <= 1


def test_more_failures_make_saves_more_frequent_and_dearer_saves_less() -> None:
    few, many = (seen(Save(2.0, 2.0), incidents=(incident(1.0),) * count) for count in (1, 20))
    dear = seen(Save(8.0, 8.0), incidents=(incident(1.0),))
    often, seldom = (plan(AUTO, world, 3600.0).interval or 0.0 for world in (many, dear))
    assert often < (plan(AUTO, few, 3600.0).interval or 0.0) < seldom


def test_a_configured_cadence_is_kept_and_its_cost_is_said() -> None:
    world = seen(Save(2.0, 3.0))
    assert in_force(SaveRules(EverySteps(7)), world, 0.0) == EverySteps(7)
    assert in_force(SaveRules(EverySeconds(90.0)), world, 0.0) == EverySeconds(90.0)
    by_clock = plan(SaveRules(EverySeconds(100.0), 3600.0), world, 3600.0)
    assert by_clock.interval == 100.0 and by_clock.saving == 0.02
    assert by_clock.reason.startswith("every 100s, as configured: a save stops training for 2s")
    running = replace(at(100), saves=world.saves)
    by_steps = plan(SaveRules(EverySteps(50), 3600.0), running, 200.0)
    assert by_steps.interval == 100.0
    assert by_steps.reason.startswith("every 50 steps, as configured: a save stops")
    never = plan(SaveRules(Never()), world, 0.0)
    assert (never.interval, never.loss) == (None, None)
    assert never.reason == "no checkpoint is made before the end, as configured"


# --- the last save ---


def test_the_last_save_is_given_what_it_may_take() -> None:
    pace, now = paced(lambda step: 30.0 if step == 1 else 12.0 if step == 4 else 1.0, 40)
    saves = tuple(Save(0.1, lag) for lag in (2.0, 2.0, 3.0, 2.0))
    found = last_save(replace(at(40), saves=saves), pace, now)
    assert found is not None
    # twice the usual 2 s; an evaluation of 12 s, but not what was compiled first; the order and one repetition of it
    assert found.seconds == pytest.approx(4.0 + 12.0 + 2.6, abs=0.2)
    assert re.fullmatch(
        r"it may take 18\.\ds: of 4 saves the usual one took 2s and the worst 3s, and the longest step 1[12](\.\d)?s",
        found.why,
    )
    once_slow = last_save(replace(at(40), saves=(*saves, Save(0.1, 40.0))), pace, now)
    assert once_slow is not None and once_slow.seconds == pytest.approx(50.0 + 12.0 + 2.6, abs=0.2)
    stuck = last_save(replace(at(40), saves=saves), pace, now + 100.0)
    assert stuck is not None and stuck.seconds > 100.0, "the step in progress is the longest by now"


def test_too_little_says_nothing_of_the_last_save() -> None:
    pace, now = paced(lambda step: 1.0, 9)
    three = (Save(0.1, 2.0),) * 3
    assert last_save(replace(at(9), saves=three[:2]), pace, now) is None
    assert last_save(replace(at(9), saves=three), Pace(), now) is None
    assert last_save(replace(at(9), saves=three, generation=Generation(2)), pace, now) is None
    first, then = paced(lambda step: 1.0, 1)
    assert last_save(replace(at(1), saves=three), first, then) is None, "the first step is no usual one"
