"""The leader's loop: feed an event, ask the policy, journal, perform.

Theory of operation
-------------------
One agent of the allocation holds the term and runs this beside its own part as a member. All state is the
`World`; all of it changes in `feed`, on the event loop, without awaiting anything: apply, decide, journal, perform,
until the policy has nothing more to say. Edges that block (the run directory, the store, Slurm) live on threads
or tasks of their own and come back with an event.

A leader that can neither renew its term nor hear a majority leaves office by itself (`SteppedDown`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, assert_never

import orjson

from hpcft import cadence, durable, stream, verdicts
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.commits import Commits
from hpcft.errors import HpcftError, UnusableError
from hpcft.events import (
    Action,
    AskPeer,
    CheckpointCommitted,
    CheckpointRef,
    CheckpointsFound,
    Commit,
    Conclude,
    Confirm,
    CopiesAlone,
    CopiesKept,
    CopiesMeasured,
    End,
    Event,
    Evict,
    Forget,
    Formation,
    Halt,
    HaltWorkers,
    Keep,
    LeaseRenewed,
    Member,
    NodeHeard,
    NodeJoined,
    NodeReported,
    Order,
    OrderSave,
    Persist,
    PersistCopies,
    Prepare,
    Probe,
    Progressed,
    Propose,
    Quarantine,
    Requeue,
    RequeueAccepted,
    RequeueRefused,
    SaveAndStop,
    SnapshotDropped,
    SnapshotTaken,
    Start,
    StopAsked,
    TermBegan,
    Ticked,
    Verdict,
)
from hpcft.ids import Generation, NodeId, Rank, RunId, Step
from hpcft.journal import PROGRESS_LINES_PER_SECOND, PROGRESS_SECONDS, Journal, Replayed
from hpcft.membership import may_lead
from hpcft.mirror.supervisor import Mirror
from hpcft.notices import JobControl, Notices
from hpcft.operators import obeyed, spooled
from hpcft.policy import Rules, decide
from hpcft.reception import Message, Reception, order_message
from hpcft.renewal import Renewal
from hpcft.rundir import RunDirectory
from hpcft.store import Heartbeat, HeartbeatReader, StoreServer
from hpcft.terms import TermRecord
from hpcft.transitions import apply
from hpcft.world import Phase, World, takes_over

log = logging.getLogger("hpcft.leader")

TICK_SECONDS = 0.1
STATUS_SECONDS = 1.0
FORGOTTEN = 8
"""Latest steps whose copies are of no use, said again to whoever joins: more than anybody has arenas for."""
DECISIONS_PER_EVENT = 64
"""Each decision changes the world so that the next differs; more than this in a row is a defect of the policy."""
JOURNAL_SECONDS = 10.0
SILENT_SLACK_SECONDS = 60.0
"""What the run clock makes up for beyond a leader's usual silence in its journal: for slow steps, and a late disk."""


PLENTIFUL = (
    NodeHeard | NodeReported | Progressed | SnapshotTaken | CopiesMeasured | CopiesKept | CopiesAlone | SnapshotDropped
)
"""A thousand nodes say these some thousand times a second."""


class SteppedDown(Exception):
    """This agent may no longer lead."""


View = Callable[[World, Rules, float], dict[str, Any]]
"""How a world looks to an operator: `status.snapshot`, handed in because views lie above this module."""


@dataclass(frozen=True, slots=True)
class Office:
    """What a leader needs to know beyond the world."""

    run: RunId
    directory: RunDirectory
    record: TermRecord
    allocation: str
    nodes: tuple[NodeId, ...]
    checkpoints: tuple[CheckpointsFound, ...]
    end_lead: float | None
    """Seconds before the time limit at which the last save begins; None: as late as the measured ones allow."""
    leaderless: float
    """For how many seconds nobody has led."""


class Leader:
    """In office from `lead()` on; before that, arriving agents wait."""

    def __init__(
        self,
        office: Office,
        rules: Rules,
        replayed: Replayed,
        control: JobControl,
        commits: Callable[[Callable[[Event], None], Callable[[], frozenset[str]]], Commits],
        view: View,
        mirror: Mirror | None = None,
    ) -> None:
        self._office = office
        self._rules = rules
        self._replayed = replayed
        self._secret = b""
        self._control = control
        self._view = view
        self._loop = asyncio.get_running_loop()
        self.world = replayed.world
        self._clock_base = replayed.clock + _missed(office, replayed) - time.monotonic()
        self._events: deque[Event] = deque()
        self._feeding = False
        self._reception = Reception(self)
        self._renewal = Renewal(
            office.directory.terms, office.record.term, rules.timing.timeout / 5, self._renewed, self._deposed
        )
        self._renewal_wanted: float | None = None
        self._retention_wanted: float | None = None
        """Since this time (monotonic) there is a checkpoint that may make older ones superfluous."""
        self._renewed_at = time.monotonic()
        self._mirror = mirror
        self._commits = commits(lambda event: self._post(event), mirror.held if mirror is not None else frozenset)
        self._journal = Journal(
            office.directory.journal,
            office.record.term,
            self.world.generation,
            office.record.incarnation,
            replayed,
        )
        self._store: StoreServer | None = None
        self._heartbeats: HeartbeatReader | None = None
        self._meeting: tuple[Generation, StoreServer] | None = None
        self._saving = cadence.Saving(told_at=self.now())
        self._copying = cadence.Copying(self.now())
        self._forgotten: dict[Step, bool] = {}
        """Steps of this generation whose copies the agents were told to forget; True: when they are written."""
        self._writing: Persist | None = None
        """The standing order to write a state that is in memory."""
        self._pace = cadence.Pace()
        self._notices = Notices(control, office.end_lead, self.feed, self._spawn, self._last_save)
        self._requeueing: asyncio.Task[None] | None = None
        self._concluded: asyncio.Future[Verdict | SteppedDown] = self._loop.create_future()
        self._running: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup | None = None

    # --- the loop ---

    def now(self) -> float:
        """The run clock."""
        return self._clock_base + time.monotonic()

    async def lead(self, secret: bytes, in_office: Callable[[], None]) -> Verdict:
        """Stay in office until the run's start has a verdict; calls `in_office` when agents may be admitted.

        Raises:
            SteppedDown: another agent may lead by now.
        """
        office = self._office
        self._secret = secret
        self._renewal.start()
        before = self._replayed.world
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._spawn(self._notices.watch(), "notices")
                self._spawn(self._tell_kill_wait(), "kill-wait")
                self._spawn(self._tick(), "tick")
                self._spawn(self._write_status(), "status")
                self._spawn(self._open_store(), "store")
                self.feed(
                    TermBegan(
                        office.run,
                        office.record.term,
                        office.record.node,
                        office.record.incarnation,
                        office.allocation,
                        office.nodes,
                        takes_over(before, office.allocation, office.record.node),
                        leaderless=office.leaderless,
                    )
                )
                for found in office.checkpoints:
                    self.feed(found)
                in_office()
                outcome = await self._concluded
                for task in self._running:
                    task.cancel()
            if isinstance(outcome, Verdict):  # else the status is the next leader's to write
                await asyncio.to_thread(self._publish_status)
        except* UnusableError as group:
            raise SteppedDown(f"this node cannot lead: {group.exceptions[0]}") from group
        finally:
            await asyncio.to_thread(self._close)
        if isinstance(outcome, SteppedDown):
            raise outcome
        return outcome

    def feed(self, event: Event) -> None:
        """Apply an event and carry out what follows. Only the event loop's thread calls this."""
        if self._concluded.done():
            return  # out of office
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                self._take(self._events.popleft())
        finally:
            self._feeding = False

    def _take(self, event: Event) -> None:
        now, before = self.now(), self.world
        self.world = apply(before, event, now)
        if self.world is before and not isinstance(event, Ticked):
            return  # no news: a late straggler, the hundredth echo of a broken collective
        if isinstance(event, CheckpointCommitted) and event.checkpoint in self.world.checkpoints:
            self._retention_wanted = time.monotonic()
            self._renewal.hurry()
        settled = self.world.turned_from is None
        if self._mirror is not None and settled and self.world.checkpoints not in ((), before.checkpoints):
            newest = self.world.checkpoints[-1]
            self._mirror.follow(checkpoint_name(newest.step, newest.generation))
        self._journal.append(event, now)
        self._speak_of_copies(before, event)
        if isinstance(event, PLENTIFUL):
            return  # nothing that the next tick would not decide as well
        for _ in range(DECISIONS_PER_EVENT):
            decided = decide(self.world, self._rules, now)
            if not decided.actions:
                return
            log.info("%s", decided.reason)
            self.world = apply(self.world, decided, now)
            self._journal.append(decided, now)
            for action in decided.actions:
                self._perform(action)
        raise AssertionError(f"the policy does not settle: {decided.reason}")

    def _speak_of_copies(self, before: World, event: Event) -> None:
        """Which copies in memory the agents are to keep, and which are of no use."""
        formation, safe, known = self.world.formation, self.world.holdings.safe, before.holdings.safe
        if formation is None:
            return
        term, generation = self._office.record.term, formation.generation
        news = safe is not None and (known is None or known.snapshot != safe.snapshot)
        if news and safe is not None and safe.snapshot.generation == generation:
            self._broadcast(Keep(term, generation, safe.snapshot.step))
        held, former = self.world.holdings.held, before.holdings.held
        if held is not None and held.blocked and (former is None or former.snapshot != held.snapshot):
            self.feed(CopiesMeasured(held.snapshot.generation, ((held.snapshot.step, round(held.blocked, 6)),)))
        doubt, earlier = self.world.holdings.doubt, before.holdings.doubt
        if doubt is not None and (earlier is None or earlier.reason != doubt.reason):
            log.warning("the copies of step %d are doubtful: %s", doubt.step, doubt.reason)
            self.feed(doubt)
        if isinstance(event, SnapshotTaken | SnapshotDropped):
            for step, written in self.world.holdings.useless(formation).items():
                self._forget(step, written=written)

    def _forget(self, step: Step, *, written: bool = False) -> None:
        """Tell the agents that nothing can be started from what some of them have of this step."""
        formation, told = self.world.formation, self._forgotten.get(step)
        if formation is None or told is False or told is written:
            return
        self._forgotten[step] = written
        for old in sorted(self._forgotten)[:-FORGOTTEN]:
            del self._forgotten[old]
        self._broadcast(Forget(self._office.record.term, formation.generation, step, written))

    def _persist(self, snapshot: CheckpointRef, members: tuple[Member, ...], handed_by: tuple[NodeId, ...]) -> None:
        """Have a state written that is in memory, unless it is written already. Where other nodes are to write than
        before, that is another attempt: whoever is gone may have left files of this one, finished or not."""
        known = self._writing
        if known is not None and known.snapshot == snapshot:
            before = known.handed_by
        else:
            before = tuple(member.node for member in members)  # each its own, in the save that they were made for
        nonce = self._commits.attempt(snapshot, anew=handed_by != before)
        self._writing = None
        if nonce is not None:
            self._writing = Persist(self._office.record.term, snapshot, members, handed_by, nonce)
            self._broadcast(self._writing)

    def _go_on_writing(self, formation: Formation) -> None:
        """What becomes of the state in memory that this generation starts from. Agents go on with their own copies by
        themselves (`Snapshots.hand_out`); more is to be said where one of them is gone, or an attempt has failed."""
        origin, handed = formation.restore, formation.handed_out()
        replaced = any(made.node != now.node for made, now in handed)
        if formation.memory and origin is not None and (replaced or self._commits.has_failed(origin)):
            self._persist(origin, tuple(made for made, _ in handed), tuple(now.node for _, now in handed))
        else:
            self._writing = None

    def _post(self, event: Event) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self.feed, event)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """It ends with the office, at the latest."""
        assert self._tasks is not None
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _perform(self, action: Action) -> None:
        match action:
            case Propose(formation):
                self._commits.follow(formation)
                self._saving = cadence.Saving(told_at=self.now())
                self._copying = cadence.Copying(self.now())
                self._renewal_wanted = time.monotonic()
                self._renewal.hurry()
                self._broadcast(Prepare(formation))
                self._forgotten = {}
                self._go_on_writing(formation)
                self._spawn(self._open_meeting(formation.generation), "meeting")
            case Commit():
                self._broadcast_start()
            case AskPeer(suspect, incarnation, peer):
                node = self.world.node(suspect)
                assert node is not None
                probe = Probe(self._office.record.term, suspect, incarnation, node.address, node.port)
                self._reception.tell(peer, order_message(probe))
            case Evict(name, _incarnation):
                self._reception.dismiss(name)
                if self._heartbeats is not None:
                    self._heartbeats.forget(name)
            case SaveAndStop():
                last = self._saving.ordered(self.world, self._pace, self.now(), stop=True)
                self._stand_by(last, last.order)
            case PersistCopies(snapshot, members, handed_by):
                self._persist(snapshot, members, handed_by)
            case HaltWorkers(generation):
                self._broadcast(Halt(self._office.record.term, generation))
            case Quarantine(checkpoint, detail):
                self._commits.quarantine(checkpoint, detail)
            case Requeue():
                self._requeueing = self._spawn(self._requeue(), "requeue")
            case Conclude(verdict):
                if self._requeueing is not None:
                    self._requeueing.cancel()  # it was accepted, refused, or is not wanted any more
                self._spawn(self._conclude(verdict), "conclude")
            case _:
                assert_never(action)

    def _broadcast(self, order: Order) -> None:
        self._reception.tell_all(order_message(order))

    def _broadcast_start(self) -> None:
        """Once the world has taken effect and its workers have a place to meet: whichever comes last."""
        for message in self._start_messages():
            self._reception.tell_all(message)

    def _start_messages(self) -> tuple[Message, ...]:
        formation = self.world.formation
        if formation is None or self.world.phase is not Phase.RUNNING or self._meeting is None:
            return ()
        generation, store = self._meeting
        if generation != formation.generation:
            return ()
        host, port = store.address
        return (
            {"meeting": {"generation": generation, "host": host, "port": port}},
            order_message(Start(formation.term, generation)),
        )

    # --- what is heard (Chair) ---

    def admit(self, connected: stream.Stream) -> None:
        """Take over an incoming connection."""
        if self._concluded.done():
            connected.close("this leader leaves office")
            return
        self._spawn(self._reception.serve(connected), "stream")

    def join(self, joined: NodeJoined, say: Callable[[Message], None]) -> None:
        if self._store is not None:
            say(self._welcome())
        if self._heartbeats is not None:
            self._heartbeats.register(joined.node, joined.incarnation)
        self.feed(joined)
        formation = self.world.formation
        if formation is not None:
            # It may have missed these while its connection was broken; both are harmless when repeated. Whatever the
            # phase: who was evicted, and hears only now that it was to start, must learn that this world is over
            # before its lease is extended.
            say(order_message(Prepare(formation)))
            for message in self._start_messages():
                say(message)
            self._repeat_of_copies(formation, say)

    def _repeat_of_copies(self, formation: Formation, say: Callable[[Message], None]) -> None:
        """What stands of the orders about copies: one that is lost would leave a node without memory for the next."""
        term, generation, safe = self._office.record.term, formation.generation, self.world.holdings.safe
        if safe is not None and safe.snapshot.generation == generation:
            say(order_message(Keep(term, generation, safe.snapshot.step)))
        for step, written in self._forgotten.items():
            say(order_message(Forget(term, generation, step, written)))
        if self._writing is not None:
            say(order_message(self._writing))

    def heard(self, event: NodeHeard) -> None:
        node = self.world.node(event.node)
        if node is None or node.incarnation != event.incarnation:
            return
        self.feed(event)
        self._reception.tell(event.node, order_message(Confirm(self._office.record.term, event.sequence)))

    def shard_reported(self, generation: int, step: int, rank: int, report: Any, timing: Message) -> None:
        self._commits.reported(Generation(generation), Step(step), Rank(rank), report, timing)

    def save_skipped(self, generation: int, step: int, rank: int, reason: Any) -> None:
        self._commits.skipped(Generation(generation), Step(step), Rank(rank), str(reason))

    def save_failed(self, generation: int, step: int, rank: int, reason: Any, nonce: str) -> None:
        self._commits.failed(Generation(generation), Step(step), Rank(rank), str(reason), nonce)

    def command(self, command: Message) -> Message:
        match command:
            case {"do": "stop", "by": str(by)}:
                self.feed(StopAsked(by))
                return {"done": self.world.last_reason}
            case {"do": "status"}:
                return {"status": self.snapshot()}
            case _:
                log.warning("unknown operator's command: %s", sorted(command))
                return {"error": f"unknown command {sorted(command)}"}

    def signalled(self, name: str, age: float) -> None:
        self._notices.signalled(name, age)

    def _welcome(self) -> Message:
        assert self._store is not None
        return {
            "welcome": {
                "term": self._office.record.term,
                "store_host": self._store.address[0],
                "store_port": self._store.address[1],
                "kill_wait": self._notices.known_kill_wait,
            }
        }

    async def _tell_kill_wait(self) -> None:
        """To those who were welcomed before Slurm had said it."""
        self._reception.tell_all({"kill_wait": await self._notices.kill_wait()})

    # --- edges ---

    async def _open_store(self) -> None:
        """The TCPStore of this leadership, for heartbeats."""
        self._store = store = await StoreServer.start(self._office.record.host)
        self._heartbeats = HeartbeatReader(
            store.address,
            self._secret,
            self._office.record.term,
            self._beat,
            interval=self._rules.timing.interval / 2,
        )
        for node in self.world.nodes:
            self._heartbeats.register(node.id, node.incarnation)
        self._reception.tell_all(self._welcome())

    async def _open_meeting(self, generation: Generation) -> None:
        """A TCPStore where the workers of one generation meet.

        Each has its own: in a store that was used before, a program's new workers would read the addresses of dead
        peers (the keys of torch's `env://` say nothing of attempts), and the program's own keys would be left over.
        """
        store = await StoreServer.start(self._office.record.host)
        formation = self.world.formation
        if formation is None or formation.generation != generation:
            store.close()
            return
        if self._meeting is not None:
            self._meeting[1].close()
        self._meeting = (generation, store)
        self._broadcast_start()

    def _beat(self, node: NodeId, beat: Heartbeat) -> None:
        self.heard(NodeHeard(node, beat.incarnation, beat.generation, beat.sequence))

    async def _tick(self) -> None:
        timing = self._rules.timing
        while True:
            await asyncio.sleep(TICK_SECONDS)
            # first of all: after a pause of this process it may have no right to decide anything
            stays, why = may_lead(self._renewed_at, self._majority_at(), time.monotonic(), timing)
            if not stays:
                self._deposed(why)
                return
            self.feed(Ticked())
            self._keep_cadence()

    def _majority_at(self) -> float:
        """When a majority of the last world had been heard, as a monotonic time of this process."""
        heard = sorted(
            (
                node.heard_at
                for member in self.world.previous
                if (node := self.world.node(member.node)) is not None and node.connected
            ),
            reverse=True,
        )
        needed = len(self.world.previous) // 2 + 1
        return heard[needed - 1] - self._clock_base if len(heard) >= needed else float("-inf")

    def _renewed(self, began: float) -> None:
        """The term's lease reached the run directory; the write began at `began` (monotonic)."""
        self._renewed_at = began
        if self._renewal_wanted is not None and began >= self._renewal_wanted:
            self._renewal_wanted = None
            self.feed(LeaseRenewed(self._office.record.term))
        # Whoever succeeds from here on finds the new checkpoint. Before, a successor may have gone on from an older one
        # while this process was stopped, and that one must not go.
        if self._retention_wanted is not None and began >= self._retention_wanted:
            self._retention_wanted = None
            self._commits.retain(self.world.checkpoints)

    def _deposed(self, why: str) -> None:
        """A later term was claimed: whatever this leader still believes, it decides nothing any more."""
        log.error("%s: leaving office", why)
        self._conclude_with(SteppedDown(why))

    def _keep_cadence(self) -> None:
        """Saves that are due by the clock, and whatever is still to be said of one that was ordered."""
        now, settled = self.now(), self._commits.settled
        self._pace = self._pace.seen(self.world, now)
        every = cadence.in_force(self._rules.saving, self.world, now)
        saving, told = self._saving.next(self.world, self._pace, now, every, settled)
        self._stand_by(saving, told)
        busy = self._saving.order is not None
        copies = self._rules.snapshot_every
        self._copying, step, missed = self._copying.next(self.world, self._pace, now, copies, saving=busy)
        formation, term = self.world.formation, self._office.record.term
        if step is not None and formation is not None:
            if missed is not None:
                self._forget(missed)
            self._broadcast(OrderSave(term, formation.generation, step, stop=False, in_memory=True))

    def _last_save(self) -> cadence.LastSave | None:
        return cadence.last_save(self.world, self._pace, self.now())

    def _stand_by(self, saving: cadence.Saving, told: cadence.Order | None) -> None:
        """From now on this order stands; `told` goes out."""
        former, self._saving = self._saving, saving
        formation = self.world.formation
        if told is None or formation is None:
            return
        if former.order is not None and saving.order is not None and former.order.step != saving.order.step:
            self._commits.supersede(former.order.step)
        self._broadcast(OrderSave(self._office.record.term, formation.generation, told.step, told.stop))

    async def _requeue(self) -> None:
        await self._sync_journal()
        try:
            await self._control.requeue()
        except HpcftError as error:
            self.feed(RequeueRefused(error.message))
        else:
            self.feed(RequeueAccepted())

    async def _conclude(self, verdict: Verdict) -> None:
        """The order matters: the verdict is durable before anybody acts on it."""
        office = self._office
        await self._sync_journal()
        try:
            await asyncio.to_thread(verdicts.write, office.directory, office.allocation, verdict, self.world.step)
        except OSError as error:
            log.error("the verdict could not be written: %s", error)
        self._broadcast(End(office.record.term, verdict))
        await asyncio.to_thread(self._renewal.release)
        self._conclude_with(verdict)

    async def _sync_journal(self) -> None:
        """Budgets are to be on disk before the job leaves its nodes, but no start waits for ever for a disk."""
        try:
            async with asyncio.timeout(JOURNAL_SECONDS):
                await self._journal.sync()
        except (OSError, TimeoutError) as error:
            log.error("the journal may not be complete on disk: %s", error or f"no answer in {JOURNAL_SECONDS:g} s")

    def _conclude_with(self, outcome: Verdict | SteppedDown) -> None:
        if not self._concluded.done():
            self._concluded.set_result(outcome)

    # --- views ---

    def snapshot(self) -> dict[str, Any]:
        found = self._view(self.world, self._rules, self.now())
        if self._journal.failed is not None:
            found["warnings"].append(f"the journal cannot be written, and is tried again: {self._journal.failed}")
        if self._mirror is not None:
            progress = self._mirror.progress()
            found["mirror"] = progress.to_json()
            found["warnings"] += [warning] if (warning := progress.warning()) else []
        return found

    async def _write_status(self) -> None:
        """Publish what there is to see, and look for operators' commands in the spool."""
        spool, record = self._office.directory.spool, self._office.record
        taken: set[Path] = set()
        while True:
            await asyncio.to_thread(self._publish_status)
            for path, command in await asyncio.to_thread(lambda: list(spooled(spool, record))):
                if path not in taken:
                    taken.add(path)
                    self._spawn(self._obey(path, command), "command")
            await asyncio.sleep(STATUS_SECONDS)

    async def _obey(self, path: Path, command: Message) -> None:
        """A command from the spool. It lies there until the journal has it: else the next leader is to find it."""
        self.command(command)
        while True:
            try:
                await self._journal.sync()
                break
            except OSError:
                await asyncio.sleep(STATUS_SECONDS)
        await asyncio.to_thread(obeyed, path)

    def _publish_status(self) -> None:
        try:
            durable.replace(self._office.directory.status, orjson.dumps(self.snapshot()))
        except OSError as error:
            log.warning("status.json could not be written: %s", error)

    def _close(self) -> None:
        self._journal.close()
        if self._mirror is not None:
            self._mirror.close()
        self._commits.close()
        self._renewal.close()
        if self._heartbeats is not None:
            self._heartbeats.close()
        if self._store is not None:
            self._store.close()
        if self._meeting is not None:
            self._meeting[1].close()


def _missed(office: Office, replayed: Replayed) -> float:
    """What the run clock has missed since the last record: within a start, all the time since it was written."""
    if replayed.written is None or replayed.world.allocation != office.allocation:
        return office.leaderless
    # Two nodes' clocks, perhaps. They agree as far as accounts need, or one is wrong: a leader whose workers train is
    # not silent for longer than this.
    silent = max(PROGRESS_SECONDS, len(office.nodes) / PROGRESS_LINES_PER_SECOND) + SILENT_SLACK_SECONDS
    since = (datetime.now(UTC) - replayed.written).total_seconds()
    return min(max(since, office.leaderless), office.leaderless + silent)
