"""The journal on a real disk: what was appended comes back, whoever writes on later."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import pytest
from checkpoint_samples import small_file_system

from hpcft.errors import DamagedError
from hpcft.events import (
    CheckpointCommitted,
    CheckpointRef,
    Commit,
    CopiesMeasured,
    Decided,
    Event,
    Formation,
    Member,
    NodeHeard,
    NodeJoined,
    Progressed,
    Propose,
    TermBegan,
    Ticked,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.journal import MEASURED_COPIES, Journal, Replayed, is_journaled, records, replay
from hpcft.transitions import LATEST_SAVES, apply
from hpcft.world import World

A, B = NodeId("a"), NodeId("b")


def begin(term: int, allocation: str = "7.0") -> TermBegan:
    return TermBegan(RunId("r"), Term(term), A, Incarnation(f"a{term}"), allocation, (A, B), takeover=False)


def form(generation: int, restore: CheckpointRef | None = None) -> tuple[Event, ...]:
    members = (
        Member(A, Incarnation("a1"), "10.0.0.1", 1, Rank(0)),
        Member(B, Incarnation("b1"), "10.0.0.2", 1, Rank(1)),
    )
    formation = Formation(Term(1), Generation(generation), members, restore, "00000000")
    return (
        Decided((Propose(formation),), f"generation {generation}"),
        Decided((Commit(Generation(generation)),), "starts"),
    )


def at_step(generation: int, step: int) -> tuple[Event, ...]:
    return tuple(Progressed(node, Generation(generation), Step(step), None) for node in (A, B))


async def write(
    directory: Path, term: int, events: list[tuple[float, Event]], after: Replayed | None = None
) -> Journal:
    after = after or replay(directory)
    journal = Journal(directory, Term(term), after.world.generation, Incarnation(f"a{term}"), after)
    for at, event in events:
        journal.append(event, at)
    await journal.sync()
    journal.close()
    return journal


def files(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def known(world: World) -> World:
    """Without what nobody writes down: when a node was heard last."""
    return replace(world, nodes=tuple(replace(node, heard_at=0.0) for node in world.nodes), term_since=0.0)


async def test_replayed_world_is_the_one_that_was_left(tmp_path: Path) -> None:
    events: list[tuple[float, Event]] = [(0.0, begin(1)), (0.1, NodeJoined(A, Incarnation("a1"), "10.0.0.1", 1, 7000))]
    events += [(1.0, each) for each in form(1)]
    events += [(2.0 + step / 10, each) for step in range(1, 200) for each in at_step(1, step)]
    events += [(23.0, CheckpointCommitted(CheckpointRef(Step(150), Generation(1)), 0.5, 10)), (23.5, Ticked())]
    world = World()
    for at, event in events:
        world = apply(world, event, at)
    await write(tmp_path, 1, events)
    replayed = replay(tmp_path)
    assert known(replayed.world) == known(world)
    assert replayed.clock == pytest.approx(23.0)
    (path,) = files(tmp_path)
    assert replayed.head == path.name
    assert replayed.length == path.stat().st_size


async def test_progress_is_thinned_but_every_decision_sees_the_steps_it_was_made_on(tmp_path: Path) -> None:
    """Otherwise a requeued run would find no generation to have made progress, and give up."""
    events: list[tuple[float, Event]] = [(0.0, begin(1))]
    world, at = World(), 0.0
    for generation in range(1, 6):
        events += [(at, each) for each in form(generation)]
        events += [
            (at + step / 100, each) for step in range(50) for each in at_step(generation, 40 * generation + step)
        ]
        at += 1.0
    for when, event in events:
        world = apply(world, event, when)
    await write(tmp_path, 1, events)
    replayed = replay(tmp_path).world
    assert (replayed.fruitless, replayed.high_step, replayed.step) == (0, world.high_step, world.step)
    lines = b"".join(path.read_bytes() for path in files(tmp_path)).count(b"Progressed")
    assert lines < len(events) / 5


async def test_the_progress_of_many_nodes_stays_readable(tmp_path: Path) -> None:
    """An hour of a thousand nodes at a step a second would be 3.6 million lines, for the next leader to read."""
    nodes = [NodeId(f"n{number}") for number in range(200)]
    events: list[tuple[float, Event]] = [(0.0, begin(1))]
    events += [
        (float(second), Progressed(node, Generation(1), Step(second), None)) for second in range(600) for node in nodes
    ]
    await write(tmp_path, 1, events)
    lines = b"".join(path.read_bytes() for path in files(tmp_path)).count(b"Progressed")
    assert len(nodes) < lines < 600 + 10 * len(nodes)


async def test_what_copies_took_is_put_together_and_lost_to_none(tmp_path: Path) -> None:
    took = [(Step(step), step / 1000) for step in range(1, 601)]
    events: list[tuple[float, Event]] = [(0.0, begin(1)), *((0.0, each) for each in form(1))]
    events += [(float(step), CopiesMeasured(Generation(1), ((step, blocked),))) for step, blocked in took]
    await write(tmp_path, 1, [*events, *((700.0, each) for each in form(2))])
    written = [each.event for each in records(tmp_path)]
    found = [each for each in written if isinstance(each, CopiesMeasured)]
    assert [pair for each in found for pair in each.copies] == took
    assert [len(each.copies) for each in found] == [MEASURED_COPIES, MEASURED_COPIES, 600 - 2 * MEASURED_COPIES]
    last = next(number for number, each in enumerate(written) if each is found[-1])
    assert isinstance(written[last + 1], Decided), "before what happened after them"
    assert replay(tmp_path).world.copies == tuple(blocked for _, blocked in took[-LATEST_SAVES:])


async def test_every_line_says_when_it_was_written_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "HERE-05:30")
    time.tzset()
    try:
        before = datetime.now(UTC)
        await write(tmp_path, 1, [(0.0, begin(1)), *((1.0, each) for each in form(1))])
        (path,) = files(tmp_path)
        walls = [orjson.loads(line)["wall"] for line in path.read_bytes().splitlines()[1:]]
        assert len(walls) > 2
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", wall) for wall in walls), walls
        written = replay(tmp_path).written
        assert written == datetime.fromisoformat(walls[-1])
        assert abs((written - before).total_seconds()) < 60
        # without an offset, as lines were written before, it is this machine's own time
        path.write_bytes(path.read_bytes().replace(walls[-1].encode(), b"2026-01-01T05:30:00"))
        assert replay(tmp_path).written == datetime(2026, 1, 1, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    await write(tmp_path, 1, [(0.0, begin(1)), *((1.0, each) for each in form(4))])
    (path,) = files(tmp_path)
    whole = replay(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"at":9.0,"wall":"x","event":{"kind":"Propo')
    assert replay(tmp_path) == whole
    # and a successor says that it has not read it
    await write(tmp_path, 2, [(2.0, begin(2, "7.1"))])
    second = max(files(tmp_path))
    opening = orjson.loads(second.read_bytes().splitlines()[0])
    assert opening["predecessor"] == path.name
    assert opening["replayed"] == whole.length < path.stat().st_size
    assert replay(tmp_path).world.generation == whole.world.generation + 100  # nobody knows what was formed since


@pytest.mark.parametrize("written", [b"", b'{"predecessor":null,"repl'])
async def test_a_journal_that_never_began_is_not_the_head(tmp_path: Path, written: bytes) -> None:
    await write(tmp_path, 1, [(0.0, begin(1))])
    (path,) = files(tmp_path)
    (tmp_path / "term-000002-g0000-a2.jsonl").write_bytes(written)
    assert replay(tmp_path).head == path.name


async def test_what_a_deposed_leader_appends_is_void(tmp_path: Path) -> None:
    old = Journal(tmp_path, Term(1), Generation(0), Incarnation("a1"), replay(tmp_path))
    old.append(begin(1), 0.0)
    for each in form(1):
        old.append(each, 1.0)
    await old.sync()
    successor = Journal(tmp_path, Term(2), Generation(1), Incarnation("a2"), replay(tmp_path))
    successor.append(begin(2), 2.0)
    # the old one was only stopped, and goes on
    for generation in (2, 3, 4):
        for each in form(generation):
            old.append(each, 3.0)
    await old.sync()
    for each in form(300):
        successor.append(each, 4.0)
    await successor.sync()
    replayed = replay(tmp_path)
    assert replayed.head == successor.path.name
    assert (replayed.world.term, replayed.world.generation) == (2, 300)
    assert replayed.world.fruitless == 0
    assert b'"generation":2,' in old.path.read_bytes()
    old.close()
    successor.close()


async def test_the_chain_is_followed_over_many_terms(tmp_path: Path) -> None:
    for term in range(1, 6):
        events: list[tuple[float, Event]] = [(float(term), begin(term, f"7.{term}"))]
        checkpoint = CheckpointRef(Step(10 * term), Generation(1000 * term))
        events += [(float(term), each) for each in form(1000 * term)]
        events.append((term + 0.5, CheckpointCommitted(checkpoint, 0.1, 1)))
        await write(tmp_path, term, events)
    world = replay(tmp_path).world
    assert [each.step for each in world.checkpoints] == [10, 20, 30, 40, 50]
    assert world.starts == 5
    assert replay(tmp_path).clock == pytest.approx(5.5)


async def test_a_damaged_line_names_file_and_line(tmp_path: Path) -> None:
    await write(tmp_path, 1, [(0.0, begin(1)), *((1.0, each) for each in form(1))])
    (path,) = files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"Decided", b"Decoded")
    path.write_bytes(b"".join(lines))
    with pytest.raises(DamagedError, match=rf"{path.name}, line 3, .*Decoded") as raised:
        replay(tmp_path)
    assert "run.name" in raised.value.hint


@pytest.mark.parametrize(
    ("first", "word"),
    [
        (b'{"predecessor":"term-000001-g0000-x.jsonl","replayed":5,"term":2,"format":1}', "No such file"),
        (b'{"predecessor":null,"replayed":0,"term":2,"format":99}', "format 99"),
        (b"not json", "line 1"),
    ],
)
def test_a_lineage_that_cannot_be_followed_is_refused(tmp_path: Path, first: bytes, word: str) -> None:
    (tmp_path / "term-000002-g0000-y.jsonl").write_bytes(first + b"\n")
    with pytest.raises(DamagedError, match=word):
        replay(tmp_path)


async def test_a_name_is_never_written_twice(tmp_path: Path) -> None:
    journal = await write(tmp_path, 1, [(0.0, begin(1))])
    before = journal.path.read_bytes()
    again = Journal(tmp_path, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
    again.append(begin(1), 5.0)
    await again.sync()
    again.close()
    assert journal.path.read_bytes() == before
    assert again.path != journal.path


async def test_a_journal_that_cannot_be_written_is_told_and_written_later(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    journal = Journal(directory, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
    journal.append(begin(1), 0.0)
    with pytest.raises(OSError, match="No such file"):
        await journal.sync()
    assert journal.failed is not None
    assert "No such file" in journal.failed
    for event in form(1):
        journal.append(event, 1.0)
    directory.mkdir()
    await asyncio.wait_for(journal.sync(), 10)
    assert journal.failed is None
    journal.close()
    assert replay(directory).world.generation == 1


async def test_without_a_sync_it_is_tried_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.journal.RETRY_SECONDS", 0.05)
    directory = tmp_path / "gone"
    journal = Journal(directory, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
    begun(journal)
    await until(lambda: journal.failed is not None)
    directory.mkdir()
    step = 0

    def written() -> bool:
        nonlocal step
        step += 1  # a steady stream of events must not put the next try off
        journal.append(CheckpointCommitted(CheckpointRef(Step(step), Generation(1)), 0.1, 1), 1.0)
        return journal.failed is None

    await until(written)
    await journal.sync()
    journal.close()
    assert [each.step for each in replay(directory).world.checkpoints] == list(range(1, step + 1))


def begun(journal: Journal) -> None:
    for event in (begin(1), *form(1)):
        journal.append(event, 0.0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 (a thread sets no asyncio.Event)
            await asyncio.sleep(0.001)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
async def test_a_full_disk_leaves_no_torn_line_and_loses_nothing(tmp_path: Path) -> None:
    with small_file_system(tmp_path, "tmpfs", 1) as disk:
        ballast = disk / "ballast"
        journal = Journal(disk, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
        begun(journal)
        await journal.sync()
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for step in range(1, 101):
            journal.append(CheckpointCommitted(CheckpointRef(Step(step), Generation(1)), 0.1, 1), 1.0)
        with pytest.raises(OSError, match="No space"):
            await journal.sync()
        half = replay(disk).world.checkpoints
        assert len(half) < 100
        assert len(journal.path.read_bytes()) % 4096  # cut back to whole lines
        ballast.unlink()
        await journal.sync()
        journal.close()
        assert [each.step for each in replay(disk).world.checkpoints] == list(range(1, 101))
        assert len(list(disk.iterdir())) == 1


async def test_another_error_makes_a_successor_that_has_what_the_file_may_lack(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
    begun(journal)
    await journal.sync()
    first, good = journal.path, journal.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (good + 300, hard))  # a write is cut short, the next one fails
    try:
        for step in range(1, 51):
            journal.append(CheckpointCommitted(CheckpointRef(Step(step), Generation(1)), 0.1, 1), 1.0)
        with pytest.raises(OSError, match="File too large"):
            await journal.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await journal.sync()
    journal.append(CheckpointCommitted(CheckpointRef(Step(51), Generation(1)), 0.1, 1), 2.0)
    await journal.sync()
    journal.close()
    assert first.stat().st_size > good
    replayed = replay(tmp_path)
    assert replayed.head == journal.path.name != first.name
    assert orjson.loads(journal.path.read_bytes().splitlines()[0])["predecessor"] == first.name
    assert orjson.loads(journal.path.read_bytes().splitlines()[0])["replayed"] == good
    assert [each.step for each in replayed.world.checkpoints] == list(range(1, 52))


async def test_a_failed_fsync_makes_a_successor(tmp_path: Path) -> None:
    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.fsync and "journal" in frame.f_code.co_filename and len(failed) < 1:
            failed.append(function)
            raise OSError(errno.EIO, "Input/output error")

    failed: list[Any] = []
    threading.setprofile(profile)
    try:
        journal = Journal(tmp_path, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
        journal.append(begin(1), 0.0)
        with pytest.raises(OSError, match="Input/output"):
            await journal.sync()
    finally:
        threading.setprofile(None)
    for event in form(1):
        journal.append(event, 1.0)
    await journal.sync()
    journal.close()
    assert len(files(tmp_path)) == 2
    replayed = replay(tmp_path)
    assert (replayed.world.term, replayed.world.generation, replayed.world.starts) == (1, 1, 1)


async def test_a_backlog_has_its_limit_and_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.journal.BACKLOG_BYTES", 4000)
    directory = tmp_path / "gone"
    journal = Journal(directory, Term(1), Generation(0), Incarnation("a1"), Replayed(World(), 0.0, None, 0))
    begun(journal)
    for step in range(1, 101):
        journal.append(CheckpointCommitted(CheckpointRef(Step(step), Generation(1)), 0.1, 1), 1.0)
    with pytest.raises(OSError, match="No such file"):
        await journal.sync()
    directory.mkdir()
    with pytest.raises(OSError, match="had to be dropped"):
        await journal.sync()
    journal.close()
    steps = [each.step for each in replay(directory).world.checkpoints]
    assert steps == list(range(1, len(steps) + 1))
    assert 0 < len(steps) < 100


def test_heartbeats_and_time_are_no_history() -> None:
    assert not is_journaled(NodeHeard(A, Incarnation("a1"), Generation(1), 5))
    assert not is_journaled(Ticked())
    assert is_journaled(begin(1))


def test_a_file_system_that_fails_is_no_damage(tmp_path: Path) -> None:
    """Another try, or another node, may have more luck: nothing is said against the run."""
    (tmp_path / "term-000002-g0000-y.jsonl").mkdir()  # EISDIR: the first error that comes to hand
    with pytest.raises(IsADirectoryError):
        replay(tmp_path)
