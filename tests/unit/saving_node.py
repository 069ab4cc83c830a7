"""A node that saves, in one process: workers' savings on threads, the agent's side on the test's loop, the leader's
commits, and real carriers. Only training is left out.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch
from checkpoint_samples import NONCE, same_tensors

from hpcft import process
from hpcft.checkpoint.layout import checkpoint_name, parse_name
from hpcft.checkpoint.load import load
from hpcft.checkpoint.read import entries, verify
from hpcft.checkpoint.tree import FlatState, flatten
from hpcft.commits import Commits, Retention
from hpcft.config import Config
from hpcft.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRef,
    CheckpointSkipped,
    Event,
    Formation,
    Member,
    NodeReported,
    Persist,
    SnapshotDropped,
    SnapshotTaken,
)
from hpcft.holdings import Holdings
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.page import NodePage
from hpcft.ranks import Assignment, Ranks
from hpcft.snapshots import SaveSettings, Snapshots
from hpcft.stream import Stream
from hpcft.worker.link import Link
from hpcft.worker.saving import Saving, Stateful, named
from hpcft.worker.spec import WorkerSpec
from hpcft.workers import WorkerSaid

NODE = NodeId("node1")
RUN = RunId("5a" * 16)
SECONDS = 60.0
EVERYTHING = Retention(10**6, 0)

Saved = CheckpointCommitted | CheckpointFailed | CheckpointSkipped


def spec_of(directory: Path, generation: int, rank: int, ranks: int, page: int, control: int) -> WorkerSpec:
    """What the worker of a rank is told."""
    return WorkerSpec(
        rank=Rank(rank),
        world_size=ranks,
        local_rank=rank,
        generation=Generation(generation),
        nonce=NONCE,
        run=RUN,
        run_directory=directory,
        copies=True,
        slot=rank,
        page_fd=page,
        control_fd=control,
    )


class Worker:
    """One rank of one generation, in this process."""

    def __init__(self, name: str, spec: WorkerSpec, ends: tuple[socket.socket, socket.socket]) -> None:
        self.name = name
        self.link = Link(spec)
        self.saving = Saving(spec, self.link, torch.device("cpu"))
        self.ends = ends

    def close(self) -> None:
        self.link.close()
        for end in self.ends:
            end.close()


class SavingNode:
    """`objects` are the state of all ranks."""

    def __init__(
        self,
        directory: Path,
        root: Path,
        ranks: int = 1,
        slots: int = 2,
        memory: int | None = 1 << 30,
        needs_copies: bool = False,
        page: NodePage | None = None,
        retained: Retention = EVERYTHING,
    ) -> None:
        self.directory = directory
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)
        self.slots = slots
        self.objects: dict[str, Stateful] = {}
        self.workers: list[Worker] = []
        self.generation = 0
        self.reports: list[NodeReported] = []
        self._count = ranks
        self._needs_copies = needs_copies
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: dict[str, socket.socket] = {}
        self._formation: Formation | None = None
        self._holdings = Holdings()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._page = page or NodePage.create(ranks)
        settings = SaveSettings(self.root, "127.0.0.1", memory, slots, None)
        self.snapshots = Snapshots(settings, NODE, self._answer, self._run, self._dial)
        config = Config.model_validate({"run": {"name": "r"}, "job": {"script": "train.py"}})
        assignment = Assignment(RUN, directory, NODE, "127.0.0.1", (), config)
        self._ranks = Ranks(assignment, Incarnation("a"), self._page, self.snapshots, self._say, self._tell)
        self._commits = Commits(self.root, RUN, retained, self._deliver)

    async def _dial(self, neighbour: Member) -> Stream:
        raise AssertionError(f"a single node has no neighbour {neighbour.node}")

    # --- a generation

    def begin(self, **objects: Stateful) -> None:
        """Workers of the next generation, with this state; those of the one before are gone."""
        for worker in self.workers:
            self._leave(worker)
        self.objects = objects
        self.workers = [self._worker(rank, name) for rank, name in enumerate(self._follow())]

    def begin_with(self, channel: socket.socket) -> None:
        """A generation of one worker, in another process, to which this leads."""
        (name,) = self._follow()
        self._channels = {name: channel}
        self._loop.add_reader(channel, self._hear, name, channel)

    def _follow(self) -> list[str]:
        """Names of the workers of the next generation."""
        self.generation += 1
        member = Member(NODE, Incarnation("a"), "127.0.0.1", self._count, Rank(0))
        formation = Formation(Term(1), Generation(self.generation), (member,), None, NONCE)
        self._commits.follow(formation)
        self._formation, self._holdings = formation, Holdings()
        return list(self._ranks.begin(formation, ("127.0.0.1", 1)))

    def _worker(self, rank: int, name: str) -> Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        spec = spec_of(self.directory, self.generation, rank, self._count, self._page.fd, theirs.fileno())
        worker = Worker(name, replace(spec, needs_copies=self._needs_copies), (ours, theirs))
        worker.saving.remember(named(self.objects), None, None)
        self._channels[name] = ours
        self._loop.add_reader(ours, self._hear, name, ours)
        return worker

    def _leave(self, worker: Worker) -> None:
        self._loop.remove_reader(worker.ends[0])
        del self._channels[worker.name]
        worker.close()

    # --- saving

    async def prepare(self) -> None:
        """As after the first step: have memory made, and wait for it."""
        for worker in self.workers:
            worker.saving.prepare()
        await until(lambda: all(worker.saving.prepared() for worker in self.workers))

    async def save(self, step: int, *, wait: bool = False) -> FlatState:
        """All ranks save, as between two steps; returns what they saved. Without `wait` ranks would ask one another."""
        assert wait or self._count == 1
        saved = self._state(step)
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
            for worker in self.workers:
                save = worker.saving.save if wait else partial(worker.saving.due, durable=True, ordered=False)
                tasks.create_task(asyncio.to_thread(save, Step(step)))
        return saved

    def _state(self, step: int) -> FlatState:
        flat = flatten(self.workers[0].saving._state(Step(step)))
        return FlatState({name: tensor.clone() for name, tensor in flat.tensors.items()}, flat.values)

    async def outcome(self) -> Saved:
        """What became of the next save of which something is known."""
        async with asyncio.timeout(SECONDS):
            while not isinstance(event := await self._events.get(), Saved):
                pass
        return event

    async def committed(self, step: int, saved: FlatState) -> None:
        """The next thing that is known is that this was committed; and it is what was saved, bit for bit."""
        event = await self.outcome()
        assert isinstance(event, CheckpointCommitted) and event.checkpoint.step == step, event
        directory = self.root / checkpoint_name(Step(step), Generation(self.generation))
        assert verify(directory, RUN) == []
        assert_same(load(directory, run=RUN), saved)

    @property
    def held(self) -> Step | None:
        """The newest step that is complete in memory."""
        held = self._holdings.held
        return None if held is None else held.snapshot.step

    def persist(self, step: int) -> None:
        """Have what is held written once more, as before the run leaves."""
        snapshot = CheckpointRef(Step(step), Generation(self.generation))
        nonce = self._commits.attempt(snapshot, anew=False)
        assert self._formation is not None and nonce is not None
        self.snapshots.persist(Persist(Term(1), snapshot, self._formation.members, (NODE,), nonce))

    def retain(self, lineage: tuple[CheckpointRef, ...]) -> None:
        """As the leader has it done when its term was renewed after a commit."""
        self._commits.retain(lineage)

    def left(self) -> list[int]:
        """Steps of the committed checkpoints; nothing else is there."""
        others = {path.name for path in self.root.iterdir()} - {"LATEST", ".trash", "lost+found"}
        assert all(parse_name(name) for name in others), others
        return [entry.step for entry in entries(self.root)]

    def carrier(self, rank: int) -> int:
        """The pid of the carrier that writes for a rank; 0: there is none yet."""
        carrier = self.snapshots._shares[rank].disk._process
        return 0 if carrier is None else carrier.pid

    def report(self) -> NodeReported:
        """What the node says of itself."""
        self.reports.clear()
        self._ranks.report(0.0)
        return self.reports[0]

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.snapshots.end()
        await until(lambda: not carriers_of(os.getpid()))
        await asyncio.sleep(0.01)  # for the loop to hear of it
        self._commits.close()
        for worker in self.workers:
            self._leave(worker)
        self._page.close()

    # --- the wiring: what agent and leader do

    def _run(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _hear(self, name: str, channel: socket.socket) -> None:
        try:
            packet, fds, _, _ = socket.recv_fds(channel, 1 << 17, 8, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionResetError:
            packet = b""
        if packet:
            self._ranks.see(WorkerSaid(name, orjson.loads(packet), tuple(fds)))
        else:
            self._loop.remove_reader(channel)

    def _answer(self, name: str, message: Mapping[str, Any], fds: Sequence[int]) -> None:
        with suppress(KeyError, OSError):  # it has ended
            socket.send_fds(self._channels[name], [orjson.dumps(message)], fds)

    def _say(self, event: Event) -> None:
        match event:
            case NodeReported():
                self.reports.append(event)
            case SnapshotTaken() | SnapshotDropped():
                formation = self._formation
                assert formation is not None
                if event.generation == formation.generation:
                    self._loop.call_soon(self._order, formation, event)

    def _order(self, formation: Formation, event: SnapshotTaken | SnapshotDropped) -> None:
        known = self._holdings
        if isinstance(event, SnapshotTaken):
            self._holdings = known.took(event, formation)
        else:
            self._holdings = known.dropped(event)
        if (safe := self._holdings.safe) is not None:
            self.snapshots.keep(safe.snapshot.generation, safe.snapshot.step)
        for step, written in self._holdings.useless(formation).items():
            self.snapshots.forget(formation.generation, step, written=written)

    def _tell(self, message: Mapping[str, Any]) -> None:
        ((kind, about),) = message.items()
        generation, step, rank = Generation(about["generation"]), Step(about["step"]), Rank(about["rank"])
        match kind:
            case "shard":
                self._commits.reported(generation, step, rank, about["report"], about)
            case "skipped":
                self._commits.skipped(generation, step, rank, about["reason"])
            case "save_failed":
                self._commits.failed(generation, step, rank, about["reason"], about.get("nonce", ""))

    def _deliver(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._hear_of, event)

    def _hear_of(self, event: Event) -> None:
        self._events.put_nowait(event)


@asynccontextmanager
async def saving_node(
    directory: Path,
    *,
    root: Path | None = None,
    ranks: int = 1,
    slots: int = 2,
    memory: int | None = 1 << 30,
    needs_copies: bool = False,
    retained: Retention = EVERYTHING,
) -> AsyncIterator[SavingNode]:
    node = SavingNode(directory, root or directory / "checkpoints", ranks, slots, memory, needs_copies, None, retained)
    try:
        yield node
    finally:
        await node.close()


def carriers_of(agent: int) -> list[int]:
    """Pids of its carriers, those included that were left behind."""

    def runs(pid: int) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return b""

    return [pid for pid in process.children(agent) if b"hpcft.carrier" in runs(pid) or process.state_of(pid) == "Z"]


def assert_same(found: FlatState, expected: FlatState) -> None:
    assert same_tensors(found, expected)
    assert found.values == expected.values


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.001)
