"""Bad input: one clear message, the documented exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.localrun import LocalRun, command, exact, write_config

pytestmark = [pytest.mark.local, pytest.mark.timeout(600)]


def script(root: Path, source: str) -> str:
    path = root / "program.py"
    path.write_text(source)
    return str(path)


MISTAKES: dict[str, tuple[Callable[[Path], dict[str, Any]], int, tuple[str, ...]]] = {
    "unknown key": (lambda root: {"nodes.minimum": 2}, 2, ("run.toml", "nodes.minimum", "nodes.min")),
    "unknown section": (lambda root: {"node.min": 2}, 2, ("run.toml", "node", "nodes")),
    "wrong type": (lambda root: {"nodes.min": "two"}, 2, ("run.toml", "nodes.min", "two")),
    "two mistakes": (
        lambda root: {"nodes.min": "two", "checkpoint.every": "often"},
        2,
        ("nodes.min", "checkpoint.every", "often"),
    ),
    "script missing": (lambda root: {"job.script": str(root / "absent.py")}, 2, ("absent.py", "no file")),
    "syntax error": (
        lambda root: {"job.script": script(root, "def train(:\n")},
        2,
        ("program.py:1:", "does not compile"),
    ),
    "nodes.min above the allocation": (lambda root: {"nodes.min": 3}, 13, ("have 2", "nodes.min", "3")),
    "a file in place of the root": (
        lambda root: {"run.root": script(root, "")},
        14,
        ("program.py", "run directory", "Not a directory"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_starts_nothing(tmp_path: Path, mistake: str) -> None:
    settings, code, words = MISTAKES[mistake]
    run = LocalRun(tmp_path, {**exact(tmp_path / "digest"), **settings(tmp_path)})
    with run.start():
        run.ends(code)
    said = run.said()
    for word in words:
        assert word in said, said
    assert said.count("error:") == 1 and "Traceback" not in said, said
    assert len(said.splitlines()) <= 12, said
    assert not run.directory.exists(), "not even a directory"


def test_unknown_runs_and_steps_are_named(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "new.toml", {"run.name": "new", "run.root": str(tmp_path / "runs"), **exact(tmp_path / "digest")}
    )
    (tmp_path / "runs").mkdir()
    for arguments in (
        ("status", "nothing"),
        ("logs", "nothing"),
        ("ledger", "nothing"),
        ("ckpt", "ls", "nothing"),
        ("ckpt", "verify", "--run", "nothing"),
        ("stop", "nothing"),
    ):
        shown = command(*arguments, "--root", tmp_path / "runs")
        assert shown.returncode == 15, shown
        assert "there is no run 'nothing'" in shown.stderr and "Traceback" not in shown.stderr
        assert shown.stdout == ""
    shown = command("status", config)
    assert shown.returncode == 15 and "has not been started" in shown.stderr

    shown = command("run", config, "--from", "100")
    assert shown.returncode == 15 and "has no checkpoint of step 100" in shown.stderr + shown.stdout, shown
    assert "Traceback" not in shown.stderr + shown.stdout


def test_a_damaged_checkpoint_that_was_asked_for_is_not_replaced_silently(tmp_path: Path) -> None:
    """`--from` names a state: starting from another one instead has to be said, at least."""
    settings = {**exact(tmp_path / "digest"), "train.steps": 20}
    with LocalRun(tmp_path, settings, nodes=1).start() as run:
        run.ends(0)
    shard = next((run.directory / "checkpoints").glob("step-00000010-*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with run.start("--from", "10"):
        run.ends(16)
    assert "the checkpoint of step 10 is damaged" in run.said()
    assert "a start without --from goes on from step 20" in run.said()
    with run.start():
        status = run.ends(0)
    assert status["restored"]["step"] == 20, "a branch that came to nothing has changed nothing"


def test_a_module_that_cannot_be_preloaded_is_named_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "early.py").write_text("import os\nIMPORTED_BY = os.getpid()\n")
    (tmp_path / "train.py").write_text(
        "import os, early, hpcft, torch\n"
        "def train(run):\n"
        "    run.restore(model=torch.nn.Linear(1, 1))\n"
        "    print('imported by the pool:', early.IMPORTED_BY == os.getppid())\n"
        "hpcft.main(train)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {"job.script": str(tmp_path / "train.py"), "job.preload": ["no_such_module", "early"]}
    with LocalRun(tmp_path, settings, nodes=1, workers=2).start() as run:
        status = run.ends(0)
    assert status["incidents"] == [] and status["generation"] == 1
    logs = run.directory / "logs" / "node1"
    assert "no_such_module is not imported: ModuleNotFoundError" in (logs / "agent.log").read_text()
    for rank in range(2):
        assert "imported by the pool: True" in (logs / f"g0001-rank{rank:04}.log").read_text()


def test_a_preloaded_module_that_starts_a_process_keeps_no_agent_from_joining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helper.py").write_text("import subprocess\nsubprocess.Popen(['sleep', '1000'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {**exact(tmp_path / "digest", pause=0.1), "job.preload": ["helper"]}
    with LocalRun(tmp_path, settings, nodes=1, workers=2).start() as run:
        run.trains()
        os.kill(run.agent(0), signal.SIGKILL)  # the next one looks for what the first may have left
        run.trains(generation=2)
        assert any("sleep" in line for line in run.left())
        run.ends(0)
    said = (run.directory / "logs" / "node1" / "agent.log").read_text()
    assert "helper leaves processes behind: " in said and "(sleep 1000)" in said
    assert "do not end" not in said
