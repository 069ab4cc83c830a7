"""`hpcft bench checkpoint-frequency` with real runs, and Ctrl-C in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hpcft import process
from tests.e2e.localrun import HPCFT, PATIENCE

pytestmark = pytest.mark.local

SMALL = ("bench", "checkpoint-frequency", "--params", "20k", "--workers", "1", "--every", "5", "--json")


def bench(directory: Path, *options: str) -> list[str]:
    return [*HPCFT, *SMALL, "--root", str(directory), *options]


def checkpoints(directory: Path) -> list[Path]:
    return list(directory.glob("bench-*/trials/*/checkpoints"))


@pytest.mark.drill
def test_a_bench_measures_saves_overhead_and_a_recovery(tmp_path: Path) -> None:
    done = subprocess.run(
        bench(tmp_path, "--mode", "async", "--steps", "12", "--mtbf", "1h"),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    none, saved = found["rows"]
    assert found["complete"]
    assert (none["mode"], saved["mode"], saved["every"]) == ("none", "asynchronous", 5)
    assert saved["saves"] + saved["left_out"] >= 1
    assert saved["recovery_seconds"] > 0
    assert none["steps_lost"] >= 12, "without a checkpoint all steps are repeated"
    assert 0 <= saved["steps_lost"] < none["steps_lost"]
    assert found["checkpoint_bytes"] > 12 * 20_000 * 0.8
    assert all(rate > 0 for rate in found["raw_bytes_per_second"])
    assert found["recommendations"][0]["steps"] >= 1
    (directory,) = tmp_path.glob("bench-*")
    assert {"results.json", "table.csv"} <= {path.name for path in directory.iterdir()}
    assert checkpoints(tmp_path) == []


@pytest.mark.drill
def test_an_interrupted_bench_shows_what_it_has_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process.become_subreaper()  # whatever outlives the bench becomes a child of this process
    started = subprocess.Popen(
        bench(tmp_path, "--mode", "sync", "--steps", "40"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("bench-*/trials/sync-5/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    out, said = started.communicate(timeout=PATIENCE)
    assert started.returncode == 130, said
    found = json.loads(out)
    assert (found["complete"], [row["mode"] for row in found["rows"]]) == (False, ["none"])
    assert [pid for pid in process.descendants(os.getpid()) if process.lives(pid)] == []
    assert checkpoints(tmp_path) == []
