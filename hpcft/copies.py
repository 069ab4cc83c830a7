"""Copies of ranks' shares in this node's memory: what one is, where it lies, and whether it is of use.

A `Share` belongs to one rank: its arenas (`slots`) and the carriers that move what is in them. The copies in it may be
a local rank's own (`snapshots`), or guests of another node (`guests`); the rules are the same. What the leader has said
of them is in one `Use`, and what memory they may take in one `Memory`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hpcft.carriers import Carrier, JobFailed
from hpcft.events import CheckpointRef, Event, Formation
from hpcft.ids import Generation, Rank, Step
from hpcft.memory import headroom
from hpcft.units import human_size

T = TypeVar("T")

MARGIN = 0.05
"""Share of what is free that is left to others."""
MARGIN_BYTES = 128 << 20
REMEMBERED = 100
"""So many of a generation's latest steps are remembered, for what is said of them late."""

Say = Callable[[Event], None]
"""Tells the leader what the node has in memory."""


class Latest(Generic[T]):
    """A set of which only the `REMEMBERED` last ones stay."""

    def __init__(self) -> None:
        self._known: dict[T, None] = {}

    def add(self, item: T) -> bool:
        """False: it is there already."""
        if item in self._known:
            return False
        self._known[item] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return True

    def __contains__(self, item: T) -> bool:
        return item in self._known


@dataclass(frozen=True, slots=True)
class Label:
    """Whose copy of which step."""

    generation: Generation
    rank: Rank
    message: Mapping[str, Any]
    """The worker's, about the copy: `step` and `size` among others."""

    @property
    def step(self) -> Step:
        return Step(self.message["step"])

    @property
    def size(self) -> int:
        return int(self.message["size"])

    @property
    def snapshot(self) -> CheckpointRef:
        return CheckpointRef(self.step, self.generation)

    @property
    def about(self) -> dict[str, Any]:
        """As the leader is told."""
        return {"generation": self.generation, "rank": self.rank, "step": self.step}


@dataclass(slots=True)
class Copy:
    """What lies in a slot."""

    label: Label
    formation: Formation
    plan: int
    values: int | None
    """Memory files, owned: what the copy is, and what else rank 0 said."""
    digest: str = ""
    """Of all of it."""
    digests: int | None = None
    """Memory file with the digests of its chunks; None: not sealed yet."""
    work: asyncio.Task[None] | None = None
    ahead: asyncio.Task[Any] | None = None
    """Writes it while it is sealed."""
    writing: bool = False
    """It is being written, or was."""
    passing: asyncio.Task[None] | None = None
    """Brings it to the neighbour."""
    made_at: float = field(default_factory=time.monotonic)
    nonce: str = ""
    """Of the attempt to write it."""
    since: float = 0.0
    """When it began to be written."""
    written: int = 0
    heard_at: float = 0.0
    outcome: Mapping[str, Any] | None = None
    """What was said of it when it was written."""

    def __post_init__(self) -> None:
        self.nonce = self.formation.nonce

    @property
    def progress(self) -> int:
        """How far it is on its way to the disk: written, being written, or neither."""
        return 2 if self.outcome is not None else int(self.writing)

    @property
    def files(self) -> list[int]:
        """The memory files that belong to it, but for the digests."""
        return [self.plan] + ([] if self.values is None else [self.values])

    def close(self) -> None:
        for fd in (*self.files, self.digests):
            if fd is not None:
                os.close(fd)


@dataclass(slots=True)
class Slot:
    fd: int
    copy: Copy | None = None


@dataclass(slots=True)
class Share:
    """One rank's arenas, with its carriers: they stay, the worker changes. A guest's has none here."""

    freed: Callable[[Share, Slot], None]
    """Called when a slot is free again."""
    rank: Rank = Rank(0)
    memory: Carrier = field(default_factory=Carrier)
    """For what never waits for a file system."""
    disk: Carrier = field(default_factory=Carrier)
    passing: Carrier = field(default_factory=Carrier)
    """For what goes to the neighbour."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One after another: what goes to the neighbour, or comes."""
    completing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One after another: those who have arenas made that were refused."""
    worker: str = ""
    size: int = 0
    """Of an arena."""
    slots: list[Slot] = field(default_factory=list)
    outgrown: list[Slot] = field(default_factory=list)
    """Slots of another size, that go when their copies do."""
    plan: int | None = None
    """Memory file with what the copies of this worker are."""
    planned: int = 0
    """Bytes of such a copy."""
    refused: str = ""
    """Why it has fewer arenas than it should."""

    @property
    def bytes(self) -> int:
        """Of the arenas, and of what belongs to the copies in them. Copies may have one plan in common."""
        known = [slot.fd for slot in (*self.slots, *self.outgrown)]
        for _, copy in self.filled:
            known += [*copy.files] + ([] if copy.digests is None else [copy.digests])
        found = {(about.st_dev, about.st_ino): about.st_size for about in map(os.fstat, known)}
        return sum(found.values())

    @property
    def filled(self) -> list[tuple[Slot, Copy]]:
        return [(slot, slot.copy) for slot in (*self.slots, *self.outgrown) if slot.copy is not None]

    def holds(self, snapshot: CheckpointRef | None) -> bool:
        return any(copy.label.snapshot == snapshot for _, copy in self.filled)

    def take(self, fds: Sequence[int], size: int) -> None:
        """Arenas of this size from now on; what is of use in earlier ones stays."""
        self.outgrow()
        self.slots, self.size = [Slot(fd) for fd in fds], size

    def outgrow(self) -> None:
        for slot in self.slots:
            if slot.copy is None:
                os.close(slot.fd)
            else:
                self.outgrown.append(slot)
        self.slots, self.size = [], 0

    def empty(self, slot: Slot) -> None:
        """Give up the copy, whatever is being done with it."""
        copy, slot.copy = slot.copy, None
        if copy is not None:
            for task in (copy.ahead, copy.work, copy.passing):
                if task is not None:
                    task.cancel()
            copy.close()
        if slot in self.outgrown:
            self.outgrown.remove(slot)
            os.close(slot.fd)

    def free(self, slot: Slot) -> None:
        self.empty(slot)
        self.freed(self, slot)

    def release(self, slot: Slot, use: Use) -> None:
        """Free the slot, unless its copy is still of use."""
        copy = slot.copy
        if copy is None or copy.work is not None:
            return
        if copy.digests is None or len(self.slots) <= 1 or use.is_outdated(copy.label.snapshot):
            self.free(slot)

    def give_up(self, use: Use) -> None:
        """What is of no use any more, the writing of it included."""
        for slot, copy in self.filled:
            if use.is_forgotten(copy.label.snapshot):
                self.free(slot)
            else:
                self.release(slot, use)

    def keep_only(self, origin: CheckpointRef | None) -> None:
        """Another generation begins, and starts from there."""
        of_origin = [copy for _, copy in self.filled if copy.label.snapshot == origin]
        # a step may have been copied twice, for a start and for a checkpoint
        best = max(of_origin, key=lambda copy: (copy.digests is not None, copy.progress), default=None)
        for slot, copy in self.filled:
            if copy is not best:
                self.empty(slot)
            elif copy.passing is not None:
                copy.passing.cancel()

    def end(self) -> None:
        for carrier in (self.memory, self.disk, self.passing):
            carrier.leave_behind()
        for slot, _ in self.filled:
            self.empty(slot)
        self.outgrow()
        if self.plan is not None:
            os.close(self.plan)


class Use:
    """Which copies are of use, as far as the leader has said."""

    def __init__(self) -> None:
        self._kept: CheckpointRef | None = None
        """The newest that all nodes have sealed, and their neighbours have."""
        self._forgotten: Latest[CheckpointRef] = Latest()
        """Some rank has no copy of these; another may be about to make one."""
        self._unkept: Latest[CheckpointRef] = Latest()
        """These are of no use when they are written, since nobody can start from them."""

    def begin(self, origin: CheckpointRef | None) -> None:
        """A generation begins, with this state if it is in memory."""
        self._kept, self._forgotten, self._unkept = origin, Latest(), Latest()

    def keep(self, snapshot: CheckpointRef) -> None:
        self._kept = snapshot

    def forget(self, snapshot: CheckpointRef, *, written: bool) -> None:
        """Nobody can start from it. Nor is writing it of use, unless `written`."""
        (self._unkept if written else self._forgotten).add(snapshot)

    def is_forgotten(self, snapshot: CheckpointRef) -> bool:
        return snapshot in self._forgotten

    def is_outdated(self, snapshot: CheckpointRef) -> bool:
        """Nobody will start from it."""
        kept = self._kept
        older = kept is not None and (snapshot.generation, snapshot.step) < (kept.generation, kept.step)
        return older or snapshot in self._forgotten or snapshot in self._unkept


@dataclass(eq=False, slots=True)
class _Making:
    size: int
    made: int = 0


class Memory:
    """What arenas on this node may take, its guests' included."""

    def __init__(self, limit: int | None, taken: Callable[[], int]) -> None:
        """`limit`: bytes, None for as many as there are; `taken`: how many they have by now."""
        self._limit = limit
        self._taken = taken
        self._making: list[_Making] = []

    def left(self) -> tuple[int, str]:
        """Bytes that are left, and what says so."""
        room = headroom()
        # what has been made of others by now is not free any more, as the kernel counts
        coming = sum(each.size - each.made for each in self._making)
        free = room.free - coming - max(MARGIN_BYTES, int(MARGIN * room.free))
        where = f"{room.where} has {human_size(max(0, free))} to spare"
        taken = self._taken() + sum(each.size for each in self._making)
        if self._limit is not None and self._limit - taken < free:
            free = self._limit - taken
            where = f"checkpoint.memory leaves {human_size(max(0, free))}"
        return max(0, free), where

    async def reserve(self, carrier: Carrier, size: int, count: int) -> list[int]:
        """Have so many arenas made; look at what is left before. JobFailed: there was no memory for them."""
        making = _Making(size * count)

        def told(made: int) -> None:
            making.made = made

        self._making.append(making)
        try:
            _, fds = await carrier.carry({"do": "reserve", "size": size, "count": count}, told=told)
        finally:
            self._making.remove(making)
        return fds

    async def give_back(self, carrier: Carrier, fd: int) -> None:
        """An arena that the carrier has just made is of no use: neither it nor this process keeps its memory."""
        try:
            with suppress(JobFailed):  # then it keeps nothing
                await carrier.carry({"do": "unmap"}, [fd])
        finally:
            os.close(fd)
