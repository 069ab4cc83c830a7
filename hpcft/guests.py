"""Copies that outlive their node: what this node keeps for the one before it, and what it brings to the next.

Where the formation says so, each sealed copy goes to the next node as well (`Visits`), and this node keeps the copies
of the one before it, its *guests* (`Guests`): in arenas of their own, under the same rules as its own copies. They are
handed out or written only where their own node cannot do it. What the two agents say to each other is in `neighbours`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

from hpcft.carriers import JobFailed
from hpcft.copies import Copy, Latest, Memory, Say, Share, Slot, Use
from hpcft.durable import digest_of_chunks
from hpcft.events import CheckpointRef, CopiesAlone, CopiesKept, Formation, Member
from hpcft.ids import NodeId, Rank, Step
from hpcft.neighbours import SETTLING_SECONDS, Dial, NotKeptError, Offer, hand_over, offer_of, take_over
from hpcft.stream import Stream, StreamClosed
from hpcft.units import human_size

log = logging.getLogger("hpcft.guests")

GUEST_SLOTS = 2
"""Of each guest: the newest that is safe, and the one that comes."""
AVOIDED_SECONDS = 60.0
"""A neighbour that could not take a copy is asked again after so long: each try may hold a copy for a while."""


class Guests:
    """The copies that this node keeps for another one."""

    def __init__(self, node: NodeId, address: str, memory: Memory, use: Use, say: Say) -> None:
        """`address`: this node's own, where copies are received."""
        self._node = node
        self._address = address
        self._memory = memory
        self._use = use
        self._say = say
        self._formation: Formation | None = None
        self._shares: dict[Rank, Share] = {}
        """By the rank that has made the copies."""
        self._incoming: set[asyncio.Task[None]] = set()
        """Copies that are being received."""
        self._freed = asyncio.Event()
        """An arena is free."""
        self._foreseen = ""
        """Why there will be no room for guests that have not come yet."""

    def __iter__(self) -> Iterator[Share]:
        return iter(list(self._shares.values()))

    @property
    def refused(self) -> str:
        """Why copies cannot be kept; empty when all can."""
        return next((share.refused for share in self if share.refused), self._foreseen)

    def begin(self, formation: Formation, origin: CheckpointRef | None) -> None:
        """A generation begins, and starts from `origin`, if it is in memory."""
        self._formation, self._foreseen = formation, ""
        for task in self._incoming:
            task.cancel()
        for share in self:
            share.refused = ""
            share.keep_only(origin)
        self._dismiss()

    def expect(self, size: int) -> None:
        """This node's own copies take arenas of `size` bytes: those of its guests will take about as much. Say so in
        time, if there is no memory for them."""
        guest = self._formation.guest(self._node) if self._formation is not None else None
        if guest is None or any(share.slots for share in self):
            return
        needed = GUEST_SLOTS * size * guest.workers
        left, where = self._memory.left()
        if needed <= left:
            self._foreseen = ""
        elif not self._foreseen:
            self._foreseen = (
                f"the copies of {guest.node} will need about {human_size(needed)} on its neighbour {self._node}, and "
                f"{where}: they will not outlive their node"
            )
            log.warning("%s", self._foreseen)

    def give_up(self) -> None:
        """What is of no use any more; arenas of former guests go with the last copy in them."""
        for share in self:
            share.give_up(self._use)
        self._dismiss()

    def _dismiss(self) -> None:
        guest = self._formation.guest(self._node) if self._formation is not None else None
        ranks = guest.ranks() if guest is not None else range(0)
        for rank, share in list(self._shares.items()):
            if rank not in ranks and not share.filled:
                self._shares.pop(rank).end()

    def end(self) -> None:
        for task in self._incoming:
            task.cancel()
        for share in self:
            share.end()
        self._shares.clear()

    async def entertain(self, peer: Stream) -> None:
        """Another agent wants a copy kept here: receive it, and tell the leader when all of that node's are here."""
        task = asyncio.current_task()
        assert task is not None
        self._incoming.add(task)
        try:
            async with asyncio.timeout(SETTLING_SECONDS):
                offer = Offer.parse(await peer.receive())
            async with asyncio.timeout(offer.limit):
                refused = await self._keep(peer, offer)
            peer.send({"refused": refused} if refused else {"kept": True})
        except (KeyError, TypeError, ValueError, JobFailed, TimeoutError) as error:
            peer.send({"refused": str(error) or "it took too long"})
        except StreamClosed as closed:
            log.info("a copy was to come from %s, and did not: %s", peer.hello.get("node"), closed.reason)
        finally:
            self._incoming.discard(task)
            peer.close()

    async def _keep(self, peer: Stream, offer: Offer) -> str:
        """Receive the copy. Returns why not."""
        label, formation, guest = offer.label, self._formation, None
        if formation is not None and formation.generation == label.generation:
            guest = formation.guest(self._node)
        who = (peer.hello.get("node"), peer.hello.get("incarnation"))
        if formation is None or guest is None or who != (guest.node, guest.incarnation):
            return f"{self._node} is not its neighbour in generation {label.generation}"
        if label.rank not in guest.ranks():
            return f"rank {label.rank} is not one of {guest.node}"
        share = self._shares.setdefault(label.rank, Share(lambda *_: self._freed.set(), label.rank))
        async with share.turn:
            if share.size < label.size:
                share.refused = await self._provide(share, label.size, guest)
                if share.refused:
                    return share.refused
            slot = await self._vacant(share)
            if self._use.is_outdated(label.snapshot):
                return f"step {label.step} is of no use any more"
            digests, files = await take_over(peer, self._address, offer, share.memory, slot.fd)
            values = files[1] if len(files) > 1 else None
            copy = Copy(label, formation, files[0], values, digest_of_chunks(offer.digests), digests)
            if self._use.is_outdated(label.snapshot):  # late
                copy.close()
                self._freed.set()
                return f"step {label.step} is of no use any more"
            slot.copy = copy
        if all(each in self._shares and self._shares[each].holds(label.snapshot) for each in map(Rank, guest.ranks())):
            self._say(CopiesKept(self._node, label.generation, label.step, guest.node))
        return ""

    async def _vacant(self, share: Share) -> Slot:
        """A slot whose copy is of no use any more, as soon as there is one."""
        while True:
            for slot in share.slots:
                if slot.copy is None:
                    return slot
            self._freed.clear()
            await self._freed.wait()

    async def _provide(self, share: Share, size: int, guest: Member) -> str:
        """Make the arenas. Returns why not."""
        left, where = self._memory.left()
        needed = size * GUEST_SLOTS
        if needed > left:
            return (
                f"the copies of {guest.node}'s rank {share.rank} need {human_size(needed)} on its neighbour "
                f"{self._node}, and {where}: they do not outlive their node"
            )
        share.take(await self._memory.reserve(share.memory, size, GUEST_SLOTS), size)
        self._foreseen = ""
        return ""


class Visits:
    """Brings this node's sealed copies to its neighbour."""

    def __init__(self, node: NodeId, dial: Dial, say: Say) -> None:
        self._node = node
        self._dial = dial
        self._say = say
        self._avoided = (0.0, "")
        """Until when the neighbour is not asked, and why."""
        self._alone: Latest[Step] = Latest()
        """Steps of this generation of which the neighbour does not have all copies."""

    def begin(self) -> None:
        """A generation begins: another neighbour, perhaps."""
        self._avoided, self._alone = (0.0, ""), Latest()

    async def bring(self, share: Share, slot: Slot, copy: Copy, neighbour: Member) -> None:
        """Bring the copy there, or tell the leader that the neighbour has none."""
        label = copy.label
        try:
            async with share.turn:
                until, why = self._avoided
                if time.monotonic() < until:
                    raise NotKeptError(why)
                await self._try(share, slot, copy, neighbour)
        except NotKeptError as error:
            if time.monotonic() >= self._avoided[0]:
                log.warning("%s has no copy of rank %d's step %d: %s", neighbour.node, label.rank, label.step, error)
                self._avoided = (time.monotonic() + AVOIDED_SECONDS, str(error))
            if self._alone.add(label.step):
                self._say(CopiesAlone(self._node, label.generation, label.step, str(error)))
        copy.passing = None

    async def _try(self, share: Share, slot: Slot, copy: Copy, neighbour: Member) -> None:
        assert copy.digests is not None
        try:
            offer = await offer_of(share.passing, copy.label, copy.digests, copy.files)
            async with asyncio.timeout(offer.limit):
                peer = await self._dial(neighbour)
                try:
                    await hand_over(peer, neighbour.address, offer, share.passing, [slot.fd, *copy.files])
                finally:
                    peer.close()
        except (JobFailed, StreamClosed) as error:
            raise NotKeptError(str(error)) from error
        except TimeoutError as error:
            raise NotKeptError(f"it has taken longer than {offer.limit:.0f} s") from error
