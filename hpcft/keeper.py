"""The keeper: the one process of a node that Slurm knows, small enough to be trusted with the life of the others.

    slurmstepd ── keeper ──┬── agent   (may crash and come back)
                           └── pool ── workers

It is a subreaper, so that everything started below stays below. It makes the shared page, starts agent and pool,
and starts either again when it ends, with a back-off. It imports neither torch nor asyncio nor anything of the run,
and holds no state that could be wrong: a page, one channel to each of the two. Whoever has read the configuration, for
which it takes more, becomes the keeper by exec (`become`): then all that is gone from its memory.

**Channels.** Agent and pool each have a SOCK_SEQPACKET channel to the keeper; its end of file means that the keeper
is gone. What the two need to talk to each other is a socket pair made here, one end to each, whenever one of them
is new: `{"op":"control"}` to the pool, `{"kind":"pool"}` to the agent, each with its end as SCM_RIGHTS. The pool says
`{"importing": module}` before each configured module, and `{"importing": null}` when it is ready.

**A module that ends the pool**, or does not come back from its import in time, is left out of the next pools, which
name it to the agents. A pool that ends again and again before it is ready, with no such module to blame, ends the node.

**Whose death means what.** Agent: the pool kills the workers and stays warm; a new agent follows, unless the exit
status was a final one (ExitCode except INTERNAL), which ends the keeper with that status. Pool: its workers die by
their death signal, what they left is killed here, and the agent lives on. Keeper: the agent by its death signal,
the pool by end of file, after it has killed its descendants. Whoever started the keeper (slurmstepd): the keeper
ends, for Slurm no longer knows of the node; seen by a pidfd, because a death signal would follow a thread.

**Orders** for the agents come in a sealed memory file: a command line can be read by every user of the machine.

**Signals** reach the keeper alone, as agent and pool have sessions of their own, and are passed on to the agent
once. The agent is started with them blocked: one that comes before its handlers stand waits there, and is not the
end of it. `Inherited.unblock_signals` is the agent's way to say that it is ready. The keeper's own start is covered in
the same way: `become` blocks them, and they are let in when the handlers stand.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn, Self

from hpcft.errors import ExitCode
from hpcft.page import NodePage
from hpcft.process import FORWARDED, become_subreaper, describe_status, die_with_parent, end_descendants, send, state_of

INHERITED_VARIABLE = "HPCFT_KEEPER_FDS"

AGENT_RESTART = 120
"""Exit status by which an agent asks for a successor with a new incarnation (it has fenced itself, say)."""

_FINAL = frozenset(code.value for code in ExitCode) - {ExitCode.INTERNAL.value}
_END_SECONDS = 10.0
_SWEEP_SECONDS = 2.0
_GIVE_UP = 20
"""Lives in a row that ended early, after which an agent is not started again: it cannot work here."""
_POOL_GIVE_UP = 5
"""Pools in a row that ended before they were ready, through no configured module: torch cannot be imported here."""
IMPORT_SECONDS = 120.0
"""For each configured module. Enough for a large package on a slow file system; should it not be, workers import the
module themselves. The world does not wait as long for a node."""
_PACKET = 1 << 16


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the agent finds: the shared page, and the channel to the keeper, where the pool's channel arrives.

    End of file on `keeper` means that the keeper is gone. `life` counts the agents of this keeper from 1. `orders` is
    what was handed to `become`.
    """

    page: NodePage
    keeper: socket.socket
    life: int
    orders: bytes

    @classmethod
    def take(cls, environ: Mapping[str, str]) -> Self | None:
        """What the keeper left for this process; None when no keeper started it."""
        text = environ.get(INHERITED_VARIABLE)
        if text is None:
            return None
        numbers = json.loads(text)
        for name in ("page", "keeper"):
            os.set_inheritable(numbers[name], False)
        keeper = socket.socket(fileno=numbers["keeper"])
        orders = b""
        if numbers["orders"] is not None:
            # not read(): all agents of this keeper share one position in the file
            orders = os.pread(numbers["orders"], os.fstat(numbers["orders"]).st_size, 0)
            os.close(numbers["orders"])
        return cls(NodePage.attach(numbers["page"]), keeper, numbers["life"], orders)

    @staticmethod
    def unblock_signals() -> None:
        """Call it when the handlers stand: signals that came since the start are delivered now."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


@dataclass(slots=True)
class Pauses:
    """How long to wait before the next start: 0.1 s, doubled up to 5 s; after a long life 0.1 s again."""

    first: float = 0.1
    longest: float = 5.0
    long_life: float = 60.0
    short_lives: int = 0

    def after(self, life: float) -> float:
        self.short_lives = 0 if life >= self.long_life else self.short_lives + 1
        return min(self.longest, self.first * (1 << min(max(self.short_lives - 1, 0), 16)))


@dataclass(slots=True)
class _Part:
    """Agent or pool: the process, our end of its channel, and when to start it (again)."""

    name: str
    pid: int = 0
    channel: socket.socket | None = None
    since: float = 0.0
    due: float = 0.0
    lives: int = 0
    pauses: Pauses = field(default_factory=Pauses)


class Keeper:
    def __init__(
        self,
        agent_argv: Sequence[str],
        slots: int,
        preload: Sequence[str],
        orders: int | None = None,
        import_seconds: float = IMPORT_SECONDS,
    ) -> None:
        self._agent_argv = list(agent_argv)
        self._orders = orders
        self._preload = list(preload)
        self._left_out: dict[str, str] = {}
        """Configured modules that the pool does without from now on, and why."""
        self._import_seconds = import_seconds
        self._importing: str | None = None
        self._overdue: float | None = None
        """When the pool must have imported it."""
        self._excused = False
        """The pool's end would count for nothing: it has been ready, or a module is to blame."""
        self._unready_pools = 0
        self._page = NodePage.create(slots)
        self._agent = _Part("agent")
        self._pool = _Part("pool")
        self._held: list[int] = []
        """Signals for an agent that is not there at the moment."""
        self._poll = select.poll()
        self._wake, self._wake_writer = socket.socketpair()
        for end in (self._wake, self._wake_writer):
            end.setblocking(False)

    def run(self) -> int:
        """Until the agent ends for good; returns the status to exit with."""
        parent = self._watch_parent()
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        self._poll.register(self._wake, select.POLLIN)
        status: int | None = None
        try:
            while status is None:
                self._start_what_is_due()
                due = [part.due for part in (self._agent, self._pool) if part.pid == 0]
                if self._overdue is not None:
                    due.append(self._overdue)
                pause = max(0.0, min(due) - time.monotonic()) * 1000 + 1 if due else None
                ready = [fd for fd, _ in self._poll.poll(pause)]
                if parent in ready:
                    _say("the process that started the keeper is gone: ending")
                    return ExitCode.CANCELLED
                if self._pool.channel is not None and self._pool.channel.fileno() in ready:
                    self._hear_pool()
                if self._overdue is not None and self._overdue <= time.monotonic():
                    self._give_module_up(f"its import takes longer than {self._import_seconds:g} s")
                    send(self._pool.pid, signal.SIGKILL)
                status = self._reap() if self._hear_signals() else None
            return status
        finally:
            self._end()

    def _watch_parent(self) -> int | None:
        parent = os.getppid()
        if parent <= 1:
            return None  # nobody to watch: started by init, or from outside of our pid namespace
        try:
            watch = os.pidfd_open(parent)
        except OSError:
            return None
        self._poll.register(watch, select.POLLIN)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return watch

    # Starting

    def _start_what_is_due(self) -> None:
        now = time.monotonic()
        fresh = False
        for part in (self._pool, self._agent):
            if part.pid == 0 and part.due <= now:
                self._start(part)
                fresh = True
        if fresh and self._pool.pid and self._agent.pid:
            self._introduce()

    def _start(self, part: _Part) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        part.lives += 1
        environment = dict(os.environ)
        if part is self._agent:
            argv = self._agent_argv
            numbers = {
                "page": self._page.fd,
                "keeper": theirs.fileno(),
                "life": part.lives,
                "orders": self._orders,
            }
            environment[INHERITED_VARIABLE] = json.dumps(numbers)
        else:
            fds = ["--page", str(self._page.fd), "--keeper", str(theirs.fileno())]
            wanted = [module for module in self._preload if module not in self._left_out]
            without = [word for module, why in self._left_out.items() for word in ("--left-out", module, why)]
            argv = [sys.executable, "-P", "-m", "hpcft.pool", *fds, *_preload_options(wanted), *without]
            self._excused = False
            self._poll.register(ours, select.POLLIN)
        keeper = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                os.setsid()
                if part is self._agent:
                    # The pool has no death signal: it has descendants to kill first.
                    die_with_parent(keeper)
                    if self._orders is not None:
                        os.set_inheritable(self._orders, True)
                else:
                    # Slurm without cgroups signals every process of the step: that must not end a pool that imports.
                    for ignored in FORWARDED:
                        signal.signal(ignored, signal.SIG_IGN)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
                for fd in (self._page.fd, theirs.fileno()):
                    os.set_inheritable(fd, True)
                os.execvpe(argv[0], argv, environment)
            except BaseException as error:
                _say(f"cannot start the {part.name} ({argv[0]}): {error}")
            finally:
                os._exit(ExitCode.UNUSABLE if part is self._agent else ExitCode.INTERNAL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        theirs.close()
        part.pid, part.channel, part.since = pid, ours, time.monotonic()
        if part is self._agent:
            for held in self._held:
                send(pid, held)
            self._held.clear()

    def _introduce(self) -> None:
        """A fresh control channel between agent and pool."""
        for_agent, for_pool = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        packets = ((self._agent, b'{"kind":"pool"}', for_agent), (self._pool, b'{"op":"control"}', for_pool))
        for part, packet, end in packets:
            with end, suppress(OSError):  # it died just now: another introduction follows
                assert part.channel is not None
                socket.send_fds(part.channel, [packet], [end.fileno()])

    def _hear_pool(self) -> None:
        """What it is about to import, or that it is ready."""
        channel = self._pool.channel
        assert channel is not None
        while True:
            try:
                packet = channel.recv(_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                with suppress(KeyError):
                    self._poll.unregister(channel)  # how it ended is told by SIGCHLD
                return
            with suppress(ValueError, TypeError, KeyError):  # a module may write anywhere
                module = json.loads(packet)["importing"]
                if module is None:
                    self._importing, self._overdue = None, None
                    self._excused, self._unready_pools = True, 0
                elif module in self._preload and not self._excused:
                    self._importing, self._overdue = module, time.monotonic() + self._import_seconds

    def _give_module_up(self, why: str) -> None:
        if self._importing is not None:
            _say(f"{self._importing} is not preloaded from now on: {why}")
            self._left_out[self._importing] = why
            self._excused = True
        self._importing, self._overdue = None, None

    # Signals and deaths

    def _hear_signals(self) -> bool:
        """Forward what came; True when a child may have died."""
        try:
            numbers = self._wake.recv(4096)
        except BlockingIOError:
            return False
        for number in numbers:
            if number != signal.SIGCHLD and not (self._agent.pid and send(self._agent.pid, number)):
                self._held.append(number)
        return signal.SIGCHLD in numbers

    def _reap(self) -> int | None:
        """Collect the dead; the status to end with, when the agent is not to come back."""
        final: int | None = None
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._agent.pid:
                    final = self._bury(self._agent, status)
                elif pid == self._pool.pid:
                    given_up = self._bury(self._pool, status)
                    final = given_up if final is None else final
        return final

    def _bury(self, part: _Part, status: int) -> int | None:
        other = self._pool if part is self._agent else self._agent
        life = time.monotonic() - part.since
        part.pid = 0
        if part is self._pool:
            self._judge_pool(status)
        if part.channel is not None:
            with suppress(KeyError):
                self._poll.unregister(part.channel)
            part.channel.close()
            part.channel = None
        if part is self._agent and os.WIFEXITED(status) and os.WEXITSTATUS(status) in _FINAL:
            return os.WEXITSTATUS(status)
        pause = part.pauses.after(life)
        what = f"the {part.name} ended after {life:.1f} s with {describe_status(status)}"
        if part is self._agent and part.pauses.short_lives >= _GIVE_UP:
            _say(f"{what}, for the {_GIVE_UP}th time in a row: giving up on this node")
            return ExitCode.INTERNAL
        if self._unready_pools >= _POOL_GIVE_UP:
            _say(
                f"{what}, before it had imported torch, for the {_POOL_GIVE_UP}th time in a row: giving up on this "
                "node; `hpcft doctor` tries the import"
            )
            return ExitCode.UNUSABLE
        _say(f"{what}: starting another in {pause:.1f} s")
        # What it left behind was reparented to us; the other one's tree is not touched.
        self._name_survivors(end_descendants(_SWEEP_SECONDS, without=[other.pid] if other.pid else []))
        part.due = time.monotonic() + pause
        return None

    def _judge_pool(self, status: int) -> None:
        """What its end was due to: a configured module, or itself."""
        self._hear_pool()  # the last that it has said
        self._give_module_up(f"the pool ended with {describe_status(status)} while it imported it")
        if not self._excused:
            self._unready_pools += 1

    def _end(self) -> None:
        for number in FORWARDED:
            signal.signal(number, signal.SIG_IGN)
        self._name_survivors(end_descendants(_END_SECONDS))

    @staticmethod
    def _name_survivors(pids: Sequence[int]) -> None:
        for pid in pids:
            _say(f"process {pid} does not die (state {state_of(pid)}): leaving it to Slurm")


def _say(text: str) -> None:
    # A full pipe behind a hanging slurmstepd must not hang us: better no line than no keeper.
    if select.select([], [2], [], 0)[1]:
        with suppress(OSError):
            os.write(2, f"hpcft keeper: {text}\n".encode())


def hold_signals() -> None:
    """Until an agent can hear them: what Slurm says to a process that has just begun would end it, and be lost."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)


def become(agent_argv: Sequence[str], *, slots: int, preload: Sequence[str] = (), orders: bytes = b"") -> NoReturn:
    """Go on as the keeper of this node, in a fresh interpreter with the same pid. Its exit status is the agent's.

    Every agent finds `orders` in what it inherits.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    hold_signals()
    options = ["--slots", str(slots), "--orders", str(_sealed(orders)), *_preload_options(preload)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "hpcft.keeper", *options, "--", *agent_argv])


def _sealed(content: bytes) -> int:
    """A file in memory that passes through an exec, and never changes."""
    fd = os.memfd_create("hpcft-orders", os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _preload_options(preload: Sequence[str]) -> list[str]:
    return [argument for module in preload for argument in ("--preload", module)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep a node until its agent ends for good, and return the exit status. Takes over this process."""
    parser = argparse.ArgumentParser(prog="python -m hpcft.keeper")
    parser.add_argument("--slots", type=int, required=True, help="workers that the node may have")
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE", help="handed to the pool")
    parser.add_argument("--import-seconds", type=float, default=IMPORT_SECONDS, help="for each module to preload")
    parser.add_argument("--orders", type=int, help="descriptor of a file in memory that every agent gets")
    parser.add_argument("agent", nargs="+", help="the agent's command line, after --")
    options = parser.parse_args(arguments)
    if options.orders is not None:
        os.set_inheritable(options.orders, False)
    become_subreaper()
    keeper = Keeper(options.agent, options.slots, options.preload, options.orders, options.import_seconds)
    return int(keeper.run())


if __name__ == "__main__":
    sys.exit(main())
