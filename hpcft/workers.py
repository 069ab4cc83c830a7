"""The agent's side of its workers: started, heard, ended through the pool; everything that happens is an event.

`Workers` belongs to the agent's loop. It makes no task, and no thread but the one that writes logs: it registers
readers, and what they find goes into the queue behind `events()`. A worker's end is told exactly once, from the first
of these to know:

1. the pool's `exited`, with the wait status (the pool is the parent, nobody else can ask);
2. the pool's death: its workers get their death signal from the kernel, and pidfds confirm one by one that they went;
3. some seconds after SIGKILL: the pidfd, when a stopped pool tells nothing; else the worker sits in the kernel
   (D state) and is told as *stuck*. Nobody ever waits for it, but `end` names it for as long as it is there.

Before an end is told, everything the worker had said is read: its packets on the control channel, its last lines. So
the packet about an exception always comes before the exit that it explains.

Requests made while there is no pool (it is being started anew) wait for it; requests made while it still imports wait
in its socket.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from hpcft.logs import Capture, LogWriter, RotatingFile
from hpcft.process import describe_status

log = logging.getLogger("hpcft.workers")

NOT_STARTED = 126
"""Status in WorkerExited of a worker that the pool could not start."""

_PACKET = 1 << 17
_KILL_SECONDS = 5.0
_REMEMBERED = 64
"""Workers that have ended, whose last lines are kept."""


@dataclass(frozen=True, slots=True)
class WorkerSpawned:
    worker: str
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """One packet of the worker contract."""

    worker: str
    message: dict[str, Any]
    fds: tuple[int, ...] = ()
    """Descriptors that came along; whoever consumes the event closes them."""


@dataclass(frozen=True, slots=True)
class WorkerExited:
    worker: str
    pid: int
    """0 when it was never started."""
    status: int
    """Exit status; the negative signal number when a signal ended it (SIGKILL also where nobody could be asked)."""
    cause: str
    """`exit 1`, `SIGKILL`, `SIGSEGV (core dumped)`, `the pool died`, or why it could not be started."""
    stuck: bool = False
    """It was told to end and is still there: the node cannot be trusted with workers any more."""
    asked: bool = False
    """It was told to end, by this agent or by the pool's fence."""
    tail: tuple[str, ...] = ()
    """Its last lines of output."""
    max_rss_kib: int = 0


WorkerEvent = WorkerSpawned | WorkerSaid | WorkerExited


@dataclass(frozen=True, slots=True)
class PoolReady:
    """The pool has imported everything. `warm` is False when workers are exec'd."""

    pid: int
    seconds: float
    warm: bool
    left: frozenset[int]
    """Children that imports have started, and that are no workers."""


class Fault(StrEnum):
    """What is wrong with a module, as it is logged."""

    UNSAFE = "does not survive a fork"
    """Workers are exec'd."""
    MISSING = "is not imported"
    """It raises, or has ended a pool."""
    LEAVING = "leaves processes behind"
    """They are not taken for workers, and end with the pool."""


@dataclass(frozen=True, slots=True)
class PreloadFault:
    """Something is wrong with a preloaded module."""

    module: str
    fault: Fault
    reason: str


@dataclass(frozen=True, slots=True)
class PoolLost:
    """The pool died; the keeper starts another."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The pool found the lease run out and killed all workers."""


@dataclass(frozen=True, slots=True)
class KeeperLost:
    """The keeper is gone, so this agent has to end (the kernel sees to it, if it is slow)."""


PoolEvent = PoolReady | PreloadFault | PoolLost | Fenced | KeeperLost


@dataclass(frozen=True, slots=True)
class LogLimits:
    directory: Path
    """Worker `x` writes `x.log` here, rotated to `x.log.1` and so on."""
    max_size: int = 64 << 20
    keep: int = 5
    """Files of each, the current one included."""
    lines: int = 50
    """Lines kept in memory for incidents."""
    queue_bytes: int = 8 << 20


@dataclass(eq=False)
class _Worker:
    name: str
    id: str
    """The pool's name for it, never the same twice."""
    channel: socket.socket
    capture: Capture
    outbox: deque[tuple[bytes, tuple[int, ...]]] = field(default_factory=deque)
    """What it has no room for at the moment, with descriptors that are closed afterwards."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Its end has been told."""
    pid: int = 0
    watch: int | None = None
    """pidfd, for signals and for ends that the pool cannot tell."""
    asked: bool = False
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class _Request:
    packet: bytes
    fds: tuple[int, ...]
    worker: _Worker | None


class Workers:
    """All workers of the node. `keeper` is the channel from `keeper.Inherited`."""

    def __init__(
        self,
        keeper: socket.socket,
        logs: LogLimits,
        on_pool: Callable[[PoolEvent], None] = lambda event: None,
    ) -> None:
        self._keeper = keeper
        self._limits = logs
        self._on_pool = on_pool
        self._pool: socket.socket | None = None
        self._outbox: deque[_Request] = deque()
        self._workers: dict[str, _Worker] = {}
        self._undying: dict[int, str] = {}
        """By pidfd: who has been told as stuck, and is there still."""
        self._captures: dict[str, Capture] = {}
        self._held: int | None = None
        self._count = 0
        self._events: asyncio.Queue[WorkerEvent | None] = asyncio.Queue()
        self._ready = asyncio.Event()

    def open(self) -> None:
        """Begin to listen, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._writer = LogWriter(self._limits.queue_bytes)
        self._keeper.setblocking(False)
        self._loop.add_reader(self._keeper, self._hear_keeper)

    async def close(self, seconds: float = 2.0) -> None:
        """Stop listening, end `events()`, write the logs to their end. Workers are not ended here: see `end`."""
        self._loop.remove_reader(self._keeper)
        self._drop_pool()
        for request in self._outbox:
            _close_all(request.fds)
        for worker in list(self._workers.values()):
            self._forget(worker)
        for watch in list(self._undying):
            self._bury(watch)
        for capture in self._captures.values():
            capture.close()
        if self._held is not None:
            os.close(self._held)
            self._held = None
        self._events.put_nowait(None)
        if not await self._writer.close(seconds):
            log.warning("the last output of workers could not be written to %s", self._limits.directory)

    async def events(self) -> AsyncIterator[WorkerEvent]:
        """What happens to workers, in order, until `close`. One consumer."""
        while (event := await self._events.get()) is not None:
            yield event

    async def ready(self) -> None:
        """Until the pool has imported everything (cancel it for a deadline)."""
        await self._ready.wait()

    def tail(self, worker: str) -> tuple[str, ...]:
        """The last lines of output of a worker, also after its end."""
        capture = self._captures.get(worker)
        return capture.tail() if capture is not None else ()

    # Starting and ending

    def start(self, name: str, spec: Mapping[str, Any], lifeline: socket.socket | int | None = None) -> None:
        """Have the pool start a worker; WorkerSpawned or WorkerExited follows. It inherits a copy of `lifeline`."""
        self._count += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # One pipe for both streams: what the worker prints and the traceback that follows stay in order.
        reading, writing = os.pipe()
        file = RotatingFile(self._limits.directory / f"{name}.log", self._limits.max_size, self._limits.keep)
        capture = Capture(reading, file, self._writer, self._limits.lines)
        capture.start()
        self._remember(name, capture)
        worker = _Worker(name, f"{name}#{self._count}", ours, capture)
        self._workers[worker.id] = worker
        self._loop.add_reader(ours, self._hear_worker, worker)
        fds = [theirs.detach(), writing, os.dup(writing)]
        if lifeline is not None:
            fds.append(os.dup(lifeline if isinstance(lifeline, int) else lifeline.fileno()))
        self._send({"op": "spawn", "worker": worker.id, "spec": dict(spec)}, fds, worker)

    def hold(self, fd: int) -> None:
        """Have the pool, and every pool after it, keep a copy of `fd` open, in place of the one before."""
        if self._held is not None:
            os.close(self._held)
        self._held = os.dup(fd)
        if self._pool is not None:
            self._send({"op": "hold"}, [os.dup(self._held)])

    def tell(self, name: str, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Say something to a worker that lives, and listens; else nothing happens. The descriptors are not closed."""
        for worker in self._workers.values():
            if worker.name == name:
                worker.outbox.append((orjson.dumps(message), tuple(os.dup(fd) for fd in fds)))
                self._flush_to(worker)

    def _flush_to(self, worker: _Worker) -> None:
        while worker.outbox:
            packet, fds = worker.outbox[0]
            try:
                socket.send_fds(worker.channel, [packet], fds)
            except BlockingIOError:
                self._loop.add_writer(worker.channel, self._flush_to, worker)
                return
            except OSError as error:  # its end is told soon
                log.info("worker %s does not listen any more: %s", worker.name, error.strerror)
            worker.outbox.popleft()
            _close_all(fds)
        self._loop.remove_writer(worker.channel)

    def kill_all(self) -> None:
        """SIGKILL all workers, with everything they started. Does not wait."""
        for worker in list(self._workers.values()):
            self._kill(worker, _KILL_SECONDS)

    async def end(self, grace: float, kill_seconds: float = _KILL_SECONDS) -> tuple[str, ...]:
        """SIGTERM, `grace` seconds, SIGKILL: returns the workers that were still there `kill_seconds` later.

        Among them are those that an earlier call, or the death of the pool, has left, without another wait. When it
        returns, the ends of all others are in the queue of events. Cancelled, it kills at once.
        """
        ending = list(self._workers.values())
        try:
            if grace > 0 and ending:
                for worker in ending:
                    worker.asked = True
                    self._send({"op": "kill", "worker": worker.id, "signal": int(signal.SIGTERM)})
                await _settled(ending, grace)
        finally:
            for worker in ending:
                self._kill(worker, kill_seconds)
        await _settled(ending, kill_seconds + 1.0)
        undying = [name for watch, name in self._undying.items() if not _is_gone(watch)]
        return (*undying, *(worker.name for worker in ending if not worker.settled.is_set()))

    def _kill(self, worker: _Worker, seconds: float) -> None:
        if worker.settled.is_set():
            return
        worker.asked = True
        for request in self._outbox:
            if request.worker is worker:  # the pool has not heard of it, and need not
                self._outbox.remove(request)
                _close_all(request.fds)
                self._exited(worker, -signal.SIGKILL, "ended before it was started")
                return
        if worker.watch is not None:  # does not depend on the pool's answering
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.watch, signal.SIGKILL)
        self._send({"op": "kill", "worker": worker.id, "signal": int(signal.SIGKILL)})  # its session, too
        self._loop.call_later(seconds, self._look_after_kill, worker)

    def _look_after_kill(self, worker: _Worker) -> None:
        if worker.settled.is_set() or worker.watch is None:
            return  # without a pidfd it was never spawned: the pool still imports, and kills it when it comes to it
        if _is_gone(worker.watch):
            self._exited(worker, -signal.SIGKILL, "SIGKILL (the pool does not answer)")
        else:
            log.error("worker %s (process %d) does not die after SIGKILL", worker.name, worker.pid)
            worker.stuck = True
            watch = os.dup(worker.watch)
            self._undying[watch] = worker.name
            self._loop.add_reader(watch, self._gone_at_last, watch, worker.pid)
            self._exited(worker, -signal.SIGKILL, "does not die after SIGKILL")

    def _gone_at_last(self, watch: int, pid: int) -> None:
        log.warning("worker %s (process %d) has ended at last", self._undying[watch], pid)
        self._bury(watch)

    def _bury(self, watch: int) -> None:
        self._loop.remove_reader(watch)
        del self._undying[watch]
        os.close(watch)

    # What the keeper and the pool say

    def _hear_keeper(self) -> None:
        while True:
            try:
                packet, fds, _, _ = socket.recv_fds(self._keeper, _PACKET, 4, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                packet, fds = b"", []
            if not packet:
                self._loop.remove_reader(self._keeper)
                self._on_pool(KeeperLost())
                return
            if orjson.loads(packet)["kind"] == "pool":
                self._lose_pool()
                self._adopt(socket.socket(fileno=fds.pop(0)))
            _close_all(fds)

    def _adopt(self, pool: socket.socket) -> None:
        self._pool = pool
        pool.setblocking(False)
        self._loop.add_reader(pool, self._hear_pool)
        if self._held is not None:
            self._outbox.appendleft(_Request(b'{"op":"hold"}', (os.dup(self._held),), None))
        self._flush()

    def _hear_pool(self) -> None:
        while self._pool is not None:
            try:
                packet = self._pool.recv(_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._lose_pool()
                return
            self._heard(orjson.loads(packet))

    def _heard(self, message: Mapping[str, Any]) -> None:
        worker = self._workers.get(message.get("worker") or "")
        match message["kind"]:
            case "pool_ready":
                self._ready.set()
                left = frozenset(message["left"])
                self._on_pool(PoolReady(message["pid"], message["seconds"], message["warm"], left))
            case "unsafe" | "missing" | "leaving" as kind:
                self._on_pool(PreloadFault(message["module"], Fault[kind.upper()], message["reason"]))
            case "spawned" if worker is not None:
                worker.pid = message["pid"]
                with suppress(OSError):  # it may have ended already: that is told next
                    worker.watch = os.pidfd_open(worker.pid)
                self._events.put_nowait(WorkerSpawned(worker.name, worker.pid))
                if worker.asked:
                    self._loop.call_later(_KILL_SECONDS, self._look_after_kill, worker)
            case "exited" if worker is not None:
                status, rss = message["status"], message["max_rss_kib"]
                self._exited(worker, os.waitstatus_to_exitcode(status), describe_status(status), rss)
            case "refused":
                self._refused(worker, message["reason"])
            case "fenced":
                log.warning("the pool found the lease run out, and killed all workers")
                for each in self._workers.values():
                    each.asked = True
                self._on_pool(Fenced())

    def _refused(self, worker: _Worker | None, reason: str) -> None:
        log.error("the pool refuses a request: %s", reason)
        if worker is not None and worker.pid == 0:
            self._exited(worker, NOT_STARTED, f"not started: {reason}")

    def _drop_pool(self) -> None:
        if self._pool is not None:
            self._loop.remove_reader(self._pool)
            self._loop.remove_writer(self._pool)
            self._pool.close()
            self._pool = None
        self._ready.clear()
        # Only births wait for another pool: whoever was to be killed dies with this one.
        dropped = [request for request in self._outbox if request.worker is None]
        self._outbox = deque(request for request in self._outbox if request.worker is not None)
        for request in dropped:
            _close_all(request.fds)

    def _lose_pool(self) -> None:
        if self._pool is None:
            return
        self._drop_pool()
        log.error("the pool died, and its workers with it")
        self._on_pool(PoolLost())
        waiting = {request.worker for request in self._outbox}
        for worker in list(self._workers.values()):
            if worker in waiting:
                continue  # not even asked for: the next pool starts it
            if worker.watch is None:
                self._exited(worker, -signal.SIGKILL, "the pool died")
            else:
                self._loop.add_reader(worker.watch, self._exited, worker, -signal.SIGKILL, "the pool died")
                self._loop.call_later(_KILL_SECONDS, self._look_after_kill, worker)

    # What workers say, and their end

    def _hear_worker(self, worker: _Worker) -> bool:
        try:
            packet, fds, _, _ = socket.recv_fds(worker.channel, _PACKET, 8, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            packet, fds = b"", []
        if not packet:
            self._loop.remove_reader(worker.channel)
            return False
        try:
            message = orjson.loads(packet)
        except ValueError:
            message = None
        if isinstance(message, dict) and isinstance(message.get("kind"), str):
            self._events.put_nowait(WorkerSaid(worker.name, message, tuple(fds)))
        else:
            _close_all(fds)
            log.warning("worker %s sent a packet that is no message: %r", worker.name, packet[:80])
        return True

    def _exited(self, worker: _Worker, status: int, cause: str, rss: int = 0) -> None:
        if worker.settled.is_set():
            return
        while self._hear_worker(worker):
            pass
        worker.capture.drain()
        tail = worker.capture.tail()
        exited = WorkerExited(worker.name, worker.pid, status, cause, worker.stuck, worker.asked, tail, rss)
        self._events.put_nowait(exited)
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        """Its output is read on, until the last process that holds the pipe is gone."""
        worker.settled.set()
        self._workers.pop(worker.id, None)
        self._loop.remove_reader(worker.channel)
        self._loop.remove_writer(worker.channel)
        for _, fds in worker.outbox:
            _close_all(fds)
        worker.outbox.clear()
        worker.channel.close()
        if worker.watch is not None:
            self._loop.remove_reader(worker.watch)
            os.close(worker.watch)
            worker.watch = None

    def _remember(self, name: str, capture: Capture) -> None:
        before = self._captures.pop(name, None)
        if before is not None:
            before.close()
        self._captures[name] = capture
        for other in list(self._captures)[:-_REMEMBERED]:
            if not self._captures[other].open:
                del self._captures[other]

    # Sending

    def _send(self, message: Mapping[str, Any], fds: Sequence[int] = (), worker: _Worker | None = None) -> None:
        """Send a request, in its turn; `fds` are closed when that is done."""
        if self._pool is None and worker is None:
            return
        self._outbox.append(_Request(orjson.dumps(message), tuple(fds), worker))
        self._flush()

    def _flush(self) -> None:
        pool = self._pool
        while pool is not None and self._outbox:
            request = self._outbox[0]
            try:
                socket.send_fds(pool, [request.packet], request.fds)
            except BlockingIOError:
                self._loop.add_writer(pool, self._flush)
                return
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ETOOMANYREFS):
                    return  # the pool has just died: its end of file is read next, and what waits goes to another
                if request.worker is not None:
                    self._refused(request.worker, f"the request cannot be sent: {error.strerror}")
            self._outbox.popleft()
            _close_all(request.fds)
        if pool is not None:
            self._loop.remove_writer(pool)


async def _settled(workers: Sequence[_Worker], seconds: float) -> None:
    """Until the ends of all have been told, or the time is up."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for worker in workers:
                await worker.settled.wait()


def _is_gone(watch: int) -> bool:
    """Whether the process behind a pidfd has ended."""
    poller = select.poll()
    poller.register(watch, select.POLLIN)
    return bool(poller.poll(0))


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
