"""What `hpcft run` says and refuses before it starts anything, and when what it started gives no verdict."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from hpcft import local, terms
from hpcft.config import Config, load
from hpcft.errors import ExitCode, UnusableError
from hpcft.events import Outcome, Verdict
from hpcft.ids import Incarnation, NodeId, Term
from hpcft.rundir import RunDirectory
from hpcft.terms import TermLease, TermRecord


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("HPCFT_RUN__ROOT", str(tmp_path / "runs"))
    file = tmp_path / "first.toml"
    file.write_text(f'[run]\nname = "first"\nroot = "{tmp_path}/runs"\n[job]\ncommand = ["true"]\n')
    return load(file, sets=(), environ={})


@pytest.fixture
def run(config: Config) -> RunDirectory:
    directory = RunDirectory(config.run.root / config.run.name)
    directory.prepare()
    return directory


def start(config: Config, said: list[str], **more: Any) -> int:
    return local.run_local(config, Path("first.toml"), nodes=1, workers=1, report=said.append, **more)


def launcher(config: Config, run: RunDirectory) -> local._Launcher:
    return local._Launcher(config, Path("first.toml"), run, 1, 1, (), None, print)


@pytest.mark.parametrize(("step", "at"), [(500, ", at step 500"), (0, "")])
def test_a_finished_run_says_so_and_starts_nothing(config: Config, run: RunDirectory, step: int, at: str) -> None:
    run.finished.write_bytes(orjson.dumps({"outcome": "finished", "step": step}))
    said: list[str] = []
    assert start(config, said) == ExitCode.OK
    assert said == [
        f"first has finished already{at}; --from STEP goes on from a checkpoint, another run.name starts afresh"
    ]
    assert not (run.path / "logs" / "node1").exists()


def test_a_run_that_is_being_trained_is_not_started_again(config: Config, run: RunDirectory) -> None:
    over = threading.Event()

    def lead() -> None:
        while not over.wait(0.2):
            run.status.write_bytes(orjson.dumps({"state": "training"}))

    leader = threading.Thread(target=lead)
    leader.start()
    try:
        until = time.monotonic() + 10
        while not run.status.exists() and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(UnusableError, match="first is being trained already") as raised:
            start(config, [])
    finally:
        over.set()
        leader.join()
    assert "hpcft status first" in raised.value.hint and "hpcft stop first" in raised.value.hint
    assert not (run.path / "logs" / "node1").exists()


def test_what_a_killed_start_left_behind_is_no_live_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_REWRITTEN_SECONDS", 0.5)
    run.status.write_bytes(orjson.dumps({"state": "training"}))
    assert not local._is_trained(run)


def test_an_earlier_leader_is_waited_for_until_it_has_let_go(config: Config, run: RunDirectory) -> None:
    ours = launcher(config, run)
    begun: Any = SimpleNamespace(name="local7-ab.0")
    assert not ours._may_be_led(begun)
    terms.claim(run.terms, TermRecord(Term(1), NodeId("node1"), Incarnation("x"), "127.0.0.1", 1, "local6-cd.0"))
    assert ours._may_be_led(begun)
    assert not ours._may_be_led(SimpleNamespace(name="local6-cd.0"))  # type: ignore[arg-type]
    terms.renew(run.terms, Term(1), TermLease(3, released=True))
    assert not ours._may_be_led(begun)
    assert ours._longest_wait() == 65, "heartbeat.timeout is 5 s"


def test_at_its_end_a_run_says_how_to_look_at_it(
    config: Config, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    ours = local._Launcher(config, Path("first.toml"), run, 1, 1, (), None, said.append)
    finished = Verdict(Outcome.FINISHED, 0, "")
    monkeypatch.delenv("HPCFT_RUN__ROOT")
    monkeypatch.setattr(local.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.chdir(run.path.parent.parent)
    ours._say_what_next(finished)
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    monkeypatch.setattr(local.sys, "argv", [".venv/bin/hpcft", "run"])
    monkeypatch.chdir(run.path)
    ours._say_what_next(finished)
    assert said == ["look at it: hpcft status first", f"look at it: .venv/bin/hpcft status {run.path}"]


@pytest.mark.parametrize(("from_step", "more"), [(None, ""), (3, " without --from")])
def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path: Path, from_step: int | None, more: str) -> None:
    file = tmp_path / "first.toml"
    file.write_text(f'[run]\nname = "first"\nroot = "{tmp_path}/runs"\n[job]\nscript = "train.py"\n')
    run = RunDirectory(tmp_path / "runs" / "first")
    run.prepare()
    said: list[str] = []
    settings = load(file, sets=(), environ={})
    ours = local._Launcher(settings, file, run, 1, 1, (), from_step, said.append)
    cancelled = Verdict(Outcome.CANCELLED, 12, "")
    ours._say_what_next(cancelled)
    assert said == [], "without a checkpoint it begins anew"
    run.status.write_bytes(orjson.dumps({"checkpoints": [{"step": 7, "generation": 1}]}))
    ours._say_what_next(cancelled)
    assert said == [f"the same command{more} goes on from the newest checkpoint"]


def test_agents_without_a_verdict_are_explained_by_this_starts_lines(config: Config, run: RunDirectory) -> None:
    ours = launcher(config, run)
    log = run.path / "logs" / "node1" / "keeper.log"
    log.parent.mkdir()
    log.write_text("08:00:00 node1 I hpcft.node: agent ends with code 14: something of yesterday\n")
    ours._log_size = log.stat().st_size
    with log.open("a") as file:
        file.write("09:00:00 node1 I hpcft.agent: the pool is ready\n")
        file.write("09:00:01 node1 I hpcft.node: agent ends with code 14: no address can be bound\n")
        file.write("09:00:02 node1 I hpcft.agent: a last line\n")
    begun: Any = SimpleNamespace(nodes=[SimpleNamespace(returncode=14)])
    with pytest.raises(UnusableError) as raised:
        ours._without_verdict(begun)
    said = raised.value.message
    assert said.startswith("the agents ended without a verdict: no address can be bound (exit codes [14])")
    assert "a last line" in said and "yesterday" not in said
