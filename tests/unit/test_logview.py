"""`hpcft logs`: which files are meant, their last lines, and following them through rotation and new generations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from hpcft import logview
from hpcft.errors import NotFoundError
from hpcft.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    return run


def write(run: RunDirectory, name: str, text: str) -> Path:
    path = run.path / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def shown(run: RunDirectory, **selection: object) -> list[str]:
    return [line.text() for line in logview.read(run, **selection)]  # type: ignore[arg-type]


def test_agents_first_then_the_workers_of_the_newest_generation(run: RunDirectory) -> None:
    write(run, "node1/agent.log", "agent one\n")
    write(run, "node2/agent.log", "agent two\n")
    write(run, "node1/g0001-rank0000.log", "old\n")
    write(run, "node2/g0002-rank0000.log", "zero\n")
    write(run, "node1/g0002-rank0001.log", "one\n")
    assert shown(run) == [
        "==> node1/agent.log <==\nagent one",
        "==> node2/agent.log <==\nagent two",
        "==> node2/g0002-rank0000.log <==\nzero",
        "==> node1/g0002-rank0001.log <==\none",
    ]


def test_a_rank_is_followed_over_generations_nodes_and_rotated_parts(run: RunDirectory) -> None:
    write(run, "node1/g0001-rank0003.log.2", "a\nb\n")
    write(run, "node1/g0001-rank0003.log.1", "c\n")
    write(run, "node1/g0001-rank0003.log", "d\n")
    write(run, "node2/g0002-rank0003.log", "e\nf\n")
    assert [line.content for line in logview.read(run, rank=3, lines=20)] == list("abcdef")
    assert [line.content for line in logview.read(run, rank=3, lines=3)] == list("def")
    assert [line.content for line in logview.read(run, rank=3, node="node1", lines=2)] == list("cd")


def test_of_a_long_file_the_end_is_read(run: RunDirectory) -> None:
    lines = [f"line {number} " + "x" * (number % 300) for number in range(5000)]
    write(run, "node1/agent.log", "\n".join(lines) + "\n")
    for count in (1, 20, 1000, 6000):
        assert [line.content for line in logview.read(run, lines=count)] == lines[-count:]
    assert shown(run, lines=0) == []


def test_bytes_that_are_not_text_and_a_last_line_without_an_end(run: RunDirectory) -> None:
    path = write(run, "node1/agent.log", "")
    path.write_bytes(b"caf\xe9\nno end")
    assert [line.content for line in logview.read(run)] == ["caf\ufffd", "no end"]


def test_a_progress_bar_is_one_line(run: RunDirectory) -> None:
    bar = "\r".join(f"{percent}%" for percent in range(101))
    write(run, "node1/agent.log", f"begin\n{bar}\nend\n")
    assert [line.content for line in logview.read(run, lines=2)] == [bar, "end"]
    assert [line.content for line in logview.read(run, lines=3)] == ["begin", bar, "end"]


def test_as_json_a_line_says_whose_it_is(run: RunDirectory) -> None:
    write(run, "node1/agent.log", "hello\n")
    write(run, "node2/g0007-rank0012.log", "loss 1.5\n")
    assert [line.as_dict() for line in logview.read(run)] == [
        {"node": "node1", "rank": None, "generation": None, "line": "hello"},
        {"node": "node2", "rank": 12, "generation": 7, "line": "loss 1.5"},
    ]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"rank": 9}, "of rank 9"),
        ({"node": "node7"}, "on node 'node7'"),
        ({"rank": 1, "node": "node1"}, "of rank 1 on"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(run: RunDirectory, selection: dict[str, object], words: str) -> None:
    write(run, "node1/agent.log", "hello\n")
    write(run, "node2/g0001-rank0000.log", "hello\n")
    write(run, "node2/g0001-rank0001.log", "hello\n")
    with pytest.raises(NotFoundError) as caught:
        shown(run, **selection)
    assert words in caught.value.message
    assert caught.value.hint == "there are nodes node1, node2 and ranks 0, 1"


def test_a_rank_of_the_world_that_wrote_nothing_is_no_mistake(run: RunDirectory) -> None:
    write(run, "node1/agent.log", "hello\n")
    run.status.write_bytes(orjson.dumps({"workers": [{"rank": 3, "node": "node1"}]}))
    assert shown(run, rank=3) == shown(run, rank=3, node="node1") == []
    for selection in ({"rank": 4}, {"rank": 3, "node": "node2"}):
        with pytest.raises(NotFoundError):
            shown(run, **selection)


def test_a_local_keepers_output_is_shown_only_where_there_is_no_agents(run: RunDirectory) -> None:
    write(run, "node1/keeper.log", "no such address\n")
    assert shown(run) == ["==> node1/keeper.log <==\nno such address"]
    write(run, "node1/agent.log", "hello\n")
    assert shown(run) == ["==> node1/agent.log <==\nhello"]


def test_a_run_without_logs(run: RunDirectory) -> None:
    with pytest.raises(NotFoundError, match="no logs yet"):
        shown(run)


class Follower:
    """Reads a followed log on a thread, and hands over lines as they come."""

    def __init__(self, lines: Iterator[logview.Line]) -> None:
        self._lines = lines
        self._seen: list[str] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._lines:
            with self._changed:
                self._seen.append(line.content)
                self._changed.notify_all()

    def until(self, *expected: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._seen) >= len(expected), timeout=30), self._seen
            assert self._seen == list(expected)


def test_following_loses_nothing_over_rotation_and_a_new_generation(run: RunDirectory) -> None:
    path = write(run, "node1/g0001-rank0000.log", "one\ntwo\n")
    follower = Follower(logview.read(run, rank=0, lines=1, follow=True))
    follower.until("two")
    with path.open("a") as file:
        file.write("three\nfo")
    follower.until("two", "three")
    with path.open("a") as file:
        file.write("ur\n")
    follower.until("two", "three", "four")
    with path.open("a") as file:
        file.write("five\n")
        path.rename(path.with_name(path.name + ".1"))
    write(run, "node1/g0001-rank0000.log", "six\n")
    follower.until("two", "three", "four", "five", "six")
    write(run, "node2/g0002-rank0000.log", "seven\n")
    follower.until("two", "three", "four", "five", "six", "seven")


def test_the_last_words_of_a_generation_are_shown_although_the_next_one_has_begun(run: RunDirectory) -> None:
    old = write(run, "node1/g0001-rank0000.log", "one\n")
    follower = Follower(logview.read(run, follow=True))
    follower.until("one")
    with old.open("a") as file:
        file.write("killed\n")
        write(run, "node1/g0002-rank0000.log", "again\n")
    follower.until("one", "killed", "again")


def test_following_may_begin_before_there_is_anything(run: RunDirectory) -> None:
    follower = Follower(logview.read(run, follow=True))
    write(run, "node1/agent.log", "hello\n")
    follower.until("hello")
