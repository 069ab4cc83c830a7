"""A node's snapshots: the arenas of its ranks, and what becomes of the copies in them.

Theory of operation
-------------------
Each local rank has a few arenas (`slots`), made when its worker says how large its share is, and kept for the workers
that follow. The worker copies into a free one and says so; from then on the copy is this module's, whether or not
the worker lives on. A carrier *seals* it (takes the digests that it will always be compared with) while another one
writes it to the checkpoint directory (`writing`), and the report goes to the leader. So a file system that hangs costs
free slots, and nothing else.

A slot is free again when its copy is neither being written, nor the newest that all nodes have sealed (the leader says
so: `keep`), nor newer than that. So the state of one step is always complete in memory, and the next generation's
workers get it from there (`begin`), whatever became of their predecessors. With one slot there is no such copy. Where
there was memory for fewer arenas than there should be, the others are made when copies have gone.

Copies go to another node's memory, too, and that of others come here (`guests`). All of them are handed out and written
under the same rules.

A copy belongs to the generation that made it. When the next one begins, what is still being written of the last
one is given up, unless it is the state that this one starts from: then that goes on to become a checkpoint, or begins
to. Where the leader orders another attempt (`persist`), all that was written in the one before is of no use.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.carriers import JobFailed
from hpcft.copies import Copy, Label, Latest, Memory, Say, Share, Slot, Use
from hpcft.events import CheckpointRef, Event, Formation, Persist, SaveReport, SnapshotDropped, SnapshotTaken
from hpcft.guests import Guests, Visits
from hpcft.ids import Generation, NodeId, Rank, Step
from hpcft.neighbours import Dial
from hpcft.stream import Stream
from hpcft.units import human_size
from hpcft.writing import Writing, Written

log = logging.getLogger("hpcft.snapshots")

REMEMBERED = 6
"""Latest events that are said again to a new leader: of two steps."""


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


Answer = Callable[[str, Mapping[str, Any], Sequence[int]], None]
"""Tells a worker something; the descriptors stay the caller's."""
Tell = Callable[[Rank, Mapping[str, Any]], None]
"""Tells the leader what became of a rank's save: `{"shard": …}` or `{"save_failed": …}`."""
Run = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class Snapshots:
    """Of one node, for all its generations."""

    def __init__(self, settings: SaveSettings, node: NodeId, answer: Answer, run: Run, dial: Dial) -> None:
        self._settings = settings
        self._node = node
        self._answer = answer
        self._run = run
        self._shares: dict[int, Share] = {}
        """Of the local ranks, by their number on this node."""
        self._use = Use()
        self._memory = Memory(settings.memory, lambda: self.reserved)
        self._guests = Guests(node, settings.address, self._memory, self._use, self._speak)
        self._visits = Visits(node, dial, self._speak)
        self._writing = Writing(settings.root, settings.bandwidth)
        self._formation: Formation | None = None
        self._tell: Tell = lambda rank, message: None
        self._say: Say = lambda event: None
        self._taken: dict[Step, set[Rank]] = {}
        """Whose share of a step is copied and sealed, or written, as long as somebody's is not."""
        self._written: Latest[Step] = Latest()
        """Those that some rank has written without a copy."""
        self._missed: Latest[Step] = Latest()
        """Those of which some rank of this node has no copy."""
        self._spoken: list[Event] = []

    # --- generations ---

    def begin(self, formation: Formation, workers: Mapping[int, tuple[str, Rank]], tell: Tell, say: Say) -> None:
        """A generation begins with these workers, by their number on this node."""
        self._formation, self._tell, self._say = formation, tell, say
        self._taken, self._written, self._missed, self._spoken = {}, Latest(), Latest(), []
        origin = formation.restore if formation.memory else None
        self._use.begin(origin)
        for number, share in list(self._shares.items()):
            share.keep_only(origin)
            if number not in workers and not share.holds(origin):
                self._shares.pop(number).end()
            else:
                share.worker = ""
        for number, (worker, rank) in workers.items():
            share = self._shares.setdefault(number, Share(self._freed))
            share.worker, share.rank, share.refused = worker, rank, ""
        self._guests.begin(formation, origin)
        self._visits.begin()

    def hand_out(self) -> None:
        """Give the workers, which are there by now, what they start from; and go on making it durable.

        That is what this node has made itself. A guest's copy is written when the leader says so, and under which nonce
        (`persist`): its own node may have written it before it was lost, in part or in whole.
        """
        formation = self._formation
        if formation is None or not formation.memory:
            return
        handed = [made for made, now in formation.handed_out() if now.node == self._node]
        own = {Rank(each) for made in handed if made.node == self._node for each in made.ranks()}
        held = self._sealed(formation.restore, {Rank(each) for made in handed for each in made.ranks()})
        for worker in [share.worker for share in self._shares.values() if share.worker]:
            for _, slot, copy in held:
                assert copy.digests is not None
                about = {"kind": "image", "rank": copy.label.rank, "values": copy.values is not None}
                fds = [slot.fd, copy.plan, copy.digests] + ([] if copy.values is None else [copy.values])
                self._answer(worker, about, fds)
            self._answer(worker, {"kind": "images", "count": len(held)}, ())
        for share, slot, copy in held:
            if copy.label.rank in own and copy.work is None and copy.outcome is None:
                self._begin_to_write(share, slot, copy)

    def persist(self, order: Persist) -> None:
        """Write what the order leaves to this node, whether or not there are workers."""
        made_by = zip(order.members, order.handed_by, strict=True)
        wanted = {Rank(rank) for member, by in made_by if by == self._node for rank in member.ranks()}
        for share, slot, copy in self._sealed(order.snapshot, wanted):
            wanted.discard(copy.label.rank)
            if copy.nonce != order.nonce:
                for task in (copy.ahead, copy.work):
                    if task is not None:
                        task.cancel()
                copy.nonce, copy.work, copy.written, copy.outcome = order.nonce, None, 0, None
            if copy.outcome is not None:
                self._tell(copy.label.rank, copy.outcome)
            elif copy.work is None:
                self._begin_to_write(share, slot, copy)
        for rank in wanted:
            about = {"generation": order.snapshot.generation, "rank": rank, "step": order.snapshot.step}
            reason = "its copy is not in memory any more"
            self._tell(rank, {"save_failed": {**about, "reason": reason, "nonce": order.nonce}})

    def _sealed(self, snapshot: CheckpointRef | None, ranks: Collection[Rank]) -> list[tuple[Share, Slot, Copy]]:
        """The copies of this state by these ranks: of two, which a step may have, the one that is written already."""
        found: dict[Rank, tuple[Share, Slot, Copy]] = {}
        for share in self._all:
            for slot, copy in share.filled:
                rank = copy.label.rank
                if copy.label.snapshot != snapshot or copy.digests is None or rank not in ranks:
                    continue
                if rank not in found or copy.progress > found[rank][2].progress:
                    found[rank] = share, slot, copy
        return list(found.values())

    @property
    def _all(self) -> list[Share]:
        return [*self._shares.values(), *self._guests]

    def end(self) -> None:
        """Give everything back."""
        for share in self._shares.values():
            share.end()
        self._shares.clear()
        self._guests.end()

    def repeat(self) -> None:
        """Say again what is in memory: the stream on which it was said may be lost."""
        for event in self._spoken:
            self._say(event)

    async def entertain(self, peer: Stream) -> None:
        """Another agent wants a copy kept here."""
        await self._guests.entertain(peer)

    # --- what workers say ---

    def asked(self, number: int, size: int, plan: int) -> None:
        """The worker needs arenas of `size` bytes, for copies that are what the memory file `plan` says."""
        share = self._shares[number]
        if share.plan is not None:
            os.close(share.plan)
        share.plan, share.planned = plan, size
        self._run(share.disk.warm(), f"warm-{share.rank}")
        self._run(self._provide(share, size), f"reserve-{share.rank}")

    async def _provide(self, share: Share, size: int) -> None:
        worker = share.worker
        reused = share.size >= size and bool(share.slots)
        if not reused:
            share.outgrow()
            count, share.refused = self._affordable(share.rank, size)
            if not count:
                log.warning("no copies in memory: %s", share.refused)
                self._answer(worker, {"kind": "no_arenas", "reason": share.refused}, ())
                return
            if share.refused:
                log.warning("%s", share.refused)
            try:
                fds = await self._memory.reserve(share.memory, size, count)
            except JobFailed as error:
                share.refused = f"{human_size(size * count)} of memory could not be had: {error}"
                self._answer(worker, {"kind": "no_arenas", "reason": share.refused}, ())
                return
            share.take(fds, size)  # instead of those of another question, meanwhile
        free = [number for number, slot in enumerate(share.slots) if slot.copy is None]
        self._answer(worker, {"kind": "arenas", "size": size, "free": free}, [slot.fd for slot in share.slots])
        if all(each.slots for each in self._shares.values() if each.worker):
            self._guests.expect(max(each.size for each in self._shares.values()))
        if reused:
            await self._complete(share)

    def _affordable(self, rank: Rank, size: int) -> tuple[int, str]:
        """How many arenas of this size there is memory for, and why there are not as many as wanted."""
        left, where = self._memory.left()
        count = min(self._settings.slots, left // max(size, 1))
        return count, self._shortage(rank, size, count, where)

    def _shortage(self, rank: Rank, size: int, count: int, where: str) -> str:
        wanted = self._settings.slots
        if count == wanted:
            return ""
        what = f"rank {rank} needs {human_size(size * wanted)} for {wanted} copies of its share, and {where}"
        return f"{what}: it gets {count}" if count else f"{what}: its checkpoints are written while training waits"

    async def _complete(self, share: Share) -> None:
        """There may be memory by now for arenas that were refused."""
        async with share.completing:
            await self._add_slots(share)

    async def _add_slots(self, share: Share) -> None:
        worker, planned, size = share.worker, share.planned, share.size or share.planned
        while (count := len(share.slots)) < self._settings.slots:
            left, where = self._memory.left()
            if left < size:
                share.refused = self._shortage(share.rank, size, count, where)
                return
            try:
                (fd,) = await self._memory.reserve(share.memory, size, 1)
            except JobFailed as error:
                share.refused = f"{human_size(size)} of memory could not be had: {error}"
                return
            now = share.worker, share.planned, len(share.slots)
            if now != (worker, planned, count) or share.size not in (0, size):  # other workers, or another question
                await self._memory.give_back(share.memory, fd)
                return
            share.slots.append(Slot(fd))
            share.size = size
            self._answer(worker, {"kind": "arena", "size": planned, "slot": count}, [fd])
        share.refused = ""

    def copied(self, number: int, message: Mapping[str, Any], values: int | None) -> None:
        """The copy of a step is in the slot; `values` is a memory file, taken over."""
        share, formation = self._shares[number], self._formation
        assert formation is not None
        label = Label(formation.generation, share.rank, message)
        at = message["slot"]
        if share.plan is None or label.size != share.planned or not 0 <= at < len(share.slots):
            # not what was agreed on: with the plan of another copy, it would become a checkpoint of something else
            if values is not None:
                os.close(values)
            reason = f"a copy of {label.size} bytes in arena {at} does not fit the plan of {share.planned} bytes"
            self._tell(share.rank, {"save_failed": {**label.about, "reason": reason}})
            self.missed(share.rank, label.step)
            return
        slot = share.slots[at]
        share.empty(slot)
        slot.copy = copy = Copy(label, formation, os.dup(share.plan), values)
        if self._use.is_forgotten(label.snapshot):
            share.free(slot)
        else:
            copy.work = self._run(self._take(share, slot, copy), f"save-{share.rank}")

    def wrote(self, rank: Rank, step: Step) -> None:
        """The rank has written its share without a copy."""
        self._written.add(step)
        self._took(rank, step)

    def missed(self, rank: Rank, step: Step) -> None:
        """A rank could not copy or write its share of this step. It may have another copy: a step may have two."""
        formation = self._formation
        if formation is None or self._sealed(CheckpointRef(step, formation.generation), {rank}):
            return
        if self._missed.add(step):
            self._speak(SnapshotDropped(self._node, formation.generation, step))

    def _took(self, rank: Rank, step: Step) -> None:
        taken = self._taken.setdefault(step, set())
        taken.add(rank)
        shares = [share for share in self._shares.values() if share.worker and share.rank == rank]
        has = {copy.label.step for share in shares for _, copy in share.filled if copy.formation is self._formation}
        for older, by in self._taken.items():
            if older < step and rank not in by and older not in has:
                self.missed(rank, older)  # another rank of this node waits for it in vain
        formation = self._formation
        if formation is None or len(taken) < sum(bool(share.worker) for share in self._shares.values()):
            return
        for older in [each for each in self._taken if each <= step]:
            del self._taken[older]
        kept = all(len(each.slots) > 1 for each in self._shares.values() if each.worker)
        in_memory = kept and step not in self._written
        copies = [copy for each in self._shares.values() for _, copy in each.filled if copy.formation is formation]
        made = sorted((copy for copy in copies if copy.label.step == step), key=lambda copy: copy.label.rank)
        words = [(copy.label.rank, copy.digest, copy.label.message) for copy in made]
        compared = tuple((rank, *message["replica"]) for rank, _, message in words if message.get("replica"))
        digests = tuple((rank, digest) for rank, digest, _ in words)
        blocked = max((message["blocked"] for _, _, message in words if not message["durable"]), default=0.0)
        self._speak(SnapshotTaken(self._node, formation.generation, step, in_memory, digests, compared, blocked))

    def _speak(self, event: Event) -> None:
        self._spoken = [*self._spoken, event][-REMEMBERED:]
        self._say(event)

    # --- what becomes of a copy ---

    async def _take(self, share: Share, slot: Slot, copy: Copy) -> None:
        """Seal the copy, and write it meanwhile, if it is to become a checkpoint."""
        twins = [
            other for _, other in share.filled if other is not copy and other.label.snapshot == copy.label.snapshot
        ]
        ahead = None
        if copy.label.message["durable"] and not any(twin.progress for twin in twins):
            copy.writing = True
            copy.ahead = ahead = asyncio.create_task(self._writing.write(share, slot, copy, len(self._shares)))
        try:
            if await self._seal(share, slot, copy) and ahead is not None:
                await self._report(copy, ahead)
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)
        copy.work = None
        share.release(slot, self._use)

    async def _seal(self, share: Share, slot: Slot, copy: Copy) -> bool:
        """False: it could not be done, and was said."""
        label = copy.label
        try:
            done, fds = await share.memory.carry({"do": "seal", "size": label.size}, [slot.fd])
        except JobFailed as error:
            copy.writing = False
            self._fail(copy, str(error))
            self.missed(label.rank, label.step)
            return False
        copy.digests, copy.digest = fds[0], done["digest"]
        neighbour = copy.formation.neighbour(self._node)
        if neighbour is not None and copy.formation is self._formation and len(share.slots) > 1:
            copy.passing = self._run(self._visits.bring(share, slot, copy, neighbour), f"pass-{label.rank}")
        self._took(label.rank, label.step)
        return True

    def _begin_to_write(self, share: Share, slot: Slot, copy: Copy) -> None:
        copy.writing = True
        copy.work = self._run(self._write(share, slot, copy), f"write-{copy.label.rank}")

    async def _write(self, share: Share, slot: Slot, copy: Copy) -> None:
        await self._report(copy, self._writing.write(share, slot, copy, len(self._shares)))
        copy.work = None
        share.release(slot, self._use)

    async def _report(self, copy: Copy, writing: Awaitable[Written]) -> None:
        """What becomes of the writing of a sealed copy."""
        try:
            report, digest = await writing
            if digest != copy.digest:
                reason = "the copy in memory has changed since it was sealed: bad memory, or a program's stray write"
                raise JobFailed(reason)
        except JobFailed as error:
            copy.writing = False
            self._fail(copy, str(error))
        else:
            blocked = copy.label.message["blocked"]
            took = blocked + time.monotonic() - copy.made_at
            copy.outcome = {"shard": {**copy.label.about, "report": report, "blocked": blocked, "took": took}}
            self._tell(copy.label.rank, copy.outcome)

    def _fail(self, copy: Copy, reason: str) -> None:
        self._tell(copy.label.rank, {"save_failed": {**copy.label.about, "reason": reason, "nonce": copy.nonce}})

    def keep(self, generation: Generation, step: Step) -> None:
        """All nodes have sealed this step, and it is safe: older copies are of no use any more."""
        self._use.keep(CheckpointRef(step, generation))
        self._give_up()

    def forget(self, generation: Generation, step: Step, *, written: bool) -> None:
        """Some rank has no copy of this step: those of others are of no use. Nor is writing them, unless `written`."""
        self._use.forget(CheckpointRef(step, generation), written=written)
        self._give_up()

    def _give_up(self) -> None:
        for share in self._shares.values():
            share.give_up(self._use)
        self._guests.give_up()
        for share in self._shares.values():
            wanting = share.worker and share.plan is not None and len(share.slots) < self._settings.slots
            if wanting and not share.completing.locked():
                self._run(self._complete(share), f"complete-{share.rank}")

    def _freed(self, share: Share, slot: Slot) -> None:
        """The slot is the worker's again."""
        if share.worker and slot in share.slots:
            self._answer(share.worker, {"kind": "free", "slot": share.slots.index(slot)}, ())

    # --- views ---

    def report(self) -> tuple[SaveReport, ...]:
        """What is being written, for people to read."""
        now = time.monotonic()
        return tuple(
            SaveReport(
                copy.label.rank,
                copy.label.step,
                now - copy.since,
                copy.written,
                copy.label.size,
                now - copy.heard_at,
            )
            for share in self._all
            for _, copy in share.filled
            if copy.work is not None and copy.since
        )

    @property
    def reserved(self) -> int:
        """Bytes of all arenas, and of what belongs to the copies in them."""
        return sum(share.bytes for share in self._all)

    @property
    def refused(self) -> str:
        """Why a rank has fewer arenas than it should, or a guest none; empty when all have theirs."""
        return next((share.refused for share in self._shares.values() if share.refused), self._guests.refused)
