"""A node as a checkpoint benchmark needs it: the agent's own parts for ranks, copies and carriers, around real workers.

What an agent has beside that is left out: pool (workers are started afresh), leader (what it would say of a save is
said here), heartbeats. So a figure is that of the engine, and not of how often a leader looks.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
from torch.distributed import TCPStore

from hpcft.checkpoint.commit import Facts, commit
from hpcft.checkpoint.manifest import ShardReport
from hpcft.config import Config
from hpcft.events import CheckpointRef, Event, Formation, Member, SnapshotTaken
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Term
from hpcft.page import NodePage
from hpcft.ranks import Assignment, Ranks
from hpcft.rundir import RunDirectory
from hpcft.snapshots import SaveSettings, Snapshots
from hpcft.stream import Stream
from hpcft.workers import WorkerSaid

HERE = Path(__file__).resolve().parent
_ADDRESS = "127.0.0.1"
_PACKET = 1 << 17
_TERM = Term(1)
_LIFE = Incarnation("bench")
_NODE = NodeId("bench")


class SessionFailed(Exception):
    """The workers did not come to their end; the reason is for people."""


class Node:
    """One node with `workers` ranks, for one generation after the other. `place` is a directory of its own."""

    def __init__(self, place: Path, workers: int, gpus: Sequence[str]) -> None:
        self._place = place
        self._workers = workers
        self._gpus = tuple(gpus)
        self._directory = RunDirectory(place / "run")
        self._run = self._directory.prepare()
        self._page = NodePage.create(workers)
        self._channels: dict[str, socket.socket] = {}
        self._reports: dict[int, dict[Rank, ShardReport]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = Generation(0)
        self._failed = ""
        self._store = TCPStore(_ADDRESS, 0, is_master=True, wait_for_workers=False)
        self.saved: CheckpointRef | None = None
        """What was committed last."""
        settings = SaveSettings(self._directory.checkpoints, _ADDRESS, memory=None, slots=2, bandwidth=None)
        self._snapshots = Snapshots(settings, _NODE, self._answer, self._begin_task, self._dial)
        self._members: tuple[Member, ...] = ()

    async def _dial(self, neighbour: Member) -> Stream:
        raise AssertionError(f"a node by itself has no neighbour {neighbour.node}")

    async def train(
        self, program: Path, plan: Mapping[str, Any], *, every: int | None, limit: float, memory: bool | None = None
    ) -> list[list[dict[str, Any]]]:
        """Have a generation run the program; returns what each rank has reported, a line at a time.

        `every`: steps between two saves. `memory`: whether it starts from the state saved last as it lies in memory,
        or from its files; None: from nothing. SessionFailed: it has not come to an end in `limit` seconds, or has
        ended otherwise than by itself or SIGKILL.
        """
        self._generation = generation = Generation(self._generation + 1)
        config = Config.model_validate(
            {
                "run": {"name": "bench"},
                "job": {"script": str(program)},
                "checkpoint": {"every": f"{every} steps"} if every else {"mode": "sync"},
                "train": {**plan, "report": str(self._place)},
            }
        )
        assignment = Assignment(self._run, self._directory.path, _NODE, _ADDRESS, self._gpus, config)
        ranks = Ranks(assignment, _LIFE, self._page, self._snapshots, self._see, self._hear_of_save)
        before, self._members = self._members, (Member(_NODE, _LIFE, _ADDRESS, self._workers, Rank(0)),)
        restore = None if memory is None else self.saved
        held = before if memory else ()
        formation = Formation(_TERM, generation, self._members, restore, f"{generation:08x}", held)
        specs = ranks.begin(formation, (_ADDRESS, self._store.port))
        loop = asyncio.get_running_loop()
        running = []
        try:
            for name, spec in specs.items():
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.setblocking(False)
                self._channels[name] = ours
                with theirs:
                    running.append(await self._start(program, spec, theirs.fileno()))
                loop.add_reader(ours, self._hear, ranks, name, ours)
            self._snapshots.hand_out()
            try:
                async with asyncio.timeout(limit):
                    ends = [await each.wait() for each in running]
            except TimeoutError:
                raise SessionFailed(f"not done after {limit:.0f} s") from None
            if self._failed:
                raise SessionFailed(self._failed)
            if strange := [end for end in ends if end not in (0, -signal.SIGKILL)]:
                raise SessionFailed(f"a rank has ended with {strange[0]}: {self._last_words()}")
        finally:
            for each in running:
                with suppress(ProcessLookupError):
                    each.kill()
                await each.wait()
            for ours in self._channels.values():
                loop.remove_reader(ours)
                ours.close()
            self._channels.clear()
            while self._tasks:
                await asyncio.wait(self._tasks)
        paths = [report_path(self._place, generation, rank) for rank in range(self._workers)]
        return [[orjson.loads(line) for line in path.read_bytes().splitlines()] for path in paths]

    async def _start(self, program: Path, spec: Mapping[str, Any], channel: int) -> asyncio.subprocess.Process:
        given = {**spec, "page_fd": self._page.fd, "control_fd": channel}
        environment = {
            **os.environ,
            "HPCFT_WORKER_SPEC": orjson.dumps(given).decode(),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        with (self._place / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, str(program)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(self._page.fd, channel),
            )

    def close(self) -> None:
        """Carriers, copies and page are gone afterwards."""
        self._snapshots.end()
        self._page.close()

    def _last_words(self) -> str:
        lines = [line for line in (self._place / "log").read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:160] if lines else "it has said nothing"

    # --- what an agent does for its ranks

    def _answer(self, worker: str, message: Mapping[str, Any], fds: Sequence[int]) -> None:
        if (channel := self._channels.get(worker)) is not None:
            with suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(channel, [orjson.dumps(message)], fds)

    def _begin_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _hear(self, ranks: Ranks, name: str, channel: socket.socket) -> None:
        try:
            packet, fds, _, _ = socket.recv_fds(channel, _PACKET, 8, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            packet, fds = b"", []
        if packet:
            ranks.see(WorkerSaid(name, orjson.loads(packet), tuple(fds)))
        else:
            asyncio.get_running_loop().remove_reader(channel)

    # --- what a leader does with a save

    def _see(self, event: Event) -> None:
        if isinstance(event, SnapshotTaken) and event.in_memory:
            self._snapshots.keep(event.generation, event.step)

    def _hear_of_save(self, message: Mapping[str, Any]) -> None:
        match message:
            case {"shard": {"step": step, "rank": rank, "report": report}}:
                reports = self._reports.setdefault(step, {})
                reports[rank] = ShardReport.parse(report)
                if len(reports) == self._workers:
                    self._begin_task(self._commit(step, list(self._reports.pop(step).values())), f"commit-{step}")
            case {"save_failed": {"reason": reason}} | {"skipped": {"reason": reason}}:
                self._failed = self._failed or f"a save came to nothing: {reason}"

    async def _commit(self, step: int, reports: list[ShardReport]) -> None:
        facts = Facts(self._run, _TERM, None, 0.0)
        generation = self._generation
        await asyncio.to_thread(commit, self._directory.checkpoints, reports, facts)
        self.saved = CheckpointRef(step, generation)


def report_path(place: Path, generation: int, rank: int) -> Path:
    """Where a rank writes what it has measured: one JSON object per line."""
    return place / f"report-{generation:04}-{rank:04}.jsonl"
