"""The pool: one process with everything imported, from which workers are forked, and which is their parent.

The keeper starts it by exec (`python -P -m hpcft.pool`), before any socket of the agent exists, so that no worker
can inherit one. It has one thread and one loop over the keeper's channel, the agent's control channel, and SIGCHLD.

    agent -> pool   {"op":"spawn","worker","spec"} + [control, stdout, stderr, lifeline?]
                    {"op":"kill","worker","signal"}   {"op":"kill_all"}   {"op":"hold"} + [fd]
    pool -> agent   pool_ready, unsafe, missing, leaving, spawned, exited, fenced, refused
    keeper -> pool  {"op":"control"} + [a fresh control channel]
    pool -> keeper  {"importing"}: a configured module, before each; null when everything is imported

All are SOCK_SEQPACKET, one JSON object per packet. Only a parent can learn how a process ended, which is why the
pool, not the agent, waits for the workers, and tells at once.

**Who makes sure that workers die.** The pool kills them all when the agent is gone (end of file on the control
channel), when the lease in the shared page has run out (the agent may be stopped: the page is read here without its
help), and when the keeper is gone (then it ends, too). Killing means SIGKILL to the worker's process group, then to
every process of its session, again until none is left; when no worker is meant to live, to every descendant. As a
subreaper the pool inherits whatever a worker leaves behind. A process in uninterruptible sleep is tried again now
and then, and never waited for. What a preloaded module has started is nobody's worker: it is named, and left alone
until the pool ends.

**Fork safety.** A child forked after a parallel region ran in the parent hangs in its own first one. Imports are
therefore made with one thread, and after each a forked child has to finish a parallel region, or the guilty module
is named and workers are exec'd from then on. The same goes for a module that starts threads or CUDA, and for a
torch that cannot be imported here at all: the user's command may bring its own. A configured module that ends the
pool, or never comes back, costs one pool: the keeper knows from `importing` which it was, and the next does without.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import orjson

from hpcft.page import NodePage
from hpcft.process import (
    become_subreaper,
    children,
    descendants,
    die_with_parent,
    end_descendants,
    lives,
    send,
    session_of,
    state_of,
)
from hpcft.program import (
    RESET_SIGNALS,
    become_fresh,
    deaf_to,
    environment,
    exec_program,
    fail,
    leave,
    run_program,
    settle,
)

WARM_IMPORTS = (
    "numpy",
    "torch",
    "torch._dynamo",  # the first optimizer of a process imports it: 0.8 s
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.nn.parallel",
    "hpcft.worker.run",  # every worker that calls hpcft.main
)

_PACKET = 1 << 17
_TRIAL_SECONDS = 10.0
_LEASE_LOOK = 0.2
"""Seconds between two looks at the lease while workers live, at most: it may appear, or the machine may sleep."""
_END_SECONDS = 5.0
_SWEEP_FIRST, _SWEEP_LONGEST = 0.01, 1.0

IMPORT_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # is_available() asks NVML: a CUDA context would not survive the fork
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or every lost connection prints a C++ stack trace
}
"""In force while the pool imports. Programs get the values that the pool was started with."""


@dataclass(frozen=True, slots=True)
class Warmth:
    """What the imports came to."""

    seconds: float
    unsafe: str | None = None
    """The module after which a forked child cannot be trusted: workers are exec'd."""
    reason: str = ""
    missing: tuple[tuple[str, str], ...] = ()
    """Configured modules that could not be imported, each with the error. Programs will meet it themselves."""
    leaving: tuple[tuple[str, str], ...] = ()
    """Modules whose import has started processes, each with these."""


@dataclass(frozen=True, slots=True)
class Birth:
    """Returned from the loop in a forked child: what it is to become."""

    spec: Mapping[str, Any]
    variables: Mapping[str, str]
    exec: bool


@dataclass(slots=True)
class _Child:
    worker: str
    pid: int
    agent: int
    """Number of the control channel that asked for it; a later agent knows nothing of it."""
    doomed: bool = False


def warm_up(
    preload: Sequence[str],
    left_out: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] = lambda module: None,
) -> Warmth:
    """Import everything, one module at a time, and try a fork after each configured one.

    `say` hears of each configured module before it is imported. `left_out` are those that ended a pool before.
    """
    began = time.monotonic()
    missing = list(left_out)
    started: dict[int, str] = {}
    guilty, reason = "", ""
    for name in (*WARM_IMPORTS, *preload):
        if name not in WARM_IMPORTS:
            say(name)
        error = _import(name)
        for pid in descendants(os.getpid()):
            started.setdefault(pid, name)
        if error and name in WARM_IMPORTS:
            guilty, reason = name, f"it cannot be imported: {error}"
            break
        if error:
            missing.append((name, error))
            continue
        if name not in WARM_IMPORTS[:-1]:
            guilty, reason = name, fork_fault()
        if reason:
            break
    gc.collect()
    gc.freeze()  # what is here now is never looked at by a child's collector, so its pages stay shared
    leaving: dict[str, list[str]] = {}
    for pid, name in started.items():
        if lives(pid):
            leaving.setdefault(name, []).append(f"{pid} ({command_of(pid)})")
    left = tuple((name, ", ".join(processes)) for name, processes in leaving.items())
    return Warmth(time.monotonic() - began, guilty if reason else None, reason, tuple(missing), left)


def _import(name: str) -> str:
    """What went wrong; empty when nothing did."""
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a module raises must not cost the pool
        return f"{type(error).__name__}: {error}"
    return ""


def fork_fault(seconds: float = _TRIAL_SECONDS) -> str:
    """Why a child forked now could not be trusted; empty when it can."""
    torch = sys.modules["torch"]
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads > 1:
        return (
            f"the import left {threads - 1} thread(s) running, as a parallel region does: "
            "a lock that one of them holds stays locked in a forked child"
        )
    if torch.cuda.is_initialized():
        return "the import initialised CUDA, which does not survive a fork"
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run_parallel_region(parent)
    watch = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(watch, select.POLLIN)
        finished = bool(poller.poll(seconds * 1000))
        if not finished:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    finally:
        os.close(watch)
    if not finished:
        return f"a forked child does not get through a parallel region (tried for {seconds:g} s)"
    return f"a forked child dies in a parallel region (wait status {status})" if status else ""


def _run_parallel_region(parent: int) -> NoReturn:
    try:
        die_with_parent(parent)
        torch = sys.modules["torch"]
        torch.set_num_threads(2)
        large = torch.ones(1 << 21)
        square = torch.ones(256, 256)
        right = float(large.sum()) == 1 << 21 and float((square @ square)[0, 0]) == 256.0
        os._exit(0 if right else 3)
    finally:
        os._exit(4)


@dataclass
class Pool:
    """The loop's state. `inherited` is the environment for programs."""

    page: NodePage
    keeper: socket.socket
    warmth: Warmth
    inherited: Mapping[str, str]
    _pid: int = field(default_factory=os.getpid)
    _keep_open: set[int] = field(default_factory=set)
    """What imports opened, and what came from whoever started us: programs may need it."""
    _control: socket.socket | None = None
    _agent: int = 0
    _held: int | None = None
    """A descriptor whose end tells somebody that agent and pool are gone. Workers do not get it."""
    _outbox: deque[bytes] = field(default_factory=deque)
    _children: dict[int, _Child] = field(default_factory=dict)
    _ending: set[int] = field(default_factory=set)
    """Sessions of which nothing may stay."""
    _left: set[int] = field(default_factory=set)
    """Children that imports have started. Only children: nobody else can take their number before they are reaped."""
    _sweep_pause: float = _SWEEP_FIRST
    _selector: selectors.BaseSelector = field(default_factory=selectors.PollSelector)
    """poll, not epoll: an epoll instance would be shared with every forked child."""

    def serve(self) -> Birth | None:
        """Run until the keeper is gone (None), or, in a forked child, return what it is to become."""
        self._keep_open = _open_descriptors() - {self.keeper.fileno()}
        self._left = set(children(self._pid))
        self._wake, wake = socket.socketpair()
        for end in (self._wake, wake):
            end.setblocking(False)
        for number in RESET_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._wake_writer = wake
        self.keeper.setblocking(False)
        self._selector.register(self.keeper, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        while True:
            for key, events in self._selector.select(self._pause()):
                if key.fileobj is self.keeper:
                    if not self._hear_keeper():
                        self._end()
                        return None
                elif key.fileobj is self._wake:
                    with suppress(BlockingIOError):
                        self._wake.recv(4096)
                    self._reap()
                elif key.fileobj is self._control:
                    if events & selectors.EVENT_WRITE:
                        self._flush()
                    if events & selectors.EVENT_READ and (birth := self._hear_agent()):
                        return birth
            self._fence()
            self._sweep()

    def _pause(self) -> float | None:
        pause: float | None = None
        if any(not child.doomed for child in self._children.values()):
            pause = min(max(self.page.lease_left(), 0.0), _LEASE_LOOK)
        if self._ending:
            pause = min(self._sweep_pause, pause if pause is not None else self._sweep_pause)
        return pause

    # The keeper and the agent

    def _hear_keeper(self) -> bool:
        """False when the keeper is gone."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.keeper, _PACKET, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not packet:
            return False
        if orjson.loads(packet)["op"] == "control":
            self._lose_agent()
            self._adopt(socket.socket(fileno=fds.pop(0)))
        for fd in fds:
            os.close(fd)
        return True

    def _adopt(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        self._agent += 1
        self._selector.register(control, selectors.EVENT_READ)
        warmth = self.warmth
        self._tell(
            {
                "kind": "pool_ready",
                "pid": self._pid,
                "seconds": warmth.seconds,
                "warm": warmth.unsafe is None,
                "left": sorted(self._left),
            }
        )
        if warmth.unsafe is not None:
            self._tell({"kind": "unsafe", "module": warmth.unsafe, "reason": warmth.reason})
        for module, reason in warmth.missing:
            self._tell({"kind": "missing", "module": module, "reason": reason})
        for module, processes in warmth.leaving:
            self._tell({"kind": "leaving", "module": module, "reason": processes})

    def _lose_agent(self) -> None:
        """Nobody is left to answer for the workers."""
        self._kill_all()
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
        self._outbox.clear()

    def _hear_agent(self) -> Birth | None:
        """Read all requests; a Birth in the forked child."""
        while self._control is not None:
            try:
                packet, fds, flags, _ = socket.recv_fds(self._control, _PACKET, 8, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except OSError:
                packet, fds, flags = b"", [], 0
            if not packet:
                self._lose_agent()
                return None
            try:
                request = orjson.loads(packet)
                match request["op"]:
                    case "spawn":
                        if birth := self._spawn(request, fds):
                            return birth
                    case "kill":
                        self._kill(request["worker"], int(request["signal"]))
                    case "kill_all":
                        self._kill_all()
                    case "hold":
                        if self._held is not None:
                            os.close(self._held)
                        self._held = fds.pop(0)
                    case other:
                        self._tell({"kind": "refused", "worker": None, "reason": f"unknown request {other!r}"})
            except (KeyError, IndexError, ValueError, TypeError) as error:
                cut = flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
                truncated = " (packet or descriptors cut off)" if cut else ""
                reason = f"malformed request: {type(error).__name__}: {error}{truncated}"
                self._tell({"kind": "refused", "worker": _worker_of(packet), "reason": reason})
            finally:
                if os.getpid() == self._pid:
                    for fd in fds:
                        os.close(fd)
        return None

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._outbox.append(orjson.dumps(message))
        self._flush()

    def _flush(self) -> None:
        if self._control is None:
            self._outbox.clear()
            return
        try:
            while self._outbox:
                self._control.send(self._outbox[0])
                self._outbox.popleft()
            wanted = selectors.EVENT_READ
        except BlockingIOError:
            wanted = selectors.EVENT_READ | selectors.EVENT_WRITE
        except OSError:  # its end of file is about to be read
            self._outbox.clear()
            wanted = selectors.EVENT_READ
        if self._selector.get_key(self._control).events != wanted:
            self._selector.modify(self._control, wanted)

    # Births

    def _spawn(self, request: Mapping[str, Any], fds: Sequence[int]) -> Birth | None:
        worker = request["worker"]
        if len(fds) not in (3, 4):
            self._tell({"kind": "refused", "worker": worker, "reason": f"{len(fds)} descriptors instead of 3 or 4"})
            return None
        control, stdout, stderr = fds[:3]
        lifeline = fds[3] if len(fds) == 4 else None
        given = {"page_fd": self.page.fd, "control_fd": control, "lifeline_fd": lifeline}
        spec = {**request["spec"], **given}
        variables = environment(self.inherited, spec)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell({"kind": "refused", "worker": worker, "reason": f"fork failed: {error.strerror}"})
            return None
        if pid:
            self._children[pid] = _Child(worker, pid, self._agent)
            self._tell({"kind": "spawned", "worker": worker, "pid": pid})
            return None
        signal.set_wakeup_fd(-1)
        keep = self._keep_open | {fd for fd in given.values() if fd is not None}
        settle(self._pid, stdout, stderr, keep, deaf_to(spec))
        # Their descriptors are closed; the objects must not close those numbers again once a program has them.
        for end in (self.keeper, self._control, self._wake, self._wake_writer):
            if end is not None:
                end.detach()
        return Birth(spec, variables, exec=self.warmth.unsafe is not None or "command" in spec["program"])

    # Deaths

    def _kill(self, worker: str, number: int) -> None:
        for child in self._children.values():
            if child.worker == worker and child.agent == self._agent:
                if number == signal.SIGKILL:
                    self._doom(child)
                else:
                    _signal_group(child.pid, number)

    def _kill_all(self) -> None:
        for child in self._children.values():
            self._doom(child)

    def _doom(self, child: _Child) -> None:
        child.doomed = True
        _signal_group(child.pid, signal.SIGKILL)
        self._end_session(child.pid)

    def _end_session(self, session: int) -> None:
        self._ending.add(session)
        self._sweep_pause = _SWEEP_FIRST

    def _sweep(self) -> None:
        """Kill what dead and doomed workers left behind; anything at all when no worker is meant to live."""
        if not self._ending:
            return
        living = [child.pid for child in self._children.values() if not child.doomed]
        left = False
        for pid in descendants(self._pid, [*living, *self._left]):
            if living and session_of(pid) not in self._ending:
                continue
            if lives(pid):
                left = True
                send(pid, signal.SIGKILL)
        if not left:
            self._ending.clear()
        self._sweep_pause = min(2 * self._sweep_pause, _SWEEP_LONGEST)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return
                child = self._children.pop(pid, None)
                if child is None:
                    self._left.discard(pid)
                    continue  # an orphan
                if child.agent == self._agent:
                    self._tell(
                        {
                            "kind": "exited",
                            "worker": child.worker,
                            "pid": pid,
                            "status": status,
                            "user_seconds": usage.ru_utime,
                            "system_seconds": usage.ru_stime,
                            "max_rss_kib": usage.ru_maxrss,
                        }
                    )
                self._end_session(pid)

    def _fence(self) -> None:
        if self.page.lease_left() > 0:
            return
        if any(not child.doomed for child in self._children.values()):
            self._kill_all()
            self._tell({"kind": "fenced"})

    def _end(self) -> None:
        """The keeper is gone: so is everything below."""
        self._kill_all()
        for pid in end_descendants(_END_SECONDS):
            print(f"hpcft pool: process {pid} does not die (state {state_of(pid)})", file=sys.stderr, flush=True)


def _signal_group(pid: int, number: int) -> None:
    """Signal a worker's process group; only itself while the group does not exist yet (it is just being born)."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        send(pid, number)


def command_of(pid: int) -> str:
    """The beginning of a process' command line; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:80]
    return ""


def _open_descriptors() -> set[int]:
    numbers = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
    return {number for number in numbers if _is_open(number)}  # without the one that listed them


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _worker_of(packet: bytes) -> Any:
    """The worker that a malformed request was about, if it says so much."""
    with suppress(ValueError, AttributeError):
        return orjson.loads(packet).get("worker")
    return None


def become(birth: Birth) -> NoReturn:
    """The forked child, out of the loop: run its program and end."""
    status = 127
    try:
        if birth.exec:
            exec_program(birth.spec, birth.variables)
        become_fresh(birth.variables)
        status = run_program(birth.spec)
    except BaseException as error:  # the top of this process; usually a command that cannot be executed
        fail(birth.spec, error)
    leave(status)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hpcft.pool")
    parser.add_argument("--page", type=int, required=True, help="descriptor of the node's shared page")
    parser.add_argument("--keeper", type=int, required=True, help="descriptor of the keeper's channel")
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE", help="import it before forking")
    parser.add_argument(
        "--left-out", action="append", default=[], nargs=2, metavar=("MODULE", "WHY"), help="a module not to import"
    )
    options = parser.parse_args(arguments)
    for fd in (options.page, options.keeper):
        os.set_inheritable(fd, False)
    inherited = dict(os.environ)
    os.environ.update(IMPORT_ENVIRONMENT)
    become_subreaper()
    here = str(Path.cwd())
    sys.path.insert(0, here)  # where a program's own modules are looked for, too
    keeper = socket.socket(fileno=options.keeper)

    def say(module: str | None) -> None:
        with suppress(OSError):  # its end of file is about to be read
            keeper.send(orjson.dumps({"importing": module}))

    warmth = warm_up(options.preload, [(module, why) for module, why in options.left_out], say)
    say(None)
    sys.path.remove(here)
    pool = Pool(NodePage.attach(options.page), keeper, warmth, inherited)
    birth = pool.serve()
    if birth is not None:
        become(birth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
