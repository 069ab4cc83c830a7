"""What workers and agents have written, for `hpcft logs`.

`logs/<node>/` has `agent.log`, and `g0007-rank0003.log` for each rank of each generation, with older parts as `.1`,
`.2` and so on. A *stream* is what one agent, or one rank over all generations, has written; its files in order are
its text. Following works by looking again and again, since no notification crosses a network file system: files that
appear are taken up, and a file that was rotated meanwhile is read to its end first, known by its inode.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from hpcft.errors import NotFoundError
from hpcft.rundir import RunDirectory

_WORKER = re.compile(r"g(\d+)-rank(\d+)\.log(?:\.(\d+))?")
_AGENT = re.compile(r"(?:agent|keeper)\.log(?:\.(\d+))?")
_BLOCK = 1 << 16
_LOOK_SECONDS = 0.3


@dataclass(frozen=True, slots=True, order=True)
class LogFile:
    """Sorted as it was written: by generation, then the older part first."""

    node: str
    rank: int
    """-1: the agent's."""
    generation: int
    age: int
    """Negative number of rotations: 0 is the file that is written now."""
    path: Path

    @property
    def stream(self) -> tuple[int, str]:
        """Ranks keep their stream when they move to another node."""
        return (self.rank, "" if self.rank >= 0 else f"{self.node}/{self.path.name.partition('.')[0]}")

    @property
    def name(self) -> str:
        return f"{self.node}/{self.path.name}"


@dataclass(frozen=True, slots=True)
class Line:
    file: LogFile
    content: str
    first: bool
    """The line before it came from another file."""

    def text(self) -> str:
        return f"==> {self.file.name} <==\n{self.content}" if self.first else self.content

    def as_dict(self) -> dict[str, Any]:
        worker = self.file.rank >= 0
        return {
            "node": self.file.node,
            "rank": self.file.rank if worker else None,
            "generation": self.file.generation if worker else None,
            "line": self.content,
        }


def read(
    run: RunDirectory, *, rank: int | None = None, node: str | None = None, lines: int = 20, follow: bool = False
) -> Iterator[Line]:
    """The last `lines` of every stream that is asked for, and then, if it is to be followed, what comes.

    Without a rank: the agents, and the workers of the newest generation. Of a rank of the world that has written
    nothing there is no log, and no line.

    Raises:
        NotFoundError: there is no such log; the message names those that there are.
    """
    files = _select(run, rank, node)
    if not files and not follow:
        if rank is not None and _is_in_world(run, rank, node):
            return
        raise _nothing(run, rank, node)
    # opened before the tails are read: what is written in between is seen by one of the two
    followed = _Followed.open_all(files) if follow else {}
    ends = {each.file: each.start for each in followed.values()}
    streams: dict[tuple[int, str], list[LogFile]] = {}
    for file in files:
        streams.setdefault(file.stream, []).append(file)
    shown: LogFile | None = None
    for stream in sorted(streams):
        for file, content in _last_lines(sorted(streams[stream], key=_written), lines, ends):
            yield Line(file, content, file != shown)
            shown = file
    if follow:
        for file, content in _follow(followed, lambda: _select(run, rank, node)):
            yield Line(file, content, file != shown)
            shown = file


def _written(file: LogFile) -> tuple[int, int]:
    return file.generation, file.age


def _select(run: RunDirectory, rank: int | None, node: str | None) -> list[LogFile]:
    found = [file for file in _all(run) if node is None or file.node == node]
    if rank is not None:
        return [file for file in found if file.rank == rank]
    newest = max((file.generation for file in found), default=0)
    return [file for file in found if file.rank < 0 or file.generation == newest]


def _all(run: RunDirectory) -> Iterator[LogFile]:
    with suppress(FileNotFoundError):
        for directory in (run.path / "logs").iterdir():
            names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
            for path in (directory / name for name in names):
                if path.name.startswith("keeper.log") and "agent.log" in names:
                    continue  # a local cluster's counterpart of the job's output: it has the agent's lines again
                if found := _WORKER.fullmatch(path.name):
                    yield LogFile(directory.name, int(found[2]), int(found[1]), -int(found[3] or 0), path)
                elif found := _AGENT.fullmatch(path.name):
                    yield LogFile(directory.name, -1, 0, -int(found[1] or 0), path)


def _is_in_world(run: RunDirectory, rank: int, node: str | None) -> bool:
    try:
        workers = orjson.loads(run.status.read_bytes())["workers"]
    except (OSError, ValueError, KeyError):
        return False
    return any(each["rank"] == rank and node in (None, each["node"]) for each in workers)


def _nothing(run: RunDirectory, rank: int | None, node: str | None) -> NotFoundError:
    known = list(_all(run))
    if not known:
        return NotFoundError(f"the run {run.name} has no logs yet", "`hpcft logs --follow` waits for them")
    nodes = ", ".join(sorted({file.node for file in known}))
    ranks = ", ".join(str(number) for number in sorted({file.rank for file in known if file.rank >= 0})) or "none"
    wanted = " ".join(
        [*([f"of rank {rank}"] if rank is not None else []), *([f"on node {node!r}"] if node is not None else [])]
    )
    return NotFoundError(f"the run {run.name} has no log {wanted}", f"there are nodes {nodes} and ranks {ranks}")


def _last_lines(files: list[LogFile], count: int, ends: Mapping[LogFile, int]) -> list[tuple[LogFile, str]]:
    """Of the text that `files` make together, each up to its place in `ends` if it has one."""
    gathered: list[tuple[LogFile, str]] = []
    for file in reversed(files):
        missing = count - len(gathered)
        if missing <= 0:
            break
        with suppress(FileNotFoundError):  # rotated away meanwhile
            gathered[:0] = [(file, line) for line in _tail(file.path, missing, ends.get(file))]
    return gathered


def _tail(path: Path, count: int, end: int | None) -> list[str]:
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END) if end is None else end
        text = b""
        while position and text.count(b"\n") <= count:
            size = min(_BLOCK, position)
            position -= size
            file.seek(position)
            text = file.read(size) + text
    lines = text.split(b"\n")  # not splitlines: to a progress bar, "\r" ends no line
    if not lines[-1]:
        lines.pop()
    return [_decoded(line) for line in lines[-count:]]


def _decoded(line: bytes) -> str:
    return line.decode(errors="replace")


@dataclass(slots=True)
class _Followed:
    """An open log file, known by its inode, and the line that is not complete yet."""

    file: LogFile
    fd: int
    start: int
    part: bytes = b""

    @classmethod
    def open(cls, file: LogFile, *, at_end: bool) -> tuple[int, _Followed] | None:
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        start = os.lseek(fd, 0, os.SEEK_END) if at_end else 0
        return os.fstat(fd).st_ino, cls(file, fd, start)

    @classmethod
    def open_all(cls, files: list[LogFile]) -> dict[int, _Followed]:
        return dict(opened for file in files if (opened := cls.open(file, at_end=True)))

    def lines(self) -> Iterator[tuple[LogFile, str]]:
        """What was added since the last call."""
        while block := os.read(self.fd, _BLOCK):
            *complete, self.part = (self.part + block).split(b"\n")
            for line in complete:
                yield self.file, _decoded(line)

    def close(self) -> Iterator[tuple[LogFile, str]]:
        """The rest."""
        yield from self.lines()
        if self.part:
            yield self.file, _decoded(self.part)
        os.close(self.fd)


def _follow(followed: dict[int, _Followed], select: Callable[[], list[LogFile]]) -> Iterator[tuple[LogFile, str]]:
    """For ever: new lines of the files that `select` names; new ones from their beginning."""
    try:
        while True:
            for each in sorted(followed.values(), key=lambda each: each.file):
                yield from each.lines()
            time.sleep(_LOOK_SECONDS)
            there: set[int] = set()
            for file in select():
                with suppress(FileNotFoundError):
                    inode = file.path.stat().st_ino
                    there.add(inode)
                    if inode not in followed and (opened := _Followed.open(file, at_end=False)):
                        there.add(opened[0])
                        if followed.setdefault(*opened) is not opened[1]:  # rotated between the two looks
                            os.close(opened[1].fd)
            for inode in followed.keys() - there:
                yield from followed.pop(inode).close()
    finally:
        for each in followed.values():
            os.close(each.fd)
