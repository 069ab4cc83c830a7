"""JSON Lines in an object store, as a data set: `S3JsonLines`.

One pass over the objects notes where each line starts, as for files (`jsonl`); one process of a node makes it, the
others wait, and it is kept. After that a record is a few bytes out of one block (`blocks`), or of two.

The objects are those that were listed when the data set was opened: a read names their ETag, so a changed object is an
error and never another sample. `fingerprint` is the listing's digest; `Data` keeps it with the position, so that a
restart with other objects is one, too.
"""

from __future__ import annotations

import fcntl
import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from hpcft import durable
from hpcft.data.blocks import BLOCK_BYTES, MAKE_ROOM, Blocks, ChangedError, RemoteFile, listed, unusable
from hpcft.data.jsonl import RecordError, Starts, keep_starts, kept_starts
from hpcft.errors import UsageError
from hpcft.places import Place, flaw_of_endpoint, flaw_of_url
from hpcft.units import parse_size

_AHEAD_BLOCKS = 16
"""In the pass over all objects."""


class S3JsonLines:
    """Records of JSON Lines objects by number: `len(lines)`, `lines[i]`."""

    def __init__(
        self,
        url: str,
        *,
        cache: str | os.PathLike[str],
        cache_size: str,
        endpoint: str = "",
        region: str = "",
    ) -> None:
        """`url`: `s3://bucket/prefix/*.jsonl`, or a prefix that ends with a slash (all its `*.jsonl`).

        `cache`: a directory of the node, shared by its processes. Its blocks are kept below `cache_size` ("200GiB", no
        less than 256 MiB), but for what is being fetched: 32 MiB for each process that trains. Credentials come from
        the environment (docs/object-storage.md).

        UsageError: no such objects, no such address, no room. UnusableError: the store cannot be listed.
        """
        if flaw := flaw_of_url(url) or (endpoint and flaw_of_endpoint(endpoint)):
            raise UsageError(f"the address of the data {flaw}")
        base, _, pattern = url.rpartition("/")
        if base.count("/") < 2:
            raise UsageError(f"{url} names no objects", "s3://bucket/prefix/*.jsonl")
        place = Place(base, endpoint, region)
        pattern = pattern or "*.jsonl"
        self.files = [each for each in listed(place, "") if fnmatch.fnmatchcase(each.key, pattern)]
        if not self.files:
            raise UsageError(f"there is no object {base}/{pattern}", "s3://bucket/prefix/*.jsonl names several")
        self._url = base
        try:
            limit = parse_size(cache_size)
        except ValueError as error:
            raise UsageError(f"cache_size: {error}") from None
        directory = Path(cache)
        self._blocks = Blocks(place, self.files, directory, limit)
        try:
            self._starts = [self._indexed(number, directory / "index") for number in range(len(self.files))]
        except BaseException:
            self.close()
            raise
        self._first = np.cumsum([0, *map(len, self._starts)])

    @property
    def fingerprint(self) -> str:
        """Another one for other objects, or other content."""
        return durable.digest("".join(each.label for each in self.files).encode())

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Any:
        """The parsed record.

        IndexError; RecordError: it is not JSON; ChangedError: its object has changed; OSError: the store, or the cache.
        """
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"there is no record {index} among {len(self)}")
        number, start, end = self._span(index)
        line = self._blocks.read(number, start, end)
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError as error:
            place = int(np.searchsorted(self._starts[number], start))
            shown = line[:60].decode("utf-8", "replace").rstrip()
            raise RecordError(
                f"{self._url}/{self.files[number].key}, record {place}: not a JSON record: {error}: {shown!r}",
                "every line must be one JSON value",
            ) from error

    def expect(self, indices: Iterable[int]) -> None:
        """These records will be read soon: what is not in the cache is fetched meanwhile. Returns at once."""
        wanted = {
            (number, block)
            for number, start, end in map(self._span, indices)
            for block in self.files[number].blocks(start, end)
        }
        self._blocks.expect(sorted(wanted))

    def close(self) -> None:
        """End the process that fetches."""
        self._blocks.close()

    def _span(self, index: int) -> tuple[int, int, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        starts = self._starts[number]
        place = index - int(self._first[number])
        end = int(starts[place + 1]) if place + 1 < len(starts) else self.files[number].size
        return number, int(starts[place]), end

    def _indexed(self, number: int, directory: Path) -> Starts:
        kept = directory / f"{self.files[number].label}.npy"
        starts = kept_starts(kept)
        if starts is None:
            with kept.with_suffix(".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                starts = kept_starts(kept)
                if starts is None:
                    starts = self._scanned(number)
                    try:
                        keep_starts(kept, starts)
                    except OSError as error:
                        raise UsageError(unusable(directory.parent, error), MAKE_ROOM) from error
        return starts

    def _scanned(self, number: int) -> Starts:
        """The start of every line that is not blank."""
        starts: list[int] = []
        begin, blank = 0, True
        for offset, content in self._content(number):
            at = 0
            while (found := content.find(b"\n", at)) >= 0:
                if not blank or content[at:found].strip():
                    starts.append(begin)
                begin, blank, at = offset + found + 1, True, found + 1
            blank = blank and not content[at:].strip()
        if not blank:
            starts.append(begin)
        return np.array(starts, dtype=np.int64)

    def _content(self, number: int) -> Iterator[tuple[int, bytes]]:
        size = self.files[number].size
        last = -(-size // BLOCK_BYTES)
        for block in range(last):
            if block % _AHEAD_BLOCKS == 0:
                self._blocks.expect([(number, each) for each in range(block, min(block + 2 * _AHEAD_BLOCKS, last))])
            start = block * BLOCK_BYTES
            yield start, self._blocks.read(number, start, min(start + BLOCK_BYTES, size))


__all__ = ["ChangedError", "RemoteFile", "S3JsonLines"]
