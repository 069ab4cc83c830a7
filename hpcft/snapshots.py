"""A node's snapshots: the arenas of its ranks, and what becomes of the copies in them.

Theory of operation
-------------------
Each local rank has a few arenas (`slots`), made when its worker says how large its share is, and kept for the workers
that follow. The worker copies into a free one and says so; from then on the copy is this module's, whether or not
the worker lives on: a carrier writes it to the checkpoint directory, the report goes to the leader, and the worker may
use the slot again. So a file system that hangs costs free slots, and nothing else.

A copy is written for the generation that made it. When the next one begins, what is still being written of the last
one is given up.

Which way of writing is faster here, through the page cache or around it, is measured on the saves themselves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from hpcft.carriers import Carrier, JobFailed
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.events import Formation, SaveReport
from hpcft.ids import Rank, Step
from hpcft.memory import headroom
from hpcft.units import human_size

log = logging.getLogger("hpcft.snapshots")

MARGIN = 0.05
"""Share of what is free that is left to others."""
MARGIN_BYTES = 128 << 20
TRIED_ANEW = 32
"""After so many saves the slower way of writing gets another chance."""
TELLING_BYTES = 32 << 20
"""Of smaller files the time says nothing about the way they were written."""


@dataclass(frozen=True, slots=True)
class SaveSettings:
    root: Path
    """The directory of the checkpoints."""
    memory: int | None
    """Bytes that the arenas of this node may take; None: as much as there is."""
    slots: int
    """Arenas of each rank."""
    bandwidth: float | None
    """Bytes per second that this node may write; None: as many as it can."""


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
        faster = median(self.direct) >= median(self.buffered)
        return faster != (self.saves % TRIED_ANEW == 0)

    def seen(self, direct: bool, size: int, seconds: float) -> Ways:
        if size < TELLING_BYTES or seconds <= 0:
            return self
        rate = size / seconds
        if direct:
            return replace(self, direct=(*self.direct, rate)[-3:], saves=self.saves + 1)
        return replace(self, buffered=(*self.buffered, rate)[-3:], saves=self.saves + 1)


@dataclass(slots=True)
class _Slot:
    fd: int
    step: Step | None = None
    """Of the copy in it that is being written."""
    since: float = 0.0
    written: int = 0
    heard_at: float = 0.0


@dataclass(slots=True)
class _Share:
    """One local rank: the carrier and the arenas stay, the worker changes."""

    carrier: Carrier = field(default_factory=Carrier)
    worker: str = ""
    rank: Rank = Rank(0)
    size: int = 0
    slots: list[_Slot] = field(default_factory=list)
    plan: int | None = None
    """Memory file with what the copies of this worker are."""
    refused: str = ""

    @property
    def bytes(self) -> int:
        return self.size * len(self.slots)

    def drop_arenas(self) -> None:
        for slot in self.slots:
            os.close(slot.fd)
        self.slots, self.size = [], 0


Answer = Callable[[str, Mapping[str, Any], Sequence[int]], None]
"""Tells a worker something; the descriptors stay the caller's."""
Tell = Callable[[Rank, Mapping[str, Any]], None]
"""Tells the leader what became of a rank's save: `{"shard": …}` or `{"save_failed": …}`."""
Run = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class Snapshots:
    """Of one node, for all its generations."""

    def __init__(self, settings: SaveSettings, answer: Answer, run: Run) -> None:
        self._settings = settings
        self._answer = answer
        self._run = run
        self._shares: dict[int, _Share] = {}
        self._formation: Formation | None = None
        self._tell: Tell = lambda rank, message: None
        self._writing: set[asyncio.Task[None]] = set()
        self._promised = 0
        """Bytes of arenas that are being made."""
        self._ways = Ways()

    def begin(self, formation: Formation, workers: Mapping[int, tuple[str, Rank]], tell: Tell) -> None:
        """A generation begins with these workers, by their number on this node."""
        for task in self._writing:
            task.cancel()
        self._formation, self._tell = formation, tell
        for number in [known for known in self._shares if known not in workers]:
            self._end_share(self._shares.pop(number))
        for number, (worker, rank) in workers.items():
            share = self._shares.setdefault(number, _Share())
            share.worker, share.rank, share.refused = worker, rank, ""
            for slot in share.slots:
                slot.step = None

    def _end_share(self, share: _Share) -> None:
        share.carrier.leave_behind()
        share.drop_arenas()
        if share.plan is not None:
            os.close(share.plan)

    def end(self) -> None:
        """Give everything back."""
        for share in self._shares.values():
            self._end_share(share)
        self._shares.clear()

    # --- what workers say ---

    def asked(self, number: int, size: int, plan: int) -> None:
        """The worker needs arenas of `size` bytes, for copies that are what the memory file `plan` says."""
        share = self._shares[number]
        if share.plan is not None:
            os.close(share.plan)
        share.plan = plan
        self._track(self._run(self._provide(share, size), f"reserve-{number}"))

    async def _provide(self, share: _Share, size: int) -> None:
        if share.size < size or not share.slots:
            share.drop_arenas()
            count, share.refused = self._affordable(share.rank, size)
            if not count:
                log.warning("no snapshots on this node: %s", share.refused)
                self._answer(share.worker, {"kind": "no_arenas", "reason": share.refused}, ())
                return
            if share.refused:
                log.warning("%s", share.refused)
            self._promised += size * count
            try:
                _, fds = await share.carrier.carry({"do": "reserve", "size": size, "count": count})
            except JobFailed as error:
                share.refused = f"{human_size(size * count)} of memory could not be had: {error}"
                self._answer(share.worker, {"kind": "no_arenas", "reason": share.refused}, ())
                return
            finally:
                self._promised -= size * count
            share.slots, share.size = [_Slot(fd) for fd in fds], size
        about = {"kind": "arenas", "size": size}
        self._answer(share.worker, about, [slot.fd for slot in share.slots])

    def _affordable(self, rank: Rank, size: int) -> tuple[int, str]:
        """How many arenas of this size there is memory for, and why there are not as many as wanted."""
        taken = sum(share.bytes for share in self._shares.values()) + self._promised
        room = headroom()
        free = room.free - self._promised - max(MARGIN_BYTES, int(MARGIN * room.free))
        where = f"{room.where} has {human_size(max(0, free))} to spare"
        if self._settings.memory is not None and self._settings.memory - taken < free:
            free = self._settings.memory - taken
            where = f"checkpoint.memory leaves {human_size(max(0, free))}"
        wanted = self._settings.slots
        count = min(wanted, max(0, free) // max(size, 1))
        if count == wanted:
            return count, ""
        what = f"rank {rank} needs {human_size(size * wanted)} for {wanted} copies of its share, and {where}"
        if count:
            return count, f"{what}: it gets {count}"
        return 0, f"{what}: its checkpoints are written while training waits"

    def copied(self, number: int, message: Mapping[str, Any], values: int | None) -> None:
        """The copy of a step is in the slot; `values` is a memory file, taken over."""
        share = self._shares[number]
        slot = share.slots[message["slot"]]
        slot.step, slot.since, slot.written = Step(message["step"]), time.monotonic(), 0
        slot.heard_at = slot.since
        self._track(self._run(self._write(share, message["slot"], message, values), f"write-{number}"))

    def _track(self, task: asyncio.Task[None]) -> None:
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, share: _Share, number: int, message: Mapping[str, Any], values: int | None) -> None:
        formation, tell = self._formation, self._tell
        assert formation is not None and share.plan is not None
        slot, rank, step = share.slots[number], share.rank, Step(message["step"])
        direct = self._ways.goes_direct(share.size)
        bandwidth = self._settings.bandwidth
        job = {
            "do": "write",
            "root": str(self._settings.root),
            "name": checkpoint_name(step, formation.generation),
            "nonce": formation.nonce,
            "direct": direct,
            "bandwidth": None if bandwidth is None else bandwidth / max(1, len(self._shares)),
            "position": message["position"],
            "versions": message["versions"],
            "ledger": message["ledger"],
        }

        def told(written: int) -> None:
            slot.written, slot.heard_at = written, time.monotonic()

        about = {"generation": formation.generation, "rank": rank, "step": step}
        try:
            fds = [slot.fd, share.plan] if values is None else [slot.fd, share.plan, values]
            done, _ = await share.carrier.carry(job, fds, told)
        except JobFailed as error:
            tell(rank, {"save_failed": {**about, "reason": str(error)}})
        else:
            self._ways = self._ways.seen(direct, share.size, done["seconds"])
            blocked = message["blocked"]
            tell(rank, {"shard": {**about, "report": done["report"], "blocked": blocked}})
        finally:
            if values is not None:
                os.close(values)
            slot.step = None
        self._answer(share.worker, {"kind": "free", "slot": number}, ())

    # --- views ---

    def report(self) -> tuple[SaveReport, ...]:
        """What is being written, for people to read."""
        now = time.monotonic()
        return tuple(
            SaveReport(share.rank, slot.step, now - slot.since, slot.written, share.size, now - slot.heard_at)
            for share in self._shares.values()
            for slot in share.slots
            if slot.step is not None
        )

    @property
    def reserved(self) -> int:
        """Bytes of all arenas."""
        return sum(share.bytes for share in self._shares.values())

    @property
    def refused(self) -> str:
        """Why a rank has fewer arenas than it should; empty when all have theirs."""
        return next((share.refused for share in self._shares.values() if share.refused), "")
