"""What hpcft knows of Slurm, on a real cluster: from a step's environment to the commands a job gives about itself."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import USER, Cluster, Size, address, until
from tests.cluster.files import REPOSITORY

pytestmark = pytest.mark.slurm

ALLOCATION = """
import dataclasses, json, os
from hpcft.slurm.environment import from_environment, own_address
allocation = from_environment(os.environ)
print(json.dumps(dataclasses.asdict(allocation) | {"own": own_address(allocation), "index": allocation.node_index}))
"""
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY)}


def allocations(text: str) -> list[dict[str, object]]:
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda each: each["index"])


def test_a_step_knows_its_allocation(cluster: Cluster) -> None:
    srun = ["srun", "-N3", "-w", "node[2-4]", sys.executable, "-c", ALLOCATION]
    found = allocations(cluster.exec(0, *srun, user=USER, env=ENVIRONMENT).stdout)
    assert [each["node"] for each in found] == ["node2", "node3", "node4"]
    assert [each["own"] for each in found] == [address(2), address(3), address(4)]
    assert all(each["nodes"] == ["node2", "node3", "node4"] for each in found)
    assert all(each["restart_count"] == 0 and each["kind"] == "slurm" for each in found)


def test_an_own_name_on_loopback_does_not_mislead(cluster: Cluster, tmp_path: Path) -> None:
    hosts = cluster.directory / "hosts-of-node1"
    hosts.write_text("127.0.1.1 node1\n" + (cluster.directory / "etc" / "hosts").read_text())
    cluster.exec(1, "mount", "--bind", hosts, "/etc/hosts")
    try:
        assert cluster.exec(1, "getent", "hosts", "node1").stdout.split()[0] == "127.0.1.1"
        srun = ["srun", "-N2", "-w", "node[1-2]", sys.executable, "-c", ALLOCATION]
        found = allocations(cluster.exec(0, *srun, user=USER, env=ENVIRONMENT).stdout)
    finally:
        cluster.exec(1, "umount", "/etc/hosts")
    assert [each["own"] for each in found] == [address(1), address(2)]


def test_gpus_are_seen_by_position(tmp_path: Path) -> None:
    with Cluster.start(tmp_path / "cluster", Size(nodes=1, gpus=4)) as cluster:
        first = cluster.sbatch("--gpus-per-node=1", "--wrap", "sleep 100")
        cluster.wait_job(first, "RUNNING")
        srun = ["srun", "--gpus-per-node=2", sys.executable, "-c", ALLOCATION]
        (found,) = allocations(cluster.exec(0, *srun, user=USER, env=ENVIRONMENT).stdout)
    assert found["gpus"] == ["1", "2"], "device 0 belongs to the other job"


TASK = """
import asyncio, json, os, signal, subprocess, time
from hpcft.slurm import control
from hpcft.slurm.environment import from_environment

allocation = from_environment(os.environ)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

def say(**what):
    print(json.dumps(what | {"start": allocation.restart_count}), flush=True)

async def main():
    say(end_time=await control.end_time(allocation.requeue_target), now=time.time())
    if allocation.restart_count == 0 and ACTION == "requeue":
        await control.requeue(allocation.requeue_target)
    elif allocation.restart_count == 1:
        subprocess.run(["scancel", allocation.requeue_target], check=True)
    signal.sigwait([signal.SIGTERM])
    say(why=await control.why_terminated(allocation.requeue_target, allocation.restart_count))

asyncio.run(main())
"""


def run_task(cluster: Cluster, action: str, *arguments: str) -> tuple[str, Path]:
    program = cluster.shared / "task.py"
    program.write_text(f"ACTION = {action!r}\n{TASK}")
    output = cluster.shared / f"output-{action}"
    script = f"#!/bin/sh\nexec srun --kill-on-bad-exit=0 {sys.executable} {program}\n"
    flags = ["-N1", "--requeue", "--open-mode=append", "--time=30", f"--output={output}"]
    return cluster.sbatch(*flags, *arguments, script=script, env=ENVIRONMENT), output


def said(output: Path) -> list[dict[str, object]]:
    if not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")]


def test_a_job_requeues_itself_and_knows_why_it_is_ended(cluster: Cluster) -> None:
    job, output = run_task(cluster, "requeue", "--array=5")
    cluster.wait_job(f"{job}_5", "CANCELLED", timeout=90)
    first = [each for each in said(output) if each["start"] == 0]
    second = [each for each in said(output) if each["start"] == 1]
    left = float(str(first[0]["end_time"])) - float(str(first[0]["now"]))
    assert 1740 < left <= 1801
    assert first[1]["why"] == "requeued"
    assert second[1]["why"] == "cancelled"


def test_a_preemption_is_seen_while_its_grace_lasts(tmp_path: Path) -> None:
    partitions = (
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=3 State=UP",
        "PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP",
    )
    with Cluster.start(tmp_path / "cluster", Size(nodes=1, slurm_options=partitions)) as cluster:
        job, output = run_task(cluster, "wait", "--partition=low")
        until(lambda: said(output), "the task runs")
        cluster.sbatch("--partition=high", "--exclusive", "--wrap", "sleep 100")
        cluster.wait_job(job, "COMPLETED")  # the task ends within the grace time
    assert said(output)[-1]["why"] == "preempted"


def test_slurmctld_away_is_told_in_time(cluster: Cluster) -> None:
    call = "import asyncio; from hpcft.slurm import control; asyncio.run(control.requeue('1', limit=3))"
    cluster.ctld_stop()
    started = time.monotonic()
    ran = cluster.exec(1, sys.executable, "-c", call, user=USER, env=ENVIRONMENT, check=False)
    assert time.monotonic() - started < 10
    assert "SlurmUnreachableError" in ran.stderr
