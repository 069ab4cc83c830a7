"""What Slurm's commands print, read: on output of 22.05, captured when SIGTERM arrived or as the name says."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.events import Termination
from hpcft.slurm import control
from hpcft.slurm.control import (
    SlurmError,
    SlurmUnreachableError,
    classify,
    find_job,
    outside_environment,
    parse_config,
    parse_jobs,
    read_end_time,
    seconds_of,
)
from hpcft.slurm.environment import from_environment
from hpcft.slurm.job import SlurmJob

SAMPLES = Path(__file__).parent / "slurm_samples"


def record(name: str) -> dict[str, str]:
    (only,) = parse_jobs((SAMPLES / f"{name}.txt").read_text())
    return only


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ("scancel", Termination.CANCELLED),
        ("scancel_signal", Termination.CANCELLED),
        ("requeue", Termination.REQUEUED),
        ("time_limit", Termination.TIME_LIMIT),
        ("preempted_cancel", Termination.PREEMPTED),
        ("preempted_grace", Termination.PREEMPTED),
        ("preempted_requeue", Termination.REQUEUED),
    ],
)
def test_why_a_first_start_was_terminated(sample: str, why: Termination) -> None:
    assert classify(record(sample), own_restart_count=0) is why


def test_a_later_start_is_requeued_only_when_the_count_exceeds_its_own() -> None:
    assert classify(record("requeue"), own_restart_count=1) is Termination.CANCELLED
    assert classify({**record("requeue"), "Restarts": "3"}, own_restart_count=1) is Termination.REQUEUED


@pytest.mark.parametrize("state", ["PREEMPTED", "TIMEOUT", "CANCELLED"])
def test_a_record_read_after_the_end_says_the_same(state: str) -> None:
    expected = {
        "PREEMPTED": Termination.PREEMPTED,
        "TIMEOUT": Termination.TIME_LIMIT,
        "CANCELLED": Termination.CANCELLED,
    }
    assert classify({**record("scancel"), "JobState": state}, 0) is expected[state]


def test_a_job_that_could_be_preempted_was_not() -> None:
    fields = {**record("scancel"), "PreemptEligibleTime": "1795261733", "PreemptTime": "None"}
    assert classify(fields, 0) is Termination.CANCELLED


def test_a_jobs_name_is_not_mistaken_for_its_state() -> None:
    job = record("scancel")
    assert job["JobName"] == "big run JobState=FAILED"
    assert job["JobState"] == "COMPLETING"


def test_fields_of_a_record() -> None:
    job = record("pending")
    assert (job["JobId"], job["ArrayJobId"], job["ArrayTaskId"], job["JobName"]) == ("3", "2", "1", "wrap")
    assert job["CPUs/Task"] == "1"
    assert job["ReqB:S:C:T"] == "0:0:*:*"
    assert job["NodeList"] == ""
    assert job["StdOut"] == "/shared/home/slurm-2_1.out"


def test_one_task_of_an_array() -> None:
    first = (SAMPLES / "pending.txt").read_text()
    second = first.replace("JobId=3 ArrayJobId=2 ArrayTaskId=1", "JobId=2 ArrayJobId=2 ArrayTaskId=2")
    for job, task in (("2", "2"), ("3", "1"), ("2_1", "1"), ("2_2", "2")):
        found = find_job(first + second, job)
        assert found is not None
        assert found["ArrayTaskId"] == task
    assert find_job(first + second, "4") is None
    assert find_job("", "4") is None


def test_end_time_is_absolute_or_unknown() -> None:
    assert read_end_time(record("scancel_signal")) == 1826797758.0
    assert read_end_time(record("requeue")) is None, "a job that is being requeued has none"
    assert read_end_time({"EndTime": "1795261181", "TimeLimit": "UNLIMITED"}) is None


def test_settings() -> None:
    config = parse_config((SAMPLES / "config.txt").read_text())
    assert config["KillWait"] == "5 sec"
    assert config["SlurmdTimeout"] == "10 sec"
    assert config["JobRequeue"] == "1"
    assert config["PreemptMode"] == "OFF"
    assert config["RequeueExit"] == "(null)"
    assert config["SLURM_VERSION"].startswith("22.05")
    assert seconds_of(config["KillWait"]) == 5.0
    with pytest.raises(ValueError, match="begins with no number"):
        seconds_of(config["PreemptMode"])


def test_a_new_job_does_not_inherit_the_old_ones_restarts() -> None:
    inside = {
        "PATH": "/bin",
        "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "n1",
        "SLURM_CONF": "/c",
        "SBATCH_ACCOUNT": "a",
    }
    assert outside_environment(inside) == {"PATH": "/bin", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a"}


@given(st.text(), st.text())
def test_no_output_makes_the_parsers_fail(text: str, more: str) -> None:
    assert all(job for job in parse_jobs(f"JobId={text}\n {more}"))
    parse_config(text)


# The commands, played by small programs on PATH


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(directory: Path, name: str, body: str) -> None:
    (directory / name).write_text(f"#!{sys.executable}\nimport os, sys, time\n{body}\n")
    (directory / name).chmod(0o755)


def alive(pid: str) -> bool:
    return Path("/proc", pid).exists()


async def test_a_command_that_hangs_is_killed_in_time(programs: Path) -> None:
    program(programs, "scontrol", f"open({str(programs / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)")
    started = time.monotonic()
    with pytest.raises(SlurmUnreachableError, match="`scontrol requeue 7` gave no answer within 1 s") as caught:
        await control.requeue("7", limit=1)
    assert time.monotonic() - started < 5
    assert "scontrol ping" in caught.value.hint
    assert not alive((programs / "pid").read_text())


async def test_a_refusal_has_slurms_words(programs: Path) -> None:
    program(programs, "scontrol", "sys.exit('Job/step already completing or completed for job 7')")
    with pytest.raises(SlurmError, match="already completing or completed") as caught:
        await control.requeue("7")
    assert not isinstance(caught.value, SlurmUnreachableError)


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "Unexpected message received for job 1",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
    ],
)
async def test_an_absent_controller_is_told_from_a_refusal(programs: Path, words: str) -> None:
    program(programs, "scontrol", f"sys.exit({words!r})")
    with pytest.raises(SlurmUnreachableError, match="failed: "):
        await control.show_job("1")


KILLED_ONCE = """
import signal
told = os.path.join(os.path.dirname(__file__), "told")
if not os.path.exists(told):
    open(told, "w").close()
    os.kill(os.getpid(), signal.SIGTERM)
"""


async def test_a_question_ended_by_slurms_own_signal_is_asked_again(programs: Path) -> None:
    program(programs, "scontrol", KILLED_ONCE + "print('JobId=7 JobName=x\\n   JobState=COMPLETING Restarts=0')")
    assert await control.why_terminated("7", 0) is Termination.CANCELLED
    assert (programs / "told").exists()


async def test_a_requeue_ended_by_a_signal_is_not_refused(programs: Path) -> None:
    program(programs, "scontrol", KILLED_ONCE)
    with pytest.raises(SlurmUnreachableError, match="`scontrol requeue 7` was ended by SIGTERM"):
        await control.requeue("7")


@pytest.mark.parametrize(("restarts", "accepted"), [(1, True), (0, False)])
async def test_a_requeue_whose_answer_was_lost(programs: Path, restarts: int, accepted: bool) -> None:
    """The first try was ended by a signal: it was heard, or the signal was scancel's, and nothing is tried again."""
    shown = f"JobId=7 JobName=x\n   JobState=COMPLETING Restarts={restarts}"
    refused = f"print({shown!r}) if sys.argv[1] == 'show' else sys.exit('Job/step already completing')"
    program(programs, "scontrol", KILLED_ONCE + refused)
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1", "SLURM_NODEID": "0"}
    job = SlurmJob(from_environment(environ), command_timeout=5)
    if accepted:
        await job.requeue()
    else:
        with pytest.raises(SlurmError, match="was cancelled while it was to be requeued"):
            await job.requeue()


async def test_a_missing_command_says_what_to_do(programs: Path) -> None:
    with pytest.raises(SlurmError, match="cannot run scontrol") as caught:
        await control.requeue("7")
    assert "PATH" in caught.value.hint


async def test_a_job_that_slurm_has_forgotten(programs: Path) -> None:
    program(programs, "scontrol", "pass")
    with pytest.raises(SlurmError, match="does not show that job"):
        await control.end_time("7")


async def test_submission(programs: Path, tmp_path: Path) -> None:
    given = programs / "given"
    program(
        programs, "sbatch", f"open({str(given)!r}, 'w').write(f'{{sys.argv[1:]}} {{os.getcwd()}}')\nprint('12;lab')"
    )
    environ = {"SLURM_RESTART_COUNT": "1"}
    directory = tmp_path / "here"
    directory.mkdir()
    job = await control.submit(["-N2", "job.sh"], directory=directory, environ={**environ, "PATH": str(programs)})
    assert job == "12"
    assert given.read_text() == f"['--parsable', '-N2', 'job.sh'] {directory}"
