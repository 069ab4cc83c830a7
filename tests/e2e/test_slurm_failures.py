"""Section by section what must hold on a real cluster of four nodes with two workers each, when something goes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, until
from tests.e2e.slurmrun import EXACT, SLOW, SlurmRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(cluster_of_module: Cluster) -> Iterator[SlurmRun]:
    """The run that the others are compared with."""
    run = SlurmRun(cluster_of_module, "undisturbed", EXACT).submit()
    states = set()
    losses = []
    run.until(
        "the end", lambda now: (states.add(now["state"]), losses.append(now.get("loss"))) and now["state"] == "finished"
    )
    run.ends("COMPLETED")
    assert {"training", "finished"} <= states
    known = [loss for loss in losses if loss is not None]
    assert known[-1] < 0.7 * known[0], "the loss falls"
    yield run


def test_undisturbed(cluster: Cluster, undisturbed: SlurmRun) -> None:
    status = undisturbed.status()
    assert status["state"] == "finished" and status["step"] == 60 and status["world_size"] == 8
    assert status["incidents"] == []
    assert undisturbed.ledger().exact
    # at once after the last step: Slurm's own record of the job's end against the last checkpoint
    ended = float(cluster.exec(0, "date", "-d", cluster.job(undisturbed.job)["EndTime"], "+%s").stdout)
    last = (undisturbed.directory / "finished.json").stat().st_mtime
    assert ended - last < 15
    until(lambda: not cluster.job_processes(), "no process is left")


def test_killed_workers(cluster: Cluster, undisturbed: SlurmRun) -> None:
    """At three moments: before there is a checkpoint, between two, late. Each on another node."""
    run = SlurmRun(cluster, "killed", {**EXACT, "train.pause": 0.2}).submit()
    for generation, (moment, node) in enumerate([(3, 3), (17, 1), (41, 2)], start=1):
        run.trains(past=moment, generation=generation)
        run.kill_worker(node)
    status = run.ends("COMPLETED")
    assert status["world_size"] == 8 and status["generation"] == 4
    assert [incident["cause"] for incident in status["incidents"]] == ["worker failed"] * 3, run.story()
    for node, incident in zip((3, 1, 2), status["incidents"], strict=True):
        assert "SIGKILL" in incident["culprit"] and f"node{node}" in incident["culprit"]
        assert incident["downtime_seconds"] > 0 and 0 <= incident["steps_lost"] <= 20
    assert run.digest.read_text() == undisturbed.digest.read_text(), "bit-identical"
    assert run.ledger().exact, run.ledger()


def test_power_off_a_node(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "power", EXACT).submit()
    run.trains(past=13)
    cluster.power_off(3)
    status = run.trains(generation=2)
    assert {worker["node"] for worker in status["workers"]} == {"node1", "node2", "node4"}
    # soon after the time-out: the incident itself is only opened then
    assert status["incidents"][-1]["cause"] == "node lost" and "node3" in status["incidents"][-1]["culprit"]
    status = run.until("the end", lambda now: now["state"] == "finished")
    assert status["world_size"] == 6
    cluster.power_on(3)  # else Slurm waits for the node with the end of the job
    run.ends("COMPLETED")
    assert run.ledger().exact, run.ledger()


@pytest.mark.drill
def test_power_off_below_the_minimum(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "below", {**EXACT, "nodes.min": 4, "nodes.join_timeout": "20s"}).submit()
    run.trains(past=13)
    cluster.power_off(4)
    until(lambda: int(cluster.job(run.job)["Restarts"]) == 1, "requeued", 120)
    cluster.power_on(4)
    status = run.ends("COMPLETED", 240)
    assert status["start"] == 2 and status["world_size"] == 8
    assert status["incidents"][0]["cause"] == "node lost", "the history survives the requeue"
    assert "from the checkpoint of step" in run.output.read_text()
    assert run.ledger().exact, run.ledger()


def test_cut_off_with_the_run_directory_in_reach(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "cut", SLOW).submit()
    run.trains(past=13)
    before = {worker["rank"]: worker["pid"] for worker in run.status()["workers"]}
    theirs = {each.pid for each in run.workers(2)}
    cluster.cut(2)
    # by itself, and before its ranks run elsewhere
    until(lambda: not theirs & {each.pid for each in cluster.processes(2)}, "node2 has ended its workers", 30)
    assert run.status()["generation"] == 1
    status = run.trains(generation=2)
    assert "node2" not in {worker["node"] for worker in status["workers"]} and before
    cluster.heal(2)
    run.until(
        "node2 as a spare",
        lambda now: any(node["node"] == "node2" and node["state"] == "spare" for node in now["nodes"]),
    )
    run.hurry()
    status = run.ends("COMPLETED", 240)
    assert status["world_size"] == 6
    assert run.ledger().exact, run.ledger()


@pytest.mark.drill
def test_cut_off_without_the_run_directory(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "cutoff", SLOW, place=cluster.detachable).submit()
    run.trains(past=13)
    theirs = {each.pid for each in run.workers(2)}
    cluster.cut(2)
    cluster.detach(2)
    until(lambda: not theirs & {each.pid for each in cluster.processes(2)}, "node2 has ended its workers", 30)
    run.trains(generation=2)
    cluster.attach(2)
    cluster.heal(2)
    run.until(
        "node2 as a spare",
        lambda now: any(node["node"] == "node2" and node["state"] == "spare" for node in now["nodes"]),
    )
    run.hurry()
    assert run.ends("COMPLETED", 240)["world_size"] == 6
    assert run.ledger().exact, run.ledger()


@pytest.mark.drill
def test_only_the_way_to_the_leader_is_broken(cluster: Cluster) -> None:
    """A second agent is asked, reaches the node, and hears when its workers have ended."""
    run = SlurmRun(cluster, "parted", SLOW).submit()
    run.trains(past=13)
    theirs = {each.pid for each in run.workers(2)}
    cluster.part(1, 2)
    until(lambda: not theirs & {each.pid for each in cluster.processes(2)}, "node2 has ended its workers", 30)
    run.trains(generation=2)
    cluster.heal(2)
    run.hurry()
    status = run.ends("COMPLETED", 240)
    assert status["incidents"][0]["culprit"] in (
        "node2 is lost: it has told node3 that its workers have ended",
        "node2 is lost: it has told node4 that its workers have ended",
    )
    assert run.ledger().exact, run.ledger()


def test_killed_agent(cluster: Cluster, undisturbed: SlurmRun) -> None:
    run = SlurmRun(cluster, "agent", EXACT).submit()
    run.trains(past=13)
    os.kill(run.process(3, "agent").pid, signal.SIGKILL)
    run.trains(generation=2)
    status = run.ends("COMPLETED")
    assert status["world_size"] == 8, "the node is not lost"
    assert run.digest.read_text() == undisturbed.digest.read_text()
    assert run.ledger().exact, run.ledger()


@pytest.mark.drill
def test_stopped_agent(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "stopped", SLOW).submit()
    run.trains(past=13)
    agent = run.process(3, "agent").pid
    theirs = {each.pid for each in run.workers(3)}
    os.kill(agent, signal.SIGSTOP)
    stopped_at = time.monotonic()
    until(lambda: not theirs & {each.pid for each in cluster.processes(3)}, "its workers do not train on", 30)
    assert run.status()["generation"] == 1, "ended before their ranks ran elsewhere"
    run.trains(generation=2)
    time.sleep(max(0.0, stopped_at + 20 - time.monotonic()))
    os.kill(agent, signal.SIGCONT)
    run.until(
        "node3 as a spare",
        lambda now: any(node["node"] == "node3" and node["state"] == "spare" for node in now["nodes"]),
    )
    run.hurry()
    assert run.ends("COMPLETED", 240)["world_size"] == 6
    assert run.ledger().exact, run.ledger()


@pytest.mark.drill
def test_a_worker_that_cannot_be_killed(cluster: Cluster) -> None:
    """One hangs in the kernel (state D), on a file system that its node has lost: the node is given up until it is rid
    of it."""
    data = cluster.detachable / "sample"
    data.write_text("a sample")
    data.chmod(0o644)
    run = SlurmRun(cluster, "unkillable", {**SLOW, "train.look_at": str(data)}).submit()
    run.trains(past=13)
    theirs = {each.pid for each in run.workers(2)}
    cluster.detach(2, "stuck")

    def hanging() -> set[int]:
        return {each.pid for each in cluster.processes(2) if each.pid in theirs and each.state == "D"}

    steps = [run.status()["step"]]
    while steps[-10:] != steps[-1:] * 10:  # one hangs, and the others wait for it
        time.sleep(0.5)
        steps.append(run.status()["step"])
    run.kill_worker(3)
    status = run.trains(generation=2)
    assert {worker["node"] for worker in status["workers"]} == {"node1", "node3", "node4"}
    assert hanging(), "SIGKILL has not ended it"
    cluster.attach(2)
    run.until(
        "node2 as a spare",
        lambda now: any(node["node"] == "node2" and node["state"] == "spare" for node in now["nodes"]),
    )
    assert not theirs & {each.pid for each in cluster.processes(2)}
    run.hurry()
    assert run.ends("COMPLETED", 240)["world_size"] == 6
    assert run.ledger().exact, run.ledger()


def test_time_limit_ahead(cluster: Cluster) -> None:
    settings = {**SLOW, "train.steps": 300, "slurm.end_lead": "30s", "checkpoint.every": "10000 steps"}
    # slurmctld looks every 30 s, and signals if the time would be there before its next look: here 30 to 60 s from the
    # start, when training has surely begun, and surely not ended
    run = SlurmRun(cluster, "limit", settings).submit("--time=2", "--signal=USR1@60")
    run.trains(past=3)
    until(lambda: int(cluster.job(run.job)["Restarts"]) == 1, "requeued", 120)
    cluster.exec(0, "scontrol", "update", f"JobId={run.job}", "TimeLimit=30", check=False)
    status = run.until("the second start", lambda now: now.get("start") == 2 and now["state"] == "training")
    assert status["incidents"] == []
    (checkpoint,) = status["checkpoints"]
    said = run.output.read_text()
    assert f"time limit; saved at step {checkpoint['step']}: the job is requeued" in said
    assert f"from the checkpoint of step {checkpoint['step']}" in said
    run.hurry()
    assert run.ends("COMPLETED", 240)["start"] == 2
    assert run.ledger().exact, run.ledger()


@pytest.mark.drill
def test_time_limit_without_a_warning(cluster: Cluster) -> None:
    settings = {**SLOW, "train.steps": 300, "slurm.end_lead": "60s", "checkpoint.every": "10000 steps"}
    run = SlurmRun(cluster, "unwarned", settings).submit("--time=1", "--signal=URG@10")
    run.trains(past=3)
    until(lambda: int(cluster.job(run.job)["Restarts"]) == 1, "requeued", 120)
    cluster.exec(0, "scontrol", "update", f"JobId={run.job}", "TimeLimit=30", check=False)
    status = run.until("the second start", lambda now: now.get("start") == 2 and now["state"] == "training")
    (checkpoint,) = status["checkpoints"]
    assert f"time limit; saved at step {checkpoint['step']}: the job is requeued" in run.output.read_text()
    run.hurry()
    run.ends("COMPLETED", 240)
    assert run.ledger().exact, run.ledger()


def test_scancel(cluster: Cluster) -> None:
    run = SlurmRun(cluster, "cancelled", {**SLOW, "checkpoint.every": "10000 steps"}).submit()
    run.trains(past=13)
    cluster.exec(0, "scancel", run.job)
    run.ends("CANCELLED")
    until(lambda: not cluster.job_processes(), "no process is left on any node", 30)
    status = run.status()
    assert status["state"] == "cancelled", run.story()
    (last,) = status["checkpoints"]
    assert last["step"] == status["step"] > 13, "the one checkpoint is that of the step at which it stopped"


@pytest.mark.drill
def test_slurmctld_away(cluster: Cluster, undisturbed: SlurmRun) -> None:
    run = SlurmRun(cluster, "ctld", SLOW).submit()
    before = run.trains(past=5)
    cluster.ctld_stop()
    began = time.monotonic()
    while time.monotonic() < began + 30:
        time.sleep(1)
        assert run.status()["state"] in ("training", "finished")
    after = run.status()
    assert after["step"] > before["step"] and after["generation"] == 1 and after["incidents"] == []
    cluster.ctld_start()
    run.hurry()
    assert run.ends("COMPLETED", 240)["world_size"] == 8


def test_finished_run_exits_at_once(cluster: Cluster, undisturbed: SlurmRun) -> None:
    job = cluster.job(undisturbed.submit().job)["JobId"]
    cluster.wait_job(job, "COMPLETED", timeout=120)
    assert undisturbed.status()["start"] == 1, "nothing was trained again"
