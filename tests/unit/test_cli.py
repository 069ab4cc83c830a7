"""The command line as a shell sees it: exit codes, messages, what is imported, and the frozen list of options."""

from __future__ import annotations

import errno
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
import pytest

from hpcft import status
from hpcft.checkpoint.layout import seal
from hpcft.cli import cli
from hpcft.data.batches import Position, advance, global_batch, slice_for
from hpcft.data.ledger import LedgerWriter, ledger_path
from hpcft.membership import Timing
from hpcft.policy import Rules
from hpcft.rundir import RunDirectory
from hpcft.world import World

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    ("run",), ("submit",), ("agent",), ("wait",), ("status",), ("explain",), ("logs",), ("ledger",),
    ("ckpt", "ls"), ("ckpt", "show"), ("ckpt", "verify"), ("ckpt", "diff"), ("ckpt", "pin"), ("ckpt", "unpin"),
    ("ckpt", "prune"), ("ckpt", "export"), ("mirror", "ls"), ("mirror", "push"), ("mirror", "pull"),
    ("stop",), ("doctor",), ("bench", "checkpoint-frequency"), ("completion",),
]  # fmt: skip
FORBIDDEN = ("torch", "pydantic", "rich", "numpy", "asyncio", "psutil")


def hpcft(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HPCFT_", "NO_COLOR"))}
    return subprocess.run(
        [sys.executable, "-m", "hpcft", *arguments],
        cwd=cwd,
        env={**variables, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def make_run(root: Path, name: str, **changes: Any) -> RunDirectory:
    run = RunDirectory(root / name)
    run.prepare()
    rules = Rules(timing=Timing(0.5, 2.0, 5.0), minimum_nodes=1)
    snapshot = status.snapshot(World(run=run.run_id()), rules, 0.0) | changes
    run.status.write_bytes(orjson.dumps(snapshot))
    return run


# --- imports ---


def imported(program: str, cwd: Path) -> set[str]:
    """Top-level names of what `program` has imported when it ends."""
    code = f"{program}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stderr.split())


def test_importing_the_command_line_imports_nothing_slow(tmp_path: Path) -> None:
    assert imported("import hpcft.cli", tmp_path).isdisjoint(FORBIDDEN)


def test_status_imports_no_torch_and_answers_at_once(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "one")
    program = "from hpcft.cli import main\nassert main(['status']) == 0"
    assert imported(program, tmp_path).isdisjoint({"torch", "numpy", "pydantic", "rich"})
    nothing = min(processor_seconds("pass", tmp_path) for _ in range(5))
    status = min(processor_seconds(program, tmp_path) for _ in range(5))
    assert status < 20 * nothing, "of what the interpreter takes to start"


def processor_seconds(program: str, directory: Path) -> float:
    def used() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    before = used()
    imported(program, directory)
    return used() - before


# --- the frozen surface ---


def test_the_reference_lists_every_command_and_option() -> None:
    """A change of an option is a change of docs/cli.md (`make docs`) and a line in CHANGELOG.md."""
    printed = subprocess.run(
        [sys.executable, ROOT / "tools" / "cli_reference.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert printed.stdout == (ROOT / "docs" / "cli.md").read_text()


def test_every_command_explains_itself() -> None:
    for command in COMMANDS:
        done = hpcft(*command, "--help")
        assert done.returncode == 0, command
        assert f"Usage: hpcft {' '.join(command)}" in done.stdout


def test_every_command_that_reports_has_json() -> None:
    silent = {("agent",), ("wait",), ("completion",)}
    for command in set(COMMANDS) - silent:
        assert "--json" in hpcft(*command, "--help").stdout, command


def test_exit_codes_are_documented() -> None:
    from hpcft.errors import ExitCode

    page = (ROOT / "docs" / "exit-codes.md").read_text()
    for code in ExitCode:
        assert f"| {code.value} | `{code.name.lower()}` |" in page, code


def test_the_version() -> None:
    assert hpcft("--version").stdout == "hpcft 0.1.0\n"


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["statsu"], "No such command 'statsu'. Did you mean 'status'?"),
        (["ckpt", "veryfy"], "No such command 'veryfy'. Did you mean 'verify'?"),
        (["frobnicate"], "No such command 'frobnicate'. There are: run, submit, agent,"),
        (["status", "--wacht"], "--watch"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "x.toml", "--nodes", "0"], "--nodes"),
        (["run", "missing.toml"], "missing.toml: there is no such file"),
        (["completion", "tcsh"], "tcsh"),
        (["completion"], "Choose from: bash, zsh, fish"),
    ],
)
def test_a_mistake_is_one_message_with_a_hint_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = hpcft(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "\nhint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_under_json_a_mistake_is_json(tmp_path: Path) -> None:
    done = hpcft("status", "nowhere", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (15, "")
    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["kind"]) == (15, "not_found")
    assert "nowhere" in error["message"]
    assert error["hint"]


def test_what_the_operating_system_refuses_is_one_message_and_exit_code_14(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one")
    run.checkpoints.rmdir()
    run.checkpoints.write_text("no directory")
    (run.path / "logs").rmdir()
    (run.path / "logs").write_text("no directory")
    for arguments, name in ((["ckpt", "ls"], "checkpoints/.marks"), (["logs"], "logs")):
        done = hpcft(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (14, ""), done.stderr
        assert done.stderr.startswith("error: ")
        assert f"runs/one/{name} cannot be used: Not a directory" in done.stderr
        assert "Traceback" not in done.stderr


def test_what_belongs_to_sbatch_does_not_make_errors_json(tmp_path: Path) -> None:
    done = hpcft("submit", "missing.toml", "--", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_sbatch_options_without_the_two_dashes_are_explained(tmp_path: Path) -> None:
    done = hpcft("submit", "train.toml", "--partition=gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "after --" in done.stderr


# --- which run ---


def test_without_a_name_the_newest_run_is_meant(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "older"]):
        run = make_run(tmp_path / "runs", name)
        long_ago = time.time() - 1000 * (age + 1)
        os.utime(run.status, (long_ago, long_ago))
    found = json.loads(hpcft("status", "--json", cwd=tmp_path).stdout)
    assert found["name"] == "newest"


def test_the_only_live_run_is_meant_and_several_are_listed(tmp_path: Path) -> None:
    old = make_run(tmp_path / "runs", "alpha")
    long_ago = time.time() - 1000
    os.utime(old.status, (long_ago, long_ago))
    make_run(tmp_path / "runs", "beta", state="training")
    assert json.loads(hpcft("status", "--json", cwd=tmp_path).stdout)["name"] == "beta"
    make_run(tmp_path / "runs", "gamma", state="training")
    done = hpcft("status", cwd=tmp_path)
    assert done.returncode == 15
    assert "beta" in done.stderr
    assert "gamma" in done.stderr
    assert "alpha" not in done.stderr
    assert hpcft("status", "gamma", cwd=tmp_path).returncode == 0


def test_a_run_is_named_by_its_directory_its_root_or_its_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "elsewhere", "mine")
    config = tmp_path / "mine.toml"
    config.write_text(f'[run]\nname = "mine"\nroot = "{tmp_path}/elsewhere"\n[job]\nscript = "x.py"\n')
    for arguments in (["mine", "--root", "elsewhere"], [str(run.path)], ["mine.toml"]):
        done = hpcft("status", "--json", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == "mine"
    done = hpcft("status", "--json", cwd=tmp_path, environment={"HPCFT_RUN__ROOT": "elsewhere"})
    assert json.loads(done.stdout)["name"] == "mine"


def test_the_root_may_begin_with_the_users_home(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere", "mine")
    home = {"HOME": str(tmp_path)}
    for arguments, root in ((["--root=~/elsewhere"], {}), ([], {"HPCFT_RUN__ROOT": "~/elsewhere"})):
        done = hpcft("status", "--json", *arguments, cwd=tmp_path, environment={**home, **root})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == "mine"


def test_a_configuration_whose_run_has_not_started_says_how_to_start_it(tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text('[run]\nname = "new"\n[job]\nscript = "x.py"\n')
    done = hpcft("status", "new.toml", cwd=tmp_path)
    assert done.returncode == 15
    assert "hint: hpcft submit new.toml" in done.stderr


# --- terminals, pipes, signals ---


def on_terminal(arguments: list[str], environment: Mapping[str, str]) -> str:
    """What appears on a terminal."""
    primary, secondary = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "hpcft", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment},
        stdin=subprocess.DEVNULL,
        stdout=secondary,
        stderr=secondary,
    ) as process:
        os.close(secondary)
        shown = b"".join(_blocks(primary))
        process.wait(60)
    os.close(primary)
    return shown.decode()


def _blocks(terminal: int) -> Iterator[bytes]:
    try:
        while block := os.read(terminal, 65536):
            yield block
    except OSError as error:
        if error.errno != errno.EIO:  # nobody has the other end any more
            raise


def test_colours_are_for_terminals_that_want_them() -> None:
    assert "\x1b[" in on_terminal(["statsu"], {})
    assert "\x1b[" not in on_terminal(["statsu"], {"NO_COLOR": "1"})
    assert "\x1b[" not in hpcft("statsu").stderr


def test_a_reader_that_goes_away_ends_the_command_without_noise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one")
    log = run.path / "logs" / "node1" / "agent.log"
    log.parent.mkdir(parents=True)
    log.write_text("a line that is long enough to fill a pipe in the end\n" * 20_000)
    with subprocess.Popen(
        [sys.executable, "-m", "hpcft", "logs", "-n", "20000"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "==> node1/agent.log <==\n"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 141
    assert errors == ""


def test_ctrl_c_ends_a_command_with_130(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one")
    log = run.path / "logs" / "node1" / "agent.log"
    log.parent.mkdir(parents=True)
    log.write_text("first\n")
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "hpcft", "logs", "--follow"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "==> node1/agent.log <==\n"
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    done = hpcft("completion", shell)
    assert done.returncode == 0
    assert "_HPCFT_COMPLETE" in done.stdout


def test_completion_knows_commands_options_and_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "first")
    make_run(tmp_path / "runs", "second")

    def completed(words: str) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        environment = {"_HPCFT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
        return [line.partition(",")[2] for line in hpcft(cwd=tmp_path, environment=environment).stdout.splitlines()]

    assert completed("hpcft sta") == ["status"]
    assert completed("hpcft status --wa") == ["--watch"]
    assert sorted(completed("hpcft status ")) == ["first", "second"]
    assert completed("hpcft ckpt verify --run se") == ["second"]


def test_all_commands_are_known_to_these_tests() -> None:
    found = {(name,) for name, command in cli.commands.items() if not isinstance(command, click.Group)}
    found |= {
        (group, name) for group, each in cli.commands.items() if isinstance(each, click.Group) for name in each.commands
    }
    assert found == set(COMMANDS)


# --- the ledger ---


def test_a_ledger_that_is_not_exact_is_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one")
    for rank in (0, 1):  # of three
        path = ledger_path(run.ledger, 1, rank)
        writer = LedgerWriter(path, generation=1, rank=rank, world_size=3, restored_step=0, restored_generation=None)
        writer.begin(samples=9, seed=0, shuffle=False)
        position = Position()
        for step in (1, 2):
            batch = global_batch(position, 9, 3)
            first, end = slice_for(batch, rank, 3)
            writer.record(step, batch, np.arange(first, end))
            position = advance(batch, 9)
    for more in ([], ["--json"]):
        done = hpcft("ledger", *more, cwd=tmp_path)
        assert done.returncode == 16, done.stderr
    assert json.loads(done.stdout)["exact"] is False


# --- checkpoints ---


def test_a_checkpoint_that_cannot_be_read_is_listed_and_is_no_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one")
    directory = run.checkpoints / "step-00000001-g0001"
    directory.mkdir()
    (directory / "manifest.json").write_bytes(seal("manifest", {"format": 2}))
    done = hpcft("ckpt", "ls", cwd=tmp_path)
    assert done.returncode == 0 and "cannot be read: the checkpoint has format 2" in done.stdout
    for more in ([], ["--json"]):
        done = hpcft("ckpt", "verify", *more, cwd=tmp_path)
        assert done.returncode == 14, done.stderr
    assert "format 2" in json.loads(done.stdout)["checkpoints"][0]["unreadable"]
    (directory / "manifest.json").write_bytes(b"")
    assert hpcft("ckpt", "verify", cwd=tmp_path).returncode == 16


# --- what is there no more ---


def test_the_logs_of_a_rank_that_wrote_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "one", workers=[{"rank": 3, "node": "node1"}])
    (run.path / "logs" / "node1").mkdir(parents=True)
    (run.path / "logs" / "node1" / "agent.log").write_text("hello\n")
    done = hpcft("logs", "--rank", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "rank 3 has written nothing\n")
    assert hpcft("logs", "--rank", "4", cwd=tmp_path).returncode == 15


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        ({"outcome": "finished", "exit_code": 0, "reason": "all done"}, 0, "one has ended already: finished, all done"),
        ({"outcome": "requeued", "exit_code": 75, "reason": "time"}, 15, "scancel 42 "),
        (None, 15, "one does not run at the moment"),
    ],
)
def test_stopping_what_does_not_run(verdict: object, code: int, words: str, tmp_path: Path) -> None:
    state = verdict["outcome"] if isinstance(verdict, dict) else "training"
    run = make_run(tmp_path / "runs", "one", state=state, verdict=verdict, allocation="42.0")
    long_ago = time.time() - 1000
    os.utime(run.status, (long_ago, long_ago))
    done = hpcft("stop", "one", cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
