"""Doctor's rules, with the facts of clusters that are not at hand; and its probes, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hpcft.config import Config
from hpcft.doctor import as_dict, exit_code, probes, rules
from hpcft.doctor.finding import Finding
from hpcft.doctor.probes import MemoryFacts, PythonFacts, SlurmFacts
from hpcft.errors import ExitCode

SITE = {
    "SLURM_VERSION": "24.05.3",
    "JobRequeue": "1",
    "KillWait": "30 sec",
    "SlurmdTimeout": "300 sec",
    "RequeueExit": "(null)",
    "PreemptMode": "REQUEUE",
    "ProctrackType": "proctrack/cgroup",
    "PrologFlags": "Alloc,Contain,X11",
}


def graded(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.subject: finding.grade for finding in findings}


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def troubles(findings: Iterable[Finding]) -> list[Finding]:
    found = [finding for finding in findings if finding.grade != "ok"]
    assert all(finding.advice for finding in found), "whatever is not ok says what to do"
    return found


# --- findings ---


def test_a_failure_is_exit_code_14_and_a_warning_is_none() -> None:
    fine, doubtful, bad = Finding("ok", "a", "b"), Finding("warn", "a", "b", "c"), Finding("fail", "a", "b", "c")
    assert exit_code([fine, doubtful]) is ExitCode.OK
    assert exit_code([fine, doubtful, bad]) is ExitCode.UNUSABLE
    assert [as_dict(each)["grade"] for each in ([], [fine], [fine, doubtful], [bad, doubtful])] == [
        "ok", "ok", "warn", "fail",
    ]  # fmt: skip


# --- Python ---


def python(**changes: Any) -> PythonFacts:
    facts = {"version": "3.11.7", "system": "Linux", "kernel": (5, 14), "requirements": (("click", "8.1", "8.5.1"),)}
    return PythonFacts(**{**facts, **changes})


@pytest.mark.parametrize(
    ("facts", "grades"),
    [
        (python(), {"system": "ok", "packages": "ok"}),
        (python(system="Darwin"), {"system": "fail", "packages": "ok"}),
        (python(kernel=(4, 18)), {"system": "fail", "packages": "ok"}),
        (python(requirements=(("click", "8.1", "8.0.4"),)), {"system": "ok", "packages": "fail"}),
        (python(requirements=(("click", "8.1", None),)), {"system": "ok", "packages": "fail"}),
        (python(requirements=(("uvloop", "0.19", "0.20"),)), {"system": "ok", "packages": "ok"}),
    ],
)
def test_python_and_its_packages(facts: PythonFacts, grades: dict[str, str]) -> None:
    findings = list(rules.judge_python(facts))
    assert graded(findings) == grades
    troubles(findings)


def test_what_is_missing_is_installed_as_hpcft_was_from_its_checkout() -> None:
    findings = list(rules.judge_python(python(requirements=(("click", "8.1", None),))))
    (advice,) = [each.advice for each in findings if each.grade == "fail"]
    assert "checkout" in advice and "pip install -e . -c constraints.txt" in advice


@pytest.mark.parametrize(
    ("text", "number"),
    [("2.13.0+cpu", (2, 13, 0)), ("23.02.6-1", (23, 2, 6)), ("2.9.0a0+git1", (2, 9, 0)), ("unknown", ())],
)
def test_version_numbers(text: str, number: tuple[int, ...]) -> None:
    assert probes.version_number(text) == number


# --- torch ---


@pytest.mark.parametrize(
    ("changes", "gpus", "grade", "words"),
    [
        ({}, 0, "ok", "2.13.0"),
        ({"version": "2.7.1"}, 0, "fail", "2.8"),
        ({"gloo": False}, 0, "fail", "gloo"),
        ({}, 4, "fail", "CUDA build"),
        ({"cuda": "12.8"}, 4, "warn", "NCCL"),
        ({"cuda": "12.8", "nccl": True}, 4, "ok", "CUDA 12.8"),
        ({"seconds": 45.0}, 0, "warn", "faster disk"),
        ({"error": "ModuleNotFoundError: No module named 'torch'"}, 0, "fail", "not part of hpcft"),
        ({"error": "no answer within 2m 00s", "silent": True}, 0, "fail", "file system"),
    ],
)
def test_torch(changes: dict[str, Any], gpus: int, grade: str, words: str) -> None:
    facts = {"version": "2.13.0+cpu", "cuda": None, "gloo": True, "nccl": False, "seconds": 1.0} | changes
    finding = only(rules.judge_torch(facts, gpus=gpus))
    assert finding.grade == grade
    assert words in finding.text()


# --- Slurm ---


def test_a_site_without_trouble() -> None:
    assert troubles(rules.judge_settings(SITE, rules.Limits())) == []


@pytest.mark.parametrize(
    ("changes", "limits", "subject", "words"),
    [
        ({"SLURM_VERSION": "22.05.8"}, {}, "slurm", "extern step"),
        ({"JobRequeue": "0"}, {}, "JobRequeue", "#SBATCH --requeue"),
        ({"KillWait": "10 sec"}, {"grace": 10.0}, "KillWait", "set recovery.grace below 10s"),
        ({"KillWait": "15 sec"}, {"grace": 10.0}, "KillWait", "only 15 s"),
        ({"SlurmdTimeout": "15 sec"}, {"heartbeat_timeout": 5.0}, "SlurmdTimeout", "heal"),
        ({"SlurmdTimeout": "0 sec"}, {}, "SlurmdTimeout", "never gives up"),
        ({"RequeueExit": "1,5-11"}, {}, "RequeueExit", "includes 1, 10, 11"),
        ({"RequeueExitHold": "12"}, {}, "RequeueExitHold", "includes 12"),
        ({"PreemptMode": "GANG,SUSPEND"}, {}, "PreemptMode", "lease runs out"),
        ({"PreemptMode": "CANCEL"}, {}, "PreemptMode", "not requeued"),
        ({"ProctrackType": "proctrack/linuxproc"}, {}, "Proctrack", "cgroup"),
    ],
)
def test_settings_that_matter(changes: dict[str, str], limits: dict[str, Any], subject: str, words: str) -> None:
    finding = only(troubles(rules.judge_settings({**SITE, **changes}, rules.Limits(**limits))))
    assert (finding.grade, finding.subject) == ("warn", subject)
    assert words in finding.text()


def test_a_site_that_does_not_requeue_is_fine_for_a_run_that_does_not_ask_for_it() -> None:
    assert troubles(rules.judge_settings({**SITE, "JobRequeue": "0"}, rules.Limits(requeue=False))) == []


def test_requeued_is_a_code_that_slurm_may_requeue() -> None:
    assert troubles(rules.judge_settings({**SITE, "RequeueExit": "75,142"}, rules.Limits())) == []


@pytest.mark.parametrize(
    ("facts", "grade", "words"),
    [
        (SlurmFacts(("sbatch", "srun", "scontrol", "squeue"), None), "warn", "only `hpcft run`"),
        (SlurmFacts(("srun",), SITE), "fail", "not on PATH: srun"),
        (SlurmFacts((), None, "scontrol: fatal: Could not establish a configuration source"), "warn", "SLURM_CONF"),
        (SlurmFacts((), None, "slurm_load_ctl_conf error: Unable to contact slurm controller"), "fail", "ping"),
        (SlurmFacts((), None, "`scontrol show config` gave no answer within 10 s"), "fail", "no answer"),
    ],
)
def test_slurm_out_of_reach(facts: SlurmFacts, grade: str, words: str) -> None:
    finding = only(troubles(rules.judge_slurm(facts, rules.Limits())))
    assert finding.grade == grade
    assert words in finding.text()


def test_a_scontrol_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 600\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    began = time.monotonic()
    facts = probes.look_at_slurm(0.3)
    assert time.monotonic() - began < 30
    assert facts == SlurmFacts((), None, "`scontrol show config` gave no answer within 0.3 s")


# --- the run directory ---

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 22 0:40 / /lustre rw,noatime shared:2 - lustre 10.0.0.1@o2ib:/scratch rw,flock
36 22 0:41 / /home rw - nfs4 server:/home rw,soft,vers=4.2
37 22 0:42 / /with\\040blank rw - xfs /dev/sdb1 rw
38 22 0:43 / /lustre/me/fast rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/lustre", "lustre"),
        ("/lustre/me", "lustre"),
        ("/lustre/me/fast/x", "tmpfs"),
        ("/lustrefs", "ext4"),
        ("/with blank/x", "xfs"),
    ],
)
def test_which_mount_holds_a_path(path: str, kind: str) -> None:
    mount = probes.mount_of(path, MOUNTS)
    assert mount is not None
    assert mount.kind == kind


def directory(**changes: Any) -> dict[str, Any]:
    facts = {
        "existing": "/lustre/me", "there": True, "directory": True, "mount": ["/lustre", "lustre", ["rw"]],
        "free": 1 << 40, "free_files": None, "sync_seconds": 0.004, "skew_seconds": 0.01,
        "rename": True, "link": "", "private": True,
    }  # fmt: skip
    return facts | changes


def test_a_shared_directory_without_trouble() -> None:
    assert troubles(rules.judge_directory("/lustre/me", directory(), shared=True)) == []


@pytest.mark.parametrize(
    ("changes", "grade", "subject", "words"),
    [
        ({"mount": ["/", "ext4", ["rw"]]}, "warn", "run root", "looks local"),
        ({"mount": ["/home", "nfs4", ["rw", "soft"]]}, "warn", "run root", "hard mount"),
        ({"mount": None}, "warn", "run root", "unknown file system"),
        ({"directory": False}, "fail", "run root", "not a directory"),
        ({"trouble": "Permission denied"}, "fail", "run root", "cannot be written: Permission denied"),
        ({"error": "no answer within 30s", "silent": True}, "fail", "run root", "stuck"),
        ({"free": 100 << 20}, "fail", "free space", "100 MiB"),
        ({"free": 5 << 30}, "warn", "free space", "checkpoint.keep"),
        ({"free_files": 12}, "fail", "free space", "12 files"),
        ({"sync_seconds": 2.5}, "warn", "fsync", "2.5s"),
        ({"rename": False}, "fail", "rename", "POSIX"),
        ({"link": "link(2): Operation not permitted"}, "fail", "rename", "leadership"),
        ({"private": False}, "fail", "permissions", "secret"),
        ({"skew_seconds": -90.0}, "warn", "clock", "1m 30s"),
    ],
)
def test_directories(changes: dict[str, Any], grade: str, subject: str, words: str) -> None:
    finding = only(troubles(rules.judge_directory("/lustre/me", directory(**changes), shared=True)))
    assert (finding.grade, finding.subject) == (grade, subject)
    assert words in finding.text()


def test_on_one_machine_a_local_file_system_will_do() -> None:
    local = directory(mount=["/", "ext4", ["rw"]])
    assert troubles(rules.judge_directory("/home/me", local, shared=False)) == []
    memory = directory(mount=["/tmp", "tmpfs", ["rw"]])
    assert only(troubles(rules.judge_directory("/tmp/me", memory, shared=False))).grade == "warn"


def test_the_probe_of_a_directory_leaves_nothing(tmp_path: Path) -> None:
    facts = probes.probe_directory(str(tmp_path / "not" / "yet"))
    assert facts["existing"] == str(tmp_path)
    assert not facts["there"]
    assert (facts["rename"], facts["link"], facts["private"]) == (True, "", True)
    assert 0 < facts["sync_seconds"] < 60
    assert abs(facts["skew_seconds"]) < 5
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    finding = only(rules.judge_directory("runs", probes.probe_directory(str(tmp_path / "runs")), shared=False))
    assert finding.grade == "fail"


# --- memory ---


def test_the_lowest_limit_along_the_path_counts_version_2(tmp_path: Path) -> None:
    job = tmp_path / "system.slice" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "step_0" / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("8589934592\n")
    (tmp_path / "system.slice" / "memory.max").write_text("34359738368\n")
    assert probes.memory_limit("0::/system.slice/job_7/step_0\n", tmp_path) == 8589934592


def test_the_lowest_limit_along_the_path_counts_version_1(tmp_path: Path) -> None:
    job = tmp_path / "memory" / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("4294967296\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert probes.memory_limit("4:memory,hugetlb:/slurm/job_7\n0::/\n", tmp_path) == 4294967296


def test_no_limit(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert probes.memory_limit("4:memory:/\n", tmp_path) is None
    assert probes.memory_limit("0::/\n", tmp_path) is None


@pytest.mark.parametrize(
    ("facts", "subject", "grade", "words"),
    [
        (MemoryFacts(64 << 30, 512 << 20, 8 << 30, True, 65536), "memory", "warn", "limit of the cgroup"),
        (MemoryFacts(64 << 30, None, 8 << 30, False, 65536), "memory", "fail", "seccomp"),
        (MemoryFacts(64 << 30, None, 64 << 20, True, 65536), "/dev/shm", "warn", "--shm-size"),
        (MemoryFacts(64 << 30, None, None, True, 65536), "/dev/shm", "warn", "missing"),
        (MemoryFacts(64 << 30, None, 8 << 30, True, 1024), "open files", "warn", "nofile"),
    ],
)
def test_memory(facts: MemoryFacts, subject: str, grade: str, words: str) -> None:
    finding = only(troubles(rules.judge_memory(facts)))
    assert (finding.subject, finding.grade) == (subject, grade)
    assert words in finding.text()


def test_memory_of_this_machine() -> None:
    facts = probes.look_at_memory()
    assert facts.total > 1 << 28
    assert facts.memfd


# --- network and GPUs ---


@pytest.mark.parametrize(
    ("facts", "shared", "grade"),
    [
        ({"name": "n1", "address": "10.0.0.1", "lookup_seconds": 0.0, "reverse_seconds": 0.0}, True, "ok"),
        ({"name": "n1", "address": "127.0.1.1", "lookup_seconds": 0.0, "reverse_seconds": 0.0}, True, "warn"),
        ({"name": "n1", "address": "127.0.1.1", "lookup_seconds": 0.0, "reverse_seconds": 0.0}, False, "ok"),
        ({"name": "n1", "address": "10.0.0.1", "lookup_seconds": 0.0, "reverse_seconds": 3.7}, True, "warn"),
        ({"name": "n1", "trouble": "its name n1 has no address"}, True, "fail"),
        ({"name": "n1", "trouble": "its name n1 has no address"}, False, "warn"),
        ({"error": "no answer within 20s", "silent": True}, True, "fail"),
    ],
)
def test_addresses(facts: dict[str, Any], shared: bool, grade: str) -> None:
    finding = only(rules.judge_address(facts, shared=shared))
    assert finding.grade == grade
    assert (finding.advice != "") == (grade != "ok")


@pytest.mark.parametrize(
    ("facts", "workers", "grade", "words"),
    [
        ({"names": []}, None, "ok", "on the CPU"),
        ({"names": []}, 2, "ok", "on the CPU"),
        ({"names": []}, 0, "warn", "nodes.workers_per_node"),
        (
            {"names": ["H200", "H200", "A100"], "driver": "570.1", "lost": []},
            0,
            "ok",
            "2 x H200, 1 x A100, driver 570.1",
        ),
        ({"names": ["H200"], "driver": "570.1", "lost": ["GPU 1: GPU is lost"]}, 0, "fail", "GPU is lost"),
        ({"names": [], "trouble": "Driver/library version mismatch"}, 0, "fail", "nvidia-smi"),
        ({"error": "no answer within 30s", "silent": True}, 0, "fail", "driver"),
    ],
)
def test_gpus(facts: dict[str, Any], workers: int | None, grade: str, words: str) -> None:
    finding = only(rules.judge_gpus(facts, workers))
    assert finding.grade == grade
    assert words in finding.text()


# --- questions ---


def test_a_probe_that_does_not_answer_is_killed_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fifo = tmp_path / "runs"  # opening a FIFO for reading blocks, as a look at a stuck mount does
    os.mkfifo(fifo)
    (tmp_path / "hpcft").mkdir()
    (tmp_path / "hpcft" / "__init__.py").write_text(f"open({str(fifo)!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(probes._PATIENCE, "directory", 0.5)
    began = time.monotonic()
    question = probes.Question("directory", str(tmp_path))
    answer = question.answer()
    assert answer == {"error": "no answer within 500ms", "silent": True}
    assert time.monotonic() - began < 30
    assert question._process.returncode == -9


def test_a_program_that_run_would_refuse(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    config = Config.model_validate({"run": {"name": "r"}, "job": {"script": str(script)}})
    found = rules.judge_program(probes.look_at_program(config))
    assert (found.grade, found.subject) == ("fail", "program") and f"there is no file {script}" in found.detail
    assert found.advice
    script.write_text("raise SystemExit('run')\n")
    assert rules.judge_program(probes.look_at_program(config)).grade == "ok"


def test_doctor_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcft", "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    report = json.loads(done.stdout)
    subjects = {finding["subject"] for finding in report["findings"]}
    assert {
        "system",
        "packages",
        "slurm",
        "run root",
        "fsync",
        "rename",
        "memory",
        "network",
        "GPUs",
        "torch",
    } <= subjects
    assert done.returncode == (14 if report["grade"] == "fail" else 0)
    assert all(finding["advice"] for finding in report["findings"] if finding["grade"] != "ok")
