"""Output of workers: kept byte for byte, rotated, remembered, and never in the loop's way."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hpcft.logs import Capture, LogWriter, RotatingFile
from tests.search import sampled


def stream_of(path: Path, keep: int) -> bytes:
    """The files in order, oldest first."""
    older = [path.with_name(f"{path.name}.{number}") for number in range(keep, 0, -1)]
    return b"".join(file.read_bytes() for file in (*older, path) if file.exists())


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


def captured(tmp_path: Path, writer: LogWriter, **limits: int) -> tuple[Capture, int]:
    reading, writing = os.pipe()
    file = RotatingFile(tmp_path / "logs" / "w.log", limits.get("max_size", 1 << 20), limits.get("keep", 3))
    capture = Capture(reading, file, writer, limits.get("lines", 5))
    capture.start()
    return capture, writing


@sampled(30)
@given(
    chunks=st.lists(st.binary(max_size=60).map(lambda raw: raw.replace(b"\x00", b"\n")), max_size=12),
    max_size=st.integers(min_value=5, max_value=60),
)
def test_rotation_loses_nothing_and_keeps_to_the_size(
    tmp_path_factory: object, chunks: list[bytes], max_size: int
) -> None:
    path = tmp_path_factory.mktemp("r") / "x.log"  # type: ignore[attr-defined]
    file = RotatingFile(path, max_size, keep=10_000)
    for chunk in chunks:
        file.write(chunk)
    file.close()
    files = [path, *path.parent.glob("x.log.*")]
    assert stream_of(path, len(files)) == b"".join(chunks)
    assert all(each.stat().st_size <= max_size for each in files if each.exists())


def test_rotation_cuts_between_lines_and_forgets_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    file = RotatingFile(path, max_size=25, keep=3)
    for number in range(20):
        file.write(b"line %04d\n" % number)
    file.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2"]
    for each in tmp_path.iterdir():
        assert all(len(line) == 9 for line in each.read_bytes().splitlines()), "a line was cut"
    assert stream_of(path, 2).splitlines()[-1] == b"line 0019"


def test_a_file_is_continued_after_a_restart(tmp_path: Path) -> None:
    for text in (b"one\n", b"two\n"):
        file = RotatingFile(tmp_path / "x.log", 100, 1)
        file.write(text)
        file.close()
    assert (tmp_path / "x.log").read_bytes() == b"one\ntwo\n"


async def test_bytes_arrive_as_they_were_written(tmp_path: Path) -> None:
    writer = LogWriter()
    capture, writing = captured(tmp_path, writer, max_size=70_000, keep=100)
    raw = os.urandom(500_000)
    thread = threading.Thread(target=lambda: [os.write(writing, raw[i : i + 3000]) for i in range(0, len(raw), 3000)])
    thread.start()
    await until(lambda: capture.total == len(raw))
    thread.join()
    os.close(writing)
    await until(lambda: not capture.open)
    assert await writer.close(10)
    assert stream_of(capture.file.path, 100) == raw


async def test_the_last_lines_are_remembered_also_an_unfinished_one(tmp_path: Path) -> None:
    writer = LogWriter()
    capture, writing = captured(tmp_path, writer, lines=3)
    for piece in (b"one\ntw", b"o\nthree\n", b"f\xffur\nfi"):
        os.write(writing, piece)
    capture.drain()
    assert capture.tail() == ("three", "f\ufffdur", "fi")
    assert capture.tail(1) == ("fi",)
    for _ in range(4):
        os.write(writing, b"x" * 30_000)
        capture.drain()
    os.write(writing, b"end\n")
    os.close(writing)
    await until(lambda: not capture.open)
    assert capture.tail(1)[0].endswith("xend")
    assert len(capture.tail(1)[0]) <= 4096
    assert await writer.close(10)


async def test_a_hanging_file_system_blocks_neither_the_loop_nor_the_worker(tmp_path: Path) -> None:
    """The log is a FIFO that nobody reads: opening it blocks the writing thread, as a hung mount would."""
    (tmp_path / "logs").mkdir()
    hung = tmp_path / "logs" / "w.log"
    os.mkfifo(hung)
    writer = LogWriter(queue_bytes=100_000)
    capture, writing = captured(tmp_path, writer)
    os.set_blocking(writing, False)
    longest = 0.0
    sent = 0
    last = time.monotonic()
    while sent < 2_000_000:
        try:
            sent += os.write(writing, b"y" * 999 + b"\n")
        except BlockingIOError:
            await asyncio.sleep(0)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    await until(lambda: capture.total == sent)
    assert capture.file.lost > 1_500_000
    assert longest < 0.5
    os.close(writing)
    await until(lambda: not capture.open)
    assert not await writer.close(0.05), "what cannot be written is not waited for"

    # The file system comes back.
    parts: list[bytes] = []

    def read() -> None:
        with hung.open("rb") as file:
            parts.append(file.read())

    reader = threading.Thread(target=read)
    reader.start()
    assert await writer.close(20)
    await asyncio.to_thread(reader.join)
    assert b"bytes of output were dropped here" in parts[0]


async def test_a_full_disk_is_told_in_the_file_once_there_is_room(tmp_path: Path) -> None:
    writer = LogWriter()
    (tmp_path / "logs").write_bytes(b"")  # the directory cannot be made: something is in its place
    capture, writing = captured(tmp_path, writer)
    os.write(writing, b"lost\n")
    await until(lambda: capture.file.error is not None)
    (tmp_path / "logs").unlink()
    os.write(writing, b"kept\n")
    os.close(writing)
    await until(lambda: not capture.open)
    assert await writer.close(10)
    text = (tmp_path / "logs" / "w.log").read_bytes()
    assert b"5 bytes of output were dropped" in text
    assert text.endswith(b"kept\n")
    assert b"lost\n" not in text
    assert capture.tail() == ("lost", "kept"), "memory does not depend on the disk"
