"""JSON Lines as a data set: numbering, odd files, errors with file and line, forked readers."""

import multiprocessing
from pathlib import Path

import orjson
import pytest

from hpcft.data.jsonl import JsonLines, RecordError
from hpcft.errors import UsageError


def shard(path: Path, first: int, count: int) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"n": n}) + b"\n" for n in range(first, first + count)))
    return path


def numbers(lines: JsonLines) -> list[int]:
    return [lines[i]["n"] for i in range(len(lines))]


def test_records_follow_the_shards_by_name(tmp_path: Path) -> None:
    shard(tmp_path / "b.jsonl", 10, 7)
    shard(tmp_path / "a.jsonl", 0, 10)
    (tmp_path / "notes.txt").write_text("not a shard")
    lines = JsonLines(tmp_path)
    assert numbers(lines) == list(range(17))
    assert lines[-1] == {"n": 16}
    for outside in (17, -18):
        with pytest.raises(IndexError, match="among 17"):
            lines[outside]


def test_a_list_of_files_keeps_its_own_order(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "1.jsonl", 0, 3), shard(tmp_path / "2.jsonl", 3, 3)
    assert numbers(JsonLines([two, str(one)])) == [3, 4, 5, 0, 1, 2]
    assert numbers(JsonLines(one)) == [0, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        b'{"n":0}\n{"n":1}\n{"n":2}\n',
        b'{"n":0}\n{"n":1}\n{"n":2}',
        b'\n\n{"n":0}\r\n \t \n{"n":1}\n\n   {"n":2}  \n\n\n',
    ],
    ids=["usual", "no newline at the end", "blank lines"],
)
def test_blank_lines_and_a_missing_newline_are_no_records(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    assert numbers(JsonLines(tmp_path)) == [0, 1, 2]


def test_an_empty_shard_has_no_records(tmp_path: Path) -> None:
    shard(tmp_path / "a.jsonl", 0, 2)
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "c.jsonl").write_bytes(b"\n")
    shard(tmp_path / "d.jsonl", 2, 2)
    assert numbers(JsonLines(tmp_path)) == [0, 1, 2, 3]


def test_lines_across_the_pieces_of_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.data.jsonl._SCANNED_BYTES", 16)
    shard(tmp_path / "a.jsonl", 95, 40)
    assert numbers(JsonLines(tmp_path)) == list(range(95, 135))


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.data.jsonl._OPEN_SHARDS", 3)
    for n in range(20):
        shard(tmp_path / f"{n:02}.jsonl", n, 1)
    lines = JsonLines(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert numbers(lines) == list(range(20))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n":0}\n\n{"n":1}\n{"n":\n{"n":3}\n')
    lines = JsonLines(tmp_path)
    assert lines[3] == {"n": 3}
    with pytest.raises(RecordError, match=r"a\.jsonl:4: not a JSON record") as caught:
        lines[2]
    assert (caught.value.path, caught.value.line) == (path, 4)


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.jsonl", 0, 10)
    lines = JsonLines(tmp_path)
    shard(path, 0, 5)
    with pytest.raises(RecordError, match=r"a\.jsonl has changed since"):
        lines[9]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no"):
        JsonLines(tmp_path)
    with pytest.raises(UsageError, match="no file"):
        JsonLines(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="the list of shards"):
        JsonLines([])


def test_a_cache_gives_the_same_and_follows_changes(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache" / "index"
    data.mkdir()
    path = shard(data / "a.jsonl", 0, 10)
    assert numbers(JsonLines(data, cache=cache)) == list(range(10))
    (kept,) = cache.iterdir()
    born = kept.stat().st_ino
    assert numbers(JsonLines(data, cache=cache)) == list(range(10))
    assert kept.stat().st_ino == born
    content = kept.read_bytes()
    kept.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])  # of a number
    assert numbers(JsonLines(data, cache=cache)) == list(range(10))
    shard(path, 5, 3)
    assert numbers(JsonLines(data, cache=cache)) == [5, 6, 7]


def _read_all(lines: JsonLines, wanted: range, answer: "multiprocessing.SimpleQueue[bool]") -> None:
    answer.put(all(lines[i]["n"] == i for _ in range(20) for i in wanted))


def test_forked_readers_do_not_disturb_each_other(tmp_path: Path) -> None:
    shard(tmp_path / "a.jsonl", 0, 500)
    lines = JsonLines(tmp_path)
    assert lines[0] == {"n": 0}  # the file is open before the fork
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    readers = [fork.Process(target=_read_all, args=(lines, range(k, 500, 3), answer)) for k in range(3)]
    for reader in readers:
        reader.start()
    assert [answer.get() for _ in readers] == [True] * 3
    for reader in readers:
        reader.join()
