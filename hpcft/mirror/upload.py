"""From a committed checkpoint to the store, chunk by chunk."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path

from hpcft import durable
from hpcft.bucket import Bucket, BucketError, ObjectMeta, begun
from hpcft.checkpoint.layout import MANIFEST, CheckpointDamagedError, Damage
from hpcft.checkpoint.manifest import FileEntry, Manifest
from hpcft.checkpoint.read import chunk_damage, damage_of, read_chunk, read_manifest
from hpcft.checkpoint.readers import reading
from hpcft.durable import CHUNK_BYTES, Buffer
from hpcft.errors import DamagedError, HpcftError, NotFoundError
from hpcft.mirror.plan import Keys, Mirrored, superfluous, unfinished

AT_ONCE = 4
"""Chunks under way, each in memory: 64 MiB together."""

_DELETED_AT_ONCE = 1000


class MirrorDamagedError(DamagedError):
    """A copy in the store is not what was mirrored."""


class Throttle:
    """Lets so many bytes per second through on average. May be used by several threads."""

    def __init__(self, bandwidth: int) -> None:
        """`bandwidth`: bytes per second; 0: no limit."""
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, size: int) -> None:
        """Waits until `size` bytes may be sent."""
        if not self._bandwidth:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + size / self._bandwidth
        time.sleep(begin - now)


class Uploads:
    """The checkpoints of one run in the store. All methods block; BucketError: the store failed."""

    def __init__(self, bucket: Bucket, keys: Keys, throttle: Throttle, *, read_back: bool = False) -> None:
        self._bucket = bucket
        self._keys = keys
        self._throttle = throttle
        self._read_back = read_back

    def offered(self) -> list[Mirrored]:
        """What is there as a whole, in the order of the commits."""
        return offered(self._bucket, self._keys)

    def manifest(self, which: Mirrored) -> Manifest:
        """DamagedError: it is not what was mirrored. NotFoundError: it has been deleted since."""
        return read_back(self._bucket, self._keys, which)

    def upload(self, directory: Path, run: str, left: Callable[[int], None]) -> Manifest:
        """Copies a committed checkpoint, except what is there already; `left` is told the bytes to go.

        NotFoundError: it is not there any more. CheckpointDamagedError: it is not what was committed, and is not
        offered. UnreadableError: this node cannot read it.
        """
        with reading(directory):  # `hpcft ckpt prune` passes over it
            return self._upload(directory, run, left)

    def _upload(self, directory: Path, run: str, left: Callable[[int], None]) -> Manifest:
        manifest, _ = read_manifest(directory, None)
        if manifest.run != run:
            raise CheckpointDamagedError(directory, Damage(MANIFEST, f"it belongs to run {manifest.run}, not to {run}"))
        which = Mirrored.of(manifest)
        data = (directory / MANIFEST).read_bytes()
        there = self._chunks(which)
        if self._is_offered(which, data):
            if self._is_complete(which, manifest, there):
                left(0)
                return manifest
            self._bucket.delete([self._keys.manifest(which)])  # it offers what is not there
        self._send_all(directory, which, manifest, there, left)
        self._put(self._keys.manifest(which), data)
        # Who retires deletes chunks, then looks for a manifest; we put the manifest, then look for the chunks. In
        # whatever order the two take place, one of them sees what the other has done.
        if not self._is_complete(which, manifest, self._chunks(which)):
            self._bucket.delete([self._keys.manifest(which)])
            raise BucketError(
                f"{self._bucket.url}/{self._keys.chunks(which)} has lost objects while others were sent",
                "another process has deleted them, or the store has lost them: try again",
            )
        return manifest

    def retire(self, keep: int, done: Mirrored) -> None:
        """Deletes what is not among the `keep` newest, and what was left unfinished before `done`.

        The manifest goes first: what has none is not offered.
        """
        begun = self._bucket.names(self._keys.all_chunks)
        there = self.offered()  # after what is begun: what has become whole meanwhile is not taken for unfinished
        for each in superfluous(there, keep):
            self._bucket.delete([self._keys.manifest(each)])
            self._delete_chunks(each)
        for each in unfinished(begun, there, done):
            self._delete_chunks(each)

    def _delete_chunks(self, which: Mirrored) -> None:
        """And the manifest that another process may have put meanwhile, thinking that all are there (`upload`)."""
        keys = list(self._chunks(which))
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            self._bucket.delete(keys[start : start + _DELETED_AT_ONCE])
        self._bucket.delete([self._keys.manifest(which)])

    def _chunks(self, which: Mirrored) -> dict[str, ObjectMeta]:
        return {each.key: each for each in self._bucket.objects(self._keys.chunks(which))}

    def _is_complete(self, which: Mirrored, manifest: Manifest, there: dict[str, ObjectMeta]) -> bool:
        """Whether there is an object of the right size for each chunk."""
        return all(
            (found := there.get(self._keys.chunk(which, entry.name, chunk))) is not None
            and found.size == min(CHUNK_BYTES, entry.size - chunk * CHUNK_BYTES)
            for entry in manifest.files
            for chunk in range(len(entry.digests))
        )

    def _is_offered(self, which: Mirrored, data: bytes) -> bool:
        try:
            found, _ = self._bucket.get(self._keys.manifest(which))
        except NotFoundError:
            return False
        return bytes(found) == data

    def _send_all(
        self,
        directory: Path,
        which: Mirrored,
        manifest: Manifest,
        there: dict[str, ObjectMeta],
        left: Callable[[int], None],
    ) -> None:
        remaining, lock = manifest.size, threading.Lock()
        left(remaining)

        def send(entry: FileEntry, chunk: int) -> None:
            nonlocal remaining
            data = _read(directory, entry, chunk)
            key = self._keys.chunk(which, entry.name, chunk)
            known = there.get(key)
            if known is None or not self._holds(known, data):
                self._put(key, data)
            with lock:
                remaining -= len(data)
                left(remaining)

        running: set[Future[None]] = set()
        try:
            for entry in manifest.files:
                for chunk in range(len(entry.digests)):
                    running.add(begun(partial(send, entry, chunk)))
                    if len(running) == AT_ONCE:  # no more, so that a failure leaves no queue to wait for
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        for each in done:
                            each.result()
            for each in running:
                each.result()
        except HpcftError:
            wait(running)  # whoever tries again does not compete with these
            raise

    def _holds(self, known: ObjectMeta, data: memoryview) -> bool:
        """Whether an object that was put before is this chunk."""
        if known.size != len(data):
            return False
        if known.etag == _md5(data) and not self._read_back:
            return True
        return self._gives_back(known.key, data)

    def _put(self, key: str, data: Buffer) -> None:
        self._throttle.take(len(data))
        etag = self._bucket.put(key, data)
        if etag == _md5(data) and not self._read_back:
            return
        if not self._gives_back(key, data):
            self._bucket.delete([key])
            raise BucketError(f"{self._bucket.url}/{key} is not what was sent", "the store damages what it is given")

    def _gives_back(self, key: str, data: Buffer) -> bool:
        try:
            found, _ = self._bucket.get(key)
        except NotFoundError:
            return False
        return len(found) == len(data) and durable.digest(found) == durable.digest(data)


def offered(bucket: Bucket, keys: Keys) -> list[Mirrored]:
    """The checkpoints of a run that have a manifest, in the order of their commits."""
    labels = (each.key.removeprefix(keys.manifests).removesuffix(".json") for each in bucket.objects(keys.manifests))
    return sorted(each for label in labels if (each := Mirrored.parse(label)) is not None)


def read_back(bucket: Bucket, keys: Keys, which: Mirrored) -> Manifest:
    """The manifest of a checkpoint in the store. MirrorDamagedError: it is not what was mirrored."""
    data, _ = bucket.get(keys.manifest(which))
    try:
        manifest, _ = Manifest.parse(bytes(data))
    except ValueError as error:
        raise MirrorDamagedError(f"its manifest is damaged: {error}") from error
    if Mirrored.of(manifest) != which or manifest.run != keys.run:
        raise MirrorDamagedError(f"its manifest is that of {manifest.name} of run {manifest.run}")
    return manifest


def _read(directory: Path, entry: FileEntry, chunk: int) -> memoryview:
    """16 MiB of a file, or what is left of it, and what was written."""
    view = memoryview(bytearray(min(CHUNK_BYTES, entry.size - chunk * CHUNK_BYTES)))
    try:
        fd = os.open(directory / entry.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = read_chunk(fd, [view], chunk * CHUNK_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointDamagedError(directory, damage_of(entry.name, error, directory)) from error
    if damage := chunk_damage(entry, chunk, length, [view]):
        raise CheckpointDamagedError(directory, damage)
    return view


def _md5(data: Buffer) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
