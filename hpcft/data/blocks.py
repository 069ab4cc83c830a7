"""Blocks of objects in a directory of the node: fetched by a process of their own, bounded in bytes.

Theory of operation
-------------------
An object is read in blocks of 4 MiB. A block is a file of the cache directory, named after object, ETag and place, with
the digest of its bytes at the end; it appears by rename, complete. Whoever wants a record opens the file. If it is not
there, the block is asked for and waited for: by a packet to the process that fetches (`fetcher`), which answers only by
making the file, or one that says why not. So any number of forked loader processes share one channel without
taking turns, and none of them touches the network, whose client does not survive a fork.

All processes of a node may share the directory. A block is fetched once: whoever fetches it holds one of 256 locks. It
is evicted when the cache is full and it was used least recently; a reader that has it open keeps it until it closes
it, and one that comes too late asks again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any

import orjson

from hpcft import durable
from hpcft.errors import ExitCode, HpcftError, UnusableError, UsageError
from hpcft.places import Place

BLOCK_BYTES = 4 * 1024 * 1024
DIGEST_BYTES = 32
LEAST_BLOCKS = 64
"""What is in use at one time, by some loader processes, has to have room."""
_OPEN_BLOCKS = 4
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05


MAKE_ROOM = "make room on its disk, or choose another `cache`, or a smaller `cache_size`"
FULL = ".full"
"""Beside the words for those who wait: those that are needed when there is no room for words. A link is enough then."""


class ChangedError(HpcftError):
    """An object is not the one that it was when the data set was opened."""

    exit_code = ExitCode.USER_CODE


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """An object as it was when it was listed."""

    key: str
    size: int
    etag: str

    @property
    def label(self) -> str:
        """Another one for other content."""
        return hashlib.sha256(f"{self.key}\0{self.size}\0{self.etag}".encode()).hexdigest()[:32]

    def blocks(self, start: int, end: int) -> range:
        """Numbers of the blocks that hold these bytes."""
        return range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))


def block_path(directory: Path, url: str, file: RemoteFile, block: int) -> Path:
    """Where it lies. Two data sets may share a directory."""
    place = hashlib.sha256(url.encode()).hexdigest()[:8]
    return directory / "blocks" / f"{place}-{file.label}-{block:06d}"


def unusable(directory: Path, error: OSError) -> str:
    """What is wrong with the cache."""
    return f"the cache {directory} cannot be used: {error.strerror or error}"


def failure(directory: Path, error: Exception, changed: bool = False) -> bytes:
    """The words for whoever waits for a block: with the number of the error, which says who is to blame."""
    number, said = errno.EREMOTEIO, f"{type(error).__name__}: {error}"
    if isinstance(error, HpcftError):
        said = error.message
    elif isinstance(error, OSError):  # the store has no such errors
        number, said = error.errno or errno.EIO, f"{unusable(directory, error)}; {MAKE_ROOM}"
    return orjson.dumps({"message": said, "changed": changed, "errno": number})


def start(verb: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process that may use the network."""
    return subprocess.Popen([sys.executable, "-P", "-m", "hpcft.data.fetcher", verb], **options)


def listed(place: Place, prefix: str) -> list[RemoteFile]:
    """What is below the prefix, in the order of the keys. UnusableError, UsageError: the store or its address."""
    asked = orjson.dumps({"place": place.to_json(), "prefix": prefix})
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hpcft.data.fetcher", "list"], input=asked, stdout=subprocess.PIPE, check=False
    )
    try:
        answer = orjson.loads(done.stdout)
    except ValueError:
        raise UnusableError(f"{place.url} could not be listed: the process that does it ended") from None
    if "failed" in answer:
        kind = UsageError if answer["failed"]["code"] == ExitCode.USAGE else UnusableError
        raise kind(answer["failed"]["message"], answer["failed"]["hint"])
    return [RemoteFile(*each) for each in answer["files"]]


class Blocks:
    """Reads objects through the cache. May be forked; the process that fetches ends with the last who holds it."""

    def __init__(self, place: Place, files: list[RemoteFile], directory: Path, limit: int) -> None:
        """`limit`: bytes of the cache, for all who share the directory.

        UsageError: too few, or the directory cannot be used.
        """
        if limit < LEAST_BLOCKS * BLOCK_BYTES:
            least = LEAST_BLOCKS * BLOCK_BYTES >> 20
            raise UsageError(f"a cache of {limit} bytes is too small to work in", f"give it {least} MiB or more")
        self._url = place.url
        self._files = files
        self._directory = directory
        self._failures = directory / f"failed-{token_hex(6)}"
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in ("blocks", "locks", "index"):
                if not durable.own_directory(directory / name):
                    raise OSError(errno.EPERM, f"its directory {name} belongs to another user, who could change data")
            self._failures.mkdir()
            durable.replace(self._failures / FULL, failure(directory, full))
        except OSError as error:
            rmtree(self._failures, ignore_errors=True)
            raise UsageError(unusable(directory, error), MAKE_ROOM) from error
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = ours
        orders = {
            "place": place.to_json(),
            "directory": str(directory),
            "limit": limit,
            "failures": str(self._failures),
            "files": [[each.key, each.size, each.etag] for each in files],
        }
        with theirs:
            child = start("fetch", stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),))
            assert child.stdin is not None
            with child.stdin as stdin:
                stdin.write(orjson.dumps({**orders, "channel": theirs.fileno()}))
        self._end = weakref.finalize(self, _end, os.getpid(), ours, child, self._failures)
        self._open: OrderedDict[tuple[int, int], _Block] = OrderedDict()

    def close(self) -> None:
        """End the process that fetches; forked copies see to theirs."""
        self._end()

    def read(self, file: int, start: int, end: int) -> bytes:
        """These bytes of the file of this number.

        ChangedError: it has changed. OSError: the store cannot be reached, or the cache not be used.
        """
        parts = []
        for block in self._files[file].blocks(start, end):
            first = block * BLOCK_BYTES
            low, high = max(start, first) - first, min(end, first + BLOCK_BYTES) - first
            parts.append(self._block(file, block).read(low, high - low))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def expect(self, wanted: Iterable[tuple[int, int]]) -> None:
        """These (file, block) will be read soon. Costs no waiting; forgotten where the fetching is behind."""
        missing = [each for each in wanted if not self._path(*each).exists()]
        for begin in range(0, len(missing), 1000):
            try:
                self._ask(missing[begin : begin + 1000], ahead=True)
            except BlockingIOError:
                return

    def _path(self, file: int, block: int) -> Path:
        return block_path(self._directory, self._url, self._files[file], block)

    def _block(self, file: int, block: int) -> _Block:
        found = self._open.get((file, block))
        if found is None:
            found = self._wait(file, block)
            self._open[file, block] = found
            if len(self._open) > _OPEN_BLOCKS:
                self._open.popitem(last=False)
        self._open.move_to_end((file, block))
        return found

    def _wait(self, file: int, block: int) -> _Block:
        path = self._path(file, block)
        length = min(BLOCK_BYTES, self._files[file].size - block * BLOCK_BYTES)
        failure = self._failures / path.name
        pause, asked = _FIRST_PAUSE, 0.0
        while True:
            try:
                return _Block(path, length)
            except FileNotFoundError:
                pass
            if failure.exists():
                self._raise(failure)
            if time.monotonic() >= asked + 1.0:  # again, should it have been evicted before we came
                asked = time.monotonic()
                self._ask([(file, block)], ahead=False)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _ask(self, wanted: list[tuple[int, int]], *, ahead: bool) -> None:
        packet = orjson.dumps({"ahead": ahead, "blocks": wanted})
        try:
            self._channel.send(packet, socket.MSG_DONTWAIT if ahead else 0)
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(errno.EIO, f"the process that fetches from {self._url} has ended") from error

    def _raise(self, failure: Path) -> None:
        try:
            told = orjson.loads(failure.read_bytes())
            failure.unlink()
        except FileNotFoundError:
            return  # another process was told, and we ask again
        if told["changed"]:
            raise ChangedError(told["message"], "data must not change during a run; the order would mean other samples")
        raise OSError(told["errno"], told["message"])


class _Block:
    """An open block whose bytes are those that were fetched. FileNotFoundError: it is not there, or not sound."""

    def __init__(self, path: Path, length: int) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        content = os.pread(self._fd, length + DIGEST_BYTES + 1, 0)
        data = memoryview(content)[:length]
        if len(content) != length + DIGEST_BYTES or durable.digest(data).encode() != content[length:]:
            path.unlink(missing_ok=True)  # a node that crashed, or a disk that forgets
            raise FileNotFoundError(errno.ENOENT, "damaged in the cache", str(path))
        os.utime(self._fd)  # by which it is seen what was used least recently

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._fd, length, start)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _end(owner: int, channel: socket.socket, child: subprocess.Popen[bytes], failures: Path) -> None:
    channel.close()
    if os.getpid() == owner:
        child.kill()  # whatever it is about is fetched again
        child.wait()
        rmtree(failures, ignore_errors=True)
