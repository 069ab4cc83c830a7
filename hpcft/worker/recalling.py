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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import orjson
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from hpcft import durable, prefault
from hpcft.checkpoint.arena import content_of
from hpcft.checkpoint.files import SLICE_BYTES
from hpcft.checkpoint.load import SavedState
from hpcft.checkpoint.needs import Need, put_chunk
from hpcft.checkpoint.pieces import TensorShape, find_gap, index_digest
from hpcft.checkpoint.share import raw
from hpcft.checkpoint.turns import do_in_turn
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
    memory: mmap.mmap | None

    def edges(self, chunk: int) -> tuple[int, int]:
        return chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, self.plan.size)

    def within(self, chunk: int, needs: Iterable[Need]) -> list[Need]:
        """What is needed of a chunk."""
        begin, end = self.edges(chunk)
        return [need for need in needs if need.begin < end and need.end > begin]

    def changed(self) -> Forgotten:
        return Forgotten(f"the copy of the former rank {self.plan.rank} has changed since it was sealed")


def recall(link: Link, restore: Restore, rank: Rank, sharing: int = 1) -> SavedState:
    """The state that the agents hold, of which no tensor has been copied yet.

    To be called on all ranks, of which `sharing` are on this node. Forgotten: it is not there, or not whole.
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
    ordered = [images[number] for number in sorted(images)]
    together = [(images[number], Rank(sources[number])) for number in sorted(images)]
    return SavedState(
        f"the copy of step {restore.step} in memory",
        index,
        orjson.loads(images[0].values)["state"],
        tuple(image.plan.placed for image in ordered),
        partial(_take_here, ordered, sharing) if restore.local else partial(_take_together, together, rank),
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
    memory = mmap.mmap(fds[0], os.fstat(fds[0]).st_size, prot=mmap.PROT_READ)
    if memory.size() < plan.size:
        raise ValueError("its memory is shorter than what should be in it")
    values = content_of(fds[3]) if len(fds) > 3 else b""
    return _Image(plan, orjson.loads(content_of(fds[2])), values, memory)


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


def _take_here(images: Sequence[_Image], sharing: int, needs: Sequence[Sequence[Need]], whole: bool) -> None:
    """Put what is needed of copies in this node's memory where it belongs, in threads."""
    chunks = [
        _Chunk(image, number, inside)
        for image, needed in zip(images, needs, strict=True)
        for number in range(len(image.digests))
        if (inside := image.within(number, needed))
    ]
    do_in_turn(chunks, _copy, sharing)


@dataclass(frozen=True, slots=True)
class _Chunk:
    image: _Image
    number: int
    needs: Sequence[Need]


def _copy(chunk: _Chunk, stopped: Callable[[], bool]) -> None:
    """Digest and copy it a slice at a time, so that the copy finds it in the processor's cache."""
    image = chunk.image
    assert image.memory is not None
    begin, end = image.edges(chunk.number)
    prefault.for_reading(image.memory, begin, end)
    view = memoryview(image.memory)
    hasher = xxhash.xxh3_128()
    for start in range(begin, end, SLICE_BYTES):
        if stopped():
            return
        part = view[start : min(start + SLICE_BYTES, end)]
        hasher.update(part)
        put_chunk(chunk.needs, start, part)
    if hasher.hexdigest() != image.digests[chunk.number]:
        raise image.changed()


def _take_together(
    images: Sequence[tuple[_Image, Rank]], rank: Rank, needs: Sequence[Sequence[Need]], whole: bool
) -> None:
    """The same of copies that are not all on this node, each chunk broadcast by the first rank of one that has it."""
    for (image, source), needed in zip(images, needs, strict=True):
        scratch = torch.empty(min(CHUNK_BYTES, image.plan.size), dtype=torch.uint8)
        for number, expected in enumerate(image.digests):
            begin, end = image.edges(number)
            own = None if image.memory is None else memoryview(image.memory)[begin:end]
            received = _broadcast(scratch[: end - begin], own if rank == source else None, source)
            part = received if own is None else own
            if durable.digest(part) != expected:
                raise image.changed()
            put_chunk(image.within(number, needed), begin, part)


def _broadcast(scratch: Tensor, own: memoryview | None, source: Rank) -> memoryview:
    place = raw(scratch)
    if own is not None:
        place[:] = own
    dist.broadcast(scratch, source)
    return place
