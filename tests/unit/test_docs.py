"""The pages say what is: links lead somewhere, commands exist, and what is printed from the code is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from hpcft.cli import cli
from hpcft.config import load
from hpcft.errors import ExitCode
from hpcft.events import CheckpointRef, Formation, Member
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.ranks import Assignment, worker_spec
from hpcft.worker.spec import STATUS_DAMAGED, STATUS_FENCED, STATUS_STOPPED, STATUS_UNREADABLE
from tools import state_diagram

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")) if path.is_file()
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?\n(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: str) -> str:
    """Without code: brackets mean something else there."""
    return _INLINE.sub("", _CODE.sub("", page))


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    broken = []
    for link in _LINK.findall(prose(text)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_pages_that_the_code_refers_to_are_there() -> None:
    named = {page for file in ROOT.glob("hpcft/**/*.py") for page in re.findall(r"docs/[\w/-]+\.md", file.read_text())}
    assert named and [page for page in sorted(named) if not (ROOT / page).exists()] == []


def commands(text: str) -> Iterator[list[str]]:
    """What follows `hpcft` in code, up to the end of the command."""
    code = [line for block in _CODE.findall(text) for line in block.splitlines()] + _INLINE.findall(text)
    for line in code:
        for found in re.finditer(r"(?:^|[\s(/\"=])hpcft ([a-z][^|#;&)…]*)", line):
            yield re.sub(r"[\\'\"]", " ", found[1]).split()


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_exist_with_their_options(path: Path) -> None:
    wrong = []
    for words in commands(path.read_text()):
        command: click.Command = cli
        while isinstance(command, click.Group) and words:
            known: dict[str, click.Command] = command.commands
            if words[0] not in known:
                break
            command = known[words.pop(0)]
        if command is cli:
            if words[0] not in ("ckpt", "mirror") and words[0] in PROSE:
                continue
            wrong.append(f"hpcft {' '.join(words)}")
            continue
        own = words[: words.index("--")] if "--" in words else words
        options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}
        wrong += [f"{command.name} {word}" for word in own if re.match(r"--?[a-z]", word) and word not in options]
    assert wrong == []


PROSE = frozenset({"keeper", "vfs"})
"""First words after `hpcft` in code that is output, not a command line."""


def test_the_scan_for_commands_finds_them() -> None:
    readme = (ROOT / "README.md").read_text()
    found = [words[0] for words in commands(readme)]
    assert {"status", "submit", "run", "doctor", "ckpt", "ledger", "logs"} <= set(found)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_exit_codes_are_those_of_the_code(path: Path) -> None:
    workers = {STATUS_FENCED, STATUS_DAMAGED, STATUS_STOPPED, STATUS_UNREADABLE}
    known = {code.value for code in ExitCode} | {130, 141} | workers
    said = re.findall(r"[Ee]xit (?:code|status(?:es)?):? (\d+)", path.read_text())
    assert {int(code) for code in said} <= known


def test_the_page_of_exit_codes_has_all_and_no_other() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    assert {(int(code), name) for code, name in rows} == {(code.value, code.name.lower()) for code in ExitCode}


def test_workers_exit_statuses_are_documented() -> None:
    for page in ("exit-codes.md", "interfaces.md"):
        text = (ROOT / "docs" / page).read_text()
        for status in (STATUS_FENCED, STATUS_DAMAGED, STATUS_STOPPED, STATUS_UNREADABLE):
            assert str(status) in text, (page, status)


def test_every_flag_of_the_batch_script_has_its_reason() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    script = (ROOT / "slurm" / "train.sbatch").read_text()
    flags = set(re.findall(r"--[a-z][a-z-]+", script)) - {"--srun"}  # which is hpcft's own
    assert {"--requeue", "--no-kill", "--signal"} <= flags
    assert {flag for flag in flags if flag not in page} == set()


def test_the_state_diagram_is_the_codes() -> None:
    page = state_diagram.PAGE.read_text()
    assert state_diagram.renewed(page) == page, "run: make docs"
    for action in ("propose", "commit", "save-and-stop", "requeue", "conclude"):
        assert action in state_diagram.diagram()


def specification(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.py").write_text("")
    file = tmp_path / "c.toml"
    file.write_text('[run]\nname = "x"\n[job]\nscript = "train.py"\n')
    config = load(file, sets=(), environ={})
    node = NodeId("n1")
    member = Member(node, Incarnation("i"), "10.0.0.1", 1, Rank(0))
    formation = Formation(Term(1), Generation(2), (member,), CheckpointRef(Step(5), Generation(1)), "00000000")
    assignment = Assignment(RunId("r"), tmp_path, node, "10.0.0.1", (), config)
    return worker_spec(assignment, formation, 0, Rank(0), 1, ("10.0.0.1", 1))


def test_the_workers_specification_is_documented_key_by_key(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "interfaces.md").read_text()
    listed = page.partition("<!-- worker specification")[2].partition("<!-- end -->")[0]
    keys = set()
    for key, value in specification(tmp_path).items():
        keys.add(key)
        keys |= set(value) if isinstance(value, dict) and key != "train" else set()
    assert set(re.findall(r"`(\w+)`", listed)) == keys | {"module", "command"}


def test_the_training_script_of_the_readme_trains(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    script = readme.partition("```python\n")[2].partition("```")[0]
    assert "run.done(500)" in script
    (tmp_path / "train.py").write_text(script.replace("run.done(500)", "run.done(20)"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("hpcft: ") for line in done.stderr.splitlines()), done.stderr
    assert "20 steps" in done.stderr


def test_the_configurations_of_the_readme_are_valid(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    readme = (ROOT / "README.md").read_text()
    first, second = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    file = tmp_path / "train.toml"
    file.write_text(first)
    assert load(file, sets=(), environ={}).run.name == "first"
    file.write_text('[run]\nname = "plain"\n' + second)
    assert load(file, sets=(), environ={}).job.command == ("python", "train.py", "--epochs", "3")
