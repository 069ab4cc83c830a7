"""A run under test, watched through its run directory as a user would; and a local cluster to hold one.

`Observed` is everything that can be asked of a run wherever it takes place: a run is a configuration and a way to look
at `status.json`. `LocalRun` is one that `hpcft run` holds on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from hpcft import process, status
from hpcft.data import account, ledger
from hpcft.rundir import RunDirectory

PATIENCE = 150.0
"""Seconds; bounds hangs, says nothing about speed."""

PROGRAMS = Path(__file__).resolve().parent.parent / "programs"

HPCFT = (sys.executable, "-P", "-m", "hpcft")

ENDED = ("finished", "requeued", "failed", "cancelled")


def write_config(path: Path, settings: Mapping[str, Any]) -> Path:
    """A configuration file of `section.key: value`."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in settings.items():
        section, key = dotted.split(".", 1)
        sections.setdefault(section, {})[key] = value
    lines = []
    for section, keys in sections.items():
        # what JSON and TOML have in common is all that is needed
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def exact(out: Path, *, strikes: tuple[str, ...] = (), pause: float = 0.0) -> dict[str, Any]:
    """Settings of the training whose last bits tell; runs with the same world end with the same digest in `out`.

    44 steps, a checkpoint every 10, so that the last one lies between two; 250 samples in batches of 32, so that the
    last batch of an epoch is smaller and four ranks share it unevenly.
    """
    return {
        "job.script": str(PROGRAMS / "struck.py"),
        "checkpoint.every": "10 steps",
        "checkpoint.keep": 10,
        "data.ledger": True,
        "train.steps": 44,
        "train.out": str(out),
        "train.strikes": list(strikes),
        "train.pause": pause,
    }


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One `hpcft …` from start to end."""
    return subprocess.run(
        [*HPCFT, *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False
    )


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("HPCFT_")}


class Observed:
    """What can be seen of a run from outside. `ended` is left to whoever holds it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def ended(self) -> int | None:
        """The exit code, once there is one."""
        raise NotImplementedError

    def said(self) -> str:
        """What the run has written where its user looks first."""
        raise NotImplementedError

    # --- status ---

    def status(self) -> dict[str, Any]:
        """As `hpcft status --json` has it; before there is a leader, with everything that tests ask for."""
        nothing = {"step": 0, "generation": 0, "workers": [], "nodes": [], "incidents": [], "checkpoints": []}
        nothing |= {"verdict": None}
        run = RunDirectory(self.directory)
        if not run.identity.exists():
            return {**nothing, "state": "not started"}
        return {**nothing, **status.read(run)}

    def until(
        self, what: str, condition: Callable[[dict[str, Any]], bool], patience: float = PATIENCE
    ) -> dict[str, Any]:
        """Wait for a status; fails with the story of the run."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            ended = self.ended()
            found = self.status()
            if condition(found):
                return found
            if ended is not None:
                raise AssertionError(f"the run ended with {ended} before {what}\n{self.story()}")
            time.sleep(0.05)
        raise AssertionError(f"no {what} within {patience} s; status: {self.status()}\n{self.story()}")

    def trains(self, past: int = 0, generation: int = 0) -> dict[str, Any]:
        return self.until(
            f"training past step {past} in generation {generation} or later",
            lambda found: found["state"] == "training" and found["step"] > past and found["generation"] >= generation,
        )

    def changes(self) -> Iterator[dict[str, Any]]:
        """Every status that differs from the one before, to the last one of all."""
        last: dict[str, Any] = {}
        while True:
            over = self.ended() is not None
            found = self.status()
            if {**found, "age_seconds": 0} != last:
                last = {**found, "age_seconds": 0}
                yield found
            if over:
                return
            time.sleep(0.02)

    def story(self) -> str:
        """Everything that was said, for a failing test."""
        logs = sorted(self.directory.glob("logs/*/*.log"))
        tails = [f"--- {log.relative_to(self.directory)}\n{log.read_text(errors='replace')[-3000:]}" for log in logs]
        return "\n".join([self.said()[-6000:], *tails])

    # --- samples ---

    def recorded(self) -> dict[tuple[int, int], int]:
        """The last step that the ledger has of every (generation, rank): to the millisecond, where status lags."""
        directory = self.directory / "ledger"
        return {
            (generation, rank): ledger.read_file(ledger.ledger_path(directory, generation, rank), header).last
            for generation, headers in ledger.read_headers(directory).items()
            for rank, header in headers.items()
        }

    def until_recorded(self, step: int, generation: int, patience: float = PATIENCE) -> None:
        """Wait until all ranks of a generation have completed this step."""

        def reached(found: dict[str, Any]) -> bool:
            del found
            steps = [at for (each, _), at in self.recorded().items() if each == generation]
            return bool(steps) and min(steps) >= step

        self.until(f"step {step} of generation {generation}", reached, patience)

    def until_saved(self, step: int, patience: float = PATIENCE) -> None:
        """Wait until there is a checkpoint of this step."""
        self.until(f"checkpoint of step {step}", lambda found: self.saved(step), patience)

    def saved(self, step: int) -> bool:
        return any(self.directory.glob(f"checkpoints/step-{step:08d}-g*"))

    def assert_exact(self, steps: int) -> account.LedgerReport:
        """Each sample exactly once per epoch, up to the last step, whatever has happened."""
        report = account.report(self.directory)
        assert report.exact, f"{report}\n{self.story()}"
        assert report.last_step == steps and report.open_step is None, report
        return report


class LocalRun(Observed):
    """`with LocalRun(tmp_path, settings).start() as run:`; after that the run is over and no process of it is there."""

    def __init__(
        self, root: Path, settings: Mapping[str, Any], *, nodes: int = 2, workers: int = 2, name: str = "run"
    ) -> None:
        super().__init__(root / "runs" / name)
        self.root = root
        everything = {"run.name": name, "run.root": str(root / "runs"), "run.seed": 7, **settings}
        self.config = write_config(root / f"{name}.toml", everything)
        self._command = [*HPCFT, "run", str(self.config), "--nodes", str(nodes), "--workers", str(workers)]
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: list[int] = []
        self._output = root / f"{name}.out"

    def start(self, *more: str) -> Self:
        """Also once more, when the run has ended."""
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, *more], stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment()
            )
        self._pids.append(self._process.pid)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        running = self.ended() is None
        if running:
            for pid in (self.pid, *process.descendants(self.pid)):
                process.send(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        if kind is None:
            assert not running, f"the test is over, the run is not\n{self.story()}"
            assert not (left := self.left()), f"left behind: {left}\n{self.story()}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def ended(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def ends(self, code: int = 0, patience: float = PATIENCE) -> dict[str, Any]:
        """Wait for the end; nothing is left then. Returns the last status."""
        assert self._process is not None
        try:
            found = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {patience} s\n{self.story()}") from None
        left = self.left()
        assert found == code, f"ended with {found}, not {code}\n{self.story()}"
        assert not left, f"left behind: {left}\n{self.story()}"
        return self.status()

    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def send(self, number: int) -> None:
        process.send(self.pid, number)

    # --- who is who ---

    def worker(self, rank: int) -> int:
        """The pid of a rank, once it is known."""
        found = self.until(
            f"the pid of rank {rank}",
            lambda found: any(each["rank"] == rank and each["pid"] for each in found["workers"]),
        )
        return int(next(each["pid"] for each in found["workers"] if each["rank"] == rank))

    def keeper(self, index: int) -> int:
        """The pid of the keeper of the node (0, 1 …)."""
        wanted = f"HPCFT_LOCAL_NODE=node{index + 1}".encode()
        for pid in process.children(self.pid):
            if wanted in _environment_of(pid):
                return pid
        raise AssertionError(f"node {index} has no keeper")

    def agent(self, index: int) -> int:
        for pid in process.children(self.keeper(index)):
            if b"hpcft.node" in _read(f"/proc/{pid}/cmdline"):
                return pid
        raise AssertionError(f"node {index} has no agent")

    def kill_node(self, index: int) -> None:
        """SIGKILL to everything on the node, the keeper first: what a power cut is."""
        keeper = self.keeper(index)
        for pid in (keeper, *process.descendants(keeper)):
            process.send(pid, signal.SIGKILL)

    def left(self) -> list[str]:
        """Processes of this run, wherever they have gone: by their environment and command line."""
        jobs = tuple(f"HPCFT_LOCAL_JOB=local{pid}-".encode() for pid in self._pids)
        about = str(self.directory).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) not in (os.getpid(), self.pid):
                line = _read(f"{entry}/cmdline")
                if about in line or any(each.startswith(jobs) for each in _environment_of(int(entry.name))):
                    found.append(f"{entry.name} {process.state_of(int(entry.name))} {line.decode(errors='replace')}")
        return found


def _environment_of(pid: int) -> list[bytes]:
    return _read(f"/proc/{pid}/environ").split(b"\0")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
