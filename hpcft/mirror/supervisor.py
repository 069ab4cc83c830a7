"""The leader's side of the mirror: one thread, which starts the copying process, listens to it and starts another.

The loop only ever leaves a name and reads what was said last; nobody waits for the process. It is killed rather than
ended, and dies with the thread that has started it (`process.die_with_parent`), so with its leader.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Collection
from typing import Any

import orjson

from hpcft.errors import DamagedError, ExitCode, HpcftError, NotFoundError, UnusableError, UsageError
from hpcft.ids import Step, Term
from hpcft.mirror.plan import PACKET, SILENT_SECONDS, Progress, Settings, pause_after
from hpcft.process import describe_status

log = logging.getLogger("hpcft.mirror")

_END_SECONDS = 1.0
_LOOK_SECONDS = 1.0
_LONG_LIFE = 60.0


class Mirror:
    """Copies checkpoints in the background from construction to `close`. All methods return at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._progress = Progress()
        self._heard_at = time.monotonic()
        self._newest: str | None = None
        self._told: str | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._warned: object = None
        self._thread = threading.Thread(target=self._supervise, name="hpcft-mirror", daemon=True)
        self._thread.start()

    def follow(self, newest: str) -> None:
        """This is the run's newest checkpoint now."""
        self._newest = newest
        self._nudge()

    def progress(self) -> Progress:
        """What is known, for status."""
        silent = time.monotonic() - self._heard_at
        if silent < SILENT_SECONDS:
            return self._progress
        return self._progress.failing(f"its process has said nothing for {silent:.0f} s: it is stopped, or hangs")

    def held(self) -> frozenset[str]:
        """Names of checkpoints that must not be retired: they are being read."""
        uploading = self._progress.uploading
        return frozenset() if uploading is None else frozenset((uploading,))

    def close(self) -> None:
        """Kill the process. What it was about is gone on with by the next start, or by `hpcft mirror push`."""
        self._closed = True
        self._nudge()
        self._thread.join(_END_SECONDS)

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):  # it is full of others, or closed
            self._waker.send(b"!")

    # --- on the thread ---

    def _supervise(self) -> None:
        with self._wake, self._waker:
            self._keep_alive()

    def _keep_alive(self) -> None:
        short_lives = 0
        while not self._closed:
            began = time.monotonic()
            try:
                ended = self._live()
            except OSError as error:
                ended = f"could not be started: {error}"
            if self._closed:
                return
            short_lives = 0 if time.monotonic() - began >= _LONG_LIFE else short_lives + 1
            pause = pause_after(short_lives)
            self._progress = self._progress.failing(f"its process {ended}")
            log.warning("the mirror's process %s: starting another in %g s", ended, pause)
            until = time.monotonic() + pause
            while not self._closed and (left := until - time.monotonic()) > 0:
                self._heard_at = time.monotonic()
                self._drain(min(left, _LOOK_SECONDS))

    def _live(self) -> str:
        """One process from its start to its end, and how it ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours:
            with theirs:
                child = self._child = start("copy", str(theirs.fileno()), pass_fds=(theirs.fileno(),))
            try:
                ours.send(orjson.dumps({"settings": self._settings.to_json()}))
                self._told, self._heard_at = None, time.monotonic()
                while not self._closed and self._hear(ours):
                    self._tell(ours)
            finally:
                child.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep: it dies when it wakes
                    child.wait(_END_SECONDS)
        return f"ended with {describe_status(_status(child))}"

    def _hear(self, channel: socket.socket) -> bool:
        """False when the process is gone."""
        ready, _, _ = select.select([channel, self._wake], [], [], _LOOK_SECONDS)
        if self._wake in ready:
            self._wake.recv(1024)
        if channel in ready:
            packet = channel.recv(PACKET)
            if not packet:
                return False
            self._heard_at = time.monotonic()
            self._progress = Progress.from_json(orjson.loads(packet))
            self._log()
        return True

    def _tell(self, channel: socket.socket) -> None:
        newest = self._newest
        if newest is not None and newest != self._told:
            with contextlib.suppress(BlockingIOError):  # it is stopped: again at the next look
                channel.send(orjson.dumps({"newest": newest}))
                self._told = newest

    def _log(self) -> None:
        progress = self._progress
        warning = progress.warning()
        kind = progress.error or bool(warning)
        if warning and kind != self._warned:
            log.warning("%s", warning)
        self._warned = kind

    def _drain(self, seconds: float) -> None:
        if select.select([self._wake], [], [], seconds)[0]:
            self._wake.recv(1024)


def start(verb: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process of the mirror, which dies with the calling thread."""
    command = [sys.executable, "-P", "-m", "hpcft.mirror.child", str(os.getpid()), verb, *arguments]
    return subprocess.Popen(command, stdin=options.pop("stdin", subprocess.DEVNULL), **options)


def _status(child: subprocess.Popen[bytes]) -> int:
    code = child.returncode
    if code is None:
        return signal.SIGKILL
    return -code if code < 0 else code << 8


async def restored(
    settings: Settings, *, journaled: tuple[Term, Collection[str]] | None = None, step: Step | None = None
) -> str | None:
    """Restores the newest checkpoint in a process of its own, as `restore.restore` does; cancelling kills it.

    Raises what that raises, and UnusableError if the process ends without a word.
    """
    asked = {
        "settings": settings.to_json(),
        "journaled": None if journaled is None else {"term": journaled[0], "names": sorted(journaled[1])},
        "step": step,
    }
    command = [sys.executable, "-P", "-m", "hpcft.mirror.child", str(os.getpid()), "restore"]
    child = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(orjson.dumps(asked))
        child.stdin.close()
        async for message in _messages(child.stdout):
            match message:
                case {"progress": str(text)}:
                    log.info("%s", text)
                case {"restored": None | str() as name}:
                    return name
                case {"failed": {"code": int(code), "message": str(text), "hint": str(hint)}}:
                    raise _ERRORS.get(code, UnusableError)(text, hint)
        raise UnusableError("the process that restores checkpoints from the mirror ended without a word")
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        with contextlib.suppress(TimeoutError):  # in uninterruptible sleep: it dies when it wakes
            async with asyncio.timeout(_END_SECONDS):
                await child.wait()


_ERRORS: dict[int, type[HpcftError]] = {
    ExitCode.DAMAGED: DamagedError,
    ExitCode.NOT_FOUND: NotFoundError,
    ExitCode.USAGE: UsageError,
    ExitCode.UNUSABLE: UnusableError,
}


async def _messages(lines: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    while line := await lines.readline():
        yield orjson.loads(line)
