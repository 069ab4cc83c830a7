"""Workers die in every way and at every moment, and the run ends with the bits of one that nothing happened to."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcft import process
from tests.e2e.localrun import PROGRAMS, LocalRun, command, exact

pytestmark = [pytest.mark.local, pytest.mark.timeout(600)]

STEPS = 44

Finish = Callable[[LocalRun], dict[str, Any]]


def incidents(status: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Cause, generation, steps lost."""
    return [(each["cause"], each["generation"], each["steps_lost"]) for each in status["incidents"]]


def test_an_undisturbed_run_is_seen_in_every_phase(undisturbed: Any) -> None:
    seen = undisturbed.seen
    order = ["not started", "gathering", "forming", "starting", "training", "finished"]
    states = list(dict.fromkeys(each["state"] for each in seen))
    assert states == sorted(states, key=order.index)
    assert {"gathering", "training", "finished"} <= set(states)

    steps = [each["step"] for each in seen]
    assert steps == sorted(steps)
    for each in seen:
        if each["state"] == "training":
            assert each["world_size"] == 4 and each["generation"] == 1 and each["total_steps"] == STEPS
            assert [worker["rank"] for worker in each["workers"]] == [0, 1, 2, 3]
            assert {node["node"]: (node["state"], node["ranks"]) for node in each["nodes"]} == {
                "node1": ("member", [0, 1]),
                "node2": ("member", [2, 3]),
            }
            assert each["live"] and each["verdict"] is None
            assert 0 <= each["goodput"] <= 1
    reporting = [each for each in seen if each["state"] == "training" and all(w["pid"] for w in each["workers"])]
    assert len({worker["pid"] for worker in reporting[0]["workers"]}) == 4
    assert any(each["eta_seconds"] is not None and each["steps_per_second"] for each in reporting)

    last = seen[-1]
    assert last["verdict"] == {
        "outcome": "finished",
        "exit_code": 0,
        "reason": f"the training function returned after step {STEPS}",
    }
    assert [each["step"] for each in last["checkpoints"]] == [10, 20, 30, 40, 44]
    assert last["saving"]["copy_blocked_seconds"] is None, "its copies were all written"
    assert last["incidents"] == [] and all(each["used"] == 0 for each in last["budget"])
    losses = [each["loss"] for each in seen if each.get("loss") is not None]
    assert losses[-1] < 1.0, "chance is ln 10"


def test_a_finished_run_can_be_looked_at_and_is_exact(undisturbed: Any) -> None:
    run = undisturbed.run
    run.assert_exact(STEPS)
    shown = command("status", run.directory, "--json")
    assert shown.returncode == 0, shown
    assert json.loads(shown.stdout)["state"] == "finished"
    counted = json.loads(command("ledger", run.directory, "--json").stdout)
    assert [epoch["once"] for epoch in counted["epochs"]] == [250, 250, 250, 250, 250, 4 * 32]
    assert command("ckpt", "verify", "--run", run.directory).returncode == 0


def test_a_finished_run_exits_at_once_and_starts_again_from_a_named_step(undisturbed: Any) -> None:
    run: LocalRun = undisturbed.run
    before = run.status()
    with run.start():
        run.ends(0)
    assert run.status()["generation"] == before["generation"], "nothing was trained"

    undisturbed.out.unlink()
    with run.start("--from", "20"):
        status = run.ends(0)
    assert status["generation"] == before["generation"] + 1
    assert "from the checkpoint of step 20" in run.story()
    assert undisturbed.out.read_text() == undisturbed.digest
    assert run.assert_exact(STEPS).generations[-1].restored_step == 20

    with run.start("--from", "21"):
        run.ends(15)
    assert "10, 20, 30, 40, 44" in run.said()


MOMENTS = (
    "1 3 1 kill",  # before there is a checkpoint
    "2 14 2 kill",  # between two
    "3 20 3 kill saving",  # while the state is being taken: no checkpoint of step 20 in this generation
    "4 30 1 kill",  # its own part is written, the commit is on its way
    "5 44 0 kill saving",  # at the end, in the last checkpoint of all
)


def test_workers_killed_at_any_moment_change_nothing(tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "digest"
    # as many strikes as there are here would make a node suspicious; there is no other to take its place
    with LocalRun(tmp_path, {**exact(out, strikes=MOMENTS), "nodes.min": 2}).start() as run:
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    run.assert_exact(STEPS)
    assert status["generation"] == 6 and status["world_size"] == 4
    found = incidents(status)
    assert [(cause, generation) for cause, generation, _ in found] == [("worker failed", n) for n in range(1, 6)]
    lost = [steps for _, _, steps in found]
    # what lay between kill and checkpoint; one less where another rank was ended in the midst of that very step, and
    # none where the commit was through
    possible = ({2, 3}, {3, 4}, {9, 10}, {9, 10, 0}, {3, 4})
    assert all(steps in each for steps, each in zip(lost, possible, strict=True)), lost
    assert all("SIGKILL" in each["culprit"] for each in status["incidents"]), status["incidents"]
    budget = {each["cause"]: each["used"] for each in status["budget"]}
    assert budget["infrastructure"] == 5 and budget["user code"] == 0


def test_what_is_only_in_memory_is_gone_on_from_and_becomes_durable(tmp_path: Path, undisturbed: Any) -> None:
    """Copies at every third step, and no checkpoint but the last: also one in the midst of a copy.

    Where a processor is scarce a copy may be left out: then it is the next one.
    """
    out = tmp_path / "digest"
    in_a_copy = (f"2 {step} 2 kill saving" for step in range(33, STEPS, 3))
    settings = {
        **exact(out, strikes=tuple(in_a_copy), pause=0.15),
        "checkpoint.every": "1000 steps",
        "checkpoint.snapshot_every": "3 steps",
        "nodes.min": 2,
    }
    with LocalRun(tmp_path, settings).start() as run:
        run.until("a copy on all nodes", lambda found: (found.get("saving") or {}).get("held_step"))
        os.kill(run.worker(1), signal.SIGKILL)
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    report = run.assert_exact(STEPS)
    nothing, first, second = [each.restored_step for each in report.generations]
    assert nothing == 0 < first <= second and first % 3 == second % 3 == 0
    assert all("from the copy of step" in each["reason"] for each in status["incidents"])
    durable = [each["step"] for each in status["checkpoints"]]
    assert status["saving"]["copy_blocked_seconds"] > 0
    assert durable[-1] == STEPS and set(durable) <= {first, second, STEPS}, "what was gone on from, if there was time"
    assert command("ckpt", "verify", "--run", run.directory).returncode == 0


def test_other_ways_to_die_and_two_in_a_row(tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "digest"
    strikes = (
        "1 5 3 segfault",
        "2 12 2 raise",
        "3 17 0 kill",
        "4 10 1 kill saving",  # right after the other one, while the state is being restored
        "5 33 2 exit",
    )
    with LocalRun(tmp_path, {**exact(out, strikes=strikes), "nodes.min": 2}).start() as run:
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    run.assert_exact(STEPS)
    assert status["generation"] == 6
    culprits = [each["culprit"] for each in status["incidents"]]
    assert len(culprits) == 4, "the second of two in a row prolongs the first one's incident"
    assert "SIGSEGV" in culprits[0]
    assert re.search(r"rank 2 on node2: ArithmeticError: wrong at step 12 at .*struck\.py:\d+", culprits[1])
    assert "SIGKILL" in culprits[2] and "SystemExit: 3" in culprits[3]
    budget = {each["cause"]: each["used"] for each in status["budget"]}
    assert budget == {"infrastructure": 3, "user code": 2, "preemption": 0}
    told = json.loads(command("explain", run.directory, "--json").stdout)["paragraphs"]
    assert [each["kind"] for each in told] == ["start", *["failure"] * 4, "end"]
    # but for milliseconds, to which the journal rounds
    assert incidents({"incidents": [each["incident"] for each in told[1:5]]}) == incidents(status)
    assert [len([d for d in each["decisions"] if "propose" in d["actions"]]) for each in told] == [1, 1, 1, 2, 1, 0]
    assert told[-1]["verdict"] == status["verdict"] and told[-1]["steps"] == STEPS


@pytest.fixture
def loaders(tmp_path: Path) -> Iterator[LocalRun]:
    out = tmp_path / "digest"
    settings = {**exact(out, pause=0.05), "data.workers": 2, "train.micro_batch": 0}
    with LocalRun(tmp_path, settings).start() as run:
        yield run


def test_loader_processes_die_with_their_worker(loaders: LocalRun, undisturbed: Any) -> None:
    run = loaders
    run.until_recorded(12, generation=1)
    victim = run.worker(1)
    below = process.descendants(victim)
    assert len(below) >= 2, "loader processes are children of their worker"
    os.kill(victim, signal.SIGKILL)
    run.until_recorded(15, generation=2)
    assert not [pid for pid in below if process.state_of(pid) not in ("", "Z")]
    run.ends(0)
    assert (run.root / "digest").read_text() == undisturbed.digest, "who loads a sample changes nothing in it"
    run.assert_exact(STEPS)


def test_an_unmodified_torchrun_script_is_restarted(tmp_path: Path) -> None:
    script, out = PROGRAMS / "plain_train.py", tmp_path / "facts.json"
    arguments = ["--checkpoint", str(tmp_path / "own.pt"), "--steps", "60", "--pause", "0.05", "--out", str(out)]
    with LocalRun(tmp_path, {"job.command": [sys.executable, str(script), *arguments]}).start() as run:
        run.until("a checkpoint of its own", lambda found: (tmp_path / "own.pt").exists())
        os.kill(run.worker(3), signal.SIGKILL)
        status = run.ends(0)
    facts = json.loads(out.read_text())
    assert facts["world_size"] == 4 and facts["restarts"] >= 1
    assert 10 <= facts["first_step"] < 60 and facts["last_step"] == 60
    assert [each["cause"] for each in status["incidents"]] == ["worker failed"]
    assert status["verdict"]["reason"] == "the command has ended on all ranks, with status 0"
