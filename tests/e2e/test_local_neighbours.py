"""Copies in memory outlive the node that has made them: nothing is on a disk, and the run goes on all the same."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft import process
from hpcft.checkpoint.read import verify
from tests.e2e.localrun import PROGRAMS, LocalRun

pytestmark = [pytest.mark.local, pytest.mark.timeout(300)]

STEPS = 12
SETTINGS = {
    "job.script": str(PROGRAMS / "small.py"),
    "data.ledger": True,
    "checkpoint.snapshot_every": "2 steps",
    "checkpoint.every": "1000 steps",
    "train.kind": "plain",
    "train.steps": STEPS,
}


class Disturbed:
    """A run whose last node is lost after step 7, when the copies of step 6 are with the neighbours."""

    def __init__(self, root: Path, nodes: int, **more: Any) -> None:
        self.out, self.nodes = root / "disturbed.npz", nodes
        self._ready, self._go = root / "ready", root / "go"
        at = [[1, 0, f"wait {self._ready}"], [7, 0, f"wait {self._go}"]]
        settings = {**SETTINGS, "train.out": str(self.out), "train.at": at, **more}
        self.run = LocalRun(root, settings, nodes=nodes, workers=1)

    def lose_a_node(self) -> dict[str, Any]:
        with self.run.start():
            self.begin()
            self.lose()
            self.go()
            return self.run.ends(0)

    def begin(self) -> None:
        self.run.until(
            "memory for copies", lambda now: sum(map(bool, _saving(now, "memory_bytes", {}).values())) == self.nodes
        )
        self._ready.touch()

    def lose(self) -> None:
        self.run.until("safe copies of step 6", lambda now: _saving(now, "safe_step", None) == 6)
        self.run.until_recorded(7, generation=1)
        assert not self.run.saved(6)
        self.run.kill_node(self.nodes - 1)

    def go(self) -> None:
        """Past step 7."""
        self._go.touch()


def _saving(status: dict[str, Any], key: str, default: Any) -> Any:
    return status.get("saving", {}).get(key, default)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one process, which nothing happens to."""
    root = tmp_path_factory.mktemp("alone")
    with LocalRun(root, {**SETTINGS, "train.out": f"{root}/one.npz"}, nodes=1, workers=1).start() as run:
        run.ends(0)
    return dict(np.load(root / "one.npz"))


def assert_same(out: Path, weights: dict[str, Any]) -> None:
    found = np.load(out)
    assert sorted(found.files) == sorted(weights)
    for name in found.files:
        np.testing.assert_allclose(found[name], weights[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_lost_node_takes_no_state_with_it(tmp_path: Path, weights: dict[str, Any], nodes: int) -> None:
    disturbed = Disturbed(tmp_path, nodes)
    status, run = disturbed.lose_a_node(), disturbed.run
    report = run.assert_exact(STEPS)
    assert [each.world_size for each in report.generations] == [nodes, nodes - 1]
    assert report.generations[1].restored_step == 6
    assert status["incidents"][0]["steps_lost"] == 1
    assert f"from the copy of step 6 in memory (node{nodes}'s from node1)" in run.said()
    assert_same(disturbed.out, weights)


def test_below_the_minimum_the_copies_are_written_before_the_requeue(tmp_path: Path, weights: dict[str, Any]) -> None:
    disturbed = Disturbed(tmp_path, 2, **{"nodes.min": 2})
    status, run = disturbed.lose_a_node(), disturbed.run
    report = run.assert_exact(STEPS)
    assert [each.restored_step for each in report.generations] == [0, 6]
    assert status["start"] == 2 and run.saved(6)
    leader = (run.directory / "logs" / "node1" / "agent.log").read_text()
    assert "first the copy of step 6, which is in memory only (node2's from node1), is made a checkpoint" in leader
    assert_same(disturbed.out, weights)


def writer_of(checkpoints: Path, name: str, rank: int, keeper: int) -> int:
    """The pid of the carrier on this keeper's node that has a rank's file of this checkpoint open, and writes it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for shard in checkpoints.glob(f".tmp-{name}-*/shard-{rank:05d}-*.safetensors"):
            for pid in process.descendants(keeper):
                with suppress(OSError):
                    if shard in {each.readlink() for each in Path(f"/proc/{pid}/fd").iterdir()}:
                        return pid
        time.sleep(0.01)
    raise AssertionError(f"nobody writes rank {rank}'s file of {name}")


def test_a_lost_node_takes_no_save_with_it(tmp_path: Path, weights: dict[str, Any]) -> None:
    """It has begun to write its file of step 6: the file stays, and its neighbour writes another one in its place."""
    disturbed = Disturbed(tmp_path, 2, **{"checkpoint.every": "6 steps", "checkpoint.max_bandwidth": "64KiB"})
    with disturbed.run.start() as run:
        disturbed.begin()
        # what it has written is not durable, and never will be
        process.send(writer_of(run.directory / "checkpoints", "step-00000006-g0001", 1, run.keeper(1)), signal.SIGSTOP)
        disturbed.lose()
        run.until_saved(6)
        disturbed.go()
        run.ends(0)
    report = run.assert_exact(STEPS)
    assert [(each.world_size, each.restored_step) for each in report.generations] == [(2, 0), (1, 6)]
    assert "from the copy of step 6 in memory (node2's from node1)" in run.said()
    checkpoints = run.directory / "checkpoints"
    assert verify(checkpoints / "step-00000006-g0001") == []
    assert not list(checkpoints.glob(".tmp-*"))
    assert_same(disturbed.out, weights)
