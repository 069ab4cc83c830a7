"""Nodes and their agents are lost, stopped and come back; the run goes on, and no two worlds train at once."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft import process
from tests.e2e.localrun import PROGRAMS, LocalRun, exact

pytestmark = [pytest.mark.local, pytest.mark.timeout(600)]

STEPS = 44


def test_a_lost_node_leaves_the_others_training_on_uneven_slices(tmp_path: Path) -> None:
    """In mid-epoch, six ranks become four; neither divides the batch. One process alone ends with the same weights."""
    out, hold = tmp_path / "many", tmp_path / "go"
    # 110 samples in batches of 22: step 8 is in the middle of the second epoch, step 5 the last one saved
    settings = {
        "job.script": str(PROGRAMS / "small.py"),
        "checkpoint.every": "5 steps",
        "data.ledger": True,
        "train.kind": "plain",
        "train.steps": 20,
    }
    held = {**settings, "train.out": f"{out}.npz", "train.at": [[8, 0, f"wait {hold}"]]}
    with LocalRun(tmp_path, held, nodes=3).start() as run:
        run.until_recorded(8, generation=1)
        run.until_saved(5)
        at = time.monotonic()
        run.kill_node(2)
        hold.touch()
        run.until_recorded(9, generation=2)
        assert time.monotonic() - at < 20, "the end of the lifelines is a proof; nobody has to wait for a lease"
        status = run.ends(0)
    assert status["world_size"] == 4 and [each["node"] for each in status["nodes"]] == ["node1", "node2"]
    assert [each["cause"] for each in status["incidents"]] == ["node lost"]
    assert status["incidents"][0]["culprit"] == "node3 is gone: all its processes have ended"
    report = run.assert_exact(20)
    assert [each.world_size for each in report.generations] == [6, 4]
    assert report.generations[1].restored_step == 5

    with LocalRun(
        tmp_path, {**settings, "train.out": f"{tmp_path}/one.npz"}, nodes=1, workers=1, name="one"
    ).start() as one:
        one.ends(0)
    many, alone = np.load(f"{out}.npz"), np.load(tmp_path / "one.npz")
    assert sorted(many.files) == sorted(alone.files)
    for name in many.files:
        np.testing.assert_allclose(many[name], alone[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_below_the_minimum_the_run_is_requeued_and_resumes(tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "digest"
    with LocalRun(tmp_path, {**exact(out, strikes=("1 25 0 hold",)), "nodes.min": 2}).start() as run:
        run.until_recorded(25, generation=1)
        run.until_saved(20)
        run.kill_node(1)
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    report = run.assert_exact(STEPS)
    assert [each.restored_step for each in report.generations] == [0, 20]
    assert status["start"] == 2 and status["world_size"] == 4
    assert "nodes.min is 2" in run.said() and "requeued" in run.said()
    # the history goes on over the requeue
    incident = status["incidents"][0]
    # the lost node's last steps may have been unknown to the leader
    assert incident["cause"] == "node lost" and 1 <= incident["steps_lost"] <= 5 and incident["downtime_seconds"] > 0
    assert next(each["used"] for each in status["budget"] if each["cause"] == "infrastructure") == 1


def test_killed_agents_cost_no_node(tmp_path: Path, undisturbed: Any) -> None:
    """First one that follows, then the one that leads: there a new term begins, in the same start."""
    out = tmp_path / "digest"
    strikes = ("1 14 0 hold", "2 25 0 hold")
    with LocalRun(tmp_path, {**exact(out, strikes=strikes), "nodes.min": 2}).start() as run:
        run.until_recorded(13, generation=1)
        run.until_saved(10)
        keeper = run.keeper(1)
        os.kill(run.agent(1), signal.SIGKILL)
        run.until_recorded(24, generation=2)
        status = run.trains(generation=2)
        assert run.keeper(1) == keeper and status["start"] == 1
        assert [each["cause"] for each in status["incidents"]] == ["agent restarted"]
        assert "its agent" in status["incidents"][0]["culprit"]
        assert {each["node"]: each["ranks"] for each in status["nodes"]} == {"node1": [0, 1], "node2": [2, 3]}

        run.until("step 25 everywhere", lambda now: now["step"] == 25)
        run.until_saved(20)
        killed_at = time.monotonic()
        os.kill(run.agent(0), signal.SIGKILL)
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    run.assert_exact(STEPS)
    assert status["start"] == 1 and status["world_size"] == 4
    assert [each["cause"] for each in status["incidents"]] == ["agent restarted", "agent restarted"]
    assert "the leader, was restarted" in status["incidents"][1]["culprit"]
    assert status["incidents"][1]["steps_lost"] == 5, "the nodes know how far they were"
    assert 0.5 < status["incidents"][1]["downtime_seconds"] < time.monotonic() - killed_at, "from the kill on"
    terms = [json.loads(path.read_bytes()) for path in (run.directory / "terms").iterdir() if path.suffix == ""]
    assert sorted(each["node"] for each in terms) == ["node1", "node1"]


def test_the_loss_of_the_leaders_node_is_a_requeue(tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "digest"
    with LocalRun(tmp_path, exact(out, strikes=("1 25 3 hold",))).start() as run:
        run.until("step 25 everywhere", lambda now: now["step"] == 25)
        run.until_saved(20)
        run.kill_node(0)
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    report = run.assert_exact(STEPS)
    assert [each.restored_step for each in report.generations] == [0, 20]
    assert status["start"] == 2 and status["world_size"] == 4
    assert [each["cause"] for each in status["incidents"]] == ["leader lost"]
    assert status["incidents"][0]["steps_lost"] == 5
    assert status["incidents"][0]["downtime_seconds"] > 20, "the time without a leader, and the wait for it, count"
    assert "node1, the leader's node, is lost" in run.said()


def test_a_stopped_agent_has_no_workers_when_others_train_on(tmp_path: Path) -> None:
    """It cannot look after its lease, so the pool and the workers themselves have to."""
    timeout = 4.0
    settings = {
        **exact(tmp_path / "digest", pause=0.1),
        "train.steps": 1000,
        "train.samples": 250,
        "heartbeat.interval": "300ms",
        "heartbeat.suspect": "1500ms",
        "heartbeat.timeout": f"{timeout}s",
    }
    with LocalRun(tmp_path, settings, workers=1).start() as run:
        run.until_recorded(12, generation=1)
        run.until_saved(10)
        stopped = run.agent(1)
        victim = run.worker(1)
        ledger = run.directory / "ledger"
        os.kill(stopped, signal.SIGSTOP)
        at = time.time()
        status = run.trains(generation=2)
        begun = ledger.stat().st_mtime  # the second world's only file was created before its first step
        last = max(path.stat().st_mtime for path in ledger.glob("g0001-*"))
        assert process.state_of(stopped) == "T", "it has been stopped all the time"
        assert process.state_of(victim) in ("", "Z")
        assert last < at + timeout, "no step past the lease"
        assert last < begun, "no two worlds at once"
        assert status["world_size"] == 1 and [each["node"] for each in status["nodes"]] == ["node1"]
        incident = status["incidents"][0]
        assert incident["cause"] == "node lost" and "node2 is lost: no heartbeat" in incident["culprit"]

        os.kill(stopped, signal.SIGCONT)
        status = run.until(
            "the return of node2 as a spare",
            lambda found: any((each["node"], each["state"]) == ("node2", "spare") for each in found["nodes"]),
        )
        assert status["generation"] == 2 and status["world_size"] == 1, "it disturbs nobody"
        assert max(path.stat().st_mtime for path in ledger.glob("g0001-*")) == last, "nothing was written afterwards"

        os.kill(run.worker(0), signal.SIGKILL)
        status = run.trains(generation=3)
        assert status["world_size"] == 2, "with the next world it is in again"
        run.send(signal.SIGTERM)
        status = run.ends(12)
    run.assert_exact(status["step"])
