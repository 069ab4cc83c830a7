"""What runs on a node, put together: the keeper first, and as its child the agent.

The configuration is read once, before the keeper begins, which hands it to every agent it starts: a file edited while
the run goes on cannot make two nodes differ. This is the only module that knows all the parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import orjson
import uvloop

from hpcft import durable, journal, keeper
from hpcft import lineage as lineages
from hpcft import status as status_view
from hpcft.agent import Agent, Ended, Station
from hpcft.cadence import SaveRules
from hpcft.checkpoint import read as checkpoint_read
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.commits import Commits, Retention
from hpcft.config import Config, check_mirror, check_program, check_torch
from hpcft.errors import (
    BelowMinimumError,
    DamagedError,
    ExitCode,
    HpcftError,
    UnusableError,
    UsageError,
)
from hpcft.events import CheckpointRef, CheckpointsFound, Event
from hpcft.ids import Incarnation, NodeId, RunId, Step
from hpcft.jobs import LocalJob
from hpcft.lanes import end_process
from hpcft.leader import Leader, Office
from hpcft.logs import RotatingFile
from hpcft.membership import Timing
from hpcft.mirror.operate import settings_of
from hpcft.mirror.supervisor import Mirror, restored
from hpcft.neighbours import Dial
from hpcft.notices import JobControl
from hpcft.policy import Rules
from hpcft.ranks import Assignment, Ranks
from hpcft.renewal import Renewal
from hpcft.rundir import RunDirectory
from hpcft.slurm.environment import Allocation, from_environment, own_address
from hpcft.snapshots import Answer, Run, SaveSettings, Snapshots
from hpcft.store import forget_dns, quiet_torch
from hpcft.terms import TermRecord
from hpcft.units import Auto, Never
from hpcft.workers import LogLimits, PoolEvent, Workers
from hpcft.world import Budget

log = logging.getLogger("hpcft.node")

KILL_WAIT_SECONDS = 30.0
"""Slurm's default KillWait; on a cluster with less, Slurm is the faster one, and nothing is lost but the last save."""


_LAST_LINES_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What the keeper passes on to every agent it starts."""

    config: Config
    from_step: Step | None

    def to_json(self) -> bytes:
        return orjson.dumps({"config": orjson.Fragment(self.config.to_json()), "from_step": self.from_step})

    @classmethod
    def from_json(cls, text: bytes) -> Orders:
        raw = orjson.loads(text)
        return cls(Config.from_json(orjson.dumps(raw["config"])), raw["from_step"])


def keep(config: Config, *, from_step: int | None = None) -> NoReturn:
    """Keep this node until the run's start is over; then this process ends with the run's exit code.

    Raises:
        HpcftError: this node cannot take part: not in an allocation, no workers, no run directory.
    """
    allocation = from_environment(os.environ)
    if len(allocation.nodes) < config.nodes.min:
        raise BelowMinimumError(
            f"the allocation has {len(allocation.nodes)} nodes, nodes.min asks for {config.nodes.min}",
            "ask for more nodes (sbatch --nodes) or lower nodes.min",
        )
    check_program(config)
    check_torch(config)
    check_mirror(config, os.environ)
    slots = workers_of(config, allocation)
    directory = run_directory(config)
    directory.prepare()
    if from_step is not None and not directory.branch(allocation.job_id).exists():
        checkpoint_read.of_step(directory.checkpoints, Step(from_step))
    orders = Orders(config, Step(from_step) if from_step is not None else None)
    command = [sys.executable, "-P", "-m", "hpcft.node"]
    keeper.become(command, slots=slots, preload=config.job.preload, orders=orders.to_json())


def run_directory(config: Config) -> RunDirectory:
    return RunDirectory((config.run.root / config.run.name).resolve())


def workers_of(config: Config, allocation: Allocation) -> int:
    """How many workers this node holds: as configured, or one for each GPU."""
    workers = config.nodes.workers_per_node or len(allocation.gpus)
    if workers < 1:
        raise UsageError(
            "this node has no GPUs that Slurm has given to the job, and nodes.workers_per_node is 0",
            "set nodes.workers_per_node, or ask Slurm for GPUs (--gpus-per-node)",
        )
    if allocation.gpus and workers > len(allocation.gpus):
        raise UsageError(
            f"nodes.workers_per_node is {workers}, but Slurm gave this node {len(allocation.gpus)} GPUs",
            "set nodes.workers_per_node to 0 for one worker per GPU",
        )
    return workers


def rules_of(config: Config) -> Rules:
    recovery, saves = config.recovery, config.checkpoint
    return Rules(
        timing=timing_of(config),
        minimum_nodes=config.nodes.min,
        multiple_of=config.nodes.multiple_of,
        join_timeout=config.nodes.join_timeout,
        rejoin_timeout=max(20.0, 2 * config.heartbeat.timeout),
        budgets=(
            (Budget.INFRASTRUCTURE, recovery.infrastructure_failures),
            (Budget.USER_CODE, recovery.user_failures),
            (Budget.PREEMPTION, recovery.preemptions),
        ),
        window=recovery.window,
        backoff=recovery.backoff,
        backoff_max=recovery.backoff_max,
        no_progress_generations=recovery.no_progress_generations,
        saves=config.job.command is None,
        saving=SaveRules(saves.every, saves.mtbf, saves.every_min, saves.every_max),
        snapshot_every=saves.snapshot_every,
        neighbours=saves.neighbour and not isinstance(saves.snapshot_every, Never),
        requeue=config.slurm.requeue,
    )


def timing_of(config: Config) -> Timing:
    beat = config.heartbeat
    return Timing(beat.interval, beat.suspect, beat.timeout)


def log_limits(config: Config, directory: RunDirectory, node: NodeId) -> LogLimits:
    return LogLimits(directory.logs(node), config.logs.max_size, config.logs.keep)


async def live(orders: Orders, allocation: Allocation, address: str, inherited: keeper.Inherited) -> Ended:
    """One incarnation, from its parts."""
    config = orders.config
    directory = run_directory(config)
    node = NodeId(allocation.node)
    run = await asyncio.to_thread(directory.prepare)
    applied = await asyncio.to_thread(directory.branch(allocation.job_id).exists)
    station = Station(
        node=node,
        index=allocation.node_index,
        start=allocation.start,
        address=address,
        workers=workers_of(config, allocation),
        directory=directory,
        timing=timing_of(config),
        # a program that uses hpcft keeps its state by checkpoints on order, and has nothing to do at SIGTERM
        grace=config.recovery.grace if config.job.command is not None else 0.0,
        kill_wait=KILL_WAIT_SECONDS,
        branches=orders.from_step is not None and not applied,
        life=inherited.life,
    )
    control: JobControl = LocalJob()
    if allocation.kind == "slurm":
        from hpcft.slurm.job import SlurmJob

        control = SlurmJob(allocation, config.slurm.command_timeout)
    assignment = Assignment(run, directory.path, node, address, allocation.gpus, config)
    limits = log_limits(config, directory, node)

    def workers(see: Callable[[PoolEvent], None]) -> Workers:
        return Workers(inherited.keeper, limits, see)

    def snapshots(answer: Answer, run: Run, dial: Dial) -> Snapshots:
        kept = config.checkpoint
        slots = kept.slots + (not isinstance(kept.snapshot_every, Never))  # one is written while others come and go
        settings = SaveSettings(directory.checkpoints, address, kept.memory, slots, kept.max_bandwidth)
        return Snapshots(settings, node, answer, run, dial)

    def ranks(
        incarnation: Incarnation,
        held: Snapshots,
        say: Callable[[Event], None],
        tell: Callable[[Mapping[str, Any]], None],
    ) -> Ranks:
        return Ranks(assignment, incarnation, inherited.page, held, say, tell)

    async def lead(record: TermRecord, leaderless: float) -> Leader:
        await asyncio.to_thread(durable.replace, directory.config, config.to_json())
        await _restore_what_is_lost(directory, run, config, record)
        replayed, found = await asyncio.to_thread(read_history, directory, run, allocation, orders.from_step)
        office = Office(
            run=run,
            directory=directory,
            record=record,
            allocation=allocation.start,
            nodes=tuple(NodeId(each) for each in allocation.nodes),
            checkpoints=found,
            end_lead=None if isinstance(config.slurm.end_lead, Auto) else config.slurm.end_lead,
            leaderless=leaderless,
        )
        saves = config.checkpoint
        retained = Retention(saves.keep, saves.keep_every, saves.keep_best, saves.best_metric, saves.best_mode)
        return Leader(
            office,
            rules_of(config),
            replayed,
            control,
            lambda deliver, held: Commits(directory.checkpoints, run, retained, deliver, held, verify=saves.verify),
            status_view.snapshot,
            Mirror(settings_of(config, run, directory.checkpoints)) if config.mirror.url else None,
        )

    return await Agent(station, inherited.page, workers, snapshots, ranks, lead).live()


async def _restore_what_is_lost(directory: RunDirectory, run: RunId, config: Config, record: TermRecord) -> None:
    """From the mirror, where there is one and no checkpoint is left, or this is a new run directory.

    It may take long: the term is renewed meanwhile, or another agent would begin the same.
    """
    if not config.mirror.url:
        return
    there = await asyncio.to_thread(checkpoint_read.entries, directory.checkpoints)
    if there:
        return
    before = (await asyncio.to_thread(journal.replay, directory.journal)).world
    if before.generation and before.saved is None:
        return  # it has trained, and has had none
    known = {checkpoint_name(each.step, each.generation) for each in before.standing}
    loop = asyncio.get_running_loop()
    deposed: asyncio.Future[str] = loop.create_future()
    renewal = Renewal(
        directory.terms, record.term, config.heartbeat.timeout / 5, lambda began: None, deposed.set_result
    )
    renewal.start()
    restoring = asyncio.ensure_future(
        restored(
            settings_of(config, run, directory.checkpoints),
            journaled=(before.term, known) if before.generation else None,
        )
    )
    try:
        await asyncio.wait((restoring, deposed), return_when=asyncio.FIRST_COMPLETED)
        if not restoring.done():
            raise UnusableError(deposed.result())
        await restoring
    finally:
        restoring.cancel()
        renewal.close()


def read_history(
    directory: RunDirectory, run: RunId, allocation: Allocation, from_step: Step | None
) -> tuple[journal.Replayed, tuple[CheckpointsFound, ...]]:
    """What earlier terms left, and the checkpoints that this one may start from. Blocks on the file system.

    A branch (`--from`) is applied once for each job: whether it was is told by the journal, which is also where it
    has its effect. It follows what is left behind, which counts again if nothing is trained on the branch.

    Raises:
        DamagedError: generations have run and checkpoints are there, but which of them count is not known.
    """
    replayed = journal.replay(directory.journal)
    before = replayed.world
    on_disk = checkpoint_read.entries(directory.checkpoints)
    if on_disk and not before.generation:
        # without a history, and restored from the mirror, say: their names are taken, and what comes is newer
        replayed = replace(replayed, world=replace(before, generation=on_disk[-1].generation))
    lineage = lineages.on_disk(before, on_disk, run)
    branch = f"--from {from_step} of job {allocation.job_id}"
    began_at = directory.branch_began_at(allocation.job_id)
    # the journal may have lost its end, but not what was committed on the branch since
    applied = branch in replayed.branches or (
        began_at is not None and bool(lineage) and lineage[-1].generation > began_at
    )
    found = CheckpointsFound(tuple(lineage))
    if from_step is not None and not applied:
        entry = checkpoint_read.of_step(directory.checkpoints, from_step)
        chosen = CheckpointRef(entry.step, entry.generation)
        older = tuple(each for each in lineage if each.step < chosen.step)
        directory.begin_branch(allocation.job_id, max(before.generation, *(each.generation for each in on_disk)))
        return replayed, (found, CheckpointsFound((*older, chosen), branch))
    if on_disk and not lineage:
        raise DamagedError(
            f"{directory.checkpoints} has {len(on_disk)} checkpoints, but the journal, in which {before.generation} "
            "generations have run, knows none of them: it has lost its end, or they are another branch's",
            "`hpcft ckpt ls` lists them; start with --from STEP to go on from one, or under another run.name anew",
        )
    return replayed, (found,)


class _QueuedHandler(logging.handlers.QueueHandler):
    """A full queue (the file system hangs) drops a line rather than stop the loop."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


class _RotatedHandler(logging.Handler):
    """A log of our own is rotated as the workers' are."""

    def __init__(self, file: RotatingFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record).encode(errors="replace") + b"\n")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()  # opened anew for the next line, which may have more luck


def _start_logging(directory: RunDirectory, node: NodeId, limits: LogLimits) -> Callable[[], None]:
    """To stderr, which is Slurm's output file, and to the run directory; each by a thread of its own.

    Returns what writes the last lines, and does not wait for a file system that hangs.
    """
    logs = directory.logs(node)
    logs.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter(f"%(asctime)s {node} %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
    root = logging.getLogger("hpcft")
    root.setLevel(logging.INFO)
    listeners = []
    file = _RotatedHandler(RotatingFile(logs / "agent.log", limits.max_size, limits.keep))
    for target in (logging.StreamHandler(), file):
        target.setFormatter(form)
        lines: queue.Queue[logging.LogRecord] = queue.Queue(10_000)
        root.addHandler(_QueuedHandler(lines))
        listener = logging.handlers.QueueListener(lines, target)
        listener.start()
        listeners.append(listener)

    def finish() -> None:
        enders = [threading.Thread(target=listener.stop, daemon=True) for listener in listeners]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join(_LAST_LINES_SECONDS)

    return finish


def main() -> int:
    """The agent's process, started by the keeper; returns its exit code."""
    finish: Callable[[], None] = lambda: logging.shutdown()
    inherited: keeper.Inherited | None = None
    try:
        inherited = keeper.Inherited.take(os.environ)
        if inherited is None:
            raise UnusableError("the agent was not started by a keeper", "use `hpcft agent CONFIG`")
        quiet_torch()
        allow_connections()
        orders = Orders.from_json(inherited.orders)
        allocation = from_environment(os.environ)
        address = own_address(allocation)
        forget_dns()  # from here on only addresses are used
        directory = run_directory(orders.config)
        directory.prepare()
        node = NodeId(allocation.node)
        finish = _start_logging(directory, node, log_limits(orders.config, directory, node))
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        # named, for whoever looks at a hanging agent; nobody joins them (see `end_process`)
        loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="hpcft-blocking"))
        ended = loop.run_until_complete(live(orders, allocation, address, inherited))
        log.info("agent ends with code %d: %s", ended.code, ended.reason)
        return ended.code
    except HpcftError as error:
        return _failed(error, inherited)
    except Exception as error:  # the top of this process: what is left is a defect, or an error out of a task
        known = _known(error)
        if known is None:
            log.exception("the agent failed: a defect of hpcft")
            return int(ExitCode.INTERNAL)
        return _failed(known, inherited)
    finally:
        finish()


def _failed(error: HpcftError, inherited: keeper.Inherited | None) -> int:
    """A node that has been of use may be so again: what an agent's later life cannot use, its next one may."""
    again = error.exit_code == ExitCode.UNUSABLE and inherited is not None and inherited.life > 1
    log.error("%s%s", error, "; another agent tries again" if again else "")
    return keeper.AGENT_RESTART if again else int(error.exit_code)


def allow_connections() -> None:
    """A leader holds three connections for each node: the soft limit of descriptors, often 1024, is raised."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _known(error: BaseException) -> HpcftError | None:
    """The error meant for a user in a group, if there is nothing else in it."""
    if isinstance(error, HpcftError):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    found = [_known(each) for each in error.exceptions]
    return None if None in found else found[0]


if __name__ == "__main__":
    # Not sys.exit: it would wait for threads, and one may hang in the file system for ever.
    end_process(main())
