"""`hpcft submit`: everything that can be checked before the queue is checked, then the batch script goes to sbatch.

The script is the one at the top of the repository, `slurm/train.sbatch`; the package carries a copy of it (a test
compares the two), so that a single file on a cluster has it. Nothing is written into it: what the configuration has to
say goes onto sbatch's command line, where it wins over the script's `#SBATCH` lines, and what the user gives after `--`
comes last and wins over both. The script's arguments are those of `hpcft agent`.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcft.cadence import END_LEAD_SECONDS
from hpcft.errors import BelowMinimumError, NotFoundError, UnusableError, UsageError
from hpcft.ids import Step
from hpcft.units import Auto

if TYPE_CHECKING:
    from hpcft.config import Config

SCRIPT = Path(__file__).parent / "slurm" / "train.sbatch"


@dataclass(frozen=True, slots=True)
class Job:
    """What is about to be submitted."""

    arguments: tuple[str, ...]
    """Of sbatch: its options, the script, the script's arguments."""
    variables: Mapping[str, str]
    """Added to the environment that the job gets."""
    script: str
    run_directory: Path

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": ["sbatch", *self.arguments],
            "environment": dict(self.variables),
            "script": self.script,
            "run_directory": str(self.run_directory),
        }

    def text(self) -> str:
        """The exact command, in a form that a shell takes, and the exact script."""
        words = [*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), "sbatch"]
        command = f"{' '.join(words)} {shlex.join(self.arguments)}"
        return f"# the command\n{command}\n\n# the script, {SCRIPT}\n{self.script}"


def prepare(
    config_file: Path,
    config: Config,
    *,
    sets: Sequence[str] = (),
    from_step: int | None = None,
    sbatch_args: Sequence[str] = (),
) -> Job:
    """Check what can be checked from here.

    Raises:
        UsageError: the training program is not there or does not compile; obstore is missing for the mirror.
        BelowMinimumError: the job asks for fewer nodes than `nodes.min`.
        NotFoundError: there is no checkpoint of `from_step`.
        UnusableError: the run directory cannot be used; the run is being trained already.
    """
    from hpcft.config import check_mirror, check_program
    from hpcft.rundir import RunDirectory, is_live

    check_program(config)
    check_mirror(config, os.environ)
    run = RunDirectory(config.run.root / config.run.name)
    script = SCRIPT.read_text()
    _check_nodes(config, script, sbatch_args)
    _check_devices(config, script, sbatch_args)
    if is_live(run):
        raise UnusableError(
            f"the run {run.name} is being trained already: two starts of one run would be in each other's way",
            f"hpcft status {run.name}; hpcft stop {run.name}; or give this one another run.name",
        )
    _check_place(run.path)
    if from_step is not None:
        _check_checkpoint(run.checkpoints, Step(from_step))
    lead = END_LEAD_SECONDS if isinstance(config.slurm.end_lead, Auto) else config.slurm.end_lead
    own = [f"--job-name={config.run.name}", f"--signal=USR1@{math.ceil(lead)}"]
    own.append("--requeue" if config.slurm.requeue else "--no-requeue")
    arguments = [str(config_file.absolute())]
    arguments += [word for each in sets for word in ("--set", each)]
    arguments += ["--from", str(from_step)] if from_step is not None else []
    return Job((*own, *sbatch_args, str(SCRIPT), *arguments), _program(), script, run.path)


def send(job: Job) -> str:
    """Submit it; returns the job's id.

    Raises:
        UnusableError: sbatch is not there, does not answer, or refuses.
    """
    from hpcft.rundir import RunDirectory
    from hpcft.slurm import control

    environ = {**control.outside_environment(os.environ), **job.variables}
    job_id = asyncio.run(control.submit(job.arguments, directory=Path.cwd(), environ=environ))
    RunDirectory(job.run_directory).prepare()  # not before: a refused job leaves nothing behind
    return job_id


def _program() -> dict[str, str]:
    """For the script: the hpcft that was asked to submit, where that is a file that can be started again."""
    program = Path(sys.argv[0]).absolute()
    if program.name == "__main__.py":  # python -m hpcft
        program = Path(sys.executable).with_name("hpcft")
    return {"HPCFT": str(program)} if os.access(program, os.X_OK) and program.is_file() else {}


def _check_nodes(config: Config, script: str, sbatch_args: Sequence[str]) -> None:
    asked = option("nodes", "N", sbatch_args) or option("nodes", "N", _directives(script))
    smallest = smallest_count(asked) if asked is not None else None
    if smallest is not None and smallest < config.nodes.min:
        raise BelowMinimumError(
            f"--nodes={asked} may give the job {smallest} nodes, and nodes.min is {config.nodes.min}",
            f"ask for more: -- --nodes={config.nodes.min}; or lower nodes.min",
        )


def _check_devices(config: Config, script: str, sbatch_args: Sequence[str]) -> None:
    words = [*_directives(script), *sbatch_args]
    if config.nodes.workers_per_node == 0 and not any(
        "gpu" in word or word.startswith(("--gres", "-G")) for word in words
    ):
        raise UsageError(
            "nodes.workers_per_node = 0 means one worker per GPU, and the job asks for no GPUs",
            "ask for them: -- --gpus-per-node=8; or set nodes.workers_per_node",
        )


def _check_place(path: Path) -> None:
    existing = next(each for each in (path, *path.parents) if each.exists())
    if not existing.is_dir():
        raise UnusableError(f"the run directory {path} cannot be made: {existing} is a file", "set run.root elsewhere")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UnusableError(
            f"the run directory {path} cannot be used: {existing} is not writable for this user",
            "set run.root elsewhere; `hpcft doctor CONFIG` tests the file system",
        )


def _check_checkpoint(root: Path, step: Step) -> None:
    from hpcft.checkpoint import read

    steps = sorted({entry.step for entry in read.entries(root)})
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise NotFoundError(f"there is no checkpoint of step {step} in {root}", f"there are: {known}; hpcft ckpt ls")


def _directives(script: str) -> list[str]:
    """The options that the script itself gives to sbatch."""
    found: list[str] = []
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            found += shlex.split(line.removeprefix("#SBATCH"), comments=True)
    return found


def option(name: str, letter: str, words: Sequence[str]) -> str | None:
    """The value of `--name` or `-letter` among sbatch's arguments, the last one given; None: not there."""
    value: str | None = None
    for word, following in pairwise([*words, ""]):
        if word in (f"--{name}", f"-{letter}"):
            value = following
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif word.startswith(f"-{letter}") and not word.startswith("--"):
            value = word[2:].removeprefix("=")
    return value


def smallest_count(nodes: str) -> int | None:
    """The fewest nodes that Slurm may give for `--nodes=4`, `2-4`, `1k`, `2,4,8` or `4-16:4`; None: not understood."""
    counts = []
    for part in nodes.split(","):
        found = re.fullmatch(r"(\d+)([km]?)(?:-\d+[km]?(?::\d+)?)?", part.strip(), re.IGNORECASE)
        if found is None:
            return None
        counts.append(int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()])
    return min(counts, default=None)
