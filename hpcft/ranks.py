"""The ranks that a node holds in the running generation: what they are told, and what becomes of them.

Between the agent, which knows formations and events, and `Workers`, which knows processes. A worker's exit status, its
last packet and its slot in the shared page together say what happened; here that becomes one `Failure` with a
sentence. Workers that this node has ended on purpose are no longer its ranks, so their ends say nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.checkpoint.layout import checkpoint_name
from hpcft.config import Config
from hpcft.events import (
    Event,
    Failure,
    FailureKind,
    Formation,
    NodeReported,
    Progressed,
    WorkerFailed,
    WorkerReport,
    WorkerReturned,
    WorkersReady,
    WorkerStopped,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step
from hpcft.page import NodePage, Phase
from hpcft.snapshots import Snapshots
from hpcft.units import EverySteps
from hpcft.worker.spec import STATUS_DAMAGED, STATUS_FENCED, STATUS_FORGOTTEN, STATUS_STOPPED, STATUS_UNREADABLE
from hpcft.workers import NOT_STARTED, WorkerEvent, WorkerExited, WorkerSaid, WorkerSpawned

log = logging.getLogger("hpcft.ranks")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker needs to know beyond its formation."""

    run: RunId
    run_directory: Path
    node: NodeId
    address: str
    gpus: tuple[str, ...]
    config: Config


@dataclass(slots=True)
class _Rank:
    rank: Rank
    slot: int
    pid: int = 0
    ready: bool = False
    last_words: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    step_seen: int = 0
    seen_at: float | None = None
    rate: float | None = None


class Ranks:
    """This node's ranks of one generation after the other. `say` sends an event to the leader, `tell` a message."""

    def __init__(
        self,
        assignment: Assignment,
        incarnation: Incarnation,
        page: NodePage,
        snapshots: Snapshots,
        say: Callable[[Event], None],
        tell: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._assignment = assignment
        self._incarnation = incarnation
        self._page = page
        self._say = say
        self._tell = tell
        self._formation: Formation | None = None
        self._ranks: dict[str, _Rank] = {}
        self._progress: tuple[Generation, Step] | None = None
        self._outcomes: list[Event] = []
        self._snapshots = snapshots
        self._saves: dict[Rank, Mapping[str, Any]] = {}
        """What was last told of each rank's saves."""

    def __len__(self) -> int:
        return len(self._ranks)

    def begin(self, formation: Formation, store: tuple[str, int]) -> dict[str, dict[str, Any]]:
        """Take over this node's share of the formation: returns each worker's specification by name."""
        member = formation.member(self._assignment.node)
        assert member is not None
        self._page.generation = formation.generation
        self._page.order_word = 0
        self._formation = formation
        self._ranks = {}
        self._outcomes = []
        self._saves = {}
        specs = {}
        for slot, rank in enumerate(member.ranks()):
            self._page.clear_slot(slot)
            name = f"g{formation.generation:04}-rank{rank:04}"
            self._ranks[name] = _Rank(Rank(rank), slot)
            specs[name] = worker_spec(self._assignment, formation, slot, Rank(rank), member.workers, store)
        workers = {each.slot: (name, each.rank) for name, each in self._ranks.items()}
        self._snapshots.begin(formation, workers, self._tell_save, self._say)
        return specs

    def forget(self) -> None:
        """They are being ended on purpose; what they say from now on is of no interest."""
        self._formation = None
        self._ranks = {}
        self._outcomes = []
        self._saves = {}

    def report_last(self) -> None:
        """Nobody trains here: how far the last ones were, before this agent perhaps, is what a recovery loses."""
        readings = [self._page.slot(slot).read() for slot in range(self._page.slots)]
        steps = [reading.step for reading in readings if reading.phase is not Phase.EMPTY]
        if steps:
            generation = Generation(self._page.generation)
            self._say(Progressed(self._assignment.node, generation, Step(min(steps)), loss=None))

    def repeat(self) -> None:
        """Say again what has become of the ranks of this generation: the stream on which it was said may be lost."""
        if not self._ranks:
            self.report_last()
        self._progress = None
        self.report_progress()
        self._snapshots.repeat()
        for message in self._saves.values():
            self._tell(message)
        for event in self._outcomes:
            self._say(event)

    def _say_outcome(self, event: Event) -> None:
        self._outcomes.append(event)
        self._say(event)

    def lowest_step(self) -> Step:
        """The last step that all ranks of this node have completed."""
        return Step(min((self._page.slot(each.slot).step for each in self._ranks.values()), default=0))

    # --- what happens to them ---

    def see(self, event: WorkerEvent) -> None:
        rank, formation = self._ranks.get(event.worker), self._formation
        if rank is None or formation is None:
            if isinstance(event, WorkerSaid):
                close_all(event.fds)
            return
        match event:
            case WorkerSpawned(pid=pid):
                rank.pid = pid
                if self._assignment.config.job.command is not None:
                    self._became_ready(rank, formation)
            case WorkerSaid(message=message, fds=fds):
                self._heard(rank, formation, message, fds)
            case WorkerExited():
                self._exited(rank, formation, event)

    def _heard(self, rank: _Rank, formation: Formation, message: Mapping[str, Any], fds: tuple[int, ...]) -> None:
        about = {"generation": formation.generation, "rank": rank.rank}
        match message:
            case {"kind": "ready"}:
                self._became_ready(rank, formation)
            case {"kind": "reserve", "size": size} if fds:
                self._snapshots.asked(rank.slot, size, fds[0])
                fds = fds[1:]
            case {"kind": "snapshot"}:
                self._snapshots.copied(rank.slot, message, fds[0] if fds else None)
                fds = fds[1:]
            case {"kind": "skipped", "step": step, "reason": reason}:
                self._tell_save(rank.rank, {"skipped": {**about, "step": step, "reason": reason}})
            case {"kind": "shard", "step": step, "report": report, **timing}:
                self._snapshots.wrote(rank.rank, Step(step))
                self._tell_save(rank.rank, {"shard": {**about, "step": step, "report": report, **timing}})
            case {"kind": "save_failed", "step": step, "reason": reason}:
                self._snapshots.missed(rank.rank, Step(step))
                self._tell_save(rank.rank, {"save_failed": {**about, "step": step, "reason": reason}})
            case {"kind": kind}:
                rank.last_words[str(kind)] = message
        close_all(fds)

    def _tell_save(self, rank: Rank, message: Mapping[str, Any]) -> None:
        self._saves[rank] = message
        self._tell(message)

    def _became_ready(self, rank: _Rank, formation: Formation) -> None:
        rank.ready = True
        if not all(each.ready for each in self._ranks.values()):
            return
        config = self._assignment.config
        steps = config.train.get("steps")
        self._say_outcome(
            WorkersReady(
                self._assignment.node,
                formation.generation,
                counts_steps=config.job.command is None,
                total_steps=Step(steps) if isinstance(steps, int) and config.job.command is None else None,
            )
        )

    def _exited(self, rank: _Rank, formation: Formation, event: WorkerExited) -> None:
        self.report_progress()  # the last steps count, too
        node, generation = self._assignment.node, formation.generation
        if event.status == 0:
            self._say_outcome(WorkerReturned(node, generation, rank.rank, self._step(rank)))
        elif event.status == STATUS_STOPPED:
            self._say_outcome(WorkerStopped(node, generation, rank.rank))
        else:
            self._failed(rank, formation, failure_of(event, rank.last_words, self._step(rank)))

    def _failed(self, rank: _Rank, formation: Formation, failure: Failure) -> None:
        log.warning("rank %d failed: %s", rank.rank, failure.what)
        self._say_outcome(
            WorkerFailed(self._assignment.node, self._incarnation, formation.generation, rank.rank, failure)
        )

    def _step(self, rank: _Rank) -> Step:
        return Step(self._page.slot(rank.slot).step)

    # --- what is reported of them ---

    def report_progress(self) -> None:
        """Tell the leader how far all ranks of this node are, if that is news."""
        if self._formation is None or not self._ranks:
            return
        readings = [self._page.slot(each.slot).read() for each in self._ranks.values()]
        news = (self._formation.generation, Step(min(reading.step for reading in readings)))
        if news == self._progress:
            return
        self._progress = news
        losses = [reading.loss for reading in readings if reading.loss is not None]
        self._say(
            Progressed(
                self._assignment.node,
                *news,
                loss=sum(losses) / len(losses) if losses else None,
            )
        )

    def report(self, now: float) -> None:
        """Tell the leader everything about these workers, for people to read."""
        if self._formation is None or not self._ranks:
            return
        workers = tuple(self._worker_report(rank, now) for rank in self._ranks.values())
        self._say(
            NodeReported(
                self._assignment.node,
                self._formation.generation,
                workers,
                saves=self._snapshots.report(),
                reserved=self._snapshots.reserved,
                low_memory=self._snapshots.refused,
            )
        )

    def _worker_report(self, rank: _Rank, now: float) -> WorkerReport:
        reading = self._page.slot(rank.slot).read()
        if reading.phase in (Phase.EMPTY, Phase.START, Phase.RESTORE):
            rank.seen_at = None  # the way to the step it starts from is none of its own
        elif reading.phase is not Phase.DONE:
            if rank.seen_at is not None and reading.step >= rank.step_seen and now > rank.seen_at:
                rate = (reading.step - rank.step_seen) / (now - rank.seen_at)
                rank.rate = rate if rank.rate is None else 0.7 * rank.rate + 0.3 * rate
            rank.step_seen, rank.seen_at = reading.step, now
        return WorkerReport(
            rank=rank.rank,
            pid=rank.pid,
            phase=reading.phase.name.lower(),
            step=Step(reading.step),
            step_age=None if reading.ended is None else max(0.0, now - reading.ended),
            loss=reading.loss,
            steps_per_second=rank.rate,
            tokens=reading.tokens,
        )


def failure_of(event: WorkerExited, last_words: Mapping[str, Mapping[str, Any]], step: Step) -> Failure:
    """What an exit and a worker's last words amount to; `step` is the last one it completed."""
    tail = event.tail
    if event.stuck:
        return Failure(FailureKind.STUCK, "does not end after SIGKILL (uninterruptible sleep)", step, tail=tail)
    if event.status == STATUS_FENCED:
        return Failure(FailureKind.FENCED, "ended by itself: its node's lease had run out", step, tail=tail)
    if event.status == STATUS_DAMAGED:
        detail = last_words.get("damaged", {}).get("detail", "it did not say where")
        return Failure(FailureKind.DAMAGED, str(detail), step, tail=tail)
    if event.status == STATUS_FORGOTTEN:
        detail = last_words.get("forgotten", {}).get("detail", "the copy of the state in memory could not be had")
        return Failure(FailureKind.FORGOTTEN, str(detail), step, tail=tail)
    if event.status == STATUS_UNREADABLE:
        detail = last_words.get("unreadable", {}).get("detail", "its checkpoint cannot be read on this node")
        return Failure(FailureKind.UNREADABLE, str(detail), step, tail=tail)
    exception = last_words.get("exception")
    if exception is not None:
        kind = FailureKind.COLLECTIVE if exception.get("collective") else FailureKind.EXCEPTION
        at = exception.get("step")
        what = f"{exception.get('type')}: {exception.get('message')}"
        if fault := exception.get("fault"):  # first: a broken GPU may show in a collective
            kind = FailureKind.SURROUNDINGS
            what = f"{what}; {fault} comes from around the program, not from it"
        where = str(exception.get("where") or "")
        if kind is FailureKind.COLLECTIVE:
            tail = ()  # of every rank of the world, and none of them says why
        return Failure(kind, what, Step(at) if isinstance(at, int) else step, where, tail)
    if event.status == NOT_STARTED and event.pid == 0:
        return Failure(FailureKind.START, event.cause, step, tail=tail)
    return Failure(FailureKind.KILLED if event.status < 0 else FailureKind.EXIT, event.cause, step, tail=tail)


def worker_spec(
    assignment: Assignment, formation: Formation, slot: int, rank: Rank, local_size: int, store: tuple[str, int]
) -> dict[str, Any]:
    """What one worker is told at its start (docs/interfaces.md)."""
    config = assignment.config
    nodes = [member.node for member in formation.members]
    every, copied = config.checkpoint.every, config.checkpoint.snapshot_every
    bandwidth = config.checkpoint.max_bandwidth
    return {
        "run_id": assignment.run,
        "run_dir": str(assignment.run_directory),
        "name": config.run.name,
        "node": assignment.node,
        "address": assignment.address,
        "generation": formation.generation,
        "term": formation.term,
        "nonce": formation.nonce,
        "rank": rank,
        "local_rank": slot,
        "world_size": formation.world_size,
        "local_world_size": local_size,
        "node_rank": nodes.index(assignment.node),
        "node_count": len(nodes),
        "slot": slot,
        "master_addr": store[0],
        "master_port": store[1],
        "store_prefix": f"g{formation.generation}",
        "group_timeout": config.recovery.group_timeout,
        "restore": _restore(assignment.run_directory, formation),
        "seed": config.run.seed,
        "checkpoint": {
            "every_steps": every.steps if isinstance(every, EverySteps) else None,
            "copy_steps": copied.steps if isinstance(copied, EverySteps) else None,
            "copies": config.checkpoint.mode == "async",
            "bandwidth": None if bandwidth is None else bandwidth / local_size,
            "compare_every": config.checkpoint.compare_every,
            "waits": config.checkpoint.busy == "wait",
            "needs_copies": config.checkpoint.low_memory == "stop",
        },
        "data": {
            "ledger": config.data.ledger,
            "workers": config.data.workers,
            "prefetch": config.data.prefetch,
        },
        "train": dict(config.train),
        "program": _program(config),
        "args": list(config.job.args),
        "device": assignment.gpus[slot] if slot < len(assignment.gpus) else None,
    }


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _restore(run_directory: Path, formation: Formation) -> dict[str, Any] | None:
    checkpoint = formation.restore
    if checkpoint is None:
        return None
    name = checkpoint_name(checkpoint.step, checkpoint.generation)
    found: dict[str, Any] = {"step": checkpoint.step, "directory": str(run_directory / "checkpoints" / name)}
    if formation.memory:
        # who has the shares of which former ranks, by the first rank that lives beside them now
        found["memory"] = [[each.first_rank, each.workers, now.first_rank] for each, now in formation.handed_out()]
        found["local"] = len(formation.members) == 1
    return found


def _program(config: Config) -> dict[str, Any]:
    job = config.job
    if job.command is not None:
        return {"command": list(job.command)}
    return {"script": str(job.script)} if job.script is not None else {"module": job.module}
