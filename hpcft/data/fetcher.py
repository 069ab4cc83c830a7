"""The process that fetches blocks (see `blocks`): the only one of a data set that speaks to the store.

It is exec'd, not forked, imports no torch, and ends with its channel. What is asked for now goes before what is asked
for ahead. A failure is tried again for a while by the store's client; what is then still wrong is left as a small file
for whoever waits.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

import orjson

from hpcft import durable
from hpcft.bucket import Bucket
from hpcft.data.blocks import BLOCK_BYTES, FULL, RemoteFile, block_path, failure
from hpcft.errors import HpcftError, NotFoundError
from hpcft.places import Place

log = logging.getLogger("hpcft.data")

_THREADS = 8
_LOCKS = 256
_PACKET = 1 << 18
_SCANS = 128
"""The cache is looked through after each such part of its limit that this process has added …"""
_ROOM = 4
"""… and, if it is beyond its limit less this part, emptied down to there: room for what others add meanwhile."""


class Fetcher:
    def __init__(self, orders: dict[str, Any]) -> None:
        self._place = Place.from_json(orders["place"])
        self._bucket = Bucket(self._place)
        self._directory = Path(orders["directory"])
        self._failures = Path(orders["failures"])
        self._files = [RemoteFile(*each) for each in orders["files"]]
        self._limit = int(orders["limit"])
        self._wanted: queue.PriorityQueue[tuple[bool, int, int, int]] = queue.PriorityQueue()
        self._order = count()
        self._under_way: set[tuple[int, int]] = set()
        self._choosing = threading.Lock()
        self._added = self._limit  # so that the first block looks
        self._adding = threading.Lock()

    def run(self, channel: socket.socket) -> None:
        for number in range(_THREADS):
            threading.Thread(target=self._fetch_all, name=f"hpcft-fetch-{number}", daemon=True).start()
        while packet := channel.recv(_PACKET):
            asked = orjson.loads(packet)
            for file, block in asked["blocks"]:
                self._wanted.put((asked["ahead"], next(self._order), file, block))

    def _fetch_all(self) -> None:
        while True:
            ahead, _, number, block = self._wanted.get()
            with self._choosing:
                if (number, block) in self._under_way:
                    continue  # whoever waits asks again and again, and shall not get all threads
                self._under_way.add((number, block))
            try:
                self._fetch(self._path(number, block), self._files[number], block)
            except Exception as error:  # whatever it is: somebody waits
                if not ahead:  # else nobody does yet: whoever will, asks again
                    self._tell(number, block, error)
            finally:
                with self._choosing:
                    self._under_way.remove((number, block))

    def _path(self, number: int, block: int) -> Path:
        return block_path(self._directory, self._place.url, self._files[number], block)

    def _tell(self, number: int, block: int, error: Exception) -> None:
        changed = isinstance(error, NotFoundError)
        if changed:
            url = f"{self._place.url}/{self._files[number].key}"
            error = NotFoundError(f"{url} has changed or is gone since the data set was opened")
        words = self._failures / self._path(number, block).name
        try:
            durable.replace(words, failure(self._directory, error, changed))
        except OSError:
            with suppress(OSError):
                words.hardlink_to(self._failures / FULL)

    def _fetch(self, path: Path, file: RemoteFile, block: int) -> None:
        if path.exists():
            return
        with _locked(self._directory / "locks" / f"{hash_of(path.name):03d}"):
            if path.exists():
                return
            start = block * BLOCK_BYTES
            length = min(BLOCK_BYTES, file.size - start)
            data = self._bucket.get_range(file.key, start, length, file.etag)
            if len(data) != length:
                raise NotFoundError(f"{file.key} has fewer bytes than before")
            aside = path.with_name(f".{token_hex(8)}.aside")
            try:
                aside.write_bytes(bytes(data) + durable.digest(data).encode())
                aside.rename(path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        self._make_room(length)

    def _make_room(self, added: int) -> None:
        with self._adding:
            self._added += added
            if self._added < self._limit // _SCANS:
                return
            self._added = 0
            with _locked(self._directory / "locks" / "evicting"):
                evict(self._directory / "blocks", self._limit - self._limit // _ROOM)


def evict(blocks: Path, limit: int) -> None:
    """Deletes what was used least recently, until `limit` bytes are left; and what a killed process left."""
    found = []
    with os.scandir(blocks) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, stat.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        Path(path).unlink(missing_ok=True)
        total -= size


def hash_of(name: str) -> int:
    """Which of the locks."""
    return int(durable.digest(name.encode())[:8], 16) % _LOCKS


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, of this node. The lock ends with its holder."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _list(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        bucket = Bucket(Place.from_json(asked["place"]))
        return {"files": [[each.key, each.size, each.etag] for each in bucket.objects(asked["prefix"])]}
    except HpcftError as error:
        return {"failed": {"message": error.message, "hint": error.hint, "code": int(error.exit_code)}}


def main(arguments: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a batch system sends them to every process of a step
    asked = orjson.loads(sys.stdin.buffer.read())
    if arguments == ["list"]:
        sys.stdout.buffer.write(orjson.dumps(_list(asked)))
        return
    Fetcher(asked).run(socket.socket(fileno=asked["channel"]))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # not waiting for threads that may hang in the store
