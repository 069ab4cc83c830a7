"""The way back: from the store to a committed checkpoint in the run directory.

The bytes go to a directory of a temporary name beside the checkpoints, each chunk compared with its digest on the way
and all of it synced; the manifest is written, and the directory gets its name: the protocol by which it was
committed in the first place (docs/checkpoint-format.md). A kill at any moment leaves what nobody is offered, and the
next try sweeps.

A checkpoint that belongs to a run of the same name with another id is *adopted*, if the configuration says so: its
manifest is sealed anew as this run's, and says in `adopted` whose it was. The files are the same.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
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
from hpcft.checkpoint.read import read_manifest
from hpcft.durable import CHUNK_BYTES
from hpcft.errors import DamagedError, HpcftError, NotFoundError, UnusableError
from hpcft.ids import RunId, Step, Term
from hpcft.mirror.plan import Keys, Mirrored, way_back
from hpcft.mirror.upload import AT_ONCE, MirrorDamagedError, offered, read_back
from hpcft.units import human_size

log = logging.getLogger("hpcft.mirror")


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
) -> str | None:
    """Makes the newest copy that is sound a committed checkpoint below `root`, and returns its name.

    `journaled`, where the run has a history: the newest term, and the names of the checkpoints that it may go on from.
    Others of earlier terms are then left alone. `step`: only a checkpoint of this step. None: the mirror has nothing
    of a run of this name.

    Raises:
        RefusedError: there are copies, of another run that is not to be adopted, or damaged, or of no known branch.
        NotFoundError: there is no copy of `step`.
        BucketError: the store failed. UnusableError: no room, or the directory cannot be written.
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
            _download(bucket, keys, which, manifest, root, run, progress)
        except (MirrorDamagedError, NotFoundError) as error:
            log.warning("%s in the mirror is passed over: %s", which.checkpoint, error.message)
            damages.append(f"{which.checkpoint}: {error.message}")
            continue
        return which.checkpoint
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
    # not the nonce of the checkpoint: two that restore it at the same time are not in each other's way
    staging = root / staging_name(which.checkpoint, token_hex(8))
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
        durable.make_directory(staging)
        try:
            fetched(0)
            for entry in manifest.files:
                keyed = [keys.chunk(which, entry.name, index) for index in range(len(entry.digests))]
                written = durable.write_file(staging / entry.name, _chunks(bucket, keyed, entry, fetched))
                if written.digests != entry.digests:  # each was compared before: it is this machine's memory
                    raise MirrorDamagedError(f"{entry.name} was not written as it was read")
            durable.replace(staging / MANIFEST, body.to_bytes())
            _give_name(staging, target, manifest.nonce)
            durable.sync_directory(root)
        finally:
            rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UnusableError(
            f"{which.checkpoint} cannot be restored from the mirror: {error.strerror or error} "
            f"({error.filename or staging})",
            "look at free space, quota and permissions",
        ) from error
    log.info("%s is restored from the mirror (%s)", which.checkpoint, human_size(manifest.size))


def _sweep(root: Path, checkpoint: str) -> None:
    """What killed processes left of it, which may be all the room there is."""
    for path in list(root.iterdir()):
        staging = parse_staging(path.name)
        if staging is not None and staging[0] == checkpoint:
            rmtree(path, ignore_errors=True)


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
