"""Copies on their way to the file system: by which way, how fast, and when one is given up.

Which way of writing is faster here, through the page cache or around it, is measured on the saves themselves. A node's
writers share its bandwidth (`checkpoint.max_bandwidth`): each rank of its own has an equal part, and a guest's copy
waits until one of these is free.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hpcft.carriers import JobFailed
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.copies import Copy, Share, Slot

TRIED_ANEW = 32
"""After so many saves the slower way of writing gets another chance."""
TELLING_BYTES = 32 << 20
"""Of smaller files the time says nothing about the way they were written."""
STUCK_SECONDS = 600.0
"""A file system that takes no byte for so long is not waited for: the save has failed. (The last sync is one word.)"""


@dataclass(frozen=True, slots=True)
class Ways:
    """What the latest saves say of the two ways to write, in bytes per second."""

    direct: tuple[float, ...] = ()
    buffered: tuple[float, ...] = ()
    saves: int = 0

    def goes_direct(self, size: int) -> bool:
        """Around the page cache? Each way is tried first, then the faster one is taken."""
        if size < TELLING_BYTES:
            return False
        if not self.direct or not self.buffered:
            return not self.direct
        faster = median(self.direct) > median(self.buffered)
        return faster != (self.saves % TRIED_ANEW == 0)

    def seen(self, direct: bool, size: int, seconds: float) -> Ways:
        """A save has gone this way. One that has failed on it has taken for ever (inf)."""
        if size < TELLING_BYTES or seconds <= 0:
            return self
        rate = size / seconds
        if direct:
            return replace(self, direct=(*self.direct, rate)[-3:], saves=self.saves + 1)
        return replace(self, buffered=(*self.buffered, rate)[-3:], saves=self.saves + 1)


class Bandwidth:
    """Bytes per second that may be written, divided among those who write at a time."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._granted: list[float] = []
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def part(self, parts: int) -> AsyncIterator[float | None]:
        """One of so many parts, as soon as it is free; None: as much as there is."""
        if self._limit is None:
            yield None
            return
        limit, part = self._limit * (1 + 1e-9), self._limit / max(1, parts)
        while sum(self._granted) + part > limit:
            self._changed.clear()
            await self._changed.wait()
        self._granted.append(part)
        try:
            yield part
        finally:
            self._granted.remove(part)
            self._changed.set()


class Written(NamedTuple):
    """What a carrier says of a copy that it has written."""

    report: dict[str, Any]
    """On the rank's part of the checkpoint."""
    digest: str
    """Of what has reached the file; it must be the copy's, as it was sealed."""


class Writing:
    """Of one node."""

    def __init__(self, root: Path, bandwidth: float | None) -> None:
        """`root`: the directory of the checkpoints; `bandwidth`: bytes per second, None for as many as there are."""
        self._root = root
        self._bandwidth = Bandwidth(bandwidth)
        self._ways = Ways()

    async def write(self, share: Share, slot: Slot, copy: Copy, writers: int) -> Written:
        """Write a copy. `writers`: among so many is the bandwidth divided. JobFailed: nothing of it counts."""
        async with self._bandwidth.part(writers) as rate:
            copy.written, copy.since = 0, time.monotonic()
            copy.heard_at = copy.since
            message, size = copy.label.message, copy.label.size
            direct = self._ways.goes_direct(size)
            job = {
                "do": "write",
                "root": str(self._root),
                "name": checkpoint_name(copy.label.step, copy.label.generation),
                "nonce": copy.nonce,
                "direct": direct,
                "bandwidth": rate,
                "position": message["position"],
                "versions": message["versions"],
                "metrics": message["metrics"],
                "ledger": message["ledger"],
            }

            def told(written: int) -> None:
                copy.written, copy.heard_at = written, time.monotonic()

            fds = [slot.fd, *copy.files]
            try:
                done, _ = await share.disk.carry(job, fds, told, STUCK_SECONDS)
            except JobFailed:
                copy.written = 0
                self._ways = self._ways.seen(direct, size, math.inf)
                raise
        copy.written = size
        self._ways = self._ways.seen(direct, size, done["seconds"] if done["direct"] == direct else math.inf)
        return Written(done["report"], done["digest"])
