"""The batch script, run with a srun and an hpcft that say how they were called."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.files import REPOSITORY

SCRIPT = REPOSITORY / "slurm" / "train.sbatch"


def test_it_is_short_and_bash_reads_it() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 40
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_what_slurm_needs_to_know_is_there_with_its_reason() -> None:
    flags = dict(
        line.removeprefix("#SBATCH").strip().partition(" ")[::2]
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    for flag in ("--requeue", "--no-kill", "--open-mode=append", "--ntasks-per-node=1", "--signal=USR1@180"):
        assert flags[flag].strip().startswith("#"), flag


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Programs that write their name and arguments to `calls`; `hpcft wait` ends with 75 after srun was called."""
    log = tmp_path / "calls"
    # one write for the whole line: the two programs run at the same time
    body = f'line="$(basename "$0") in $PWD:$(printf " [%s]" "$@")"; echo "$line" >>{log}\n'
    for name, rest in (("srun", "sleep 0.1"), ("hpcft", f"until grep -q ^srun {log}; do sleep 0.05; done; exit 75")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}{rest}\n")
        (tmp_path / name).chmod(0o755)
    return log


def run(calls: Path, submitted_from: Path, *arguments: str, **environ: str) -> dict[str, str]:
    environment = {"PATH": f"{calls.parent}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(submitted_from), **environ}
    spooled = calls.parent / "slurm_script"
    spooled.write_text(SCRIPT.read_text())
    ran = subprocess.run(["bash", str(spooled), *arguments], env=environment, cwd="/", timeout=30)
    assert ran.returncode == 75, "the job's exit code is that of `hpcft wait`"
    return dict(line.split(":", 1) for line in calls.read_text().splitlines())


def test_agents_are_started_by_srun_and_the_verdict_is_waited_for(calls: Path, tmp_path: Path) -> None:
    here = tmp_path / "repository"
    here.mkdir()
    called = run(calls, here)
    step = called[f"srun in {here}"]
    for flag in ("--no-kill", "--kill-on-bad-exit=0", "--wait=0"):
        assert f"[{flag}]" in step
    assert step.endswith("[hpcft] [agent] [configs/train.toml]"), "without a shell in between"
    assert "[-c" not in step
    words = called[f"hpcft in {here}"].split()
    assert words[:3] == ["[wait]", "[configs/train.toml]", "[--srun]"]
    assert words[3].strip("[]").isdecimal()


def test_the_first_argument_is_the_configuration_and_options_go_to_both(calls: Path, tmp_path: Path) -> None:
    called = run(calls, tmp_path, "my run.toml", "--set", "a=b c", SLURM_CPUS_PER_TASK="8")
    step = called[f"srun in {tmp_path}"]
    assert step.endswith("[hpcft] [agent] [my run.toml] [--set] [a=b c]")
    assert "[-c] [8]" in step
    assert called[f"hpcft in {tmp_path}"].startswith(" [wait] [my run.toml] [--set] [a=b c] [--srun]")


def test_the_projects_own_hpcft_is_preferred_and_can_be_replaced(calls: Path, tmp_path: Path) -> None:
    own = tmp_path / ".venv" / "bin" / "hpcft"
    own.parent.mkdir(parents=True)
    own.write_text((tmp_path / "hpcft").read_text())
    own.chmod(0o755)
    assert "[.venv/bin/hpcft] [agent]" in run(calls, tmp_path)[f"srun in {tmp_path}"]
    calls.unlink()
    other = str(tmp_path / "hpcft")
    assert f"[{other}] [agent]" in run(calls, tmp_path, HPCFT=other)[f"srun in {tmp_path}"]
