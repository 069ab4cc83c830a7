"""`hpcft ckpt …` as a shell sees it: which checkpoint is meant, exit codes, what is printed where, terminals."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from checkpoint_samples import RUN, committed, listing
from test_cli import hpcft, imported, on_terminal
from test_prune import formed, journal_of, name, ref, say_status

from hpcft.cli import main
from hpcft.events import CheckpointCommitted
from hpcft.rundir import RunDirectory

UNIT = Path(__file__).resolve().parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
async def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "one")
    run.prepare()
    run.identity.write_bytes(orjson.dumps({"id": RUN, "name": "one"}))
    events = formed(1, None)
    for step in (100, 200, 300):
        committed(run.checkpoints, step, world_size=2)
        events.append(CheckpointCommitted(ref(step), 0.1, 1))
    await journal_of(run, events)
    say_status(run, "finished", {"outcome": "finished"})
    return run


@pytest.fixture
def ckpt(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, which has torch loaded: most of the time that each would take."""
    monkeypatch.chdir(run.path.parents[1])
    monkeypatch.delenv("HPCFT_RUN__ROOT", raising=False)

    def invoke(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = main(["ckpt", *arguments])
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return invoke


def answer(ckpt: Command, *arguments: str, code: int = 0) -> Any:
    done = ckpt(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_only_looks_or_marks_or_deletes_imports_no_torch(run: RunDirectory, tmp_path: Path) -> None:
    program = """
from hpcft.cli import main
for line in ("ls", "show 300", "verify", "pin 100", "unpin 100", "prune --keep 2 --yes"):
    assert main(["ckpt", *line.split()]) == 0, line
"""
    assert imported(program, tmp_path).isdisjoint({"torch", "rich"})
    assert [path.name for path in run.checkpoints.glob("step-*")].count(name(100)) == 0


def test_a_checkpoint_is_named_by_its_step_its_name_or_its_directory(
    run: RunDirectory, ckpt: Command, tmp_path: Path
) -> None:
    directory = run.checkpoints / name(200)
    by_step = answer(ckpt, "show", "200")
    assert by_step == answer(ckpt, "show", name(200), "--run", "one") == answer(ckpt, "show", str(directory))
    assert answer(ckpt, "show", "latest")["step"] == 300
    assert (by_step["step"], by_step["world_size"], by_step["position"]) == (200, 2, {"samples": 6400})
    assert [each["name"] for each in by_step["parts"]] == ["model", "optimizer", "scheduler", "extra"]
    assert by_step["parts"][0]["tensors"] == 9
    assert sum(each["bytes"] for each in by_step["parts"]) == sum(each["bytes"] for each in by_step["tensors"])
    text = ckpt("show", "200", "--tensors").stdout
    assert "model.0.weight  F32 [65, 33]" in text and "samples 6400" in text
    for word, hint in (("250", "there are: 100, 200, 300"), (name(250), "ckpt ls"), ("nonsense", "name a step")):
        done = ckpt("show", word)
        assert done.returncode == 15
        assert hint in done.stderr


def test_what_no_run_directory_should_hold_is_said_in_one_line(run: RunDirectory, ckpt: Command) -> None:
    many = "9" * 5000
    for line in (["show", many], ["show", f"step-{many}-g0001"], ["show", f"step-00000001-g{many}"]):
        assert ckpt(*line).returncode == 15
    for target in (".", "..", "/"):
        done = ckpt("export", "300", target, "--to", "dcp", "--force")
        assert done.returncode == 2 and "no name that an export could get" in done.stderr
    for content, section in ((b"[]", "section"), (b'{"checkpoint": 5}', "section"), (b"{", "unexpected")):
        run.config.write_bytes(content)
        done = ckpt("prune", "--keep", "1", "--yes")
        assert done.returncode == 14 and "checkpoint.keep_best" in done.stderr and section in done.stderr
    manifest, shard = (
        run.checkpoints / name(300) / file for file in ("manifest.json", "shard-00000-of-00002.safetensors")
    )
    shard.unlink()
    os.mkfifo(shard)
    for line in (["verify", "300"], ["export", "300", "out", "--to", "torch"]):
        done = ckpt(*line)
        assert done.returncode == 16 and "no file" in done.stdout + done.stderr
    manifest.unlink()
    os.mkfifo(manifest)
    assert "DAMAGED: manifest.json: it cannot be read: it is a directory, or" in ckpt("ls").stdout
    for content in (b"[]", b'{"id": 5}'):
        run.identity.write_bytes(content)
        done = ckpt("verify")
        assert done.returncode == 14 and "run.json cannot be read" in done.stderr


def test_pins_may_be_set_and_taken_twice_and_are_shown(run: RunDirectory, ckpt: Command, tmp_path: Path) -> None:
    assert answer(ckpt, "pin", "100") == {"checkpoint": name(100), "pinned": True, "changed": True}
    assert answer(ckpt, "pin", "100") == {"checkpoint": name(100), "pinned": True, "changed": False}
    assert "pinned" in ckpt("ls").stdout.splitlines()[3]
    assert answer(ckpt, "show", "100")["marks"] == ["pinned"]
    kept = answer(ckpt, "prune", "--keep", "1", "--dry-run")
    assert (kept["retired"], kept["protected"]) == ([name(200)], {name(100): "it is pinned"})
    assert answer(ckpt, "unpin", "100")["changed"]
    assert not answer(ckpt, "unpin", "100")["changed"]
    assert listing(run.checkpoints / ".marks") == []


def test_damage_ends_verify_and_export_and_diff_with_16(run: RunDirectory, ckpt: Command, tmp_path: Path) -> None:
    shard = run.checkpoints / name(200) / "shard-00001-of-00002.safetensors"
    flip(shard)
    found = answer(ckpt, "verify", code=16)
    assert [each["sound"] for each in found["checkpoints"]] == [True, False, True]
    (damage,) = found["checkpoints"][1]["damages"]
    assert (damage["file"], damage["chunk"]) == (shard.name, 0) and damage["tensors"]
    assert found["run"] == "one"
    for word in ("300", "latest", name(300), str(run.checkpoints / name(300))):
        (other,) = answer(ckpt, "verify", word)["checkpoints"]
        assert (other["name"], other["sound"]) == (name(300), True)
    assert ckpt("verify", "200").returncode == 16
    done = ckpt("verify", "one")
    assert done.returncode == 15 and "a run is named by --run" in done.stderr
    for line in (["export", "200", "out.pt", "--to", "torch"], ["diff", "100", "200"]):
        done = ckpt(*line)
        assert (done.returncode, done.stdout) == (16, "")
        assert f"{shard.name}, chunk 0" in done.stderr and damage["tensors"][0] in done.stderr
    assert listing(tmp_path) == ["runs"]


def test_the_exit_code_says_whether_two_differ(run: RunDirectory, ckpt: Command, tmp_path: Path) -> None:
    assert answer(ckpt, "diff", "100", str(run.checkpoints / name(100)))["equal"]
    found = answer(ckpt, "diff", "100", "200", "--only", "model", code=17)
    assert {each["name"].partition(".")[0] for each in found["tensors"]} == {"model"}
    done = ckpt("diff", "100", "200")
    assert done.returncode == 17
    assert "model.0.weight: F32 [65, 33], 2145 of 2145 differ, by at most " in done.stdout
    assert "extra.step: 100 → 200" in done.stdout and done.stderr == ""


def test_an_export_is_said_and_not_replaced_unasked(run: RunDirectory, ckpt: Command, tmp_path: Path) -> None:
    line = ["export", "300", "model.pt", "--to", "torch", "--only", "model"]
    said = answer(ckpt, *line)
    assert (said["checkpoint"], said["tensors"], said["bytes"]) == (
        name(300),
        9,
        (tmp_path / "model.pt").stat().st_size,
    )
    assert torch.load(tmp_path / "model.pt", weights_only=True)["0.weight"].shape == (65, 33)
    done = ckpt(*line)
    assert done.returncode == 2 and "model.pt exists already" in done.stderr and "--force" in done.stderr
    assert ckpt(*line, "--force").returncode == 0
    wrong = ckpt(*line[:2], "x", "--to", "safetensors", "--max-shard-size", "5")
    assert wrong.returncode == 2 and "has no unit" in wrong.stderr


def test_nothing_is_deleted_without_a_yes(run: RunDirectory, ckpt: Command, tmp_path: Path) -> None:
    for line, words in (
        (["--keep", "1"], "nothing is deleted without being asked about"),
        ([], "it is not said what to delete"),
        (["--trash", "--keep-every", "10"], "--keep-every needs --keep"),
        (["--keep", "0"], "--keep"),
    ):
        done = ckpt("prune", *line)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "delete" in ckpt("prune", "--keep", "1", "--dry-run").stdout
    assert asked(tmp_path, "n\n", "ckpt", "prune", "--keep", "1") == (0, "nothing was deleted\n")
    assert len(list(run.checkpoints.glob("step-*"))) == 3
    code, said = asked(tmp_path, "y\n", "ckpt", "prune", "--keep", "1")
    lines = said.splitlines()
    assert code == 0 and lines[-1].startswith("deleted: 2 checkpoints, ")
    assert lines[:-1] == [f"{name(100)}: deleted", f"{name(200)}: deleted"]
    assert [path.name for path in run.checkpoints.glob("step-*")] == [name(300)]
    assert ckpt("prune", "--keep", "1", "--yes").stdout == "there is nothing to delete\n"


def asked(directory: Path, reply: str, *arguments: str) -> tuple[int, str]:
    """Exit code and stdout of a command that is asked on a terminal, whose other end gives this reply."""
    primary, secondary = pty.openpty()
    try:
        os.write(primary, reply.encode())
        done = subprocess.run(
            [sys.executable, "-m", "hpcft", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(UNIT.parents[1])},
            stdin=secondary,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "delete them? [y/N]" in done.stderr
        return done.returncode, done.stdout
    finally:
        os.close(primary)
        os.close(secondary)


def test_a_terminal_sees_how_far_it_got_and_nobody_else(run: RunDirectory, ckpt: Command, tmp_path: Path) -> None:
    root = {"HPCFT_RUN__ROOT": str(tmp_path / "runs")}
    for environment in (root, {**root, "NO_COLOR": "1"}):
        shown = on_terminal(["ckpt", "verify"], environment)
        assert "verifying" in shown and "100%" in shown and "/s" in shown
        assert "\x1b[3" not in shown, "no colour"
    assert ckpt("verify").stderr == ""


def test_ctrl_c_is_one_line_and_130_and_leaves_nothing(run: RunDirectory, tmp_path: Path) -> None:
    """A real SIGINT, in the midst of the export."""
    line = "export 300 out --to safetensors --max-shard-size 9kB"
    program = f"""
import os, signal, sys
from hpcft.checkpoint import export
from hpcft.cli import main
from system_calls import interrupted
def act(name):
    os.kill(os.getpid(), signal.SIGINT)
with interrupted(20, act):
    code = main({["ckpt", *line.split()]!r})
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{UNIT}:{UNIT.parents[1]}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n"), (
        "on a line of its own, behind the ^C"
    )
    assert listing(tmp_path) == ["runs"]


def test_completion_knows_the_checkpoints_of_the_run(run: RunDirectory, tmp_path: Path) -> None:
    words = "hpcft ckpt export 2"
    environment = {"_HPCFT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "3"}
    assert hpcft(cwd=tmp_path, environment=environment).stdout == "plain,200\n"
