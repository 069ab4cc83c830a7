"""The daemon of one node: it follows a leader, or becomes one, and keeps this node's workers.

Theory of operation
-------------------
An agent's life is one incarnation. It looks for the holder of the newest term, or claims the next one; dials the
leader; and from then on does what its `Membership` says: that pure machine decides what an order means, when the
lease is over, what to acknowledge, and the agent performs the effects. Facts about workers go to the leader.

Crash-only: an agent that was fenced, or whose leader was lost while workers ran, does not repair itself. It kills
its workers and ends; the keeper starts the next incarnation, which comes in through the same door as a fresh one.

Everything here runs on one event loop, without blocking: the run directory, the store and the logs are reached on
named threads. All times are seconds of CLOCK_BOOTTIME, the clock of the shared page.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from hpcft import process, stream, terms, verdicts, wire
from hpcft import secret as run_secret
from hpcft.carriers import is_carrier
from hpcft.errors import DamagedError, ExitCode, HpcftError, NotFoundError, UnusableError, UsageError
from hpcft.events import (
    Confirm,
    Event,
    Formation,
    Member,
    NodeHeard,
    Outcome,
    PeerAnswered,
    Probe,
    Reach,
    Verdict,
    WorldAcknowledged,
    WorldRefused,
)
from hpcft.ids import Generation, Incarnation, NodeId, Step, Term
from hpcft.keeper import AGENT_RESTART, Inherited
from hpcft.leader import Leader, SteppedDown
from hpcft.membership import (
    Acknowledge,
    Effect,
    ExtendLease,
    Fence,
    ForgetCopies,
    KeepCopies,
    KillWorkers,
    LookAt,
    Membership,
    Refuse,
    Retire,
    SaveAt,
    StartWorkers,
    StopWorkers,
    Timing,
    WriteCopies,
    may_claim,
)
from hpcft.neighbours import Dial
from hpcft.page import NodePage, Order, now_ns
from hpcft.process import FORWARDED
from hpcft.ranks import Ranks
from hpcft.rundir import RunDirectory
from hpcft.snapshots import Answer, Run, Snapshots
from hpcft.store import Heartbeat, HeartbeatWriter, import_torch
from hpcft.terms import Sight, TermLease, TermRecord, TermWatch
from hpcft.workers import Fenced, KeeperLost, PoolEvent, PoolLost, PoolReady, PreloadFault, WorkerExited, Workers

log = logging.getLogger("hpcft.agent")

TICK_SECONDS = 0.05
REPORT_SECONDS = 1.0
SEEK_SECONDS = 0.2
_NO_LEADER = "this agent does not lead"
WARNING = (signal.SIGUSR1, signal.SIGUSR2)
"""Ahead of the time limit: `sbatch --signal`. The batch script asks for the first, and many are used to the second."""
ENDING = (signal.SIGTERM, signal.SIGINT)
LEADERS_TRIED = 5
"""Agents of a start that claim a term and cannot lead, before the run is given up."""
FOREIGN_RENEWALS = 5
"""Seen so often, the leader of another job is alive, and not merely late to end."""
FIRST_CLAIM_TURN_SECONDS = 10.0
"""How long the other nodes of a fresh allocation let the first one claim the term."""


def now() -> float:
    """The clock of the shared page; it goes on while the machine sleeps, as a lease must."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Ended:
    """How an incarnation ended; the keeper acts on the code."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Station:
    """Where this agent stands, and what was configured for it."""

    node: NodeId
    index: int
    """Position of the node in the allocation; the first one claims a fresh run's term."""
    start: str
    """Names this start of the run: job and restart count."""
    address: str
    workers: int
    directory: RunDirectory
    timing: Timing
    grace: float
    kill_wait: float
    branches: bool
    """A checkpoint to start from was named: a finished run may go on."""
    life: int
    """Counts the agents of this node from 1."""


@dataclass(frozen=True, slots=True)
class Lifelines:
    """Two connections to one leader whose only content is their end.

    Of `workers` every process that trains holds a copy, of `keeper` the pool does: the first one's end means that
    nothing trains here any more, the second one's that nobody is left who would restart the agent.
    """

    record: TermRecord
    workers: socket.socket
    keeper: socket.socket

    def close(self) -> None:
        self.workers.close()
        self.keeper.close()


class Agent:
    """One incarnation on one node."""

    def __init__(
        self,
        station: Station,
        page: NodePage,
        workers: Callable[[Callable[[PoolEvent], None]], Workers],
        snapshots: Callable[[Answer, Run, Dial], Snapshots],
        ranks: Callable[[Incarnation, Snapshots, Callable[[Event], None], Callable[[Mapping[str, Any]], None]], Ranks],
        lead: Callable[[TermRecord, float], Awaitable[Leader]],
    ) -> None:
        self._station = station
        self._page = page
        self._incarnation = Incarnation(secrets.token_hex(6))
        self._workers = workers(self._see_pool)
        self._snapshots = snapshots(self._workers.tell, self._run_errand, self._dial_neighbour)
        self._ranks = ranks(self._incarnation, self._snapshots, self._say, self._tell)
        self._lead = lead
        self._loop = asyncio.get_running_loop()
        self._membership = Membership(station.node, self._incarnation, station.timing)
        self._secret = b""
        self._stream: stream.Stream | None = None
        self._lifelines: Lifelines | None = None
        self._meeting: tuple[Generation, tuple[str, int]] | None = None
        """Where the workers of a generation meet."""
        self._heartbeats: HeartbeatWriter | None = None
        self._confirmed_at = 0.0
        self._kill_wait = station.kill_wait
        self._unreachable: TermRecord | None = None
        self._pool = 0
        """The pool's process."""
        self._helpers: frozenset[int] = frozenset()
        """Its children that are no workers: preloaded modules have started them."""
        self._server: stream.Server
        self._leader: Leader | None = None
        self._waiting: list[stream.Stream] | None = None
        """Who came while this agent was on its way into office."""
        self._inquirers: list[stream.Stream] = []
        self._presiding: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[Ended] = self._loop.create_future()
        self._errands: set[asyncio.Task[None]] = set()
        """What ends unfinished when this incarnation ends."""
        self._leaving = False
        self._retiring = False
        self._tasks: asyncio.TaskGroup

    async def live(self) -> Ended:
        """From the first look at the run directory to the end of this incarnation; never raises `Ended`."""
        station = self._station
        await asyncio.to_thread(station.directory.prepare)
        self._secret = await asyncio.to_thread(run_secret.create, station.directory.secret)
        if not station.branches and await asyncio.to_thread(station.directory.finished.exists):
            return Ended(ExitCode.OK, f"the run {station.directory.name} has finished already")
        self._server = await stream.serve(station.address, 0, self._secret, self._arrive)
        # a handler needs the tasks below: nothing is awaited from here until they are there
        for number in (*ENDING, *WARNING):
            self._loop.add_signal_handler(number, self._signalled, number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # no terminal of ours
        Inherited.unblock_signals()
        self._workers.open()
        self._page.lease_until_ns = 1  # long over: 0 would mean that no lease is needed
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                background = [
                    tasks.create_task(self._attend(), name="attend"),
                    tasks.create_task(self._follow(), name="follow"),
                    tasks.create_task(self._report(), name="report"),
                    tasks.create_task(self._see_workers(), name="workers"),
                ]
                if self._page.terminated_ns:
                    self._leave()  # an earlier agent of this node was told
                ended = await self._ending
                for task in (*background, *self._errands):
                    task.cancel()
                if self._presiding is not None and not self._retiring:
                    self._presiding.cancel()  # without a verdict: whose agent is gone leads nobody
                if self._stream is not None:
                    self._stream.close(ended.reason)
        finally:
            # Slurm ends what is left of the step when the batch script is over: by then this is only slow to leave
            signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
            stuck = await self._workers.end(0.0)
            self._snapshots.end()
            await self._workers.close()
            for inquirer in self._inquirers if not stuck else ():
                inquirer.send({"answer": Reach.ENDED})
            await self._server.close()
            if self._lifelines is not None:
                self._lifelines.close()
        return ended

    def _end(self, code: int, reason: str) -> None:
        if not self._ending.done():
            log.info("this incarnation ends: %s", reason)
            self._ending.set_result(Ended(code, reason))

    # --- who leads ---

    async def _follow(self) -> None:
        """Find the leader, stay with it; without one, claim the term."""
        station = self._station
        watch = TermWatch(station.directory.terms)
        said: object = None
        # Importing torch holds the interpreter for seconds on a busy node, and with it the heartbeats: so it comes
        # first, while the pool does the same.
        await asyncio.gather(asyncio.to_thread(import_torch), self._workers.ready())
        await self._outlast_the_undead()
        while True:
            self._look_at_lease()
            try:
                sight = await asyncio.to_thread(watch.look)
            except (OSError, ValueError) as error:
                log.warning("the terms cannot be read, and are tried again: %s", error)
                await asyncio.sleep(SEEK_SECONDS * 5)
                continue
            holder = sight.holder
            here = holder is not None and holder.allocation == station.start
            if here and sight.lease.released and await self._heed_verdict():
                return
            reached = holder is not None and here and not sight.lease.released and await self._stay_with(holder)
            if not reached and self._presiding is None:
                claims, why = may_claim(
                    holder=holder.node if holder is not None else None,
                    released=sight.lease.released,
                    unchanged_for=sight.unchanged_for,
                    same_allocation=here,
                    turn=station.index and FIRST_CLAIM_TURN_SECONDS + station.index * SEEK_SECONDS,
                    timing=station.timing,
                    own_past=here and holder is not None and holder.node == station.node,
                )
                outlook = (claims, holder, sight.lease.released)
                if outlook != said:  # the reason itself counts seconds
                    said = outlook
                    log.info("%s", why)
                if holder is not None and self._is_outdated(holder):
                    self._end(ExitCode.CANCELLED, f"a later start of the run, {holder.allocation}, has begun")
                    return
                if holder is not None and self._is_foreign(holder) and sight.renewals > FOREIGN_RENEWALS:
                    self._end(*self._refused(holder))
                    return
                if claims and here and await self._heed_verdict():
                    return
                if claims and not here and await self._has_finished():
                    return
                if claims:
                    await self._claim(sight, why)
                    continue
            await asyncio.sleep(SEEK_SECONDS)

    async def _has_finished(self) -> bool:
        """End, if another start has finished the run while this agent waited for its leader."""
        station = self._station
        finished = not station.branches and await asyncio.to_thread(station.directory.finished.exists)
        if finished:
            self._end(ExitCode.OK, f"the run {station.directory.name} has finished meanwhile")
        return finished

    async def _outlast_the_undead(self) -> None:
        """Workers of an earlier life may hang in the kernel. Where they are, nothing can be promised, and whatever they
        wait for is likely to catch their successors, too.

        Carriers may as well: they are for that. What they still do is to add files that nobody reads."""
        if self._station.life == 1:
            return
        named: list[int] = []
        while left := await asyncio.to_thread(self._undead):
            if left != named:
                named = left
                who = ", ".join(map(str, left))
                log.error(
                    "processes of an earlier life do not end (%s): this node takes no part while they are there", who
                )
            await asyncio.sleep(1.0)
            await self._workers.ready()  # a new pool is not known before

    def _undead(self) -> list[int]:
        pool = self._pool
        below = process.descendants(os.getppid(), without=[os.getpid(), pool])
        below += process.descendants(pool, without=self._helpers)
        return sorted(pid for pid in below if process.lives(pid) and not is_carrier(pid))

    def _is_outdated(self, holder: TermRecord) -> bool:
        """This agent outlived its start: Slurm could not reach the node when it gave the job to the queue."""
        (job, _, start), (ours, _, mine) = holder.allocation.rpartition("."), self._station.start.rpartition(".")
        return job == ours and int(start) > int(mine)

    def _is_foreign(self, holder: TermRecord) -> bool:
        """Of another job, not of an earlier start of this one, which is about to end."""
        return holder.allocation.rpartition(".")[0] != self._station.start.rpartition(".")[0]

    def _refused(self, holder: TermRecord) -> tuple[int, str]:
        job = holder.allocation.rpartition(".")[0]
        return ExitCode.UNUSABLE, (
            f"the run {self._station.directory.name} is being trained by job {job}, whose leader on {holder.node} "
            "renews its term: wait for its end, or give this one another run.name"
        )

    async def _heed_verdict(self) -> bool:
        """End, if this start has a verdict that did not reach this agent: it was between two lives, say."""
        try:
            verdict = await asyncio.to_thread(verdicts.read, self._station.directory, self._station.start)
        except UnusableError as error:
            log.warning("%s", error.message)
            return False
        if verdict is not None:
            self._end(verdict.exit_code, verdict.reason)
        return verdict is not None

    async def _claim(self, sight: Sight, why: str) -> None:
        host, port = self._server.address
        record = TermRecord(sight.next_term, self._station.node, self._incarnation, host, port, self._station.start)
        self._waiting = []  # the record brings them before this agent knows that it leads
        try:
            claimed = await asyncio.to_thread(terms.claim, self._station.directory.terms, record)
        except OSError as error:
            log.warning("term %d cannot be claimed, and is tried again: %s", record.term, error)
            claimed = False
        if not claimed:
            for arrived in self._waiting:
                arrived.close(_NO_LEADER)
            self._waiting = None
            return
        log.info("%s: this agent leads term %d", why, record.term)
        try:
            leader = await self._lead(record, self._leaderless(sight))
        except (DamagedError, NotFoundError, UsageError) as error:
            await self._give_up_the_run(record, error)
            return
        except (OSError, UnusableError) as error:
            await self._lay_down(record, error)
            return
        self._presiding = self._tasks.create_task(self._preside(leader), name="leader")

    async def _give_up_the_run(self, record: TermRecord, error: HpcftError) -> None:
        """What this agent cannot read as a leader, no other can: it says so for all, or they would find out in turn."""
        station = self._station
        verdict = Verdict(Outcome.FAILED, int(error.exit_code), str(error))
        try:
            await asyncio.to_thread(verdicts.write, station.directory, station.start, verdict, Step(0))
        except OSError as trouble:
            log.error("the verdict could not be written: %s", trouble)
        await self._release(record)
        self._end(verdict.exit_code, verdict.reason)

    async def _lay_down(self, record: TermRecord, error: OSError | UnusableError) -> None:
        """What cannot be read now, and here, may be read in a while, or by another; but not for ever."""
        station = self._station
        await self._release(record)
        try:
            tried = await asyncio.to_thread(terms.not_led, station.directory.terms, station.start)
        except (OSError, ValueError):
            tried = 0
        if tried >= LEADERS_TRIED:
            reason = f"{tried} agents in a row could not read what a leader has to know: {error}"
            await self._give_up_the_run(record, UnusableError(reason, "`hpcft doctor CONFIG` tests the file system"))
        else:
            self._end(AGENT_RESTART, f"this agent cannot read what a leader has to know: {error}")

    async def _release(self, record: TermRecord) -> None:
        """A term that was claimed, and is not led: the next may be claimed at once."""
        try:
            await asyncio.to_thread(
                terms.renew, self._station.directory.terms, record.term, TermLease(0, released=True)
            )
        except (OSError, terms.Deposed) as trouble:
            log.error("term %d could not be released: %s", record.term, trouble)

    def _leaderless(self, sight: Sight) -> float:
        """For how many seconds nobody has led, as this node knows: it has waited for another leader's lease to run out,
        or its keeper has started this agent at once when its former one, the leader, had ended, or the run starts."""
        holder, station = sight.holder, self._station
        waited = holder is not None and holder.allocation == station.start and holder.node != station.node
        return sight.unchanged_for if waited else now() - process.began_at(os.getpid())

    def _arrive(self, arrived: stream.Stream) -> None:
        """A connection to this agent: to its leader, if it has one, or a peer's question."""
        if arrived.hello.get("purpose") == "probe":
            self._answer(arrived)
        elif arrived.hello.get("purpose") == "copies":
            self._run_errand(self._snapshots.entertain(arrived), "guest")
        elif self._leader is not None:
            self._leader.admit(arrived)
        elif self._waiting is not None:
            self._waiting.append(arrived)
        else:
            arrived.close(_NO_LEADER)

    async def _preside(self, leader: Leader) -> None:
        def admit_waiting() -> None:
            assert self._waiting is not None
            self._leader = leader
            for arrived in self._waiting:
                leader.admit(arrived)
            self._waiting.clear()

        try:
            verdict = await leader.lead(self._secret, admit_waiting)
        except SteppedDown as down:
            self._end(AGENT_RESTART, str(down))
        else:
            # this agent's own stream may not have been there yet when the leader told everybody
            self._retire(verdict)
        finally:
            self._leader = None  # whoever comes now waits, until the server closes

    async def _stay_with(self, record: TermRecord) -> bool:
        """One connection to the leader, from its first word to its end; False when no leader spoke.

        An address is not enough: the record may name an agent that failed to take office, or a port that has passed
        to another one since.
        """
        me = {"node": self._station.node, "incarnation": self._incarnation}
        address = (record.host, record.port)
        limit = self._station.timing.timeout
        try:
            await self._open_lifelines(record, me)
            hello = {
                **me,
                "purpose": "agent",
                "address": self._station.address,
                "port": self._server.address[1],
                "workers": self._station.workers,
            }
            self._stream = await stream.dial(address, self._secret, hello, limit)
        except stream.StreamClosed as closed:
            if self._unreachable != record:
                self._unreachable = record
                log.info("the leader %s is not reachable: %s", record.node, closed.reason)
            return False
        spoken = False
        assert self._lifelines is not None
        self._workers.hold(self._lifelines.keeper.fileno())
        self._ranks.repeat()
        self._tell_signals()
        self._beat()
        try:
            while True:
                message = await self._stream.receive()
                if not spoken:
                    spoken = True
                    log.info("joined %s, leader of term %d", record.node, record.term)
                self._hear(record, message)
        except stream.StreamClosed as closed:
            if spoken or self._unreachable != record:
                self._unreachable = record
                log.info("the stream to %s closed: %s", record.node, closed.reason)
        finally:
            self._stream = None
            if self._heartbeats is not None:
                self._heartbeats.close()
                self._heartbeats = None
        return spoken

    async def _open_lifelines(self, record: TermRecord, me: Mapping[str, str]) -> None:
        """Once for each leader: a new line beside a living one would let the old one's end look like ours."""
        if self._lifelines is not None:
            if self._lifelines.record == record:
                return
            self._lifelines.close()
        address, limit = (record.host, record.port), self._station.timing.timeout
        # in this order: should the second one fail, the end of the first alone proves nothing to the leader
        keeper = await stream.open_lifeline(address, self._secret, {**me, "line": "keeper"}, limit)
        try:
            workers = await stream.open_lifeline(address, self._secret, {**me, "line": "workers"}, limit)
        except BaseException:
            keeper.close()
            raise
        self._lifelines = Lifelines(record, workers, keeper)

    def _hear(self, record: TermRecord, message: Mapping[str, Any]) -> None:
        match message:
            case {"order": raw}:
                order = wire.decode_order(raw)
                if isinstance(order, Confirm):
                    self._confirmed_at = now()
                self._perform(*self._membership.obey(order, now()))
            case {"welcome": {"term": int(term), "store_host": str(host), "store_port": int(port), **more}}:
                if isinstance(seconds := more.get("kill_wait"), int | float):
                    self._kill_wait = float(seconds)
                self._heartbeats = HeartbeatWriter((host, port), self._secret, Term(term))
            case {"kill_wait": int() | float() as seconds}:
                self._kill_wait = float(seconds)
            case {"meeting": {"generation": int(generation), "host": str(host), "port": int(port)}}:
                self._meeting = (Generation(generation), (host, port))
            case _:
                log.warning("%s sent an unknown message: %s", record.node, sorted(message))

    def _say(self, event: Event) -> None:
        self._tell({"event": wire.encode(event)})

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._stream is not None:
            self._stream.send(message)

    # --- the member ---

    def _perform(self, membership: Membership, effects: tuple[Effect, ...]) -> None:
        self._membership = membership
        for effect in effects:
            match effect:
                case KillWorkers(reason):
                    log.info("workers are killed: %s", reason)
                    self._spawn(self._kill_workers(), "kill")
                case StopWorkers():
                    self._spawn(self._stop_workers(), "stop")
                case StartWorkers(formation):
                    self._start_workers(formation)
                case Acknowledge(term, generation):
                    self._say(WorldAcknowledged(self._station.node, self._incarnation, term, generation))
                case Refuse(term, generation):
                    self._say(WorldRefused(self._station.node, self._incarnation, term, generation))
                case ExtendLease(until):
                    self._page.lease_until_ns = int(until * 1e9)
                case SaveAt(step, stop, in_memory):
                    self._page.order_word = Order(step, stop, in_memory).word
                case KeepCopies(generation, step):
                    self._snapshots.keep(generation, step)
                case ForgetCopies(generation, step, written):
                    self._snapshots.forget(generation, step, written=written)
                case WriteCopies(order):
                    self._snapshots.persist(order)
                case LookAt(probe):
                    self._run_errand(self._inquire(probe), f"inquiry-{probe.suspect}")
                case Fence(reason):
                    self._workers.kill_all()
                    self._end(AGENT_RESTART, reason)
                case Retire(verdict):
                    self._retire(verdict)
                case _:
                    assert_never(effect)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.create_task(work, name=name)

    def _run_errand(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        errand = self._tasks.create_task(work, name=name)
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)
        return errand

    def _start_workers(self, formation: Formation) -> None:
        # the leader says start only after it has told everybody where to meet
        assert self._meeting is not None and self._meeting[0] == formation.generation
        assert self._lifelines is not None
        for name, spec in self._ranks.begin(formation, self._meeting[1]).items():
            self._workers.start(name, spec, self._lifelines.workers)
        self._snapshots.hand_out()

    async def _kill_workers(self) -> None:
        self._ranks.forget()
        stuck = await self._workers.end(0.0)
        if stuck:
            # a worker that cannot be killed may still write: this node must not promise that it is gone
            self._end(AGENT_RESTART, f"workers {', '.join(stuck)} do not end after SIGKILL")
            return
        self._ranks.report_last()
        self._perform(*self._membership.workers_gone())

    async def _stop_workers(self) -> None:
        self._ranks.forget()
        await self._workers.end(self._station.grace)

    def _retire(self, verdict: Verdict) -> None:
        if not self._retiring:
            self._retiring = True
            self._spawn(self._end_with(verdict), "retire")

    async def _end_with(self, verdict: Verdict) -> None:
        await self._stop_workers()
        self._end(verdict.exit_code, verdict.reason)

    async def _see_workers(self) -> None:
        async for event in self._workers.events():
            self._ranks.see(event)
            if isinstance(event, WorkerExited):
                self._ranks.report(now())

    def _see_pool(self, event: PoolEvent) -> None:
        match event:
            case PoolReady(pid, seconds, warm, left):
                self._pool, self._helpers = pid, left
                log.info("the pool is ready after %.1f s%s", seconds, "" if warm else "; workers are exec'd")
            case PreloadFault(module, fault, reason):
                log.warning("%s %s: %s", module, fault, reason)
            case Fenced():
                log.warning("the pool has killed all workers: the lease had run out")
            case PoolLost():
                log.error("the pool died, and its workers with it; the keeper starts another")
            case KeeperLost():
                self._end(ExitCode.INTERNAL, "the keeper is gone")
            case _:
                assert_never(event)

    def _beat(self) -> None:
        at = now()
        self._membership = self._membership.beat(at)
        sequence, generation = self._membership.sequence, self._membership.promised
        node, incarnation = self._station.node, self._incarnation
        if self._heartbeats is not None:
            digest = {"workers": len(self._ranks), "step": self._ranks.lowest_step()}
            self._heartbeats.beat(Heartbeat(node, incarnation, generation, sequence, digest))
        if at - self._confirmed_at > 2 * self._station.timing.interval:
            # no store yet, or it hangs: the stream carries the heartbeat as well
            self._say(NodeHeard(node, incarnation, generation, sequence))

    async def _attend(self) -> None:
        """Lease and heartbeats."""
        beat_at, seen_at = 0.0, now()
        while True:
            self._look_at_lease()
            at = now()
            if at - seen_at > self._station.timing.suspect / 2:
                log.warning("this process was held up for %.1f s: stopped, or no processor for it", at - seen_at)
            seen_at = at
            if self._stream is not None and at >= beat_at:
                beat_at = at + self._station.timing.interval
                self._beat()
            await asyncio.sleep(TICK_SECONDS)

    def _look_at_lease(self) -> None:
        """After a pause of this process the lease must be looked at before anything else is done."""
        self._perform(*self._membership.tick(now()))

    async def _report(self) -> None:
        """Progress as soon as it is there, and once a second everything about the workers."""
        reported_at = 0.0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._ranks.report_progress()
            at = now()
            if at >= reported_at + REPORT_SECONDS:
                reported_at = at
                self._ranks.report(at)

    # --- silent peers ---

    async def _inquire(self, probe: Probe) -> None:
        """Look at an agent that the leader does not hear, and say what is found. It may answer now, and end later."""
        timing = self._station.timing

        def say(found: Reach, detail: str = "") -> None:
            self._say(PeerAnswered(self._station.node, probe.suspect, probe.incarnation, found, detail))

        hello = {"purpose": "probe", "node": self._station.node, "incarnation": probe.incarnation}
        answered = False
        try:
            async with asyncio.timeout(2 * timing.timeout):
                limit = (timing.timeout - timing.suspect) / 2
                suspect = await stream.dial((probe.host, probe.port), self._secret, hello, limit)
                try:
                    while True:
                        say(Reach((await suspect.receive())["answer"]))
                        answered = True
                finally:
                    suspect.close()
        except stream.StreamClosed as closed:
            if not answered:
                say(Reach.SILENT, closed.reason)
        except (TimeoutError, KeyError, ValueError) as error:
            log.info("%s was looked at for the leader: %s", probe.suspect, error or "it goes on")

    def _answer(self, inquirer: stream.Stream) -> None:
        """A peer asks for the leader, which does not hear this agent."""
        if inquirer.hello.get("incarnation") != self._incarnation:
            inquirer.close("that incarnation has ended")
            return
        log.warning("the leader does not hear this agent: %s asks for it", inquirer.hello.get("node"))
        self._inquirers = [each for each in self._inquirers if not each.ended] + [inquirer]
        inquirer.send({"answer": Reach.ANSWERS})

    async def _dial_neighbour(self, neighbour: Member) -> stream.Stream:
        """For a copy that it is to keep."""
        hello = {"purpose": "copies", "node": self._station.node, "incarnation": self._incarnation}
        return await stream.dial((neighbour.address, neighbour.port), self._secret, hello, self._station.timing.timeout)

    # --- signals ---

    def _signalled(self, number: signal.Signals) -> None:
        """Slurm warns or ends us. What that means is asked once, by the leader."""
        log.info("received %s", signal.Signals(number).name)
        if number in WARNING:
            self._page.warned_ns = self._page.warned_ns or now_ns()
        else:
            self._page.terminated_ns = self._page.terminated_ns or now_ns()
        if self._ending.done():
            return
        self._tell_signals()
        if number in ENDING:
            self._leave()

    def _tell_signals(self) -> None:
        """Whenever a leader is joined, too: nobody may have been leading when they came."""
        for name, at in (("USR1", self._page.warned_ns), ("TERM", self._page.terminated_ns)):
            if at:
                self._tell({"signal": name, "age": (now_ns() - at) / 1e9})

    def _leave(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._run_errand(self._leave_in_time(), "leave")

    async def _leave_in_time(self) -> None:
        """A verdict should come; if it does not, this node is clean before Slurm kills it."""
        age = (now_ns() - self._page.terminated_ns) / 1e9
        await asyncio.sleep(self._kill_wait * 0.8 - age)
        self._workers.kill_all()
        self._end(ExitCode.CANCELLED, "terminated, and no verdict came in time")
