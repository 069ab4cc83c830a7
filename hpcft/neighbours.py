"""Copies for a neighbour: what two agents say to each other, so that what one has in memory outlives it.

    owner -> keeper    {"offer": …}: whose share of which step it is, with the digests of its seal
    keeper -> owner    {"at": port, "token"}: where a carrier of the keeper waits for it; or {"refused": why}
                       the bytes go from carrier to carrier (see `transfer`)
    keeper -> owner    {"kept": true} or {"refused": why}

Over an authenticated stream, one for each share and step, that the owner opens. The token is for one connection. No
agent sees the bytes, and whatever hangs is bounded in time.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from hpcft.carriers import Carrier, JobFailed
from hpcft.checkpoint.arena import content_of, memory_file
from hpcft.copies import Label
from hpcft.durable import chunk_count
from hpcft.events import Member
from hpcft.ids import Generation, Rank
from hpcft.stream import Stream, StreamClosed
from hpcft.transfer import TOKEN_BYTES
from hpcft.units import human_size

SLOWEST = 20e6
"""Bytes per second: what takes longer than this is given up."""
SETTLING_SECONDS = 30.0
"""Beside the bytes: for an arena that has to be made, say."""
MORE_BYTES = 256 << 20
"""What belongs to a copy, its plan or its values, is not larger: it is received without having been reserved."""

Dial = Callable[[Member], Awaitable[Stream]]
"""Opens a stream to a member's agent. StreamClosed: it is not reachable."""


class NotKeptError(Exception):
    """The neighbour has no copy; the reason is for people."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One rank's sealed copy of a step."""

    label: Label
    digests: tuple[str, ...]
    """Of the chunks of the image."""
    more: tuple[tuple[int, tuple[str, ...]], ...]
    """Size and digests of the plan, and of the values if there are any."""

    @property
    def limit(self) -> float:
        """Seconds that its transfer may take."""
        return SETTLING_SECONDS + self.label.size / SLOWEST

    def to_json(self) -> dict[str, Any]:
        label = self.label
        whose = {"generation": label.generation, "rank": label.rank, "message": dict(label.message)}
        return {**whose, "digests": self.digests, "more": self.more}

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Offer:
        """KeyError, TypeError, ValueError: that is no offer."""
        found = said["offer"]
        label = Label(Generation(int(found["generation"])), Rank(int(found["rank"])), dict(found["message"]))
        more = tuple((int(size), tuple(map(str, digests))) for size, digests in found["more"])
        offer = cls(label, tuple(map(str, found["digests"])), more)
        if label.step < 0 or label.size <= 0 or len(more) not in (1, 2):
            raise ValueError("not an offer of a copy")
        for size, listed in ((label.size, offer.digests), *more):
            if len(listed) != chunk_count(size):
                raise ValueError(f"not an offer of a copy: {len(listed)} digests for {size} bytes")
        if any(size > MORE_BYTES for size, _ in more):
            raise ValueError(f"what belongs to a copy may have {human_size(MORE_BYTES)} at most")
        return offer


async def offer_of(carrier: Carrier, label: Label, digests: int, more: Sequence[int]) -> Offer:
    """What is said of a sealed copy; `digests` and `more` are its memory files. JobFailed: they could not be read."""
    done, _ = await carrier.carry({"do": "digest"}, more)
    sizes = [os.fstat(fd).st_size for fd in more]
    described = tuple((size, tuple(found)) for size, found in zip(sizes, done["digests"], strict=True))
    return Offer(label, tuple(orjson.loads(content_of(digests))), described)


async def hand_over(peer: Stream, host: str, offer: Offer, carrier: Carrier, fds: Sequence[int]) -> None:
    """Have the agent at the other end keep the copy: `fds` are its arena, its plan, and its values if it has any.

    Cancelled, or NotKeptError: it may have nothing of it.
    """
    try:
        peer.send({"offer": offer.to_json()})
        where = await peer.receive()
        if "at" in where:
            sizes = [offer.label.size, *(size for size, _ in offer.more)]
            job = {"do": "send", "host": host, "port": where["at"], "token": where["token"], "sizes": sizes}
            try:
                await carrier.carry(job, fds)
            except JobFailed as error:
                raise NotKeptError(await _said_meanwhile(peer) or str(error)) from error
            where = await peer.receive()
        if where.get("kept") is not True:
            raise NotKeptError(str(where.get("refused")))
    except (StreamClosed, ValueError) as error:  # a message that is too long
        raise NotKeptError(str(error)) from error


async def _said_meanwhile(peer: Stream) -> str:
    """The keeper's own word on what went wrong is the better one."""
    with suppress(StreamClosed, TimeoutError):
        async with asyncio.timeout(1.0):
            return str((await peer.receive()).get("refused") or "")
    return ""


async def take_over(peer: Stream, host: str, offer: Offer, carrier: Carrier, arena: int) -> tuple[int, list[int]]:
    """Receive the copy into the arena, on an address of this node.

    Returns memory files that are the caller's: the digests; the plan, and the values if there are any. What they say is
    what was sealed.

    Raises:
        JobFailed: it did not come, or is not what was sealed. What is in the arena is of no use.
    """
    digests = memory_file("hpcft-digests", orjson.dumps(offer.digests))
    try:
        done, _ = await carrier.carry({"do": "listen", "host": host})
        token = secrets.token_hex(TOKEN_BYTES)
        peer.send({"at": done["port"], "token": token})
        job = {"do": "receive", "token": token, "size": offer.label.size, "more": offer.more}
        _, files = await carrier.carry(job, [arena, digests])
    except BaseException:
        os.close(digests)
        carrier.leave_behind()  # it may be listening
        raise
    return digests, files
