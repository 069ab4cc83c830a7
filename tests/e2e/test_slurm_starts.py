"""How a run starts on a cluster, is steered, and is refused: one clear message, a documented code, nothing left."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import USER, Cluster, until
from tests.e2e.slurmrun import EXACT, REPOSITORY, SlurmRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

HPCFT = Path(sys.executable).parent / "hpcft"


@pytest.mark.drill
def test_from_one_file(cluster: Cluster) -> None:
    """`make binary`, dropped on the shared file system, unpacked on each node; torch comes from the environment."""
    subprocess.run(["make", "--silent", "binary"], cwd=REPOSITORY, check=True, capture_output=True, timeout=300)
    binary = cluster.shared / "hpcft"
    shutil.copy(REPOSITORY / "dist" / "hpcft", binary)
    run = SlurmRun(cluster, "binary", {**EXACT, "train.steps": 20})
    environment = {
        "HPCFT": str(binary),
        "SHIV_ROOT": "/tmp/hpcft-unpacked",
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    run.submit(nodes=2, environment=environment)
    assert run.ends("COMPLETED", 240)["state"] == "finished", run.story()
    assert run.ledger().exact
    unpacked = cluster.exec(1, "ls", "-A", "/tmp/hpcft-unpacked", user=USER).stdout
    assert unpacked, "it was unpacked on the node"
    pool = (run.directory / "logs" / "node1" / "agent.log").read_text()
    assert "the pool is ready" in pool


def test_stop_from_the_login_node(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "steered", {**EXACT, "train.steps": 5000}).submit(nodes=2)
    run.trains(past=3)
    said = cluster.exec(0, HPCFT, "stop", run.name, "--root", run.root, user=USER, cwd=cluster.home).stdout
    assert "last checkpoint" in said
    status = run.until("the end", lambda now: now.get("verdict") is not None)
    assert status["state"] == "cancelled" and "stopped by hpcft-test" in status["reason"]
    assert status["checkpoints"], "the last checkpoint was made"
    record = cluster.wait_job(run.job, "FAILED", timeout=60)
    assert record["ExitCode"] == "12:0"
    until(lambda: not cluster.job_processes(), "no process is left")


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"checkpoint.evry": "10 steps"}, 2, ("checkpoint.evry", "checkpoint.every")),
        ({"nodes.min": "two"}, 2, ("nodes.min",)),
        ({"nodes.min": 3}, 13, ("allocation has 2 nodes", "nodes.min asks for 3")),
        ({"job.script": "/nowhere/train.py"}, 2, ("/nowhere/train.py",)),
    ],
)
def test_refused(cluster: Cluster, settings: Mapping[str, Any], code: int, words: tuple[str, ...]) -> None:
    run = SlurmRun(cluster, f"refused-{next(iter(settings))}-{code}", {**EXACT, **settings}).submit(nodes=2)
    record = cluster.wait_job(run.job, "FAILED", timeout=120)
    said = run.output.read_text()
    assert record["ExitCode"] == f"{code}:0", said
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert not (run.directory / "status.json").exists()
    until(lambda: not cluster.job_processes(), "no process is left")


def test_run_directory_that_cannot_be(cluster: Cluster) -> None:
    place = cluster.shared / "file"
    place.write_text("not a directory")
    run = SlurmRun(cluster, "nowhere", {**EXACT, "run.root": str(place / "runs")}).submit(nodes=2)
    record = cluster.wait_job(run.job, "FAILED", timeout=120)
    said = run.output.read_text()
    assert record["ExitCode"] == "14:0", said
    assert "cannot be used" in said and "hpcft doctor" in said
