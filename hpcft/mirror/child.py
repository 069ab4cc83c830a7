"""The mirror's processes: one that copies for as long as a leader wants it, one that restores and ends.

Either is killed without notice: what it was about is gone on with by the next one. They read what they are to do from
a channel or from stdin, never from a command line, and know neither the run's secret nor its configuration.

- `copy FD`: a SOCK_SEQPACKET channel. The leader sends `{"settings": …}` first, and `{"newest": name}` whenever
  there is a newer checkpoint; it is sent `plan.Progress` at least once a second. Its end is ours.
- `restore`: `{"settings": …, "journaled": …, "step": …}` on stdin. Lines on stdout: `{"progress": text}`; the last one
  is `{"restored": name or null}` or `{"failed": {"code": …, "message": …, "hint": …}}`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from hpcft.bucket import Bucket, BucketError
from hpcft.checkpoint.layout import CheckpointDamagedError, parse_name
from hpcft.checkpoint.manifest import Manifest
from hpcft.checkpoint.read import read_manifest
from hpcft.errors import DamagedError, HpcftError, NotFoundError
from hpcft.ids import RunId, Step, Term
from hpcft.mirror.plan import PACKET, Keys, Mirrored, Progress, Settings, due, pause_after
from hpcft.mirror.restore import restore
from hpcft.mirror.upload import Throttle, Uploads
from hpcft.process import die_with_parent
from hpcft.units import human_size

log = logging.getLogger("hpcft.mirror")

_TELL_SECONDS = 1.0
_PROGRESS_SECONDS = 10.0


class Copying:
    """Mirrors the newest checkpoint that is due, one after the other, for ever."""

    def __init__(self, settings: Settings, channel: socket.socket) -> None:
        self._settings = settings
        self._channel = channel
        self._progress = Progress()
        self._changed = threading.Condition()
        self._newest: str | None = None
        self._last: tuple[Step, float] | None = None
        """Of the checkpoint mirrored last: its step, and when it was made."""
        self._waiting: list[tuple[Step, float]] = []
        """Checkpoints that were due since: their steps, and when they were heard of."""
        self._failures = 0

    def run(self) -> None:
        threading.Thread(target=self._listen, name="hpcft-listen", daemon=True).start()
        threading.Thread(target=self._tell, name="hpcft-tell", daemon=True).start()
        settings = self._settings
        uploads = Uploads(
            Bucket(settings.place, settings.request_seconds),
            Keys(settings.name, settings.run),
            Throttle(settings.bandwidth),
            read_back=settings.read_back,
        )
        handled: str | None = None
        known = False
        while True:
            newest = handled
            try:
                if not known:
                    self._look(uploads)
                    known = True
                newest = self._next(handled)
                self._mirror(uploads, newest)
                handled = newest
                self._failures = 0
            except CheckpointDamagedError as error:  # nothing will make it whole: the next one is mirrored
                self._say(error=error.message, uploading=None)
                handled = newest
            except NotFoundError:  # retired before its turn came, or the leader's directory is another one
                self._say(uploading=None)
                handled = newest
            except BucketError as error:  # what is begun is gone on with
                self._say(error=error.message)
                self._pause()
            except (
                HpcftError,
                OSError,
            ) as error:  # of this node: the newest is tried next, and this one may be retired
                said = error.message if isinstance(error, HpcftError) else str(error)
                self._say(error=said, uploading=None)
                self._pause()

    def _look(self, uploads: Uploads) -> None:
        """What earlier processes have mirrored."""
        for each in reversed(uploads.offered()):
            with contextlib.suppress(DamagedError, NotFoundError):  # deleted since, or to be mirrored again
                self._has_mirrored(uploads.manifest(each))
                break
        self._say(error=None)

    def _mirror(self, uploads: Uploads, name: str) -> None:
        settings = self._settings
        directory = Path(settings.root) / name
        manifest, _ = read_manifest(directory)
        if not due(settings.every, self._last, manifest.step, manifest.created):
            return
        self._say(uploading=name, bytes_left=manifest.size)
        uploads.upload(directory, settings.run, lambda left: self._say(bytes_left=left))
        self._has_mirrored(manifest)
        uploads.retire(settings.keep, Mirrored.of(manifest))

    def _has_mirrored(self, manifest: Manifest) -> None:
        self._last = (manifest.step, manifest.created)
        with self._changed:
            self._waiting = [each for each in self._waiting if each[0] > manifest.step]
        self._say(mirrored=manifest.step, uploading=None, bytes_left=0, behind=len(self._waiting), error=None)

    # --- with the leader ---

    def _next(self, handled: str | None) -> str:
        """The newest checkpoint that was not dealt with, once there is one. What the store has refused comes first, as
        long as it is there: else a store that often fails would never get a whole one."""
        begun = self._progress.uploading
        if begun is not None and (Path(self._settings.root) / begun).exists():
            return begun
        with self._changed:
            while self._newest is None or self._newest == handled:
                self._changed.wait()
            return self._newest

    def _listen(self) -> None:
        while packet := self._channel.recv(PACKET):
            self._hear(str(orjson.loads(packet)["newest"]))
        os._exit(0)  # the leader is gone

    def _hear(self, name: str) -> None:
        parsed = parse_name(name)
        if parsed is None:
            return
        with self._changed:
            self._newest = name
            before = self._waiting[-1] if self._waiting else self._last
            made = (parsed[0], time.time())
            self._waiting = [each for each in self._waiting if each[0] < made[0]]
            if due(self._settings.every, before, *made):
                self._waiting.append(made)
            self._progress = replace(self._progress, behind=len(self._waiting))
            self._changed.notify_all()

    def _say(self, **changes: Any) -> None:
        with self._changed:
            self._progress = replace(self._progress, **changes)
            self._changed.notify_all()

    def _tell(self) -> None:
        """At most ten times a second, and at least once."""
        told: Progress | None = None
        with contextlib.suppress(OSError):
            while True:
                with self._changed:
                    if self._progress == told:
                        self._changed.wait(_TELL_SECONDS)
                    told = self._progress
                self._channel.send(orjson.dumps(told.to_json()))
                time.sleep(_TELL_SECONDS / 10)

    def _pause(self) -> None:
        """With jitter; a newer checkpoint does not cut it short."""
        self._failures += 1
        time.sleep(pause_after(self._failures) * random.uniform(0.5, 1.0))


def _copy(fd: int) -> int:
    channel = socket.socket(fileno=fd)
    packet = channel.recv(PACKET)
    if not packet:
        return 0
    Copying(Settings.from_json(orjson.loads(packet)["settings"]), channel).run()
    return 0


def _restore() -> int:
    asked = orjson.loads(sys.stdin.buffer.read())
    settings = Settings.from_json(asked["settings"])
    said_at = 0.0

    def progress(checkpoint: str, left: int) -> None:
        nonlocal said_at
        if time.monotonic() >= said_at + _PROGRESS_SECONDS:
            said_at = time.monotonic()
            _line({"progress": f"{checkpoint} is being restored from the mirror: {human_size(left)} to go"})

    journaled = asked["journaled"]
    try:
        restored = restore(
            Bucket(settings.place, settings.request_seconds),
            Path(settings.root),
            settings.name,
            RunId(settings.run),
            adopt=settings.adopt,
            journaled=None if journaled is None else (Term(journaled["term"]), frozenset(journaled["names"])),
            step=None if asked["step"] is None else Step(asked["step"]),
            progress=progress,
        )
    except HpcftError as error:
        _line({"failed": {"code": int(error.exit_code), "message": error.message, "hint": error.hint}})
        return int(error.exit_code)
    _line({"restored": restored.checkpoint if restored else None})
    return 0


def _line(value: object) -> None:
    sys.stdout.buffer.write(orjson.dumps(value) + b"\n")
    sys.stdout.buffer.flush()


def main(arguments: list[str]) -> int:
    parent, verb, *rest = arguments
    die_with_parent(int(parent))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a batch system sends them to every process of a step
    with contextlib.suppress(OSError):
        os.nice(10)
    logging.basicConfig(format="hpcft mirror: %(message)s", level=logging.INFO)
    return _copy(int(rest[0])) if verb == "copy" else _restore()


if __name__ == "__main__":
    # not sys.exit: it would wait for threads that may hang in the store or the file system
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
