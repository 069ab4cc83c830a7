from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft import page
from hpcft.cadence import LET_GO, Pace, Saving, due, meeting_step, missed, step_seconds
from hpcft.events import CheckpointRef, Formation, Member, NodeReported, WorkerReport
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step, Term
from hpcft.units import EverySeconds, EverySteps, Never
from hpcft.world import Phase, World

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


def test_a_save_by_the_clock_is_repeated_only_if_a_rank_has_missed_it() -> None:
    scene, world = Scene(), training(10)
    assert scene.look(world) == []
    assert scene.look(world, later=601.0) == [(12, False)]
    scene.settled.add(12)
    assert scene.look(training(15), later=60.0) == [], "it is being committed, slowly"
    scene.settled.clear()
    (again,) = scene.look(training(15), later=1.0)
    assert again[0] > 15 and not again[1]
    assert scene.look(saved(training(15), again[0])) == []
    assert scene.look(training(15), later=601.0) != [], "the next one is due"
