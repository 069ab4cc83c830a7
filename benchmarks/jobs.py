"""The jobs that are measured: hpcft's and torchrun's way to start the same loop, and the steps that they complete."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcft import process

PROGRAMS = Path(__file__).resolve().parent / "programs"
STEPS = 1_000_000
_POLL = 0.005


class Timeline:
    """The steps that a system's workers have completed, read from their files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self.steps: list[tuple[float, int, int, int]] = []

    def read(self) -> None:
        for path in self._directory.glob("*.steps"):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.splitlines():
                at, step, life, rank = line.split()
                self.steps.append((float(at), int(step), int(life), int(rank)))

    def await_steps(self, count: int, patience: float) -> bool:
        """Wait until the newest life has completed `count` steps."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self.read()
            if self.steps:
                life = max(each[2] for each in self.steps)
                if len({each[1] for each in self.steps if each[2] == life}) >= count:
                    return True
            time.sleep(0.05)
        return False

    def first_after(self, at: float, patience: float) -> float | None:
        """Seconds from `at` to the first step of a new life."""
        life = max(each[2] for each in self.steps)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self.read()
            new = [each[0] for each in self.steps if each[2] > life and each[0] > at]
            if new:
                return min(new) - at
            time.sleep(_POLL)
        return None


@contextmanager
def started(commands: list[list[str]], environments: list[dict[str, str]], log: Path) -> Iterator[list[int]]:
    """Processes in sessions of their own; all their descendants are gone afterwards."""
    running = []
    try:
        with log.open("ab") as output:
            for command, environment in zip(commands, environments, strict=True):
                running.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **environment},
                        stdout=output,
                        stderr=output,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
        yield [each.pid for each in running]
    finally:
        for each in running:
            for pid in (*process.descendants(each.pid), each.pid):
                process.send(pid, signal.SIGKILL)
        process.end_descendants(10.0)
        for each in running:
            each.poll()


def workers_below(pids: list[int]) -> list[int]:
    """Processes that have a timeline open: the workers."""
    found = []
    for pid in pids:
        for each in process.descendants(pid):
            try:
                files = [entry.readlink() for entry in Path(f"/proc/{each}/fd").iterdir()]
            except OSError:
                continue
            if any(file.suffix == ".steps" for file in files):
                found.append(each)
    return found


def hpcft_job(place: Path, nodes: int, workers: int) -> tuple[list[list[str]], list[dict[str, str]]]:
    config = place / "job.toml"
    config.write_text(
        f"""
[run]
name = "bench"
root = "{place}/runs"
[job]
script = "{PROGRAMS}/steps_hpcft.py"
[checkpoint]
every = "10 steps"
[recovery]
infrastructure_failures = 1000
[train]
steps = {STEPS}
timeline = "{place}"
"""
    )
    command = [
        sys.executable,
        "-P",
        "-m",
        "hpcft",
        "run",
        str(config),
        "--nodes",
        str(nodes),
        "--workers",
        str(workers),
    ]
    return [command], [{"PYTHONPATH": str(PROGRAMS)}]


def torchrun_job(
    place: Path, nodes: int, workers: int, *, shared_store: bool, elastic: str, last_call: int | None
) -> tuple[list[list[str]], list[dict[str, str]]]:
    port = free_port()
    more = f",last_call_timeout={last_call}" if last_call is not None else ""
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={elastic}", f"--nproc-per-node={workers}", "--max-restarts=1000"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=bench"),
        *("--local-addr=127.0.0.1", f"--rdzv-conf=join_timeout=120{more}"),
        *(str(PROGRAMS / "steps_torchrun.py"), str(place), str(STEPS)),
    ]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAMS), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if not shared_store:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return [command] * nodes, [environment] * nodes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def place_for(system: str) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix=f"recovery-{system}-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
