"""How a run is made to leave, gives up, and goes on later; and what happens where nothing can be saved."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hpcft import process
from hpcft.checkpoint import read
from tests.cluster import until
from tests.e2e.localrun import LocalRun, command, exact

pytestmark = [pytest.mark.local, pytest.mark.timeout(600)]

STEPS = 44


def used(status: dict[str, Any], cause: str) -> int:
    return int(next(each["used"] for each in status["budget"] if each["cause"] == cause))


def test_time_limit_then_ctrl_c_then_a_damaged_checkpoint(tmp_path: Path, undisturbed: Any) -> None:
    """Four starts in a row, and the bits of one that was left alone."""
    out = tmp_path / "digest"
    with LocalRun(tmp_path, {**exact(out, pause=0.2), "nodes.min": 2}).start() as run:
        run.until_recorded(5, generation=1)
        for index in (0, 1):  # Slurm warns all steps alike
            process.send(run.keeper(index), signal.SIGUSR1)
        status = run.until("the next start", lambda found: found.get("start") == 2 and found["state"] == "training")
        saved = status["checkpoints"][-1]["step"]
        assert saved >= 5 and "requeued: time limit; saved at step" in run.said()
        assert status["incidents"] == [], "a time limit is no failure"

        run.until_recorded(saved + 4, generation=2)
        run.send(signal.SIGINT)
        run.until("the verdict", lambda found: found["verdict"] is not None)
        at = time.monotonic()
        status = run.ends(12)
        assert time.monotonic() - at < 10, "agents end right after the verdict, whoever has signalled them"
        assert status["state"] == "cancelled" and status["step"] < STEPS
        last = status["checkpoints"][-1]
        assert last["step"] == status["step"] >= saved + 4, "nothing was lost"

    damage(run.directory / "checkpoints" / f"step-{last['step']:08}-g{last['generation']:04}")
    verified = command("ckpt", "verify", "--run", run.directory)
    assert verified.returncode == 16 and f"{last['step']}" in verified.stdout

    with run.start():
        status = run.ends(0)
    assert f"the checkpoint of step {last['step']} is damaged" in run.said()
    assert "the next older one is used" in run.said()
    assert out.read_text() == undisturbed.digest
    run.assert_exact(STEPS)
    assert last["step"] not in [each["step"] for each in status["checkpoints"] if each["generation"] == 2]
    assert command("ckpt", "verify", "--run", run.directory).returncode == 0, "the damaged one is out of the way"


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path) -> None:
    with LocalRun(tmp_path, exact(tmp_path / "digest", strikes=("1 13 2 hold",))).start() as run:
        run.until_recorded(13, generation=1)
        run.send(signal.SIGINT)
        run.until("the first one's answer", lambda found: "once more kills" in run.said())
        at = time.monotonic()
        run.send(signal.SIGINT)
        status = run.ends(12)
        assert time.monotonic() - at < 20
    assert (status["state"], status["verdict"]["exit_code"]) == ("cancelled", 12)
    assert "cancelled  interrupted, without a last checkpoint" in run.said()
    with run.start("--set", "train.strikes=[]"):  # at once: nobody waits for a leader that is known to be dead
        run.until("the next start", lambda found: found.get("start") == 2)
        run.ends(0)
    assert "has not let go" not in run.said()


def test_who_waits_for_a_leader_that_was_killed_is_told_so_and_may_leave(tmp_path: Path) -> None:
    with LocalRun(tmp_path, exact(tmp_path / "digest", pause=0.2)).start() as run:
        run.until_recorded(3, generation=1)
        run.send(signal.SIGKILL)
        until(lambda: run.ended() is not None and not run.left(), "everything has ended")
    with run.start():
        run.until("the wait", lambda found: "has not let go of it" in run.said())
        at = time.monotonic()
        run.send(signal.SIGTERM)
        run.ends(12)
        assert time.monotonic() - at < 20
    assert "nothing trains yet: ending" in run.said() and "cancelled  interrupted" in run.said()


def damage(checkpoint: Path) -> None:
    """Flip one bit of the data."""
    shard = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-100] ^= 0x10
    shard.write_bytes(content)


def test_the_same_exception_twice_is_the_users(tmp_path: Path) -> None:
    strikes = ("1 13 2 raise", "2 13 2 raise")
    with LocalRun(tmp_path, exact(tmp_path / "digest", strikes=strikes)).start() as run:
        status = run.ends(10)
    said = run.said()
    assert re.search(
        r"rank 2 on node2 failed twice at step 13 with the same error: ArithmeticError: wrong at step 13 "
        r"at \S+/struck\.py:\d+",
        said,
    )
    assert "strike: raise at step 13" in said and "Traceback" in said, "the last lines of the output"
    assert status["state"] == "failed" and status["verdict"]["exit_code"] == 10
    assert any("wrong at step 13" in line for line in status["incidents"][-1]["last_output"])


def test_a_signal_is_heeded_though_nobody_leads_when_it_comes(tmp_path: Path) -> None:
    settings = {**exact(tmp_path / "digest", pause=0.3), "checkpoint.every": "10 steps"}
    with LocalRun(tmp_path, settings).start() as run:
        run.until_recorded(12, generation=1)
        run.until_saved(10)
        os.kill(run.agent(0), signal.SIGKILL)
        time.sleep(0.2)
        run.send(signal.SIGTERM)
        status = run.ends(12)
    assert status["state"] == "cancelled" and status["step"] < 40
    assert status["checkpoints"][-1]["step"] == 10


def test_budgets_survive_the_end_of_a_start(tmp_path: Path) -> None:
    settings = {
        **exact(tmp_path / "digest", strikes=("1 3 1 raise",), pause=0.1),
        "train.steps": 10_000,
        "recovery.user_failures": 1,
    }
    with LocalRun(tmp_path, settings).start() as run:
        run.until_recorded(12, generation=2)
        run.send(signal.SIGTERM)
        status = run.ends(12)
        assert used(status, "user code") == 1
    strike = f"3 {status['step'] + 3} 2 exit"
    with run.start("--set", f"train.strikes={[strike]}"):
        status = run.ends(11)
    assert used(status, "user code") == 2
    assert "2 failures of user code within 3600 s, 1 are allowed" in run.said()


def test_a_save_that_fails_is_an_incident_and_training_goes_on(tmp_path: Path, undisturbed: Any) -> None:
    out, brake = tmp_path / "digest", tmp_path / "brake"
    brake.touch()
    with LocalRun(tmp_path, {**exact(out, pause=0.6), "train.brake": str(brake)}).start() as run:
        run.until("a checkpoint", lambda found: bool(found["checkpoints"]))
        checkpoints, away = run.directory / "checkpoints", run.directory / "away"
        checkpoints.rename(away)
        checkpoints.write_text("this is no directory")
        last = max(entry.step for entry in read.entries(away))
        status = run.until("an incident", lambda found: bool(found["incidents"]))
        checkpoints.unlink()
        away.rename(checkpoints)
        brake.unlink()
        incident = status["incidents"][0]
        assert incident["cause"] == "checkpoint failed" and incident["steps_lost"] == 0
        assert "checkpoints" in incident["culprit"], "the reason names what cannot be used"
        status = run.ends(0)
    assert status["generation"] == 1, "no worker has noticed anything"
    assert [each["step"] for each in status["checkpoints"]][-1] == STEPS
    assert last + 10 not in [each["step"] for each in status["checkpoints"]]
    assert out.read_text() == undisturbed.digest
    run.assert_exact(STEPS)
    assert command("ckpt", "verify", "--run", run.directory).returncode == 0
