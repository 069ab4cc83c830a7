"""What `hpcft submit` finds before the queue does, and what it would give to sbatch.

Real submissions are tested on the Slurm cluster of tests/e2e.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from checkpoint_samples import committed

from hpcft import submit
from hpcft.config import Config, load
from hpcft.errors import ExitCode, HpcftError, NotFoundError, UnusableError, UsageError
from hpcft.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("print('hello')\n")
    path = tmp_path / "mine.toml"
    path.write_text(
        f'[run]\nname = "mine"\nroot = "{tmp_path}/runs"\n[job]\nscript = "train.py"\n'
        '[nodes]\nmin = 2\nworkers_per_node = 4\n[slurm]\nend_lead = "90s"\n'
    )
    return path


def config(path: Path, *sets: str) -> Config:
    return load(path, sets=sets)


def test_the_package_carries_the_script_of_the_repository() -> None:
    assert submit.SCRIPT.read_bytes() == (ROOT / "slurm" / "train.sbatch").read_bytes()


def test_the_command_has_what_the_configuration_says_and_the_users_options_last(config_file: Path) -> None:
    job = submit.prepare(
        config_file,
        config(config_file),
        sets=["checkpoint.every=50 steps"],
        sbatch_args=["--nodes", "4", "--job-name=other"],
    )
    assert job.arguments == (
        "--job-name=mine", "--signal=USR1@90", "--requeue", "--nodes", "4", "--job-name=other",
        str(submit.SCRIPT), str(config_file), "--set", "checkpoint.every=50 steps",
    )  # fmt: skip
    assert job.run_directory == config_file.parent / "runs" / "mine"


def test_a_lead_that_is_reckoned_asks_slurm_for_a_warning_two_minutes_before(config_file: Path) -> None:
    assert "--signal=USR1@120" in submit.prepare(config_file, config(config_file, "slurm.end_lead=auto")).arguments
    assert "--signal=USR1@31" in submit.prepare(config_file, config(config_file, "slurm.end_lead=30.5s")).arguments


def test_a_run_that_does_not_requeue_tells_slurm_so(config_file: Path) -> None:
    job = submit.prepare(config_file, config(config_file, "slurm.requeue=false"))
    assert "--no-requeue" in job.arguments
    assert "--requeue" not in job.arguments


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--nodes=1"], "--nodes=1"),
        (["--nodes", "1"], "--nodes=1"),
        (["-N1"], "--nodes=1"),
        (["-N", "1-4"], "--nodes=1-4"),
        (["--nodes=1,2,4"], "--nodes=1,2,4"),
        (["--nodes=8", "--nodes=1"], "--nodes=1"),
    ],
)
def test_fewer_nodes_than_the_run_needs_are_refused_before_the_queue(
    config_file: Path, arguments: list[str], asked: str
) -> None:
    with pytest.raises(HpcftError) as caught:
        submit.prepare(config_file, config(config_file), sbatch_args=arguments)
    assert caught.value.exit_code is ExitCode.BELOW_MINIMUM
    assert f"{asked} may give the job 1 nodes, and nodes.min is 2" in caught.value.message
    assert not (config_file.parent / "runs").exists()


def test_without_nodes_on_the_command_line_the_scripts_own_count(config_file: Path) -> None:
    submit.prepare(config_file, config(config_file, "nodes.min=2"))
    with pytest.raises(HpcftError, match=r"may give the job 2 nodes, and nodes\.min is 3"):
        submit.prepare(config_file, config(config_file, "nodes.min=3"))


@pytest.mark.parametrize(
    ("nodes", "smallest"),
    [("4", 4), ("2-4", 2), ("1k", 1024), ("2,4,8", 2), ("4-16:4", 4), ("  3", 3), ("all", None), ("", None)],
)
def test_the_fewest_nodes_that_an_option_allows(nodes: str, smallest: int | None) -> None:
    assert submit.smallest_count(nodes) == smallest


def test_one_worker_per_gpu_without_gpus_is_a_mistake(config_file: Path) -> None:
    automatic = config(config_file, "nodes.workers_per_node=0")
    with pytest.raises(UsageError, match="asks for no GPUs"):
        submit.prepare(config_file, automatic)
    for words in (["--gpus-per-node=8"], ["--gres=gpu:4"], ["-G", "8"], ["-G8"]):
        submit.prepare(config_file, automatic, sbatch_args=words)


def test_a_program_that_does_not_compile_is_refused(config_file: Path) -> None:
    (config_file.parent / "train.py").write_text("def train(:\n")
    with pytest.raises(UsageError, match=r"train\.py:1"):
        submit.prepare(config_file, config(config_file))


def test_a_live_run_is_not_joined_by_a_second_job(config_file: Path) -> None:
    run = RunDirectory(config_file.parent / "runs" / "mine")
    run.prepare()
    run.status.write_bytes(orjson.dumps({"state": "training"}))
    with pytest.raises(UnusableError, match="is being trained already"):
        submit.prepare(config_file, config(config_file))


def test_a_place_that_cannot_hold_the_run_directory(config_file: Path) -> None:
    (config_file.parent / "runs").write_text("a file")
    with pytest.raises(UnusableError, match="runs is a file"):
        submit.prepare(config_file, config(config_file))


def test_a_step_without_checkpoint_is_refused_with_those_that_have_one(config_file: Path) -> None:
    run = RunDirectory(config_file.parent / "runs" / "mine")
    run.prepare()
    committed(run.checkpoints, 100)
    job = submit.prepare(config_file, config(config_file), from_step=100)
    assert job.arguments[-2:] == ("--from", "100")
    with pytest.raises(NotFoundError) as caught:
        submit.prepare(config_file, config(config_file), from_step=150)
    assert caught.value.hint == "there are: 100; hpcft ckpt ls"


# --- as a command ---


def hpcft(*arguments: str, cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcft", "submit", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_dry_run_prints_command_and_script_and_submits_nothing(config_file: Path) -> None:
    done = hpcft("mine.toml", "--dry-run", "--", "--nodes=4", cwd=config_file.parent, path="/nowhere")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "# the command"
    assert "sbatch --job-name=mine --signal=USR1@90 --requeue --nodes=4" in lines[1]
    assert done.stdout.endswith((ROOT / "slurm" / "train.sbatch").read_text())
    assert not (config_file.parent / "runs").exists()
    printed = json.loads(hpcft("mine.toml", "--dry-run", "--json", cwd=config_file.parent, path="/nowhere").stdout)
    assert printed["command"][0] == "sbatch"
    assert printed["script"] == (ROOT / "slurm" / "train.sbatch").read_text()


def test_without_sbatch_there_is_one_clear_message_and_nothing_left_behind(config_file: Path) -> None:
    done = hpcft("mine.toml", cwd=config_file.parent, path="/nowhere")
    assert done.returncode == 14
    assert "cannot run sbatch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (config_file.parent / "runs").exists()
