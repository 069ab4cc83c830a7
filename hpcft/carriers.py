"""The agent's side of its carriers: a job goes out, its result comes back, and nobody waits for one that hangs."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import orjson

from hpcft.process import CARRIER_NAME, FORWARDED, arguments_of, name_of

_PACKET = 1 << 17
LEFT_BEHIND = 4
"""While so many of a carrier's processes hang, there is not another one: each costs memory, and would hang as well."""
_MODULE = "hpcft.carrier"


def is_carrier(pid: int) -> bool:
    """Whether this process is one, of whatever agent: killed or not, as long as it is not gone."""
    # One that hangs while it ends has no command line any more, one that hangs while it starts has no name yet.
    return name_of(pid) == CARRIER_NAME or (b"-m", _MODULE.encode()) in pairwise(arguments_of(pid))


class JobFailed(Exception):
    """What was asked of a carrier could not be done; the reason is for people."""


class Carrier:
    """One process (see `hpcft.carrier`), started for the first job, and again after it has died or was left behind.

    One job at a time: others wait their turn.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._turn = asyncio.Lock()
        self._left: list[subprocess.Popen[bytes]] = []
        """Killed, and not gone when that was last looked at."""

    async def carry(
        self,
        job: Mapping[str, Any],
        fds: Sequence[int] = (),
        told: Callable[[int], None] = lambda written: None,
        patience: float = math.inf,
    ) -> tuple[dict[str, Any], list[int]]:
        """Have it done: returns what was made, with the descriptors that came along, which are the caller's.

        `told` hears now and then how many bytes are written, or made. Cancelled, the process is left behind.

        Raises:
            JobFailed: it could not be done, or the process has died over it, or has said nothing for `patience` seconds
                and is left behind.
        """
        async with self._turn:
            try:
                channel = self._give(orjson.dumps(job), fds)
                while True:
                    async with asyncio.timeout(None if patience == math.inf else patience):
                        await _readable(channel)
                    packet, found, _, _ = socket.recv_fds(channel, _PACKET, 8, socket.MSG_CMSG_CLOEXEC)
                    if not packet:
                        raise ConnectionResetError
                    match orjson.loads(packet):
                        case {"written": int() as written}:
                            told(written)
                        case {"done": dict() as done}:
                            return done, found
                        case {"failed": str() as reason}:
                            raise JobFailed(reason)
            except TimeoutError as error:
                self.leave_behind()
                raise JobFailed(f"no progress in {patience:g} s, and none is waited for any more") from error
            except OSError as error:
                self.leave_behind()
                raise JobFailed("the process that was to do it has died (out of memory, perhaps)") from error
            except asyncio.CancelledError:
                self.leave_behind()
                raise

    async def warm(self) -> None:
        """Start the process ahead of its first job. Where that fails, the job will say so."""
        async with self._turn:
            if self._channel is None:
                with suppress(OSError, JobFailed):
                    self._start()

    def _give(self, packet: bytes, fds: Sequence[int]) -> socket.socket:
        """To the process; to another one, if it has died since its last job."""
        if self._channel is not None:
            try:
                socket.send_fds(self._channel, [packet], fds)
            except (BrokenPipeError, ConnectionResetError):
                self.leave_behind()
            else:
                return self._channel
        channel = self._start()
        socket.send_fds(channel, [packet], fds)
        return channel

    def _start(self) -> socket.socket:
        self._left = [each for each in self._left if each.returncode is None]
        if len(self._left) >= LEFT_BEHIND:
            pids = ", ".join(str(each.pid) for each in self._left)
            raise JobFailed(f"processes that were given up before still hang in the kernel ({pids})")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            numbers = ["--channel", str(theirs.fileno()), "--parent", str(os.getpid())]
            # Slurm signals every process of a job, and means the agent. What is blocked here stays blocked in the new
            # process, from its first instruction on (which a loop's own way to start one does not promise).
            before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _MODULE, *numbers],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        self._channel = ours
        return ours

    def leave_behind(self) -> None:
        """SIGKILL, and no waiting: in the kernel it may take for ever to go. The next job finds another process."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            threading.Thread(target=self._process.wait, name="hpcft-reap", daemon=True).start()
            self._left.append(self._process)
            self._process = None


async def _readable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(channel, wake)
    try:
        await ready
    finally:
        loop.remove_reader(channel)
