"""Durable files: the one protocol by which anything of hpcft reaches a disk for good.

Theory of operation
-------------------
A file is written *aside*, under a unique name in the directory where it belongs, then fsynced and closed (both
checked: NFS reports a full quota only there), and only then given its name; at last the directory is fsynced, for
without that the name itself may be lost with the power. So a reader meets a complete file or none.

- `replace` gives the name by rename(2): the new content takes the place of the old one in one step.
- `create` gives it by link(2), which refuses an existing name: of several processes that create the same file, on
  whatever nodes, exactly one succeeds. What needs an owner (a term, a run's identity) is claimed like that.
- `write_file` and `write_image` are for large files inside a directory that nobody reads yet: they are written under
  their own name, O_EXCL, and become visible with the directory. Their digests are taken from memory on the way, so
  that what the disk returns later is compared with what was meant, not with what was written.

After a failed fsync the kernel has dropped the dirty pages and a second fsync would report success: the file is
given up and removed, never fsynced again. Whatever fails, no file that was written aside stays behind, unless the
process is killed; such leftovers start with a dot and end in ``.aside`` (`is_aside`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import TypeAlias, TypeVar

import xxhash

T = TypeVar("T")

Buffer: TypeAlias = bytes | bytearray | memoryview

CHUNK_BYTES = 16 * 1024 * 1024
"""One digest stands for this many bytes of a file: small enough to say what is damaged."""

_SLICE_BYTES = 4 * 1024 * 1024
"""Written at a time: the digest has just brought these bytes into the cache. write(2) ends near 2 GiB anyway."""

_DIRECT_BYTES = 4096
"""Around the page cache only whole blocks can be written. None is larger than this, on disks that there are."""

_SMALL_BYTES = 64 * 1024
"""Pieces below this are gathered, so that ten thousand small tensors are not ten thousand system calls."""

_ASIDE = ".aside"


@dataclass(frozen=True, slots=True)
class Written:
    """A large file that is on disk: its size, and the xxh3-128 (hex) of every `CHUNK_BYTES` of it."""

    size: int
    digests: tuple[str, ...]
    direct: bool = field(default=False, compare=False)
    """It went around the page cache, but for what is less than a block."""


def replace(path: Path, data: Buffer, mode: int = 0o644) -> None:
    """Gives `path` this content, durably and in one step, whether or not it exists. OSError: it has its old one.

    The one exception: when the last fsync, that of the directory, fails, the new content is visible, but may not
    survive a loss of power.
    """
    aside = _write_aside(path, data, mode)
    try:
        aside.rename(path)
    except BaseException:
        _remove(aside)
        raise
    sync_directory(path.parent)


def create(path: Path, data: Buffer, mode: int = 0o644) -> None:
    """Makes `path` with this content, durably. FileExistsError: somebody else has made it (complete, as always)."""
    aside = _write_aside(path, data, mode)
    try:
        try:
            os.link(aside, path)
        except FileExistsError:
            # An NFS client repeats a request whose answer was lost, and is then told that the name exists, by
            # itself. The link count knows better.
            if aside.stat().st_nlink != 2:
                raise
    finally:
        _remove(aside)
    sync_directory(path.parent)


def make_directory(path: Path, mode: int = 0o755) -> bool:
    """Makes the directory durably; True when it was this call that made it. The parent must exist."""
    try:
        path.mkdir(mode)
    except FileExistsError:
        if path.is_dir():
            return False
        raise
    sync_directory(path.parent)
    return True


def own_directory(path: Path) -> bool:
    """Makes a directory in which nobody else may write; False: it is there, and somebody else's.

    Neither a umask of 002 nor the ACLs and setgid bits of a project directory open it to the group. The parent must
    exist.
    """
    with suppress(FileExistsError):
        path.mkdir(0o755)
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    mine = found.st_uid == os.geteuid()
    if mine and found.st_mode & 0o022:
        path.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
    return mine


def sync_directory(path: Path) -> None:
    """Makes names durable: what was created, renamed or removed in `path` so far."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget_cached(directory: Path) -> None:
    """Let this node drop what it holds of the files of `directory` in memory: what is read then comes from the disk.

    What is not durable yet stays, and so does what a file system does not give up; then there is nothing to be done.
    """
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


Before: TypeAlias = Callable[[int], None]
"""Called ahead of each part of a large file, and of its fsync, with the bytes written so far; may take its time."""


def write_file(
    path: Path, chunks: Iterable[Buffer], mode: int = 0o644, *, before: Before = lambda written: None
) -> Written:
    """Writes a new, large file and makes its bytes durable; its name is with the next `sync_directory`.

    `chunks` may be of any length and are not copied, except small ones. FileExistsError: never written over.
    After any other failure the file is removed, which also gives back the room it took on a full disk.
    """
    return _write_new(path, mode, lambda fd: _write_digested(fd, chunks, before))


def write_image(
    path: Path, image: memoryview, *, direct: bool = False, before: Before = lambda written: None
) -> Written:
    """`write_file` for bytes that lie in memory as one: the digest of a chunk is taken while the one before is written.

    `direct` goes around the page cache (O_DIRECT; `image` has to begin at a page), where the file system lets it. What
    it does not take in this way, it gets in the other one.
    """
    return _write_new(path, 0o644, lambda fd: _write_image(fd, image, direct, before))


def is_aside(name: str) -> bool:
    """Whether a file of this name was left by a process that was killed while it wrote."""
    return name.startswith(".") and name.endswith(_ASIDE)


def digest(data: Buffer) -> str:
    """The xxh3-128 of these bytes, as 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def chunk_count(size: int) -> int:
    """How many digests stand for a file of this size; it must not be negative."""
    if size < 0:
        raise ValueError(f"{size} bytes")
    return -(-size // CHUNK_BYTES)


def chunk_digests(data: memoryview) -> Iterator[str]:
    """The digest of each `CHUNK_BYTES` of these bytes."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield digest(data[start : start + CHUNK_BYTES])


def chunk_digests_of(parts: Iterable[Buffer]) -> tuple[str, ...]:
    """The same of these parts one after another, of which none is copied but small ones."""
    digests: list[str] = []
    hasher, room = xxhash.xxh3_128(), CHUNK_BYTES
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            taken = view[:room]
            hasher.update(taken)
            view, room = view[len(taken) :], room - len(taken)
            if not room:
                digests.append(hasher.hexdigest())
                hasher, room = xxhash.xxh3_128(), CHUNK_BYTES
    if room < CHUNK_BYTES:
        digests.append(hasher.hexdigest())
    return tuple(digests)


def digest_of_chunks(digests: Sequence[str]) -> str:
    """One digest that stands for those of all chunks."""
    return digest("".join(digests).encode())


def digest_of(parts: Iterable[Buffer]) -> str:
    """The digest of these parts one after another."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _write_aside(path: Path, data: Buffer, mode: int) -> Path:
    aside = path.with_name(f".{path.name}.{token_hex(6)}{_ASIDE}")
    _write_new(aside, mode, lambda fd: _write_all(fd, memoryview(data)))
    return aside


def _write_new(path: Path, mode: int, write: Callable[[int], T]) -> T:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        written = write(fd)
        os.fsync(fd)
    except BaseException:
        with suppress(OSError):
            os.close(fd)
        _remove(path)
        raise
    try:
        os.close(fd)
    except OSError:
        _remove(path)
        raise
    return written


def _write_image(fd: int, image: memoryview, direct: bool, before: Before) -> Written:
    direct = passed = direct and _go_direct(fd, True)

    def put(part: memoryview) -> None:
        nonlocal direct, passed
        blocks = len(part) - len(part) % _DIRECT_BYTES if direct else 0
        written = 0
        try:
            while written < blocks:
                written += os.write(fd, part[written:blocks])
        except OSError:
            # Direct writes are refused only now, or after a short one, or this device fails them. What was written
            # counts, and whether the rest can be written at all is said by the cache's way and its fsync.
            passed = False
        if written < len(part):
            direct = direct and _go_direct(fd, False)
            _write_all(fd, part[written:])

    digests = []
    with ThreadPoolExecutor(1, thread_name_prefix="hpcft-digest") as aside:
        for start in range(0, len(image), CHUNK_BYTES):
            before(start)
            part = image[start : start + CHUNK_BYTES]
            digesting = aside.submit(digest, part)
            put(part)
            if not direct:  # begins to write out, and leaves the page cache to those who read
                with suppress(OSError):
                    os.posix_fadvise(fd, start, len(part), os.POSIX_FADV_DONTNEED)
            digests.append(digesting.result())
    before(len(image))
    return Written(len(image), tuple(digests), passed)


def _go_direct(fd: int, direct: bool) -> bool:
    """Switch the page cache off or on again for this file; returns whether it is off now."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError:
        return not direct
    return direct


def _write_digested(fd: int, chunks: Iterable[Buffer], before: Before) -> Written:
    digests: list[str] = []
    hasher = xxhash.xxh3_128()
    room = CHUNK_BYTES
    size = 0

    def put(view: memoryview) -> None:
        nonlocal hasher, room, size
        start = 0
        while start < len(view):
            before(size)
            part = view[start : start + min(_SLICE_BYTES, room)]
            hasher.update(part)
            _write_all(fd, part)
            start += len(part)
            size += len(part)
            room -= len(part)
            if room == 0:
                digests.append(hasher.hexdigest())
                hasher = xxhash.xxh3_128()
                room = CHUNK_BYTES

    gathered = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        if len(view) < _SMALL_BYTES:
            gathered += view
            if len(gathered) < _SLICE_BYTES:
                continue
            view = memoryview(b"")
        if gathered:
            put(memoryview(gathered))
            gathered = bytearray()
        put(view)
    put(memoryview(gathered))
    if room < CHUNK_BYTES:
        digests.append(hasher.hexdigest())
    before(size)
    return Written(size, tuple(digests))


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
