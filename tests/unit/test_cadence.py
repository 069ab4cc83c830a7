from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.cadence import due, meeting_step, step_seconds
from hpcft.events import Formation, Member
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step, Term
from hpcft.units import EverySeconds, EverySteps, Never
from hpcft.world import World

MEMBER = Member(NodeId("a"), Incarnation("a1"), "", 1, Rank(0))
FORMATION = Formation(Term(1), Generation(1), (MEMBER,), None, "0")


def at(step: int, *, base: int = 0, since: float | None = 0.0) -> World:
    progress = {NodeId("a"): Step(step)}
    return World(formation=FORMATION, progress=progress, base_step=Step(base), training_since=since)


def test_only_a_cadence_by_the_clock_is_ordered() -> None:
    assert not due(EverySeconds(60.0), at(5), now=159.9, last_save=100.0)
    assert due(EverySeconds(60.0), at(5), now=160.0, last_save=100.0)
    assert not due(EverySteps(1), at(5), now=1e6, last_save=0.0)
    assert not due(Never(), at(5), now=1e6, last_save=0.0)


def test_steps_are_timed_within_their_generation() -> None:
    assert step_seconds(at(150, base=100, since=10.0), 20.0) == pytest.approx(0.2)
    assert step_seconds(at(100, base=100, since=10.0), 20.0) is None
    assert step_seconds(at(150, since=None), 20.0) is None


def test_ranks_meet_at_a_step_that_none_has_reached() -> None:
    assert meeting_step(at(0), 0.0, 0.6) == 2
    assert meeting_step(at(100, since=0.0), 10.0, 0.6) == 100 + 6 + 2
    assert meeting_step(at(4, since=0.0), 120.0, 0.6) == 4 + 1 + 2


@given(
    done=st.integers(1, 10**6),
    seconds=st.floats(1e-3, 60.0),
    lead=st.floats(0.05, 5.0),
    old=st.floats(0.0, 1.0),
)
def test_the_meeting_lies_ahead_of_a_picture_that_is_a_little_old(
    done: int, seconds: float, lead: float, old: float
) -> None:
    """Steps that were made while the report and the order were on their way do not reach the meeting."""
    meeting = meeting_step(at(done, since=0.0), done * seconds, lead)
    made_meanwhile = lead * old / seconds
    assert meeting > done + made_meanwhile
