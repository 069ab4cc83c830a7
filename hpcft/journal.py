"""Everything that happened, in order: replaying it rebuilds the world.

Theory of operation
-------------------
Each leader writes one file, `journal/term-000003-g0007-<incarnation>.jsonl`, created exclusively. Its first line
names the predecessor and how many bytes of it were replayed; whatever a deposed leader appended after that is
void. The head is the journal of the highest term, for a term has one holder only; recovery follows the chain of
predecessors, never "the highest step".

A line is `{"at": run clock seconds, "wall": UTC, "event": record}`. A torn last line (the writer died) is
ignored. Writing is append-only on one thread: `append` never blocks the loop, `sync` waits for the disk. Only
what must be durable before it is acted upon is waited for; a hanging file system delays no recovery.

A disk that refuses costs nothing that is still in memory. A full one is tried again, after what a short write has
left is cut off. After any other error nobody knows what of the unsynced rest is on disk: the file is left as it is,
and a successor (`..._001.jsonl`) says up to where it is good and begins with everything that came after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from hpcft import durable, wire
from hpcft.errors import DamagedError
from hpcft.events import (
    CheckpointsFound,
    CopiesAlone,
    CopiesKept,
    CopiesMeasured,
    Event,
    NodeHeard,
    NodeReported,
    Progressed,
    SnapshotDropped,
    SnapshotTaken,
    TermBegan,
    Ticked,
)
from hpcft.ids import Generation, Incarnation, NodeId, Term
from hpcft.transitions import apply
from hpcft.world import World

log = logging.getLogger("hpcft.journal")

FORMAT = 1
PROGRESS_SECONDS = 5.0
"""Between two records of all nodes' progress, or longer with many nodes:"""
PROGRESS_LINES_PER_SECOND = 1.0
"""a thousand nodes for a day would else be 17 million lines, which the next leader has to read before it can lead."""
EARLY_PROGRESS = 3
"""So many reports of a node in a new generation are written as they come: they say when an incident was over."""
MEASURED_COPIES = 256
"""So many copies in memory are put into one line at most."""
UNSYNCED_BYTES = 1 << 20
"""More than this is synced without being asked for: it is kept in memory until then."""
BACKLOG_BYTES = 64 << 20
"""More than this is not kept for a disk that refuses; the journal then ends where it is."""
RETRY_SECONDS = 1.0
RETRY_MAX_SECONDS = 60.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class Replayed:
    """What earlier terms left: the world, the run clock, and where the next journal continues."""

    world: World
    clock: float
    head: str | None
    length: int
    written: datetime | None = None
    """When the last line was written, by the clock of who wrote it."""
    branches: frozenset[str] = frozenset()
    """Why the lineage was turned to older checkpoints, each time training has gone on from there."""


def is_journaled(event: Event) -> bool:
    """Heartbeats, copies in memory and the passing of time are not history."""
    return not isinstance(
        event, NodeHeard | NodeReported | SnapshotTaken | CopiesKept | CopiesAlone | SnapshotDropped | Ticked
    )


def replay(directory: Path, see: Callable[[float, Event], None] = lambda at, event: None) -> Replayed:
    """Rebuild the world from the newest lineage; `see` is told of each event, and when it was on the run clock.

    Raises:
        DamagedError: a line inside the lineage is not what was written; the message names file and line.
        OSError: the file system does not give a journal out; another try, or another node, may have more luck.
    """
    world, clock, length, written = World(), 0.0, 0, None
    branches: set[str] = set()
    branch = ""
    head: str | None = None
    for path, end in _lineage(directory):
        data = _lines(path, end)
        head, length = path.name, len(data)
        for number, record in _records(path, data):
            clock, written, event = record.at, record.wall, record.event
            try:
                world = apply(world, event, clock)
                see(clock, event)
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(path, number, error) from error
            if isinstance(event, TermBegan | CheckpointsFound):
                branch = event.branch if isinstance(event, CheckpointsFound) else ""
            if branch and world.turned_from is None:
                branches.add(branch)
    return Replayed(world, clock, head, length, written, frozenset(branches))


@dataclass(frozen=True, slots=True)
class Record:
    """An event, and when the leader saw it."""

    at: float
    """On the run clock, in seconds."""
    wall: datetime
    """By the leader's clock, UTC."""
    event: Event


def records(directory: Path) -> Iterator[Record]:
    """The events of the newest lineage, in the order in which they were seen. Raises as `replay`."""
    for path, end in _lineage(directory):
        for _, record in _records(path, _lines(path, end)):
            yield record


def _lineage(directory: Path) -> list[tuple[Path, int | None]]:
    """The journals that count, the first one first, and how many bytes of each do; None: all whole lines."""
    chain: list[tuple[Path, int | None]] = []
    paths = sorted(directory.glob("term-*.jsonl"))
    current = next((path for path in reversed(paths) if _opening(path) is not None), None)
    limit: int | None = None
    while current is not None:
        chain.append((current, limit))
        opening = _opening(current)
        if opening is None or opening.predecessor is None:
            break
        limit = opening.replayed
        current = directory / opening.predecessor
    return chain[::-1]


def _lines(path: Path, end: int | None) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1] if end is None else data[:end]


def _records(path: Path, data: bytes) -> Iterator[tuple[int, Record]]:
    """With the number of each line; the first one is no record."""
    for number, line in enumerate(data.splitlines()[1:], start=2):
        try:
            record = orjson.loads(line)
            at, wall = float(record["at"]), datetime.fromisoformat(record["wall"]).astimezone(UTC)
            event = wire.decode_event(record["event"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, number, error) from error
        yield number, Record(at, wall, event)


@dataclass(frozen=True, slots=True)
class _Opening:
    """The first line of a journal."""

    predecessor: str | None
    replayed: int
    term: int
    format: int


def _opening(path: Path) -> _Opening | None:
    """None if the writer died before its first line was complete: nothing followed from it then."""
    try:
        with path.open("rb") as file:
            line = file.readline()
        if not line.endswith(b"\n"):
            return None
        opening = _Opening(**orjson.loads(line))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise _damaged(path, 1, error) from error
    if opening.format != FORMAT:
        raise _damaged(path, 1, f"it has format {opening.format}, this version of hpcft reads {FORMAT}")
    return opening


def _damaged(path: Path, number: int, what: object) -> DamagedError:
    return DamagedError(
        f"the journal {path}, line {number}, cannot be read: {what}",
        "restore the file, or start a new run under another run.name from a checkpoint",
    )


class Journal:
    """The writing end. One thread appends; `failed` holds the reason as long as the disk refuses."""

    def __init__(
        self, directory: Path, term: Term, generation: Generation, incarnation: Incarnation, after: Replayed
    ) -> None:
        self.failed: str | None = None
        """Why the newest events are not in the journal; None when they are, or are on their way."""
        self._pen = _Pen(directory / f"term-{term:06}-g{generation:04}-{incarnation}.jsonl", term, after)
        self._queue: queue.SimpleQueue[tuple[bytes, asyncio.Future[None] | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="hpcft-journal", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._held: dict[NodeId, tuple[float, Progressed]] = {}
        self._early: dict[NodeId, tuple[Generation, int]] = {}
        self._progress_at = float("-inf")
        self._measured: tuple[float, CopiesMeasured] | None = None
        self._thread.start()

    @property
    def path(self) -> Path:
        """The file that is written at present."""
        return self._pen.path

    def append(self, event: Event, at: float) -> None:
        """Queue the event.

        Of each node's progress only the latest is kept until something else happens, or for a while: every decision is
        replayed on the steps on which it was made. For as long is gathered what copies in memory took.
        """
        if not is_journaled(event):
            return
        if isinstance(event, CopiesMeasured):
            earlier = self._measured[1].copies if self._measured is not None else ()
            self._measured = at, CopiesMeasured(event.generation, (*earlier, *event.copies))
            if len(self._measured[1].copies) >= MEASURED_COPIES:
                self._write_held()
            return
        if isinstance(event, Progressed):
            self._held[event.node] = (at, event)
            generation, written = self._early.get(event.node, (event.generation, 0))
            written = written + 1 if generation == event.generation else 1
            self._early[event.node] = (event.generation, written)
            pause = max(PROGRESS_SECONDS, len(self._early) / PROGRESS_LINES_PER_SECOND)
            if written > EARLY_PROGRESS and at < self._progress_at + pause:
                return
            self._progress_at = at
            self._write_held()
            return
        self._write_held()
        self._put(event, at)

    def _write_held(self) -> None:
        for at, event in sorted(self._held.values(), key=lambda held: held[0]):
            self._put(event, at)
        self._held.clear()
        if self._measured is not None:
            at, measured = self._measured
            self._measured = None
            self._put(measured, at)

    def _put(self, event: Event, at: float) -> None:
        record = {
            "at": round(at, 3),
            "wall": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": wire.encode(event),
        }
        self._queue.put((orjson.dumps(record) + b"\n", None))

    async def sync(self) -> None:
        """Returns when all that was appended is on disk; raises OSError if it cannot be."""
        self._write_held()
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((b"", done))
        await done

    def close(self) -> None:
        """Let the thread end after what is queued; does not wait for a stuck disk."""
        self._queue.put(None)

    def _write(self) -> None:
        pen = self._pen
        pause = RETRY_SECONDS
        self._attempt(pen.write)
        tried = time.monotonic()
        while True:
            item: tuple[bytes, asyncio.Future[None] | None] | None = (b"", None)
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(
                    timeout=max(0.0, tried + pause - time.monotonic()) if self.failed is not None else None
                )
            if item is None:
                break
            data, done = item
            if data:
                pen.add(data)
            if self.failed is not None and done is None and time.monotonic() < tried + pause:
                continue
            again = self.failed is not None
            self._attempt(pen.sync if done is not None or pen.kept > UNSYNCED_BYTES else pen.write)
            tried = time.monotonic()
            pause = min(2 * pause, RETRY_MAX_SECONDS) if again else RETRY_SECONDS
            if done is not None:
                self._loop.call_soon_threadsafe(_settle, done, self.failed)
        if self.failed is not None:
            self._attempt(pen.write)
        pen.close()

    def _attempt(self, action: Callable[[], None]) -> None:
        """What is not written now is kept; the log says when that begins and when it is over."""
        try:
            action()
        except OSError as error:
            reason = f"{self.path.name}: {error.strerror}"
            if reason != self.failed:
                log.error("the journal cannot be written, and is tried again: %s", reason)
            self.failed = reason
        else:
            if self.failed is not None:
                log.warning("the journal is written again, nothing is missing in it: %s", self.path.name)
            self.failed = None


class _Pen:
    """The thread's side of a journal: the file at hand, and the records that are not certainly on disk."""

    def __init__(self, path: Path, term: Term, after: Replayed) -> None:
        self.path = path
        self.kept = 0
        """Bytes of the records in memory."""
        self._first = path
        self._files = 0
        self._term = term
        self._predecessor = (after.head, after.length)
        self._records: deque[bytes] = deque()
        self._written = 0
        """So many of the records are in the file, unsynced."""
        self._fd = -1
        self._length = 0
        """Bytes of the file, whole records only."""
        self._synced = 0
        """Bytes of it that are certain."""
        self._overrun = False

    def add(self, record: bytes) -> None:
        if self.kept + len(record) > BACKLOG_BYTES:
            self._overrun = True  # a journal with a gap would lie: it ends before the gap
        if not self._overrun:
            self._records.append(record)
            self.kept += len(record)

    def write(self) -> None:
        """Raises OSError; then the records stay here, and calling again goes on."""
        if self._fd < 0:
            self._open()
        if self._length == 0:
            opening = _Opening(*self._predecessor, self._term, FORMAT)
            self._put(orjson.dumps(opening) + b"\n")
        while self._written < len(self._records):
            self._put(self._records[self._written])
            self._written += 1
        if self._overrun:
            raise OSError(errno.ENOBUFS, "it could not be written for so long that events had to be dropped")

    def sync(self) -> None:
        """`write`, and make it durable."""
        self.write()
        try:
            os.fsync(self._fd)
        except OSError:
            self._abandon()
            raise
        self._synced = self._length
        self._records.clear()
        self._written = self.kept = 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _open(self) -> None:
        # "_" sorts after ".": the successor of a file is a head before it
        name = f"{self._first.stem}_{self._files:03}.jsonl" if self._files else self._first.name
        path = self._first.with_name(name)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            self._files += 1
            raise
        self._files += 1
        self.path = path
        try:
            durable.sync_directory(path.parent)
        except OSError:
            self._abandon()
            raise

    def _put(self, record: bytes) -> None:
        rest = record
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            if error.errno not in _FULL or not self._cut():
                self._abandon()
            raise
        self._length += len(record)

    def _cut(self) -> bool:
        """Take back what a short write has left, so that no torn line comes to lie in the middle."""
        try:
            os.ftruncate(self._fd, self._length)
        except OSError:
            return False
        return True

    def _abandon(self) -> None:
        """Leave this file: what of its unsynced part the disk has is not known."""
        if self._synced:
            self._predecessor = (self.path.name, self._synced)
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1
        self._length = self._synced = self._written = 0


def _settle(done: asyncio.Future[None], failed: str | None) -> None:
    if done.done():
        return
    if failed is None:
        done.set_result(None)
    else:
        done.set_exception(OSError(failed))
