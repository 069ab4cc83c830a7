"""Which checkpoints there are, whether they are what was committed, and setting aside those that are not. No torch.

A directory of a checkpoint's name has been committed, whole; nothing else is offered. What the disk has made of
it since is another question: `verify` answers it for every byte, `load` for the bytes it reads. Which branch of the
run counts is a third one, and the journal answers it. `LATEST` decides nothing.

A file that is missing from a directory that is there, or short, or not what was written, is damage. An error of the
system (an I/O error, a stale handle, a permission) is not: it may be this node's, and says nothing about the
checkpoint, which is why it is raised and nobody sets anything aside.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import orjson

from hpcft import durable
from hpcft.checkpoint.fields import Fields
from hpcft.checkpoint.image import contradiction, header_length
from hpcft.checkpoint.layout import (
    LATEST,
    MANIFEST,
    QUARANTINE,
    SHARD_SUFFIX,
    CheckpointDamagedError,
    CheckpointEntry,
    Damage,
    parse_name,
    parse_staging,
    seal,
    unseal,
)
from hpcft.checkpoint.manifest import FileEntry, Manifest
from hpcft.durable import CHUNK_BYTES
from hpcft.errors import NotFoundError, UnusableError
from hpcft.ids import Generation, RunId, Step

_DAMAGE = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP})
"""Another thing stands where a file should."""

_BUFFERS = 1024
"""preadv(2) takes so many (IOV_MAX)."""


class UnreadableError(UnusableError):
    """This node cannot read a file, which says nothing about the checkpoint. `damages`: what was found beside it."""

    def __init__(self, path: Path, error: OSError, damages: Iterable[Damage] = ()) -> None:
        why = error.strerror or str(error)
        super().__init__(f"{path} cannot be read: {why}", "check the permissions and the file system")
        self.reason = f"{path.name}: {why}"
        self.damages = tuple(damages)


class Tally:
    """Bytes that have been done so far, and of how many, which may be known later: calling it with more tells both."""

    def __init__(self, progress: Callable[[int, int], None], total: int = 0) -> None:
        self.total = total
        self._progress = progress
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(min(self._done, self.total), self.total)


@dataclass(frozen=True, slots=True)
class Latest:
    """The hint: what was committed last, as far as whoever wrote it knew."""

    name: str
    step: Step
    generation: Generation
    nonce: str
    manifest: str
    """Digest of its manifest."""


def entries(root: Path) -> list[CheckpointEntry]:
    """The committed checkpoints in the order of their commits (generation, then step). No file is opened."""
    try:
        names = [path.name for path in root.iterdir()]
    except FileNotFoundError:
        return []
    found = [CheckpointEntry(*parsed, root / name) for name in names if (parsed := parse_name(name)) is not None]
    return sorted(found, key=lambda entry: (entry.generation, entry.step))


def of_step(root: Path, step: Step) -> CheckpointEntry:
    """The newest committed checkpoint of this step.

    Raises:
        NotFoundError: there is none; the hint lists the steps that there are.
    """
    found = entries(root)
    chosen = [each for each in found if each.step == step]
    if not chosen:
        steps = ", ".join(str(each) for each in sorted({each.step for each in found})) or "none"
        raise NotFoundError(
            f"{root.parent.name} has no checkpoint of step {step}", f"there are: {steps}; see `hpcft ckpt ls`"
        )
    return chosen[-1]


def open_file(path: Path) -> int:
    """Opens a file to be read; not waiting for a writer, where a pipe stands in its place."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(fd, True)  # as far as it is a file
    return fd


def _content(path: Path) -> bytes:
    fd = open_file(path)
    try:
        if not S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EISDIR, "it is a directory, or another thing that is no file", str(path))
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def read_latest(root: Path) -> Latest | None:
    """The hint; None when there is none. CheckpointDamagedError: it is not what was written."""
    path = root / LATEST
    try:
        body, _ = unseal("latest", _content(path))
        fields = Fields(body, "latest")
        return Latest(
            name=fields.text("name"),
            step=Step(fields.whole("step")),
            generation=Generation(fields.whole("generation")),
            nonce=fields.text("nonce"),
            manifest=fields.text("manifest"),
        )
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointDamagedError(path, Damage(LATEST, str(error))) from error


def read_manifest(directory: Path, run: RunId | None = None) -> tuple[Manifest, str]:
    """The manifest and its digest, checked against the directory's name and, if given, the run.

    NotFoundError: no such directory. CheckpointDamagedError: the manifest is not that of this checkpoint.
    """
    try:
        data = _content(directory / MANIFEST)
        manifest, digest = Manifest.parse(data)
    except ValueError as error:
        raise CheckpointDamagedError(directory, Damage(MANIFEST, str(error))) from error
    except OSError as error:
        raise CheckpointDamagedError(directory, damage_of(MANIFEST, error, directory)) from error
    staging = parse_staging(directory.name)
    if manifest.name != (staging[0] if staging else directory.name):
        raise CheckpointDamagedError(directory, Damage(MANIFEST, f"it belongs to {manifest.name}"))
    if run is not None and manifest.run != run:
        raise CheckpointDamagedError(directory, Damage(MANIFEST, f"it belongs to run {manifest.run}, not to {run}"))
    return manifest, digest


def damage_of(file: str, error: OSError, directory: Path) -> Damage:
    """What this error says of the checkpoint's file.

    NotFoundError: there is no such checkpoint at all. UnreadableError: nothing, the trouble is elsewhere.
    """
    if error.errno == errno.ENOENT or error.errno in _DAMAGE:
        try:
            there = S_ISDIR(directory.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError as trouble:
            raise UnreadableError(directory, trouble) from error
        if not there:
            raise NotFoundError(f"there is no checkpoint {directory}", "`hpcft ckpt ls` lists them") from error
        missing = error.errno == errno.ENOENT
        return Damage(file, "it is missing" if missing else f"it cannot be read: {error.strerror}")
    raise UnreadableError(directory / file, error) from error


def verify(
    directory: Path, run: RunId | None = None, progress: Callable[[int], None] = lambda nbytes: None
) -> list[Damage]:
    """Reads every byte of a checkpoint and says all that is wrong with it; an empty list: nothing.

    UnreadableError: some of it could not be read, all else was; its `damages` are what is wrong with that.

    The bytes are asked of the storage where the page cache can be told to forget them; only another node can be
    sure of that on a network file system. `progress` is told the bytes read since the last call.
    """
    try:
        manifest, _ = read_manifest(directory, run)
    except CheckpointDamagedError as error:
        return list(error.damages)
    damages = _damages(directory, manifest, progress)
    known = {MANIFEST, *(entry.name for entry in manifest.files)}
    try:
        others = sorted({path.name for path in directory.iterdir()} - known)
    except FileNotFoundError as error:
        return [*damages, damage_of(MANIFEST, error, directory)]
    except OSError as error:
        raise UnreadableError(directory, error, damages) from error
    damages += [Damage(name, "it is no part of the checkpoint") for name in others]
    return damages


def losses(directory: Path, run: RunId | None = None) -> list[Damage]:
    """`verify`, without what is only there in addition: an NFS client leaves files of its own, which cost nothing."""
    try:
        manifest, _ = read_manifest(directory, run)
    except CheckpointDamagedError as error:
        return list(error.damages)
    return _damages(directory, manifest, lambda nbytes: None)


def glance(directory: Path, run: RunId | None = None) -> list[Damage]:
    """What is wrong with a checkpoint as far as manifest and sizes of files tell. It may be damaged all the same.

    NotFoundError: there is none. UnreadableError: it cannot be said here.
    """
    try:
        return compare_sizes(directory, sizes(directory, run))
    except CheckpointDamagedError as error:
        return list(error.damages)


def sizes(directory: Path, run: RunId | None = None) -> dict[str, int]:
    """Of each file of a checkpoint, in bytes, as its manifest has it. Errors as in `read_manifest`."""
    manifest, _ = read_manifest(directory, run)
    try:
        own = (directory / MANIFEST).stat().st_size
    except OSError as error:
        raise CheckpointDamagedError(directory, damage_of(MANIFEST, error, directory)) from error
    return {MANIFEST: own, **{entry.name: entry.size for entry in manifest.files}}


def compare_sizes(directory: Path, sizes: Mapping[str, int]) -> list[Damage]:
    """Which of these files are missing or have another size; nothing is opened. Errors as in `glance`."""
    damages = []
    for name, size in sizes.items():
        try:
            damage = _size_damage(name, size, (directory / name).stat())
        except OSError as error:
            damage = damage_of(name, error, directory)
        damages += [damage] if damage else []
    return damages


def _damages(directory: Path, manifest: Manifest, progress: Callable[[int], None]) -> list[Damage]:
    damages: list[Damage] = []
    unreadable: UnreadableError | None = None
    for entry in manifest.files:
        try:
            damages.extend(_verify_file(directory, entry, progress))  # what was found before an error stays
        except OSError as error:
            try:
                damages.append(damage_of(entry.name, error, directory))
            except UnreadableError as trouble:
                unreadable = unreadable or trouble
    if unreadable is not None:
        unreadable.damages = tuple(damages)
        raise unreadable
    return damages


def quarantine(directory: Path, reason: str) -> Path | None:
    """Sets a checkpoint aside, with the reason beside it; nothing is deleted. None: somebody else already has.

    To take it back: move it from `.quarantine/` to where it was, and start with `--from`: the run counts it no more.
    """
    place = directory.parent / QUARANTINE
    durable.make_directory(place)
    for attempt in range(1000):
        # A checkpoint that was taken back and failed again finds its own name here.
        target = place / (directory.name if attempt == 0 else f"{directory.name}.{attempt}")
        try:
            target.mkdir()
        except FileExistsError:
            continue
        try:
            directory.rename(target)  # onto the empty directory that we have just made ours
        except FileNotFoundError:
            try:
                target.rmdir()
            except OSError:
                pass  # not empty: an NFS client repeated our rename, which had succeeded
            else:
                return None
        durable.sync_directory(place)
        durable.sync_directory(directory.parent)
        durable.replace(place / f"{target.name}.reason.json", seal("reason", {"reason": reason}))
        return target
    raise UnusableError(f"{place} holds {directory.name} a thousand times", "delete what is no longer needed there")


def stat_damage(entry: FileEntry, found: os.stat_result) -> Damage | None:
    """What is wrong with a file that can be seen without reading it."""
    damage = _size_damage(entry.name, entry.size, found)
    if damage is None or not S_ISREG(found.st_mode):
        return damage
    return replace(damage, tensors=tuple(item.piece.name for item in entry.tensors if item.end > found.st_size))


def _size_damage(name: str, size: int, found: os.stat_result) -> Damage | None:
    if not S_ISREG(found.st_mode):
        return Damage(name, "it is a directory, or another thing that is no file")
    return None if found.st_size == size else Damage(name, f"it has {found.st_size} bytes instead of {size}")


def read_chunk(fd: int, buffers: list[memoryview], offset: int) -> int:
    """Fills the buffers, one after another, from `offset` on; returns the bytes read, fewer at the file's end."""
    rest = [buffer for buffer in buffers if len(buffer)]
    done = 0
    first = 0
    while first < len(rest):
        count = os.preadv(fd, rest[first : first + _BUFFERS], offset + done)
        if count == 0:
            break
        done += count
        while first < len(rest) and count >= len(rest[first]):
            count -= len(rest[first])
            first += 1
        if count:
            rest[first] = rest[first][count:]
    return done


def chunk_damage(entry: FileEntry, chunk: int, length: int, buffers: Iterable[memoryview]) -> Damage | None:
    """Whether what was read of a chunk is what was written; `length` bytes of it came."""
    return content_damage(entry, chunk, length, durable.digest_of(buffers))


def content_damage(entry: FileEntry, chunk: int, length: int, digest: str) -> Damage | None:
    """`chunk_damage` for content whose digest has been taken while it was read."""
    expected = min(CHUNK_BYTES, entry.size - chunk * CHUNK_BYTES)
    if length != expected:
        return Damage(entry.name, f"it ends {expected - length} bytes early", chunk, entry.tensors_at(chunk))
    if digest != entry.digests[chunk]:
        return Damage(entry.name, "its content does not match its digest", chunk, entry.tensors_at(chunk))
    return None


def _verify_file(directory: Path, entry: FileEntry, progress: Callable[[int], None]) -> Iterator[Damage]:
    fd = open_file(directory / entry.name)
    try:
        found = os.fstat(fd)
        sound = True
        if damage := stat_damage(entry, found):
            sound = False
            yield damage
            if not S_ISREG(found.st_mode):
                return
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.size)))
        for chunk in range(len(entry.digests)):
            start = chunk * CHUNK_BYTES
            if start >= found.st_size:
                break  # said above
            view = buffer[: min(CHUNK_BYTES, entry.size - start)]
            length = read_chunk(fd, [view], start)
            progress(length)
            if damage := chunk_damage(entry, chunk, length, [view]):
                sound = False
                yield damage
        if sound:
            yield from _contradictions(fd, entry)
    finally:
        os.close(fd)


def _contradictions(fd: int, entry: FileEntry) -> list[Damage]:
    """Intact files can still disagree with the manifest, when whoever wrote them was wrong."""
    if not entry.name.endswith(SHARD_SUFFIX):
        try:
            orjson.loads(os.pread(fd, entry.size, 0))
        except ValueError as error:
            return [Damage(entry.name, f"it is not JSON: {error}")]
        return []
    try:
        header = os.pread(fd, header_length(os.pread(fd, 8, 0)), 0)
    except ValueError as error:
        return [Damage(entry.name, str(error))]
    flaw = contradiction(header, entry.tensors)
    return [Damage(entry.name, flaw)] if flaw else []
