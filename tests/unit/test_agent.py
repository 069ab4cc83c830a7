"""How agents come to a leader, where the run directory fails them on the way. Real agents; workers that do nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcft import agent as agents
from hpcft import durable, terms
from hpcft.agent import Agent, Ended, Station
from hpcft.carriers import Carrier
from hpcft.errors import DamagedError, ExitCode
from hpcft.ids import NodeId
from hpcft.keeper import AGENT_RESTART
from hpcft.leader import Leader
from hpcft.membership import Timing
from hpcft.page import NodePage
from hpcft.rundir import RunDirectory
from hpcft.terms import TermRecord


class NoWorkers:
    """What an agent asks of its workers while it has none."""

    def open(self) -> None: ...
    def hold(self, descriptor: int) -> None: ...
    def kill_all(self) -> None: ...
    def tell(self, name: str, message: Any) -> None: ...
    async def close(self) -> None: ...
    async def ready(self) -> None: ...
    async def end(self, grace: float) -> tuple[str, ...]:
        return ()

    async def events(self) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield


class NoSnapshots:
    def end(self) -> None: ...


class NoRanks:
    def repeat(self) -> None: ...
    def forget(self) -> None: ...
    def report_progress(self) -> None: ...
    def report(self, now: float) -> None: ...
    def lowest_step(self) -> int:
        return 0

    def __len__(self) -> int:
        return 0


class Allocation:
    """Agents of one start, each on a loopback address of its own."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDirectory(directory)
        self.run.prepare()
        self.leads: list[TermRecord] = []
        self.trouble: Exception | None = None
        """Of whoever wants to lead, as long as it is set."""
        self.wanted = asyncio.Event()

    def agent(self, index: int) -> Agent:
        station = Station(
            node=NodeId(f"n{index}"),
            index=index,
            start="7.0",
            address=f"127.0.0.{index + 1}",
            workers=1,
            directory=self.run,
            timing=Timing(0.5, 1.0, 2.0),
            grace=0.0,
            kill_wait=30.0,
            branches=False,
            life=1,
        )
        return Agent(
            station,
            NodePage.create(1),
            workers=lambda see: NoWorkers(),  # type: ignore[arg-type, return-value]
            snapshots=lambda *a: NoSnapshots(),  # type: ignore[arg-type, return-value]
            ranks=lambda *a: NoRanks(),  # type: ignore[arg-type, return-value]
            lead=self._lead,
        )

    async def _lead(self, record: TermRecord, leaderless: float) -> Leader:
        self.leads.append(record)
        self.wanted.set()
        if self.trouble is not None:
            raise self.trouble
        await asyncio.Event().wait()
        raise AssertionError


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocation]:
    monkeypatch.setattr(agents, "import_torch", lambda: None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield Allocation(tmp_path)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)  # an agent that ends hears no signals any more


async def test_a_claim_that_was_made_and_seemed_to_fail_holds_nobody_up(
    allocation: Allocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record names an agent that does not lead: it can be reached, and has nothing to say."""
    sync, failed = durable.sync_directory, []

    def failing(path: Path) -> None:
        if path == allocation.run.terms and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(durable, "sync_directory", failing)
    living = [asyncio.create_task(allocation.agent(index).live()) for index in (0, 1)]
    try:
        await asyncio.wait_for(allocation.wanted.wait(), 60)
        assert failed
        assert [each.term for each in allocation.leads] == [2]
    finally:
        for task in living:
            task.cancel()
        await asyncio.gather(*living, return_exceptions=True)


async def test_an_earlier_lifes_carrier_keeps_nobody_out_and_its_workers_do(
    allocation: Allocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hang in the kernel, say, and have come to the keeper, which is this process here."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    carrier = Carrier()
    assert await carrier.carry({"do": "digest"}) == ({"digests": []}, [])
    agent = allocation.agent(0)
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", "hpcft.carrier", stdin=PIPE)
    try:
        assert agent._undead() == [worker.pid]
    finally:
        worker.kill()
        await worker.wait()
        carrier.leave_behind()
    assert agent._undead() == []


async def test_no_signal_that_slurm_may_send_ends_an_agent_at_once(allocation: Allocation) -> None:
    agent = allocation.agent(0)
    living = asyncio.create_task(agent.live())
    try:
        await asyncio.wait_for(allocation.wanted.wait(), 60)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR2)
        for _ in range(6000):
            if agent._page.warned_ns:
                break
            await asyncio.sleep(0.01)
        assert agent._page.warned_ns and not living.done()
        agent._end(0, "enough")
        await living
        agent._signalled(signal.SIGTERM)  # one that was on its way: nobody is left to heed it
    finally:
        living.cancel()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def test_after_several_agents_that_cannot_lead_the_run_is_given_up(allocation: Allocation) -> None:
    allocation.trouble = OSError(errno.EACCES, "Permission denied")
    codes = []
    for _ in range(agents.LEADERS_TRIED):
        ended: Ended = await asyncio.wait_for(allocation.agent(0).live(), 60)
        codes.append(ended.code)
    assert codes == [AGENT_RESTART] * (agents.LEADERS_TRIED - 1) + [ExitCode.UNUSABLE]
    assert "Permission denied" in ended.reason
    assert len(list(allocation.run.verdicts.iterdir())) == 1


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), AGENT_RESTART),
        (DamagedError("the journal is damaged", "restore it"), ExitCode.DAMAGED),
    ],
)
async def test_only_damage_ends_the_run_where_a_leader_cannot_read_its_history(
    allocation: Allocation, trouble: Exception, code: int
) -> None:
    allocation.trouble = trouble
    ended: Ended = await asyncio.wait_for(allocation.agent(0).live(), 60)
    assert ended.code == code
    holder = terms.newest(allocation.run.terms)
    assert holder is not None and terms.lease(allocation.run.terms, holder.term).released
    assert bool(list(allocation.run.verdicts.iterdir())) == (code == ExitCode.DAMAGED)
