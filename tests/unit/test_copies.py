"""What copies take of a node's memory and of its way to the disk, and which of them are of use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from hpcft import copies
from hpcft.carriers import Carrier
from hpcft.checkpoint.arena import memory_file
from hpcft.copies import MARGIN_BYTES, REMEMBERED, Copy, Label, Latest, Memory, Share, Use
from hpcft.events import CheckpointRef, Formation
from hpcft.ids import Generation, Rank, Step, Term
from hpcft.memory import Headroom
from hpcft.writing import Bandwidth

FORMATION = Formation(Term(1), Generation(1), (), None, "0")


def ref(step: int, generation: int = 1) -> CheckpointRef:
    return CheckpointRef(Step(step), Generation(generation))


def test_only_the_latest_are_remembered() -> None:
    latest: Latest[int] = Latest()
    assert [latest.add(number) for number in (0, 0, *range(1, 3 * REMEMBERED))][:3] == [True, False, True]
    assert [number in latest for number in (2 * REMEMBERED - 1, 2 * REMEMBERED)] == [False, True]


def test_a_copy_is_of_use_until_a_newer_one_is_kept_or_nobody_can_start_from_it() -> None:
    use = Use()
    use.begin(None)
    assert not use.is_outdated(ref(10))
    use.keep(ref(10))
    use.forget(ref(20), written=True)
    use.forget(ref(30), written=False)
    assert [use.is_outdated(ref(step)) for step in (9, 10, 11, 20, 30)] == [True, False, False, True, True]
    assert [use.is_forgotten(ref(step)) for step in (9, 20, 30)] == [False, False, True]
    assert not use.is_outdated(ref(30, generation=2)), "of another generation"


def test_an_outgrown_arena_counts_as_what_it_is_and_what_belongs_to_a_copy_counts_once() -> None:
    def arena(size: int) -> int:
        return memory_file("arena", bytes(size))

    plan = memory_file("plan", bytes(300))
    share = Share(lambda *_: None)
    share.take([arena(84_000), arena(84_000)], 84_000)
    label = Label(Generation(1), Rank(0), {"step": 1, "size": 68_000})
    for slot in share.slots:
        slot.copy = Copy(label, FORMATION, os.dup(plan), memory_file("values", bytes(20)))
    share.take([arena(100_000)], 100_000)
    assert share.bytes == 2 * 84_000 + 100_000 + 300 + 2 * 20
    share.end()
    assert share.bytes == 0
    os.close(plan)


class Slow(Carrier):
    """Makes arenas when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.done = asyncio.Event()

    async def carry(
        self, job: Any, fds: Any = (), told: Callable[[int], None] = lambda made: None, patience: float = 1.0
    ) -> tuple[dict[str, Any], list[int]]:
        self.told = told
        self.asked.set()
        await self.done.wait()
        return {}, []


async def test_arenas_that_are_being_made_are_taken_from_the_room_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is still missing of them: the rest has left what the kernel calls free."""
    total = 10 << 30
    free = total
    monkeypatch.setattr(copies, "headroom", lambda: Headroom(free, "the machine"))
    monkeypatch.setattr(copies, "MARGIN", 0.0)
    memory, carrier = Memory(None, lambda: 0), Slow()
    making = asyncio.create_task(memory.reserve(carrier, 1 << 30, 3))
    await carrier.asked.wait()
    for made in (0, 1 << 30, 3 << 30):
        free = total - made
        carrier.told(made)
        assert memory.left()[0] == total - (3 << 30) - MARGIN_BYTES
    assert Memory(5 << 30, lambda: 2 << 30).left() == (3 << 30, "checkpoint.memory leaves 3 GiB")
    carrier.done.set()
    await making
    free = total
    assert memory.left()[0] == total - MARGIN_BYTES


async def test_a_configured_limit_counts_all_of_what_is_being_made() -> None:
    memory, carrier = Memory(8 << 20, lambda: 1 << 20), Slow()
    making = asyncio.create_task(memory.reserve(carrier, 1 << 20, 3))
    await carrier.asked.wait()
    carrier.told(3 << 20)
    assert memory.left() == (4 << 20, "checkpoint.memory leaves 4 MiB")
    carrier.done.set()
    await making


async def test_writers_together_have_the_bandwidth_of_the_node() -> None:
    """Each of its ranks a part; a guest's copy waits for one of these."""
    bandwidth = Bandwidth(300.0)
    going: list[float] = []
    most = 0.0

    async def write(parts: int) -> None:
        nonlocal most
        async with bandwidth.part(parts) as rate:
            assert rate is not None
            going.append(rate)
            most = max(most, sum(going))
            for _ in range(3):
                await asyncio.sleep(0)
            going.remove(rate)

    await asyncio.gather(*(write(3) for _ in range(8)), write(2))
    assert most == pytest.approx(300.0)
    blocked = asyncio.create_task(write(1))
    async with bandwidth.part(3):
        for _ in range(5):
            await asyncio.sleep(0)
        assert not blocked.done() and not going
    await blocked
    async with Bandwidth(None).part(3) as rate:
        assert rate is None
