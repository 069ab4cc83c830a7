"""The file system hangs, and processes that write to it are killed: training goes on, and so do saves afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hpcft import process
from hpcft.operators import _send
from hpcft.rundir import RunDirectory
from tests import fuse
from tests.e2e.localrun import LocalRun, _read, command, exact

pytestmark = [
    pytest.mark.local,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(fuse.MISSING), reason=fuse.MISSING or "there is one"),
]


def endless(out: Path) -> dict[str, Any]:
    return {**exact(out, pause=0.02), "checkpoint.every": "5 steps", "train.steps": 10**6, "data.ledger": False}


def carriers(run: LocalRun) -> list[int]:
    return [pid for pid in process.children(run.agent(0)) if b"hpcft.carrier" in _read(f"/proc/{pid}/cmdline")]


def newest(status: dict[str, Any]) -> int:
    return max((each["step"] for each in status["checkpoints"]), default=0)


def saved_past(run: LocalRun, step: int) -> dict[str, Any]:
    return run.until(f"a checkpoint past step {step}", lambda now: newest(now) > step)


def test_checkpoints_that_cannot_be_written_hold_nobody_up(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "run" / "checkpoints"
    with (
        fuse.served(tmp_path / "served", place) as server,
        LocalRun(tmp_path, endless(tmp_path / "digest"), nodes=1).start() as run,
    ):
        status = saved_past(run, 0)
        for _ in range(3):
            for pid in carriers(run):
                os.kill(pid, signal.SIGKILL)
            status = saved_past(run, status["step"])
        assert all(each["cause"] == "checkpoint failed" for each in status["incidents"]), status["incidents"]

        server.now(fuse.HANG)
        before = run.status()["step"]
        status = run.until("a warning", lambda now: now["warnings"])
        assert status["step"] > before + 20 and newest(status) <= before + 5
        assert status["generation"] == 1 and status["state"] == "training"
        assert all(node["heartbeat_age_seconds"] < 3 for node in status["nodes"])
        assert status["saving"]["skipped"] > 0
        (warning,) = status["warnings"]
        assert "makes no progress on node1" in warning and "Training goes on" in warning
        assert "makes no progress on node1" in command("status", run.directory).stdout

        server.now(fuse.GO_ON)
        saved_past(run, status["step"])
        status = run.until("no warning", lambda now: not now["warnings"])
        assert status["generation"] == 1
        server.now(fuse.HANG)
        stopped = command("stop", run.directory)
        assert stopped.returncode == 0 and "makes a last checkpoint" in stopped.stdout
        run.until("the last save", lambda now: now["state"] == "leaving")
        server.now(fuse.GO_ON)
        status = run.ends(12)
        assert newest(status) == status["step"] and "saved at step" in status["verdict"]["reason"]


def told(run: Path) -> dict[str, Any]:
    """What the leader answers, where its run directory hangs for itself."""
    return asyncio.run(_send(RunDirectory(run), {"do": "status"}))["status"]


def trains_on(run: Path, seconds: float) -> dict[str, Any]:
    """All the time steps are made, and heartbeats come; returns the last status."""
    until = time.monotonic() + seconds
    status = told(run)
    while time.monotonic() < until:
        before = status["step"]
        time.sleep(5)
        status = told(run)
        assert status["step"] > before and status["generation"] == 1 and status["state"] == "training", status
        assert all(node["heartbeat_age_seconds"] < 3 for node in status["nodes"])
    assert any("makes no progress" in each for each in status["warnings"]), status["warnings"]
    return status


@pytest.mark.drill
def test_most_of_a_minute_without_the_run_directory(tmp_path: Path) -> None:
    """For twelve times `heartbeat.timeout` a leader stays in office without it."""
    files = tmp_path / "served"
    with (
        fuse.served(files, tmp_path / "runs" / "run") as server,
        LocalRun(tmp_path, endless(tmp_path / "digest"), nodes=1).start() as run,
    ):
        saved_past(run, 0)
        server.now(fuse.HANG)
        status = trains_on(files, 45)
        server.now(fuse.GO_ON)
        status = saved_past(run, status["step"])
        assert (status["generation"], status["term"], status["incidents"]) == (1, 1, [])
        assert command("stop", run.directory).returncode == 0
        run.ends(12)


@pytest.mark.drill
def test_a_run_can_be_stopped_while_its_checkpoints_hang(tmp_path: Path) -> None:
    with (
        fuse.served(tmp_path / "served", tmp_path / "runs" / "run" / "checkpoints") as server,
        LocalRun(tmp_path, endless(tmp_path / "digest"), nodes=1).start() as run,
    ):
        saved_past(run, 0)
        server.now(fuse.HANG)
        trains_on(run.directory, 60)
        assert command("stop", run.directory).returncode == 0
        while run.ended() is None:
            time.sleep(0.2)
        assert run.ended() == 12
        assert "no last checkpoint was made" in run.status()["verdict"]["reason"], run.status()["verdict"]
        # who is in the kernel for a file system cannot be killed: it is named, and ends when that answers
        assert not run.left() or "processes that do not end (uninterruptible sleep)" in run.said()
        server.now(fuse.GO_ON)
        while run.left():
            time.sleep(0.2)
