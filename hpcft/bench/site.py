"""Where trials run: on a local cluster of this machine, or on the nodes of the Slurm allocation this process is in.

Both start the same code. A trial is a child of this process in a session of its own, so that Ctrl-C on a terminal
reaches this process alone, which ends the trial.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson

from hpcft import process
from hpcft.bench.raw import PREFIX
from hpcft.errors import UnusableError
from hpcft.units import counted, human_duration, human_size

_PYTHON = (sys.executable, "-P", "-m")
_KILL_SECONDS = 15.0
_QUIT_SECONDS = 20.0
"""An srun that is told to quit ends its step on all nodes first."""
_LONGEST_SECONDS = 600.0
"""That a command which ends by itself may take."""


class Site(Protocol):
    def describe(self) -> str:
        """For people: what trains here."""

    def started(self, config: Path, sets: Sequence[str], log: Path) -> contextlib.AbstractContextManager[Trained]:
        """A run of this configuration. None of its processes is left afterwards."""

    def strike(self, node: str, pid: int) -> None:
        """SIGKILL to a process on one of the nodes. UnusableError: that cannot be done from here."""

    def raw_rate(self, directory: Path, files: int, size: int) -> float:
        """Bytes per second that all nodes together write to the directory. UnusableError: they cannot."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that is under way."""

    started: subprocess.Popen[bytes]

    def ended(self) -> int | None:
        return self.started.poll()


@dataclass(frozen=True, slots=True)
class Local:
    nodes: int
    workers: int

    def describe(self) -> str:
        return f"{self.nodes} x {counted(self.workers, 'worker')} on this machine"

    @contextmanager
    def started(self, config: Path, sets: Sequence[str], log: Path) -> Iterator[Trained]:
        command = [*_PYTHON, "hpcft", "run", str(config), "--nodes", str(self.nodes), "--workers", str(self.workers)]
        with _child([*command, *_options(sets)], log) as started:
            yield Trained(started)

    def strike(self, node: str, pid: int) -> None:
        if pid not in process.descendants(os.getpid()):
            raise UnusableError(f"process {pid}, which the trial calls a worker, is not below this one")
        process.send(pid, signal.SIGKILL)

    def raw_rate(self, directory: Path, files: int, size: int) -> float:
        return _raw_rate((), directory, files * self.nodes, size)


@dataclass(frozen=True, slots=True)
class InAllocation:
    """The nodes of a Slurm job. This process runs on one of them, or wherever srun works."""

    nodes: tuple[str, ...]
    own: str
    """The node that this process runs on; empty: none of them."""
    workers: int
    """On each; 0: one for each GPU."""

    def describe(self) -> str:
        each = f"{counted(self.workers, 'worker')} on each" if self.workers else "one worker per GPU"
        return f"{counted(len(self.nodes), 'node')} of this allocation, {each}"

    @contextmanager
    def started(self, config: Path, sets: Sequence[str], log: Path) -> Iterator[Trained]:
        # the flags of slurm/train.sbatch, where each is explained
        flags = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none", "--cpu-bind=none", "--unbuffered"]
        step = ["srun", *flags, *self._one_on_each(), "--quit-on-interrupt"]
        own = [*sets, f"nodes.workers_per_node={self.workers}"]
        with _child([*step, *_PYTHON, "hpcft", "agent", str(config), *_options(own)], log) as started:
            try:
                yield Trained(started)
            finally:
                if started.poll() is None:
                    started.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        started.wait(_QUIT_SECONDS)

    def strike(self, node: str, pid: int) -> None:
        if node == self.own:
            process.send(pid, signal.SIGKILL)
            return
        step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "kill", "-KILL", str(pid)]
        done = _finished(step, f"killing worker {pid} on {node}")
        if done.returncode:
            raise UnusableError(f"worker {pid} on {node} could not be killed: {done.stderr.strip()}")

    def raw_rate(self, directory: Path, files: int, size: int) -> float:
        return _raw_rate(("srun", "--mpi=none", *self._one_on_each()), directory, files, size)

    def _one_on_each(self) -> list[str]:
        """Of srun's options: both, or the number of tasks that the job was asked for would count."""
        return [f"--nodes={len(self.nodes)}", f"--ntasks={len(self.nodes)}", "--ntasks-per-node=1"]


def _options(sets: Sequence[str]) -> list[str]:
    return [word for each in sets for word in ("--set", each)]


@contextmanager
def _child(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own; it and whatever it started are gone afterwards, this process's other children too."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            [*_PYTHON, "hpcft.bench.child", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        left = process.end_descendants(_KILL_SECONDS)
        started.poll()
        if left:
            print(f"processes that do not end (uninterruptible sleep): {left}", file=sys.stderr)


def _raw_rate(step: Sequence[str], directory: Path, files: int, size: int) -> float:
    command = [*step, *_PYTHON, "hpcft.bench.raw", str(directory), str(files), str(size)]
    try:
        done = _finished(command, f"writing {counted(files, 'file')} of {human_size(size)} to {directory} as a measure")
    finally:
        for path in directory.glob(f"{PREFIX}*"):  # of one that had to be killed
            path.unlink(missing_ok=True)
    found: list[Mapping[str, float]] = [orjson.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    if done.returncode or not found:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise UnusableError(f"{directory} could not be written as a measure: {last[0]}")
    return sum(each["bytes"] for each in found) / max(each["seconds"] for each in found)


def _finished(command: Sequence[str], what: str) -> subprocess.CompletedProcess[str]:
    """The command, when it has ended by itself. It does not outlive this call, whatever ends that.

    UnusableError: it takes too long.
    """
    started = subprocess.Popen(
        [*_PYTHON, "hpcft.bench.child", str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = started.communicate(timeout=_LONGEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UnusableError(f"{what} takes longer than {human_duration(_LONGEST_SECONDS)}") from error
    finally:
        for end in (started.terminate, started.kill):  # srun has to have time to end its tasks
            if started.poll() is None:
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(_QUIT_SECONDS)
        for pipe in (started.stdout, started.stderr):
            assert pipe is not None
            pipe.close()
    return subprocess.CompletedProcess(command, started.returncode, said, complained)
