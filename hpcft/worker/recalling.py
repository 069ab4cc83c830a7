"""From the copies in the agents' memory to the state: nobody reads a file, and no agent moves a byte over the network.

Each agent hands its copies to all its workers. What a node does not have itself comes from the first rank of the node
that has it, by broadcast, a chunk at a time, over the process group that the generation has formed anyway. Every
chunk is compared with the digest that was taken when the copy was sealed.

All ranks go through the copies in the same order, the ranks of the world that made them, and take part in every
broadcast, whether or not they need anything of it.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from hpcft import durable
from hpcft.checkpoint.arena import content_of
from hpcft.checkpoint.load import SavedState
from hpcft.checkpoint.needs import Need, put_chunk
from hpcft.checkpoint.pieces import TensorShape, find_gap, index_digest
from hpcft.checkpoint.share import raw
from hpcft.checkpoint.write import Plan
from hpcft.durable import CHUNK_BYTES
from hpcft.ids import Rank
from hpcft.worker.link import Link
from hpcft.worker.spec import Restore

ANSWER_SECONDS = 60.0
"""How long the agent may take to hand out what it has: it has it."""


class Forgotten(BaseException):
    """A copy in memory could not be had, or is not what was sealed. Not an Exception: nobody should catch it."""


@dataclass(frozen=True, slots=True)
class _Image:
    """A copy: what it is, what its chunks must be, and its bytes, where they are in this node's memory."""

    plan: Plan
    digests: Sequence[str]
    values: bytes
    view: memoryview | None


def recall(link: Link, restore: Restore, rank: Rank) -> SavedState:
    """The state that the agents hold, of which no tensor has been copied yet.

    To be called on all ranks. Forgotten: it is not there, or not whole.
    """
    here = _local(link)
    images: dict[int, _Image] = {}
    for holder in restore.memory:
        mine = {number: here[number] for number in holder.ranks if number in here}
        if not restore.local:
            mine = _tell_all(mine, Rank(holder.source), rank)
        images |= mine
        if missing := [number for number in holder.ranks if number not in images]:
            raise Forgotten(f"the copies of the former ranks {missing} are not in memory")
    pieces = [placed.piece for image in images.values() for placed in image.plan.placed]
    index = {piece.name: TensorShape(piece.dtype, piece.shape) for piece in pieces}
    plans = {image.plan.index for image in images.values()}
    if plans != {index_digest(index)} or (gap := find_gap(pieces)):
        raise Forgotten(f"the copies in memory are not one state{'' if plans else f': {gap}'}")
    sources = {number: holder.source for holder in restore.memory for number in holder.ranks}
    ordered = [(image, None if restore.local else sources[number]) for number, image in sorted(images.items())]
    return SavedState(
        f"the copy of step {restore.step} in memory",
        index,
        orjson.loads(images[0].values)["state"],
        tuple(image.plan.placed for image, _ in ordered),
        partial(_take_all, ordered, rank),
    )


def _local(link: Link) -> dict[int, _Image]:
    """What the agent of this node has, by the rank that made it."""
    found: dict[int, _Image] = {}
    deadline = time.monotonic() + ANSWER_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        link.check_lease()
        heard = link.hear(min(left, 0.5))
        if heard is None:
            continue
        message, fds = heard
        try:
            match message:
                case {"kind": "image", "rank": int() as number}:
                    found[number] = _open(fds)
                case {"kind": "images", "count": int()}:
                    return found
        except (OSError, ValueError) as error:
            raise Forgotten(f"the copy of the former rank {message.get('rank')} cannot be used: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)
    raise Forgotten(f"the agent has not handed out its copies in {ANSWER_SECONDS:.0f} s")


def _open(fds: Sequence[int]) -> _Image:
    plan = Plan.parse(content_of(fds[1]))
    view = memoryview(mmap.mmap(fds[0], os.fstat(fds[0]).st_size, prot=mmap.PROT_READ))
    values = content_of(fds[3]) if len(fds) > 3 else b""
    return _Image(plan, orjson.loads(content_of(fds[2])), values, view[: plan.size])


def _tell_all(mine: dict[int, _Image], source: Rank, rank: Rank) -> dict[int, _Image]:
    """Have every rank know what the copies are that the node of `source` holds."""
    said = b""
    if rank == source:
        said = orjson.dumps(
            [
                [number, image.plan.to_bytes().decode(), image.digests, image.values.decode()]
                for number, image in mine.items()
            ]
        )
    length = torch.tensor([len(said)])
    dist.broadcast(length, source)
    content = torch.frombuffer(bytearray(said) or bytearray(int(length)), dtype=torch.uint8)
    dist.broadcast(content, source)
    told = orjson.loads(content.numpy().tobytes())
    return {
        number: mine.get(number) or _Image(Plan.parse(plan.encode()), digests, values.encode(), None)
        for number, plan, digests, values in told
    }


def _take_all(
    images: Sequence[tuple[_Image, Rank | None]], rank: Rank, needs: Sequence[Sequence[Need]], whole: bool
) -> None:
    for (image, source), needed in zip(images, needs, strict=True):
        _take(image, source, rank, needed)


def _take(image: _Image, source: Rank | None, rank: Rank, needs: Sequence[Need]) -> None:
    """Put what is needed of the copy where it belongs; from another node's memory if `source` says so."""
    scratch = torch.empty(0, dtype=torch.uint8)
    if source is not None:
        scratch = torch.empty(min(CHUNK_BYTES, image.plan.size), dtype=torch.uint8)
    for chunk, expected in enumerate(image.digests):
        begin = chunk * CHUNK_BYTES
        end = min(begin + CHUNK_BYTES, image.plan.size)
        inside = [need for need in needs if need.begin < end and need.end > begin]
        part = image.view[begin:end] if image.view is not None else None
        if source is not None:
            received = _broadcast(scratch[: end - begin], part if rank == source else None, source)
            part = part or received
        elif not inside:
            continue
        assert part is not None
        if durable.digest(part) != expected:
            raise Forgotten(f"the copy of the former rank {image.plan.rank} has changed since it was sealed")
        put_chunk(inside, begin, part)


def _broadcast(scratch: Tensor, own: memoryview | None, source: Rank) -> memoryview:
    place = raw(scratch)
    if own is not None:
        place[:] = own
    dist.broadcast(scratch, source)
    return place
