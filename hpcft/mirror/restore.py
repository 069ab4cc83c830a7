"""The way back: from the store to a committed checkpoint in the run directory.

The bytes go to a directory of a temporary name beside the checkpoints, each chunk compared with its digest on the way
and all of it synced; the manifest is written, and the directory gets its name: the protocol by which it was
committed in the first place (docs/checkpoint-format.md). A kill at any moment leaves what nobody is offered, and the
next try sweeps. Two may restore the same checkpoint at the same time: each has a directory of its own, with a lock on
it (`readers`), so that neither the other one nor the leader takes it for something left over. Where locks do not reach
from node to node, what is swept is renamed before its files go, and the one that was restoring it fails.

A checkpoint that belongs to a run of the same name with another id is *adopted*, if the configuration says so: its
manifest is sealed anew as this run's, and says in `adopted` whose it was. The files are the same.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from secrets import token_hex
from shutil import rmtree

from hpcft import durable
from hpcft.bucket import Bucket, begun
from hpcft.checkpoint.layout import MANIFEST, parse_staging, staging_name
from hpcft.checkpoint.manifest import FileEntry, Manifest
from hpcft.checkpoint.read import losses, quarantine, read_manifest, stat_damage
from hpcft.checkpoint.readers import excluded, reading
from hpcft.durable import CHUNK_BYTES
from hpcft.errors import DamagedError, HpcftError, NotFoundError, UnusableError
from hpcft.ids import RunId, Step, Term
from hpcft.mirror.plan import Keys, Mirrored, way_back
from hpcft.mirror.upload import AT_ONCE, MirrorDamagedError, offered, read_back
from hpcft.units import human_size

log = logging.getLogger("hpcft.mirror")


@dataclass(frozen=True, slots=True)
class Restored:
    checkpoint: str
    fetched: bool
    """False: it was there already, and every byte of it is what was committed."""


class RefusedError(DamagedError):
    """There are checkpoints in the mirror, and none of them may or can be used: starting anew would be a mistake."""


def restore(
    bucket: Bucket,
    root: Path,
    name: str,
    run: RunId,
    *,
    adopt: bool,
    journaled: tuple[Term, Collection[str]] | None = None,
    step: Step | None = None,
    progress: Callable[[str, int], None] = lambda checkpoint, left: None,
) -> Restored | None:
    """Makes the newest copy that is sound a committed checkpoint below `root`.

    If that is there already, nothing is fetched; if what is there is damaged, it is set aside for the copy.

    `journaled`, where the run has a history: the newest term, and the names of the checkpoints that it may go on from.
    Others of earlier terms are then left alone. `step`: only a checkpoint of this step. None: the mirror has nothing
    of a run of this name.

    Raises:
        RefusedError: there are copies, of another run that is not to be adopted, or damaged, or of no known branch.
        NotFoundError: there is no copy of `step`.
        BucketError: the store failed. UnusableError: no room, or the directory cannot be read or written.
    """
    keys, copies = _copies(bucket, name, run, adopt)
    if keys is None:
        return None
    if step is not None:
        steps = ", ".join(str(each) for each in sorted({each.step for each in copies}))
        copies = [each for each in copies if each.step == step]
        if not copies:
            raise NotFoundError(f"the mirror has no checkpoint of step {step}", f"there are: {steps or 'none'}")
    damages: list[str] = []
    unknown: list[Mirrored] = []
    for which in way_back(copies):
        try:
            manifest = read_back(bucket, keys, which)
            if journaled is not None and which.checkpoint not in journaled[1] and manifest.term < journaled[0]:
                unknown.append(which)
                continue
            if fetched := not _is_sound(root / which.checkpoint, run):
                _download(bucket, keys, which, manifest, root, run, progress)
        except (MirrorDamagedError, NotFoundError) as error:
            log.warning("%s in the mirror is passed over: %s", which.checkpoint, error.message)
            damages.append(f"{which.checkpoint}: {error.message}")
            continue
        return Restored(which.checkpoint, fetched)
    if unknown:
        steps = ", ".join(str(each.step) for each in unknown)
        raise RefusedError(
            f"the mirror has checkpoints of step {steps}, but the journal does not say that the run may go on from them"
            + "".join(f"; {each}" for each in damages),
            "hpcft mirror pull RUN --step STEP, and start with --from STEP",
        )
    raise RefusedError(
        f"the checkpoints are gone, and no copy in the mirror is sound: {'; '.join(damages)}",
        "start under another run.name, or another mirror.url, to begin anew",
    )


def _copies(bucket: Bucket, name: str, run: RunId, adopt: bool) -> tuple[Keys | None, list[Mirrored]]:
    """Of this run if there are any; else of the run of this name that was mirrored last."""
    own = Keys(name, run)
    if copies := offered(bucket, own):
        return own, copies
    others: list[tuple[datetime, str]] = []
    for other in bucket.names(f"{name}/"):
        written = [each.modified for each in bucket.objects(Keys(name, other).manifests)]
        if written:
            others.append((max(written), other))
    if not others:
        return None, []
    _, newest = max(others)
    keys = Keys(name, newest)
    copies = offered(bucket, keys)
    if not copies:
        return None, []
    if not adopt:
        raise RefusedError(
            f"this run directory is new, and {bucket.url} has checkpoints up to step {copies[-1].step} of a run {name} "
            f"with another id ({newest})",
            "set mirror.adopt = true to go on from there; change run.name or mirror.url to begin anew",
        )
    return keys, copies


def _is_sound(target: Path, run: RunId) -> bool:
    """Whether the checkpoint is there; afterwards it is, or nothing is in the way of restoring it."""
    if not target.exists():
        return False
    try:
        damages = losses(target, run)
    except NotFoundError:  # retired since
        return False
    if not damages:
        return True
    said = "; ".join(map(str, damages))
    if aside := quarantine(target, f"a copy in the mirror takes its place: {said}"):
        log.warning("%s was damaged (%s) and is set aside in %s", target.name, said, aside)
    return False


def _download(
    bucket: Bucket,
    keys: Keys,
    which: Mirrored,
    manifest: Manifest,
    root: Path,
    run: RunId,
    progress: Callable[[str, int], None],
) -> None:
    target = root / which.checkpoint
    adopted = manifest.run != run
    body = replace(manifest, run=run, adopted=manifest.run) if adopted else manifest
    left = manifest.size

    def fetched(size: int) -> None:
        nonlocal left
        left -= size
        progress(which.checkpoint, left)

    try:
        _sweep(root, which.checkpoint)
        _check_room(root, manifest.size)
        with _staging(root, which.checkpoint) as staging:
            fetched(0)
            for entry in manifest.files:
                keyed = [keys.chunk(which, entry.name, index) for index in range(len(entry.digests))]
                written = durable.write_file(staging / entry.name, _chunks(bucket, keyed, entry, fetched))
                if written.digests != entry.digests:  # each was compared before: it is this machine's memory
                    raise MirrorDamagedError(f"{entry.name} was not written as it was read")
            durable.replace(staging / MANIFEST, body.to_bytes())
            for entry in manifest.files:
                if damage := stat_damage(entry, (staging / entry.name).stat()):
                    raise UnusableError(f"{staging} was changed while it was written: {damage}", "try again")
            _give_name(staging, target, manifest.nonce)
            durable.sync_directory(root)
    except OSError as error:
        raise UnusableError(
            f"{which.checkpoint} cannot be restored from the mirror: {error.strerror or error} "
            f"({error.filename or root})",
            "look at free space, quota and permissions, and whether somebody else restores it at the same time",
        ) from error
    log.info("%s is restored from the mirror (%s)", which.checkpoint, human_size(manifest.size))


@contextmanager
def _staging(root: Path, checkpoint: str) -> Iterator[Path]:
    """A directory to restore it in. Nobody sweeps it as long as the block runs; what is left of it then goes."""
    while True:
        # not the nonce of the checkpoint: two that restore it at the same time are not in each other's way
        staging = root / staging_name(checkpoint, token_hex(8))
        durable.make_directory(staging)
        with ExitStack() as stack:
            with suppress(NotFoundError):  # it was being swept, before we had the lock
                stack.enter_context(reading(staging))
            if not staging.exists():
                continue
            try:
                yield staging
            finally:
                rmtree(staging, ignore_errors=True)
            return


def _sweep(root: Path, checkpoint: str) -> None:
    """What killed processes left of it, which may be all the room there is."""
    for path in list(root.iterdir()):
        staging = parse_staging(path.name)
        if staging is None or staging[0] != checkpoint:
            continue
        with excluded(path) as alone:
            if alone:
                # First out of the way of whoever may be at work there, unseen by us: no half of it gets a name.
                doomed = path.with_name(staging_name(checkpoint, token_hex(8)))
                with suppress(FileNotFoundError):
                    path.rename(doomed)
                    rmtree(doomed, ignore_errors=True)


def _check_room(root: Path, needed: int) -> None:
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if needed > free:
        raise UnusableError(
            f"the checkpoint in the mirror has {human_size(needed)}, and {human_size(free)} are free ({root})",
            "make room for it",
        )


def _give_name(staging: Path, target: Path, nonce: str) -> None:
    try:
        staging.rename(target)
    except OSError:
        # somebody else has restored it, or our own request was repeated by an NFS client
        with suppress(HpcftError):
            if read_manifest(target)[0].nonce == nonce:
                return
        raise


def _chunks(
    bucket: Bucket, keys: Sequence[str], entry: FileEntry, fetched: Callable[[int], None]
) -> Iterator[memoryview]:
    """The chunks of a file in order, some of them fetched ahead."""
    ahead: deque[Future[memoryview]] = deque()
    todo = iter(enumerate(keys))
    while True:
        for index, key in islice(todo, AT_ONCE - len(ahead)):
            ahead.append(begun(partial(_chunk, bucket, key, entry, index)))
        if not ahead:
            return
        data = ahead.popleft().result()
        yield data
        fetched(len(data))


def _chunk(bucket: Bucket, key: str, entry: FileEntry, index: int) -> memoryview:
    data, _ = bucket.get(key)
    expected = min(CHUNK_BYTES, entry.size - index * CHUNK_BYTES)
    if len(data) != expected or durable.digest(data) != entry.digests[index]:
        raise MirrorDamagedError(f"{entry.name}, chunk {index}, is not what was mirrored")
    return data
