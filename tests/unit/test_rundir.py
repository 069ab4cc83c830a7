"""Run directories: made by many at once, found by name, by path, or as the newest."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import pytest
from checkpoint_samples import small_file_system

from hpcft import secret
from hpcft.errors import NotFoundError, UnusableError
from hpcft.ids import Generation, Incarnation, NodeId, Term
from hpcft.operators import spooled
from hpcft.rundir import STATUS_FRESH_SECONDS, RunDirectory, find_run, is_live, runs
from hpcft.terms import TermRecord


def make(root: Path, name: str, *, state: str | None = None, age: float = 0.0) -> RunDirectory:
    run = RunDirectory(root / name)
    run.prepare()
    if state is not None:
        run.status.write_bytes(orjson.dumps({"state": state}))
    at = time.time() - age
    for path in (run.status, run.identity):
        if path.exists():
            os.utime(path, (at, at))
    return run


def test_many_agents_make_one_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "demo")
    with ThreadPoolExecutor(16) as pool:
        ids = set(pool.map(lambda _: run.prepare(), range(64)))
    assert len(ids) == 1
    assert ids == {run.run_id()}
    assert {path.name for path in run.path.iterdir()} == {
        "run.json", "terms", "journal", "verdicts", "checkpoints", "ledger", "spool", "logs",
    }  # fmt: skip
    assert orjson.loads(run.identity.read_bytes())["name"] == "demo"


def test_names_lie_below_the_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "demo")
    for path in (run.secret, run.config, run.status, run.finished, run.verdict("17.0"), run.logs("node1")):  # type: ignore[arg-type]
        assert path.is_relative_to(run.path)
    assert run.verdict("17.0") != run.verdict("17.1")


def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a directory")
    with pytest.raises(UnusableError, match=r"runs/demo cannot be used: Not a directory") as raised:
        RunDirectory(tmp_path / "runs" / "demo").prepare()
    assert "run.root" in raised.value.hint


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no run\.json"):
        RunDirectory(tmp_path).run_id()
    broken = make(tmp_path, "demo")
    broken.identity.write_bytes(b"{")
    with pytest.raises(UnusableError, match=r"run\.json cannot be read"):
        broken.run_id()


def test_the_most_recently_active_run_is_the_newest(tmp_path: Path) -> None:
    make(tmp_path, "old", age=300)
    make(tmp_path, "young", state="finished", age=100)
    make(tmp_path, "middle", state="requeued", age=200)
    (tmp_path / "something else").mkdir()
    assert [run.name for run in runs(tmp_path)] == ["young", "middle", "old"]
    assert find_run(tmp_path, None).name == "young"


def test_the_live_run_is_meant_even_if_another_is_newer(tmp_path: Path) -> None:
    make(tmp_path, "live", state="training", age=3)
    make(tmp_path, "made just now")
    assert find_run(tmp_path, None).name == "live"


def test_several_live_runs_must_be_told_apart(tmp_path: Path) -> None:
    make(tmp_path, "one", state="training")
    make(tmp_path, "two", state="recovering")
    with pytest.raises(NotFoundError, match=r"several runs are live: (one, two|two, one)"):
        find_run(tmp_path, None)
    assert find_run(tmp_path, "two").name == "two"


@pytest.mark.parametrize(
    ("state", "age", "live"),
    [
        ("training", 0.0, True),
        ("training", STATUS_FRESH_SECONDS + 5, False),
        ("finished", 0.0, False),
        ("failed", 0.0, False),
        ("requeued", 0.0, False),
        (None, 0.0, False),
    ],
)
def test_what_counts_as_live(tmp_path: Path, state: str | None, age: float, live: bool) -> None:
    assert is_live(make(tmp_path, "demo", state=state, age=age)) is live


def test_a_torn_status_is_not_live(tmp_path: Path) -> None:
    run = make(tmp_path, "demo", state="training")
    run.status.write_bytes(b'{"state": "trai')
    assert not is_live(run)


def test_a_directory_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "first")
    make(tmp_path, "locked")
    is_file = Path.is_file

    def refused(path: Path) -> bool:  # by hand: permissions do not bind root
        if path.parent.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert [run.name for run in runs(tmp_path)] == ["first"]
    assert find_run(tmp_path, None).name == "first"
    assert find_run(tmp_path, "first").name == "first"
    with pytest.raises(PermissionError):
        find_run(tmp_path, "locked")


def test_by_name_by_path_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = make(tmp_path / "elsewhere", "demo")
    root = tmp_path / "root"
    with pytest.raises(NotFoundError, match="there is no run under"):
        find_run(root, None)
    assert find_run(root, str(elsewhere.path)).path == elsewhere.path
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_run(root, "demo").path == elsewhere.path
    make(root, "other")
    with pytest.raises(NotFoundError, match="there is no run 'nowhere'") as raised:
        find_run(root, "nowhere")
    assert "other" in raised.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_run_that_exists_needs_no_room_on_the_disk(tmp_path: Path) -> None:
    with small_file_system(tmp_path, "tmpfs", 1) as disk:
        run = RunDirectory(disk / "demo")
        identity, known = run.prepare(), secret.create(run.secret)
        with pytest.raises(OSError, match="No space"), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert run.prepare() == identity
        assert secret.create(run.secret) == known


def test_nobody_else_can_write_where_it_is_decided_about_the_run(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        tmp_path.chmod(0o2775)
        run = RunDirectory(tmp_path / "demo")
        (tmp_path / "demo").mkdir()
        run.spool.mkdir(0o775)  # made by an earlier version
        run.prepare()
        run.begin_branch("7", Generation(1))
    finally:
        os.umask(before)
    inside = [path for path in run.path.iterdir() if path.is_dir()]
    assert {run.checkpoints, run.spool, run.terms, run.branch("7").parent} < set(inside)
    for directory in (run.path, *inside):
        assert directory.stat().st_mode & 0o022 == 0, directory


def leader(allocation: str, term: int = 1) -> TermRecord:
    return TermRecord(Term(term), NodeId("a"), Incarnation("a1"), "10.0.0.1", 4711, allocation)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_command_of_somebody_else_is_none(tmp_path: Path) -> None:
    run = make(tmp_path, "demo")
    for name, owner in (("a", 12345), ("b", 0)):
        path = run.spool / f"{name}.json"
        path.write_bytes(orjson.dumps({"do": "stop", "by": name}))
        os.chown(path, owner, -1)
    (run.spool / "c.json").symlink_to(run.identity)
    assert [(path.name, each["by"]) for path, each in spooled(run.spool, leader("7.0"))] == [("b.json", "b")]
    assert not (run.spool / "a.json").exists()
    assert [path.name for path in run.spool.iterdir()] == ["b.json"], "it goes when it has been obeyed"


def test_a_command_for_a_job_that_is_over_is_not_obeyed_by_the_next(tmp_path: Path) -> None:
    run = make(tmp_path, "demo")
    for job, term in (("7", 2), ("8", 3), ("9", 4)):
        (run.spool / f"{job}.json").write_bytes(orjson.dumps({"do": "stop", "by": "me", "job": job, "term": term}))
    assert [each["job"] for _, each in spooled(run.spool, leader("8.1", 3))] == ["8"]
    assert sorted(path.name for path in run.spool.iterdir()) == ["8.json", "9.json"], "this leader may have slept"
