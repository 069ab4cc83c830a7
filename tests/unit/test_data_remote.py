"""JSON Lines in an object store: the same records as from files, through a cache that several processes share."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import torch
from checkpoint_samples import small_file_system

from hpcft.bucket import Bucket
from hpcft.data import Data, JsonLines, S3JsonLines, blocks
from hpcft.data.blocks import BLOCK_BYTES, ChangedError
from hpcft.data.fetcher import evict, hash_of
from hpcft.data.jsonl import RecordError
from hpcft.errors import UnusableError, UsageError
from hpcft.places import Place
from tests.object_store import Store

torch.set_num_threads(1)

SIZE = "256MiB"
PATIENCE = 60.0


@pytest.fixture
def place(store: Store, request: pytest.FixtureRequest) -> Place:
    return store.place(request.node.name.replace("_", "-")[-60:].strip("-"), "data")


def stored(place: Place, tmp_path: Path, **shards: bytes) -> Path:
    """The same shards in the store and in a directory."""
    directory = tmp_path / "files"
    directory.mkdir(exist_ok=True)
    for name, content in shards.items():
        (directory / f"{name}.jsonl").write_bytes(content)
        Bucket(place).put(f"{name}.jsonl", content)
    return directory


def records(first: int, count: int, padding: int = 0) -> bytes:
    return b"".join(orjson.dumps({"n": n, "pad": "x" * padding}) + b"\n" for n in range(first, first + count))


@contextmanager
def opened(place: Place, tmp_path: Path, pattern: str = "", size: str = SIZE) -> Iterator[S3JsonLines]:
    lines = S3JsonLines(
        f"{place.url}/{pattern}",
        cache=tmp_path / "cache",
        cache_size=size,
        endpoint=place.endpoint,
        region=place.region,
    )
    try:
        yield lines
    finally:
        lines.close()


def lose(lines: S3JsonLines, tmp_path: Path) -> None:
    """All that is in the cache, and what the data set has open of it."""
    for path in (tmp_path / "cache" / "blocks").iterdir():
        path.unlink()
    lines._blocks._open.clear()


def until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def numbers(batch: list[dict[str, int]]) -> list[int]:
    return [each["n"] for each in batch]


def test_the_records_are_those_of_the_files(place: Place, tmp_path: Path) -> None:
    odd = b'\n  \n{"n": 100}\n\n{"n": 101, "pad": "\xc3\xa4"}\n   \n{"n": 102}'  # blank lines, no newline at the end
    # the third record of `b` begins in the first block and ends in the second
    long = records(0, 2) + orjson.dumps({"n": 2, "pad": "y" * BLOCK_BYTES}) + b"\n" + records(3, 5)
    files = JsonLines(stored(place, tmp_path, a=odd, b=long, c=b"", d=b"\n\n"))
    Bucket(place).put("notes.txt", b"no shard")
    with opened(place, tmp_path) as lines:
        assert len(lines) == len(files) == 11
        assert [lines[i] for i in range(len(lines))] == [files[i] for i in range(len(files))]
        assert lines[-1] == files[-1]
        with pytest.raises(IndexError, match="among 11"):
            lines[11]
        with opened(place, tmp_path, "b*.jsonl") as some:
            assert [some[i]["n"] for i in range(len(some))] == list(range(8))


def test_ranks_and_loader_processes_share_what_was_fetched(place: Place, store: Store, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 900, 10_000))
    with opened(place, tmp_path) as one, opened(place, tmp_path) as other:
        seen = []
        for rank, lines in enumerate((one, other)):
            data = Data(lines, batch_size=100, epochs=1, workers=1, collate_fn=numbers)
            data.bind(7, rank, 2)
            for batch in data:
                seen += batch
                data.end_pass()
                data.complete_step(1)
            data.close()
    assert sorted(seen) == list(range(900))
    bucket = place.url.split("/")[2]
    assert store.log.read_text().count(f"GET /{bucket}/data/a.jsonl") == 3  # 9 MB


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_a_cache_that_another_user_could_write_to_is_none(place: Place, tmp_path: Path) -> None:
    blocks_of_another = tmp_path / "cache" / "blocks"
    blocks_of_another.mkdir(parents=True)
    os.chown(blocks_of_another, 12345, -1)
    with pytest.raises(UsageError, match="its directory blocks belongs to another user"):
        blocks.Blocks(place, [], tmp_path / "cache", 1 << 28)
    os.chown(blocks_of_another, 0, -1)
    blocks_of_another.chmod(0o777)
    blocks.Blocks(place, [], tmp_path / "cache", 1 << 28).close()
    assert blocks_of_another.stat().st_mode & 0o022 == 0
    assert not list((tmp_path / "cache").glob("failed-*"))


def test_the_cache_stays_below_its_limit(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LEAST_BLOCKS", 1)
    stored(place, tmp_path, a=records(0, 240, 100_000))
    cache = tmp_path / "cache" / "blocks"
    with opened(place, tmp_path, size="13MiB") as lines:
        for number in random.Random(5).choices(range(240), k=60):
            assert lines[number]["n"] == number
            assert sum(path.stat().st_size for path in cache.iterdir()) <= 17 << 20  # one more is being written
    evict(cache, BLOCK_BYTES)
    assert len(list(cache.iterdir())) <= 1
    with pytest.raises(UsageError, match="too small"), opened(place, tmp_path, size="1MiB"):
        pass


def test_what_was_used_least_recently_is_evicted(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "older")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    evict(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_what_will_be_read_is_fetched_before(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 100, 100_000))
    with opened(place, tmp_path) as lines:
        cache = tmp_path / "cache" / "blocks"
        there = len(list(cache.iterdir()))
        for path in cache.iterdir():
            path.unlink()
        lines.expect(range(100))
        while len([path for path in cache.iterdir() if not path.name.startswith(".")]) < there:
            assert lines._blocks._end.alive


def test_a_changed_object_is_an_error(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 10), b=records(10, 10))
    with opened(place, tmp_path) as lines:
        before = Data(lines, batch_size=5).state_dict()
        Bucket(place).put("b.jsonl", records(20, 10))
        lose(lines, tmp_path)
        assert lines[3]["n"] == 3
        with pytest.raises(ChangedError, match=r"b.jsonl has changed or is gone"):
            lines[13]
    with opened(place, tmp_path) as changed:
        assert changed[13]["n"] == 23
        with pytest.raises(UsageError, match="made with other data"):
            Data(changed, batch_size=5).load_state_dict(before)
    Bucket(place).put("b.jsonl", records(10, 10))
    with opened(place, tmp_path) as again:
        Data(again, batch_size=5).load_state_dict(before)


def test_a_damaged_block_is_fetched_again(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 10))
    with opened(place, tmp_path):
        (block,) = (tmp_path / "cache" / "blocks").iterdir()
    content = bytearray(block.read_bytes())
    content[6] ^= 1
    block.write_bytes(content)
    with opened(place, tmp_path) as lines:
        assert lines[0]["n"] == 0


def test_a_damaged_index_is_made_again(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 10))
    with opened(place, tmp_path):
        (kept,) = (tmp_path / "cache" / "index").glob("*.npy")
    sound = kept.read_bytes()
    for at in (5, -40, -1):  # the header, a number, the digest
        content = bytearray(sound)
        content[at] ^= 1
        kept.write_bytes(content)
        with opened(place, tmp_path) as lines:
            assert [lines[i]["n"] for i in range(len(lines))] == list(range(10))
        assert kept.read_bytes() == sound
    kept.write_bytes(b"")
    with opened(place, tmp_path) as lines:
        assert len(lines) == 10


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_is_named_with_what_helps(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 10))
    (found,) = blocks.listed(place, "")
    full = r"the cache .*mounted cannot be used: No space left on device; make room .* `cache_size`"
    with small_file_system(tmp_path, "tmpfs", 1) as disk:
        reading = blocks.Blocks(place, [found], disk, 1 << 28)
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:  # until there is no room for a file that says so
                file.write(bytes(4096))
        with pytest.raises(OSError, match=full) as raised:
            reading.read(0, 0, 10)
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(UsageError, match=r"the cache .*mounted cannot be used: No space"):
            blocks.Blocks(place, [found], disk, 1 << 28)
        ballast.unlink()
        assert reading.read(0, 0, 6) == b'{"n":0'
        reading._open.clear()
        reading.close()


def test_one_slow_block_takes_one_of_those_who_fetch(place: Place, tmp_path: Path) -> None:
    """It is asked for every second; here another process of the node has it under way, and does not get on."""
    stored(place, tmp_path, a=records(0, 100, 100_000))
    with opened(place, tmp_path) as lines:
        lose(lines, tmp_path)
        slow, other = (lines._blocks._path(0, block) for block in (0, 1))
        with (tmp_path / "cache" / "locks" / f"{hash_of(slow.name):03d}").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in range(20):
                lines._blocks._ask([(0, 0)], ahead=False)
            lines.expect([50])
            until("the other block", other.exists)
            assert not slow.exists()
        assert lines[0]["n"] == 0


def test_whatever_fails_is_told_to_whoever_waits(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(place, tmp_path, a=records(0, 10))
    (found,) = blocks.listed(place, "")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of\ntwo lines")  # at which its client panics
    reading = blocks.Blocks(place, [found], tmp_path / "cache", 1 << 28)
    try:
        with pytest.raises(OSError, match="the client of the store has failed"):
            reading.read(0, 0, 10)
    finally:
        reading.close()


def test_no_record_and_no_data(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=b'{"n": 1}\n{"n": \n')
    with opened(place, tmp_path) as lines, pytest.raises(RecordError, match=r"a.jsonl, record 1: not a JSON record"):
        lines[1]
    with pytest.raises(UsageError, match="there is no object"), opened(place, tmp_path, "*.txt"):
        pass
    with pytest.raises(UsageError, match="not of the form"):
        S3JsonLines("/data/x", cache=tmp_path, cache_size=SIZE)
    with pytest.raises(UnusableError, match="NoSuchBucket"):
        nowhere = Place("s3://nosuchbucket", place.endpoint, place.region)
        with opened(nowhere, tmp_path):
            pass


def test_the_end_of_the_fetching_process_is_the_surroundings_fault(place: Place, tmp_path: Path) -> None:
    stored(place, tmp_path, a=records(0, 10))
    with opened(place, tmp_path) as lines:
        lose(lines, tmp_path)
        child = lines._blocks._end.peek()[2][2]  # type: ignore[index]
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with pytest.raises(OSError, match="has ended"):
            lines[0]
