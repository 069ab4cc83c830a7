"""Worlds of real workers with a stand-in for their agent: a TCPStore, a page, and a control channel for each.

Workers are forked from a process that has everything imported, as the pool's are.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import orjson
from torch.distributed import TCPStore

from hpcft.checkpoint.commit import Committed, Facts, commit
from hpcft.checkpoint.manifest import ShardReport
from hpcft.ids import RunId, Term
from hpcft.page import NodePage
from hpcft.rundir import RunDirectory
from hpcft.worker.spec import SPEC_VARIABLE

SMALL = Path(__file__).parents[1] / "programs" / "small.py"
SECONDS = 90.0

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "hpcft.worker.run", __name__])


@dataclass
class World:
    page: NodePage
    processes: list[BaseProcess]
    channels: list[socket.socket]
    logs: list[Path]
    said: list[list[dict[str, Any]]] = field(default_factory=list)

    def hear(self) -> None:
        for channel, said in zip(self.channels, self.said, strict=True):
            while True:
                try:
                    packet = channel.recv(1 << 17)
                except (BlockingIOError, ConnectionResetError):
                    break
                if not packet:
                    break
                said.append(message := orjson.loads(packet))
                if message["kind"] == "reserve":
                    channel.send(orjson.dumps({"kind": "no_arenas", "reason": "there are none here"}))

    def until(self, true: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, f"{what} did not come about\n{self.output()}"
            self.hear()
            time.sleep(0.002)

    def step(self) -> int:
        """What all ranks have completed."""
        return min(self.page.slot(rank).step for rank in range(len(self.processes)))

    def finish(self) -> list[int | None]:
        """Wait for all; their exit statuses."""
        self.until(lambda: not any(process.is_alive() for process in self.processes), "the end of all workers")
        self.hear()
        return [process.exitcode for process in self.processes]

    def messages(self, kind: str) -> list[dict[str, Any]]:
        self.hear()
        return [{**message, "rank": rank} for rank, said in enumerate(self.said) for message in said
                if message["kind"] == kind]  # fmt: skip

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.logs if path.exists())


@dataclass
class Life:
    """One run directory, and the generations that live in it."""

    directory: RunDirectory
    generation: int = 0
    parent: str | None = None

    @classmethod
    def begin(cls, path: Path) -> Life:
        directory = RunDirectory(path)
        directory.prepare()
        return cls(directory)

    @contextmanager
    def world(
        self,
        size: int,
        *,
        restore: Path | None = None,
        every: int | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        program: Path = SMALL,
        timeout: float = 60.0,
        workers: int = 0,
        absent: int | None = None,
        store_port: int | None = None,
        **train: Any,
    ) -> Iterator[World]:
        self.generation += 1
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        page = NodePage.create(size)
        world = World(page, [], [], [])
        try:
            for rank in range(size):
                if rank == absent:
                    continue
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.setblocking(False)
                log = self.directory.path / "logs" / f"g{self.generation}-r{rank}.log"
                spec = {
                    "run_id": self.directory.run_id(),
                    "run_dir": str(self.directory.path),
                    "name": self.directory.name,
                    "node": "n1",
                    "address": "127.0.0.1",
                    "generation": self.generation,
                    "term": 1,
                    "nonce": f"{self.generation:08x}",
                    "rank": rank,
                    "local_rank": rank,
                    "world_size": size,
                    "local_world_size": size,
                    "node_rank": 0,
                    "node_count": 1,
                    "slot": rank,
                    "master_addr": "127.0.0.1",
                    "master_port": store.port if store_port is None else store_port,
                    "store_prefix": f"g{self.generation}",
                    "group_timeout": timeout,
                    "restore": None if restore is None else {
                        "step": int(restore.name.split("-")[1]), "directory": str(restore)
                    },
                    "seed": 11,
                    "checkpoint": {"every_steps": every, **(checkpoint or {})},
                    "data": {"ledger": True, "workers": workers, "prefetch": 2},
                    "train": train,
                    "program": {"script": str(program)},
                    "args": [],
                    "device": None,
                }  # fmt: skip
                process = forks.Process(target=_work, args=(spec, DupFd(page.fd), DupFd(theirs.fileno()), str(log)))
                process.start()
                theirs.close()
                world.processes.append(process)
                world.channels.append(ours)
                world.logs.append(log)
                world.said.append([])
            yield world
        finally:
            for process in world.processes:
                process.kill()
                process.join()
                process.close()
            for channel in world.channels:
                channel.close()
            page.close()

    def commit(self, world: World, step: int) -> Path:
        """What the leader does when all ranks have reported."""
        size = len(world.processes)
        world.until(lambda: len(self._shards(world, step)) == size, f"the checkpoint of step {step}")
        reports = [ShardReport.parse(message["report"]) for message in self._shards(world, step)]
        facts = Facts(RunId(self.directory.run_id()), Term(1), self.parent, time.time())
        done: Committed = commit(self.directory.checkpoints, reports, facts)
        self.parent = done.name
        return done.directory

    def _shards(self, world: World, step: int) -> list[dict[str, Any]]:
        return [message for message in world.messages("shard") if message["step"] == step]


def _work(spec: Mapping[str, Any], page: Any, control: Any, log: str) -> None:
    """A forked worker, up to the user's program."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    given = {**spec, "page_fd": page.detach(), "control_fd": control.detach()}
    os.environ[SPEC_VARIABLE] = orjson.dumps(given).decode()
    runpy.run_path(spec["program"]["script"], run_name="__main__")
