"""A run on the cluster of the tests: submitted as a user would, watched through its run directory and Slurm."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from hpcft.data.account import LedgerReport, report
from tests.cluster import Cluster, Process, node_name

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = REPOSITORY / "tests" / "programs"
PATIENCE = 150.0
"""Seconds; bounds hangs on a loaded machine, says nothing about speed."""

EXACT: Mapping[str, Any] = {
    "job.script": str(PROGRAMS / "exact.py"),
    "nodes.workers_per_node": 2,
    "nodes.min": 2,
    "checkpoint.every": "10 steps",
    "data.ledger": True,
    "train.steps": 60,
    "train.pause": 0.05,
    "run.seed": 7,
}
"""Eight ranks, several DDP buckets, BatchNorm, dropout, augmentation: what shows the last bit."""


SLOW: Mapping[str, Any] = {**EXACT, "train.steps": 200, "train.pause": 0.3, "train.brake": "its own"}
"""The same, for a minute or longer, until `SlurmRun.hurry`."""


class SlurmRun:
    def __init__(self, cluster: Cluster, name: str, settings: Mapping[str, Any], *, place: Path | None = None) -> None:
        self.cluster = cluster
        self.name = name
        self.root = (place or cluster.shared) / "runs"
        self.directory = self.root / name
        self.digest = cluster.shared / f"{name}.digest"
        self.output = cluster.shared / f"{name}.out"
        self.job = ""
        self.brake = cluster.shared / f"{name}.brake"
        everything = {"run.name": name, "run.root": str(self.root), "train.out": str(self.digest), **settings}
        if "train.brake" in settings:
            self.brake.touch()
            everything["train.brake"] = str(self.brake)
        self.config = cluster.shared / f"{name}.toml"
        self.config.write_text(_toml(everything))

    def submit(self, *options: str, nodes: int = 4, environment: Mapping[str, str] | None = None) -> SlurmRun:
        environment = environment or {"HPCFT": f"{Path(sys.executable).parent}/hpcft"}
        arguments = (f"--nodes={nodes}", f"--output={self.output}", *options, "slurm/train.sbatch", str(self.config))
        self.job = self.cluster.sbatch(*arguments, cwd=REPOSITORY, env=environment)
        return self

    def hurry(self) -> None:
        """What was to be seen of a slow run has been seen."""
        self.brake.unlink()

    # --- watching ---

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = orjson.loads((self.directory / "status.json").read_bytes())
        except FileNotFoundError:
            return {"state": "not started", "step": 0, "workers": [], "nodes": [], "incidents": [], "generation": 0}
        return found

    def until(
        self, what: str, condition: Callable[[dict[str, Any]], object], patience: float = PATIENCE
    ) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            status = self.status()
            if condition(status):
                return status
            time.sleep(0.1)
        raise AssertionError(f"no {what} within {patience:g} s\n{self.story()}")

    def trains(self, past: int = 0, generation: int = 1) -> dict[str, Any]:
        return self.until(
            f"training past step {past} in generation {generation} or later",
            lambda now: now["state"] == "training" and now["step"] > past and now["generation"] >= generation,
        )

    def ends(self, state: str = "COMPLETED", patience: float = PATIENCE) -> dict[str, Any]:
        """Wait until Slurm says so; returns the last status."""
        try:
            self.cluster.wait_job(self.job, state, timeout=patience)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None
        return self.status()

    def ledger(self) -> LedgerReport:
        return report(self.directory)

    def story(self) -> str:
        """Everything that was said, for a failing test."""
        parts = [orjson.dumps(self.status(), option=orjson.OPT_INDENT_2).decode()[-3000:]]
        logs = [path for path in (self.output, *sorted(self.directory.glob("logs/*/*.log"))) if path.exists()]
        parts += [f"--- {log.name} in {log.parent.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs]
        return "\n".join(parts)

    # --- who is who ---

    def process(self, index: int, part: str) -> Process:
        """`keeper`, `agent` or `pool` of a node."""
        marks = {"keeper": "hpcft.keeper", "agent": "hpcft.node", "pool": "hpcft.pool"}
        found = [each for each in self.cluster.processes(index) if marks[part] in each.cmdline]
        if part == "agent":  # its command line is part of the keeper's
            found = [each for each in found if marks["keeper"] not in each.cmdline]
        if part == "pool":
            found = [each for each in found if not any(other.pid == each.parent for other in found)]
        assert found, f"no {part} on {node_name(index)}: {self.cluster.processes(index)}"
        return found[0]

    def workers(self, index: int) -> list[Process]:
        """The worker processes of a node: children of the pool."""
        pool = self.process(index, "pool")
        return [each for each in self.cluster.processes(index) if each.parent == pool.pid]

    def kill_worker(self, index: int) -> None:
        os.kill(self.workers(index)[0].pid, signal.SIGKILL)


def _toml(settings: Mapping[str, Any]) -> str:
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in settings.items():
        section, key = dotted.split(".", 1)
        sections.setdefault(section, {})[key] = value
    lines = []
    for section, keys in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {orjson.dumps(value).decode()}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"
