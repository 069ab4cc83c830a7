"""A data set out of JSON Lines files: one record per line, in any number of shards.

Theory of operation
-------------------
One pass over the shards notes where each line starts; after that a record is one `pread` of known length and one
parse, from any process: reading moves no shared file offset and holds no lock, so loader processes may be forked at
any time. Blank lines are no records. The numbers of the records follow the shards in the order of their names (or
the order in which they are given), which is what makes an order of samples mean the same in every start of a run.

The pass runs at the speed of memory where the files are in the page cache. For large data on a shared file system
`cache` names a directory for what it found, one file for each shard; a shard whose size or time of change differs is
gone through again, and so is one of which what was noted has been damaged since. The noted starts are then mapped from
there, once for all processes of a node.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from hpcft import durable
from hpcft.errors import ExitCode, HpcftError, UnusableError, UsageError

Starts: TypeAlias = NDArray[np.int64]

_SCANNED_BYTES = 32 * 1024 * 1024
_OPEN_SHARDS = 64
_DIGEST_BYTES = 32
_NEWLINE = 10
_SPACE = 32


class RecordError(HpcftError):
    """A line that is no record: `path`, and its number `line` from 1."""

    exit_code = ExitCode.USER_CODE

    def __init__(self, message: str, hint: str = "", path: Path | None = None, line: int = 0) -> None:
        super().__init__(message, hint)
        self.path = path
        self.line = line


class JsonLines:
    """Records of JSON Lines files by number: `len(lines)`, `lines[i]`."""

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """`source`: a directory (all its `*.jsonl`), one file, or several files.

        UsageError: there are no such files, or none of them can be read.
        """
        self.shards = _shards(source)
        directory = Path(cache) if cache is not None else None
        self._starts: list[Starts] = []
        self._sizes: list[int] = []
        for path in self.shards:
            starts, size = _indexed(path, directory)
            self._starts.append(starts)
            self._sizes.append(size)
        self._first = np.cumsum([0, *map(len, self._starts)])
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(_Shard)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Any:
        """The parsed record. IndexError; RecordError: it is not JSON, or its file has changed since."""
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"there is no record {index} among {len(self)}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        starts = self._starts[shard]
        place = index - int(self._first[shard])
        start = int(starts[place])
        end = int(starts[place + 1]) if place + 1 < len(starts) else self._sizes[shard]
        line = self._open(self.shards[shard]).read(start, end - start)
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise self._explained(shard, start, line, end - start, error) from error

    def _explained(self, shard: int, start: int, line: bytes, length: int, error: ValueError) -> RecordError:
        path = self.shards[shard]
        if len(line) < length or path.stat().st_size != self._sizes[shard]:
            return RecordError(
                f"{path} has changed since it was indexed: {self._sizes[shard]} bytes then, {path.stat().st_size} now",
                "data must not change during a run; the order of samples would mean other samples",
                path,
            )
        number = 1 + _count_newlines(path, start)
        shown = line[:60].decode("utf-8", "replace").rstrip()
        return RecordError(
            f"{path}:{number}: not a JSON record: {error}: {shown!r}", "every line must be one JSON value", path, number
        )


class _Shard:
    """A file that is read by position, and closed with the last reference to it."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, length: int) -> bytes:
        content = os.pread(self._fd, length, start)
        while len(content) < length and (more := os.pread(self._fd, length - len(content), start + len(content))):
            content += more
        return content

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _shards(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    if not isinstance(source, str | os.PathLike):
        shards = tuple(Path(each) for each in source)
        named = "the list of shards"
    elif (path := Path(source)).is_dir():
        shards = tuple(sorted(path.glob("*.jsonl")))
        named = f"the directory {path}"
    else:
        shards, named = (path,), str(path)
    if not shards:
        raise UsageError(f"{named} holds no *.jsonl file", "name a directory of JSON Lines shards, or the files")
    if missing := [str(shard) for shard in shards if not shard.is_file()]:
        raise UsageError(f"there is no file {missing[0]}", "name a directory of JSON Lines shards, or the files")
    return shards


def _indexed(path: Path, cache: Path | None) -> tuple[Starts, int]:
    """Where the records of a shard start, and its size."""
    stat = path.stat()
    if cache is None:
        return _scanned(path, stat.st_size), stat.st_size
    name = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    kept = cache / f"{name}.npy"
    starts = kept_starts(kept)
    if starts is None:
        cache.mkdir(parents=True, exist_ok=True)
        keep_starts(kept, _scanned(path, stat.st_size))
        starts = kept_starts(kept)
    if starts is None:
        raise UnusableError(f"{kept} is not what was just written", f"is the disk of {cache} in order?")
    return starts, stat.st_size


def keep_starts(path: Path, starts: Starts) -> None:
    """With their digest at the end, which numpy does not look at."""
    content = io.BytesIO()
    np.save(content, starts, allow_pickle=False)
    content.write(durable.digest(content.getbuffer()).encode())
    durable.replace(path, content.getbuffer())


def kept_starts(path: Path) -> Starts | None:
    """Mapped, once for all processes of a node. None: there is nothing, or it is not what was written."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except (FileNotFoundError, ValueError):  # or empty
        return None
    if durable.digest(content[:-_DIGEST_BYTES].data) != content[-_DIGEST_BYTES:].tobytes().decode("ascii", "replace"):
        return None
    starts: Starts = np.load(path, mmap_mode="r", allow_pickle=False)
    return starts


def _scanned(path: Path, size: int) -> Starts:
    """The start of every line that is not blank."""
    if size == 0:
        return np.zeros(0, dtype=np.int64)
    content = np.memmap(path, dtype=np.uint8, mode="r", shape=(size,))
    newlines = (
        np.flatnonzero(content[offset : offset + _SCANNED_BYTES] == _NEWLINE) + offset
        for offset in range(0, size, _SCANNED_BYTES)
    )
    starts = np.concatenate([np.zeros(1, dtype=np.int64), *(found + 1 for found in newlines)])
    starts = starts[starts < size]
    ends = np.append(starts[1:], size)
    candidates = np.flatnonzero(content[starts] <= _SPACE)  # a blank line starts with white space, few others do
    blank = [i for i in candidates if not content[starts[i] : ends[i]].tobytes().strip()]
    return np.delete(starts, blank)


def _count_newlines(path: Path, end: int) -> int:
    count = 0
    with path.open("rb") as file:
        while end > 0 and (piece := file.read(min(end, _SCANNED_BYTES))):
            count += piece.count(b"\n")
            end -= len(piece)
    return count
