"""A leader's claim on its term, with a file system that answers when the test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcft import renewal, terms
from hpcft.ids import Incarnation, NodeId, Term
from hpcft.renewal import Renewal
from hpcft.terms import TermLease, TermRecord

TERM = Term(1)


class SlowDisk:
    """Renewals, not releases, reach the directory when `go` is set."""

    def __init__(self) -> None:
        self.write = terms.renew
        self.under_way = threading.Event()
        self.go = threading.Event()
        self.through = threading.Event()

    def renew(self, directory: Path, term: Term, sign: TermLease) -> None:
        if not sign.released:
            self.under_way.set()
            assert self.go.wait(30)
        self.write(directory, term, sign)
        if sign.released:
            self.through.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SlowDisk:
    slow = SlowDisk()
    monkeypatch.setattr(terms, "renew", slow.renew)
    assert terms.claim(tmp_path, TermRecord(TERM, NodeId("a"), Incarnation("a1"), "10.0.0.1", 4711, "17.0"))
    return slow


def renewing(directory: Path, renewed: Callable[[float], None]) -> Renewal:
    def deposed(why: str) -> None:
        raise AssertionError(why)

    return Renewal(directory, TERM, 0.01, renewed, deposed)


async def test_a_renewal_that_is_under_way_does_not_undo_the_release(tmp_path: Path, disk: SlowDisk) -> None:
    renewed: list[float] = []
    held = renewing(tmp_path, renewed.append)
    held.start()
    assert await asyncio.to_thread(disk.under_way.wait, 30)
    release = asyncio.create_task(asyncio.to_thread(held.release))
    await asyncio.sleep(0.05)
    assert not release.done() and not disk.through.is_set(), "it waits for its turn"
    disk.go.set()
    await release
    assert terms.lease(tmp_path, TERM) == TermLease(1_000_001, released=True)
    assert renewed == []


async def test_a_renewal_that_hangs_is_not_waited_for_and_releases_the_term_itself(
    tmp_path: Path, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "RELEASE_SECONDS", 0.1)
    held = renewing(tmp_path, lambda began: None)
    held.start()
    assert await asyncio.to_thread(disk.under_way.wait, 30)
    await asyncio.wait_for(asyncio.to_thread(held.release), 30)
    assert not disk.through.is_set()
    disk.go.set()
    assert await asyncio.to_thread(disk.through.wait, 30)
    assert terms.lease(tmp_path, TERM).released


async def test_what_is_released_is_renewed_no_more(tmp_path: Path, disk: SlowDisk) -> None:
    disk.go.set()
    first = asyncio.get_running_loop().create_future()
    held = renewing(tmp_path, lambda began: None if first.done() else first.set_result(began))
    held.start()
    await asyncio.wait_for(first, 30)
    await asyncio.to_thread(held.release)
    sign = terms.lease(tmp_path, TERM)
    await asyncio.sleep(0.1)  # ten intervals
    assert sign.released and terms.lease(tmp_path, TERM) == sign
