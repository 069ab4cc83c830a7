"""What a leader reckons before it leads."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hpcft.events import CheckpointsFound
from hpcft.ids import Incarnation, NodeId, RunId, Term
from hpcft.journal import PROGRESS_SECONDS, Replayed
from hpcft.leader import SILENT_SLACK_SECONDS, Office, _missed
from hpcft.rundir import RunDirectory
from hpcft.terms import TermRecord
from hpcft.units import Never
from hpcft.world import World


def office(leaderless: float, nodes: int = 2) -> Office:
    return Office(
        run=RunId("r"),
        directory=RunDirectory(Path("/nowhere")),
        record=TermRecord(Term(2), NodeId("a"), Incarnation("a2"), "10.0.0.1", 4711, "7.0"),
        allocation="7.0",
        nodes=tuple(NodeId(f"n{number}") for number in range(nodes)),
        checkpoints=CheckpointsFound(()),
        save_every=Never(),
        end_lead=60.0,
        leaderless=leaderless,
    )


def replayed(seconds_ago: float, allocation: str = "7.0") -> Replayed:
    written = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    return Replayed(World(allocation=allocation), 100.0, "head", 10, written)


@pytest.mark.parametrize(
    ("seconds_ago", "leaderless", "missed"),
    [
        (30.0, 20.0, 30.0),  # the former leader's last line was 10 s old when it was lost
        (5.0, 20.0, 20.0),  # its clock was ahead
        (-3600.0, 20.0, 20.0),
        (3600.0, 20.0, 20.0 + PROGRESS_SECONDS + SILENT_SLACK_SECONDS),  # ours is
    ],
)
def test_the_run_clock_makes_up_for_the_time_between_two_leaders(
    seconds_ago: float, leaderless: float, missed: float
) -> None:
    assert _missed(office(leaderless), replayed(seconds_ago)) == pytest.approx(missed, abs=1.0)


def test_with_many_nodes_a_leader_may_be_silent_for_longer() -> None:
    assert _missed(office(20.0, nodes=1000), replayed(900.0)) == pytest.approx(900.0, abs=1.0)
    assert _missed(office(20.0, nodes=1000), replayed(1e6)) == pytest.approx(1080.0, abs=1.0)


def test_time_in_the_queue_is_not_the_runs() -> None:
    assert _missed(office(3.0), replayed(3600.0, allocation="7.1")) == 3.0
    assert _missed(office(3.0), Replayed(World(), 0.0, None, 0)) == 3.0
