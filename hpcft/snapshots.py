"""A node's snapshots: the arenas of its ranks, and what becomes of the copies in them.

Theory of operation
-------------------
Each local rank has a few arenas (`slots`), made when its worker says how large its share is, and kept for the workers
that follow. The worker copies into a free one and says so; from then on the copy is this module's, whether or not
the worker lives on. A carrier *seals* it (takes the digests that it will always be compared with), writes it to the
checkpoint directory, and the report goes to the leader. So a file system that hangs costs free slots, and nothing else.

A slot is free again when its copy is neither being written, nor the newest that all nodes have sealed (the leader says
so: `keep`), nor newer than that. So the state of one step is always complete in memory, and the next generation's
workers get it from there (`begin`), whatever became of their predecessors. With one slot there is no such copy.

Where the formation says so, each sealed copy goes to the next node as well (`neighbours`), and this node keeps the
copies of the one before it, its *guests*: in arenas of their own, under the same rules, and handed out or written only
where their own node cannot do it.

A copy belongs to the generation that made it. When the next one begins, what is still being written of the last
one is given up, unless it is the state that this one starts from: then that goes on to become a checkpoint, or begins
to.

Which way of writing is faster here, through the page cache or around it, is measured on the saves themselves.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from hpcft.carriers import Carrier, JobFailed
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.events import (
    CheckpointRef,
    CopiesAlone,
    CopiesKept,
    Event,
    Formation,
    Member,
    Persist,
    SaveReport,
    SnapshotDropped,
    SnapshotTaken,
)
from hpcft.ids import Generation, NodeId, Rank, Step
from hpcft.memory import headroom
from hpcft.neighbours import SETTLING_SECONDS, Dial, NotKeptError, Offer, hand_over, offer_of, take_over
from hpcft.stream import Stream, StreamClosed
from hpcft.units import human_size

log = logging.getLogger("hpcft.snapshots")

MARGIN = 0.05
"""Share of what is free that is left to others."""
MARGIN_BYTES = 128 << 20
TRIED_ANEW = 32
"""After so many saves the slower way of writing gets another chance."""
GUEST_SLOTS = 2
"""Of each guest: the newest that is safe, and the one that comes."""
AVOIDED_SECONDS = 60.0
"""A neighbour that could not take a copy is asked again after so long: each try may hold a copy for a while."""
REMEMBERED = 6
"""Latest events that are said again to a new leader: of two steps."""
TELLING_BYTES = 32 << 20
"""Of smaller files the time says nothing about the way they were written."""


@dataclass(frozen=True, slots=True)
class SaveSettings:
    root: Path
    """The directory of the checkpoints."""
    address: str
    """This node's own: where a neighbour's copies are received."""
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


@dataclass(slots=True)
class _Copy:
    """What lies in a slot."""

    formation: Formation
    rank: Rank
    message: Mapping[str, Any]
    """The worker's, about this copy."""
    plan: int
    values: int | None
    """Memory files, owned: what the copy is, and what else rank 0 said."""
    digest: str = ""
    """Of all of it."""
    digests: int | None = None
    """Memory file with the digests of its chunks; None: not sealed yet."""
    work: asyncio.Task[None] | None = None
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
    def step(self) -> Step:
        return Step(self.message["step"])

    @property
    def size(self) -> int:
        return int(self.message["size"])

    @property
    def snapshot(self) -> CheckpointRef:
        return CheckpointRef(self.step, self.formation.generation)

    def close(self) -> None:
        for fd in (self.plan, self.values, self.digests):
            if fd is not None:
                os.close(fd)


@dataclass(slots=True)
class _Slot:
    fd: int
    copy: _Copy | None = None


@dataclass(slots=True)
class _Share:
    """One local rank: carriers and arenas stay, the worker changes. Or a guest's, without a worker."""

    memory: Carrier = field(default_factory=Carrier)
    """For what never waits for a file system."""
    disk: Carrier = field(default_factory=Carrier)
    passing: Carrier = field(default_factory=Carrier)
    """For what goes to the neighbour."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One after another: what goes to the neighbour, or comes."""
    worker: str = ""
    rank: Rank = Rank(0)
    size: int = 0
    """Of an arena."""
    slots: list[_Slot] = field(default_factory=list)
    outgrown: list[_Slot] = field(default_factory=list)
    """Slots of another size, that go when their copies do."""
    plan: int | None = None
    """Memory file with what the copies of this worker are."""
    planned: int = 0
    """Bytes of such a copy."""
    refused: str = ""

    @property
    def bytes(self) -> int:
        outgrown = sum(slot.copy.size for slot in self.outgrown if slot.copy is not None)
        return self.size * len(self.slots) + outgrown

    @property
    def filled(self) -> list[tuple[_Slot, _Copy]]:
        return [(slot, slot.copy) for slot in (*self.slots, *self.outgrown) if slot.copy is not None]

    def holds(self, snapshot: CheckpointRef | None) -> bool:
        return any(copy.snapshot == snapshot for _, copy in self.filled)

    def outgrow(self) -> None:
        """The arenas are too small from now on; what is of use in them stays."""
        for slot in self.slots:
            if slot.copy is None:
                os.close(slot.fd)
            else:
                self.outgrown.append(slot)
        self.slots, self.size = [], 0

    def empty(self, slot: _Slot) -> None:
        """Give up the copy, whatever is being done with it."""
        copy, slot.copy = slot.copy, None
        if copy is not None:
            for task in (copy.work, copy.passing):
                if task is not None:
                    task.cancel()
            copy.close()
        if slot in self.outgrown:
            self.outgrown.remove(slot)
            os.close(slot.fd)


Answer = Callable[[str, Mapping[str, Any], Sequence[int]], None]
"""Tells a worker something; the descriptors stay the caller's."""
Tell = Callable[[Rank, Mapping[str, Any]], None]
"""Tells the leader what became of a rank's save: `{"shard": …}` or `{"save_failed": …}`."""
Say = Callable[[Event], None]
"""Tells the leader what the node has in memory."""
Run = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class Snapshots:
    """Of one node, for all its generations."""

    def __init__(self, settings: SaveSettings, node: NodeId, answer: Answer, run: Run, dial: Dial) -> None:
        self._settings = settings
        self._node = node
        self._answer = answer
        self._run = run
        self._dial = dial
        self._shares: dict[int, _Share] = {}
        self._guests: dict[Rank, _Share] = {}
        """By the rank that has made the copies."""
        self._incoming: set[asyncio.Task[None]] = set()
        """Copies that are being received."""
        self._freed = asyncio.Event()
        """An arena for a guest is free."""
        self._avoided = (0.0, "")
        """Until when the neighbour is not asked, and why."""
        self._alone: set[Step] = set()
        """Steps of this generation of which the neighbour does not have all copies."""
        self._formation: Formation | None = None
        self._tell: Tell = lambda rank, message: None
        self._say: Say = lambda event: None
        self._kept: CheckpointRef | None = None
        """The newest that all nodes have sealed, and their neighbours have."""
        self._taken: dict[Step, set[Rank]] = {}
        """Whose share of a step is copied and sealed, or written, as long as somebody's is not."""
        self._written: set[Step] = set()
        """Those of them that some rank has written without a copy."""
        self._forgotten: set[Step] = set()
        """Steps of this generation that some rank has no copy of; another may be about to make one."""
        self._unkept: set[Step] = set()
        """Others that are of no use when they are written, since nobody can start from them."""
        self._missed: set[Step] = set()
        """Those of which some rank of this node has no copy."""
        self._promised = 0
        """Bytes of arenas that are being made."""
        self._ways = Ways()
        self._spoken: list[Event] = []

    # --- generations ---

    def begin(self, formation: Formation, workers: Mapping[int, tuple[str, Rank]], tell: Tell, say: Say) -> None:
        """A generation begins with these workers, by their number on this node."""
        self._formation, self._tell, self._say = formation, tell, say
        self._taken, self._written, self._forgotten, self._spoken = {}, set(), set(), []
        self._unkept, self._missed = set(), set()
        self._alone, self._avoided = set(), (0.0, "")
        for task in self._incoming:
            task.cancel()
        origin = formation.restore if formation.memory else None
        self._kept = origin
        for number, share in list(self._shares.items()):
            for slot, copy in share.filled:
                if copy.snapshot != origin:
                    share.empty(slot)
                elif copy.passing is not None:
                    copy.passing.cancel()
            if number not in workers and not share.holds(origin):
                self._end_share(self._shares.pop(number))
            else:
                share.worker = ""
        for number, (worker, rank) in workers.items():
            share = self._shares.setdefault(number, _Share())
            share.worker, share.rank, share.refused = worker, rank, ""
        for guest in self._guests.values():
            guest.refused = ""
            for slot, copy in guest.filled:
                if copy.snapshot != origin:
                    guest.empty(slot)
        self._dismiss_guests()

    def hand_out(self) -> None:
        """Give the workers, which are there by now, what they start from; and go on making it durable."""
        formation = self._formation
        if formation is None or not formation.memory:
            return
        ranks = {rank for made, now in formation.handed_out() if now.node == self._node for rank in made.ranks()}
        held = [
            (share, slot, copy)
            for share in self._all
            for slot, copy in share.filled
            if copy.snapshot == formation.restore and copy.digests is not None and copy.rank in ranks
        ]
        for worker in [share.worker for share in self._shares.values() if share.worker]:
            for _, slot, copy in held:
                assert copy.digests is not None
                about = {"kind": "image", "rank": copy.rank, "values": copy.values is not None}
                fds = [slot.fd, copy.plan, copy.digests] + ([] if copy.values is None else [copy.values])
                self._answer(worker, about, fds)
            self._answer(worker, {"kind": "images", "count": len(held)}, ())
        for share, slot, copy in held:
            if copy.work is None and copy.outcome is None:
                copy.work = self._run(self._write(share, slot, copy), f"write-{copy.rank}")

    def persist(self, order: Persist) -> None:
        """Write what the order leaves to this node, whether or not there are workers."""
        made_by = zip(order.members, order.handed_by, strict=True)
        wanted = {Rank(rank) for member, by in made_by if by == self._node for rank in member.ranks()}
        for share in self._all:
            for slot, copy in share.filled:
                if copy.snapshot != order.snapshot or copy.rank not in wanted or copy.digests is None:
                    continue
                wanted.discard(copy.rank)
                if copy.nonce != order.nonce:
                    if copy.work is not None:
                        copy.work.cancel()
                    copy.nonce, copy.work, copy.written, copy.outcome = order.nonce, None, 0, None
                if copy.outcome is not None:
                    self._tell(copy.rank, copy.outcome)
                elif copy.work is None:
                    copy.work = self._run(self._write(share, slot, copy), f"write-{copy.rank}")
        for rank in wanted:
            about = {"generation": order.snapshot.generation, "rank": rank, "step": order.snapshot.step}
            reason = "its copy is not in memory any more"
            self._tell(rank, {"save_failed": {**about, "reason": reason, "nonce": order.nonce}})

    @property
    def _all(self) -> list[_Share]:
        return [*self._shares.values(), *self._guests.values()]

    def _end_share(self, share: _Share) -> None:
        share.memory.leave_behind()
        share.disk.leave_behind()
        share.passing.leave_behind()
        for slot, _ in share.filled:
            share.empty(slot)
        share.outgrow()
        if share.plan is not None:
            os.close(share.plan)

    def end(self) -> None:
        """Give everything back."""
        for task in self._incoming:
            task.cancel()
        for share in self._all:
            self._end_share(share)
        self._shares.clear()
        self._guests.clear()

    def repeat(self) -> None:
        """Say again what is in memory: the stream on which it was said may be lost."""
        for event in self._spoken:
            self._say(event)

    # --- what workers say ---

    def asked(self, number: int, size: int, plan: int) -> None:
        """The worker needs arenas of `size` bytes, for copies that are what the memory file `plan` says."""
        share = self._shares[number]
        if share.plan is not None:
            os.close(share.plan)
        share.plan, share.planned = plan, size
        self._run(share.disk.warm(), f"warm-{share.rank}")
        self._run(self._provide(share, size), f"reserve-{share.rank}")

    async def _provide(self, share: _Share, size: int) -> None:
        worker = share.worker
        if share.size < size or not share.slots:
            share.outgrow()
            count, share.refused = self._affordable(share.rank, size)
            if not count:
                log.warning("no copies in memory: %s", share.refused)
                self._answer(worker, {"kind": "no_arenas", "reason": share.refused}, ())
                return
            if share.refused:
                log.warning("%s", share.refused)
            self._promised += size * count
            try:
                _, fds = await share.memory.carry({"do": "reserve", "size": size, "count": count})
            except JobFailed as error:
                share.refused = f"{human_size(size * count)} of memory could not be had: {error}"
                self._answer(worker, {"kind": "no_arenas", "reason": share.refused}, ())
                return
            finally:
                self._promised -= size * count
            share.outgrow()  # those of another question, meanwhile
            share.slots, share.size = [_Slot(fd) for fd in fds], size
        free = [number for number, slot in enumerate(share.slots) if slot.copy is None]
        self._answer(worker, {"kind": "arenas", "size": size, "free": free}, [slot.fd for slot in share.slots])

    def _affordable(self, rank: Rank, size: int) -> tuple[int, str]:
        """How many arenas of this size there is memory for, and why there are not as many as wanted."""
        free, where = self._room()
        wanted = self._settings.slots
        count = min(wanted, free // max(size, 1))
        if count == wanted:
            return count, ""
        what = f"rank {rank} needs {human_size(size * wanted)} for {wanted} copies of its share, and {where}"
        if count:
            return count, f"{what}: it gets {count}"
        return 0, f"{what}: its checkpoints are written while training waits"

    def _room(self) -> tuple[int, str]:
        """Bytes that are left for arenas, and what says so."""
        room = headroom()
        free = room.free - self._promised - max(MARGIN_BYTES, int(MARGIN * room.free))
        where = f"{room.where} has {human_size(max(0, free))} to spare"
        taken = self.reserved + self._promised
        if self._settings.memory is not None and self._settings.memory - taken < free:
            free = self._settings.memory - taken
            where = f"checkpoint.memory leaves {human_size(max(0, free))}"
        return max(0, free), where

    def copied(self, number: int, message: Mapping[str, Any], values: int | None) -> None:
        """The copy of a step is in the slot; `values` is a memory file, taken over."""
        share, formation = self._shares[number], self._formation
        assert formation is not None
        at, size = message["slot"], message["size"]
        if share.plan is None or size != share.planned or not 0 <= at < len(share.slots):
            # not what was agreed on: with the plan of another copy, it would become a checkpoint of something else
            if values is not None:
                os.close(values)
            reason = f"a copy of {size} bytes in arena {at} does not fit the plan of {share.planned} bytes"
            about = {"generation": formation.generation, "rank": share.rank, "step": Step(message["step"])}
            self._tell(share.rank, {"save_failed": {**about, "reason": reason}})
            return
        slot = share.slots[at]
        share.empty(slot)
        slot.copy = copy = _Copy(formation, share.rank, message, os.dup(share.plan), values)
        if copy.step in self._forgotten:
            self._free(share, slot)
        else:
            copy.work = self._run(self._take(share, slot, copy), f"save-{share.rank}")

    def wrote(self, rank: Rank, step: Step) -> None:
        """The rank has written its share without a copy."""
        self._written.add(step)
        self._took(rank, step)

    def missed(self, step: Step) -> None:
        """Some rank could not copy or write its share of this step."""
        if self._formation is not None and step not in self._missed:
            self._missed.add(step)
            self._speak(SnapshotDropped(self._node, self._formation.generation, step))

    def _took(self, rank: Rank, step: Step) -> None:
        taken = self._taken.setdefault(step, set())
        taken.add(rank)
        formation = self._formation
        if formation is None or len(taken) < sum(bool(share.worker) for share in self._shares.values()):
            return
        for older in [each for each in self._taken if each <= step]:
            del self._taken[older]
        kept = all(len(each.slots) > 1 for each in self._shares.values() if each.worker)
        in_memory = kept and step not in self._written
        copies = [copy for each in self._shares.values() for _, copy in each.filled if copy.formation is formation]
        made = sorted((copy for copy in copies if copy.step == step), key=lambda copy: copy.rank)
        compared = tuple((copy.rank, *copy.message["replica"]) for copy in made if copy.message.get("replica"))
        digests = tuple((copy.rank, copy.digest) for copy in made)
        blocked = max((copy.message["blocked"] for copy in made if not copy.message["durable"]), default=0.0)
        self._speak(SnapshotTaken(self._node, formation.generation, step, in_memory, digests, compared, blocked))

    def _speak(self, event: Event) -> None:
        self._spoken = [*self._spoken, event][-REMEMBERED:]
        self._say(event)

    # --- what becomes of a copy ---

    async def _take(self, share: _Share, slot: _Slot, copy: _Copy) -> None:
        try:
            done, fds = await share.memory.carry({"do": "seal", "size": copy.size}, [slot.fd])
        except JobFailed as error:
            self._fail(copy, str(error))
            self.missed(copy.step)
            copy.work = None
            self._release(share, slot)
            return
        copy.digests, copy.digest = fds[0], done["digest"]
        neighbour = copy.formation.neighbour(self._node)
        if neighbour is not None and copy.formation is self._formation and len(share.slots) > 1:
            copy.passing = self._run(self._pass_on(share, slot, copy, neighbour), f"pass-{copy.rank}")
        self._took(copy.rank, copy.step)
        if copy.message["durable"]:
            await self._write(share, slot, copy)
        else:
            copy.work = None
            self._release(share, slot)

    async def _write(self, share: _Share, slot: _Slot, copy: _Copy) -> None:
        copy.since = copy.heard_at = time.monotonic()
        message, formation = copy.message, copy.formation
        direct = self._ways.goes_direct(copy.size)
        bandwidth = self._settings.bandwidth
        job = {
            "do": "write",
            "root": str(self._settings.root),
            "name": checkpoint_name(copy.step, formation.generation),
            "nonce": copy.nonce,
            "direct": direct,
            "bandwidth": None if bandwidth is None else bandwidth / max(1, len(self._shares)),
            "position": message["position"],
            "versions": message["versions"],
            "metrics": message["metrics"],
            "ledger": message["ledger"],
        }

        def told(written: int) -> None:
            copy.written, copy.heard_at = written, time.monotonic()

        about = {"generation": formation.generation, "rank": copy.rank, "step": copy.step}
        assert copy.digests is not None
        try:
            fds = [slot.fd, copy.plan, copy.digests] + ([] if copy.values is None else [copy.values])
            done, _ = await share.disk.carry(job, fds, told)
        except JobFailed as error:
            copy.written = 0
            self._ways = self._ways.seen(direct, copy.size, math.inf)
            self._fail(copy, str(error))
        else:
            copy.written = copy.size
            as_asked = done["direct"] == direct
            self._ways = self._ways.seen(direct, copy.size, done["seconds"] if as_asked else math.inf)
            blocked = message["blocked"]
            took = blocked + time.monotonic() - copy.made_at
            copy.outcome = {"shard": {**about, "report": done["report"], "blocked": blocked, "took": took}}
            self._tell(copy.rank, copy.outcome)
        copy.work = None
        self._release(share, slot)

    def _fail(self, copy: _Copy, reason: str) -> None:
        about = {"generation": copy.formation.generation, "rank": copy.rank, "step": copy.step}
        self._tell(copy.rank, {"save_failed": {**about, "reason": reason, "nonce": copy.nonce}})

    def keep(self, generation: Generation, step: Step) -> None:
        """All nodes have sealed this step, and it is safe: older copies are of no use any more."""
        self._kept = CheckpointRef(step, generation)
        for share in self._all:
            for slot, _ in share.filled:
                self._release(share, slot)
        self._dismiss_guests()

    def forget(self, generation: Generation, step: Step, *, written: bool) -> None:
        """Some rank has no copy of this step: those of others are of no use. Nor is writing them, unless `written`."""
        gone = CheckpointRef(step, generation)
        (self._unkept if written else self._forgotten).add(step)
        for share in self._all:
            for slot, copy in share.filled:
                if copy.snapshot == gone:
                    if written:
                        self._release(share, slot)
                    else:
                        self._free(share, slot)

    def _release(self, share: _Share, slot: _Slot) -> None:
        """The slot is the worker's again, unless its copy is still of use."""
        copy = slot.copy
        if copy is None or copy.work is not None:
            return
        kept = self._kept
        older = kept is not None and (copy.snapshot.generation, copy.step) < (kept.generation, kept.step)
        unkept = copy.formation is self._formation and copy.step in self._unkept
        if copy.digests is not None and not older and not unkept and len(share.slots) > 1:
            return
        self._free(share, slot)

    def _free(self, share: _Share, slot: _Slot) -> None:
        share.empty(slot)
        if not share.worker:
            self._freed.set()
        elif slot in share.slots:
            self._answer(share.worker, {"kind": "free", "slot": share.slots.index(slot)}, ())

    # --- to the neighbour, and from it ---

    async def _pass_on(self, share: _Share, slot: _Slot, copy: _Copy, neighbour: Member) -> None:
        """Bring the copy to the neighbour, or say that it has none."""
        try:
            async with share.turn:
                until, why = self._avoided
                if time.monotonic() < until:
                    raise NotKeptError(why)
                await self._bring(share, slot, copy, neighbour)
        except NotKeptError as error:
            if time.monotonic() >= self._avoided[0]:
                log.warning("%s has no copy of rank %d's step %d: %s", neighbour.node, copy.rank, copy.step, error)
                self._avoided = (time.monotonic() + AVOIDED_SECONDS, str(error))
            if copy.step not in self._alone:
                self._alone.add(copy.step)
                self._speak(CopiesAlone(self._node, copy.formation.generation, copy.step, str(error)))
        copy.passing = None

    async def _bring(self, share: _Share, slot: _Slot, copy: _Copy, neighbour: Member) -> None:
        assert copy.digests is not None
        more = [copy.plan] + ([] if copy.values is None else [copy.values])
        generation = copy.formation.generation
        try:
            offer = await offer_of(share.passing, generation, copy.rank, copy.message, copy.digests, more)
            async with asyncio.timeout(offer.limit):
                peer = await self._dial(neighbour)
                try:
                    await hand_over(peer, neighbour.address, offer, share.passing, [slot.fd, *more])
                finally:
                    peer.close()
        except (JobFailed, StreamClosed) as error:
            raise NotKeptError(str(error)) from error
        except TimeoutError as error:
            raise NotKeptError(f"it has taken longer than {offer.limit:.0f} s") from error

    async def entertain(self, peer: Stream) -> None:
        """Another agent wants a copy kept here: receive it, and tell the leader when all of that node's are here."""
        task = asyncio.current_task()
        assert task is not None
        self._incoming.add(task)
        try:
            async with asyncio.timeout(SETTLING_SECONDS):
                offer = Offer.parse(await peer.receive())
            async with asyncio.timeout(offer.limit):
                refused = await self._keep_guest(peer, offer)
            peer.send({"refused": refused} if refused else {"kept": True})
        except (KeyError, TypeError, ValueError, JobFailed, TimeoutError) as error:
            peer.send({"refused": str(error) or "it took too long"})
        except StreamClosed as closed:
            log.info("a copy was to come from %s, and did not: %s", peer.hello.get("node"), closed.reason)
        finally:
            self._incoming.discard(task)
            peer.close()

    async def _keep_guest(self, peer: Stream, offer: Offer) -> str:
        """Receive the copy. Returns why not."""
        formation, guest = self._formation, None
        if formation is not None and formation.generation == offer.generation:
            guest = formation.guest(self._node)
        who = (peer.hello.get("node"), peer.hello.get("incarnation"))
        if formation is None or guest is None or who != (guest.node, guest.incarnation):
            return f"{self._node} is not its neighbour in generation {offer.generation}"
        if offer.rank not in guest.ranks():
            return f"rank {offer.rank} is not one of {guest.node}"
        share = self._guests.setdefault(offer.rank, _Share(rank=offer.rank))
        async with share.turn:
            if share.size < offer.size and (refused := await self._provide_guest(share, offer.size, guest)):
                share.refused = refused
                return refused
            slot = await self._vacant(share)
            if self._outdated(offer):
                return f"step {offer.step} is of no use any more"
            digests, files = await take_over(peer, self._settings.address, offer, share.memory, slot.fd)
            values = files[1] if len(files) > 1 else None
            copy = _Copy(formation, offer.rank, offer.message, files[0], values, digests=digests)
            if self._outdated(offer):  # late
                copy.close()
                self._freed.set()
                return f"step {offer.step} is of no use any more"
            slot.copy = copy
        complete = all(
            each in self._guests and self._guests[each].holds(copy.snapshot) for each in map(Rank, guest.ranks())
        )
        if complete:
            self._speak(CopiesKept(self._node, offer.generation, offer.step, guest.node))
        return ""

    def _outdated(self, offer: Offer) -> bool:
        kept = self._kept
        older = kept is not None and (offer.generation, offer.step) < (kept.generation, kept.step)
        return older or offer.step in self._forgotten or offer.step in self._unkept

    async def _vacant(self, share: _Share) -> _Slot:
        """A slot whose copy is of no use any more, as soon as there is one."""
        while True:
            for slot in share.slots:
                if slot.copy is None:
                    return slot
            self._freed.clear()
            await self._freed.wait()

    async def _provide_guest(self, share: _Share, size: int, guest: Member) -> str:
        """Make the arenas for a guest. Returns why not."""
        free, where = self._room()
        needed = size * GUEST_SLOTS
        if needed > free:
            return (
                f"the copies of {guest.node}'s rank {share.rank} need {human_size(needed)} on its neighbour "
                f"{self._node}, and {where}: they do not outlive their node"
            )
        self._promised += needed
        try:
            _, fds = await share.memory.carry({"do": "reserve", "size": size, "count": GUEST_SLOTS})
        finally:
            self._promised -= needed
        share.outgrow()
        share.slots, share.size, share.refused = [_Slot(fd) for fd in fds], size, ""
        return ""

    def _dismiss_guests(self) -> None:
        """Arenas of former guests go with the last copy in them."""
        guest = self._formation.guest(self._node) if self._formation is not None else None
        ranks = guest.ranks() if guest is not None else range(0)
        for rank, share in list(self._guests.items()):
            if rank not in ranks and not share.filled:
                self._end_share(self._guests.pop(rank))

    # --- views ---

    def report(self) -> tuple[SaveReport, ...]:
        """What is being written, for people to read."""
        now = time.monotonic()
        return tuple(
            SaveReport(copy.rank, copy.step, now - copy.since, copy.written, copy.size, now - copy.heard_at)
            for share in self._all
            for _, copy in share.filled
            if copy.work is not None and copy.since
        )

    @property
    def reserved(self) -> int:
        """Bytes of all arenas."""
        return sum(share.bytes for share in self._all)

    @property
    def refused(self) -> str:
        """Why a rank has fewer arenas than it should; empty when all have theirs."""
        return next((share.refused for share in self._all if share.refused), "")
