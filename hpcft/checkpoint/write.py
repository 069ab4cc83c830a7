"""What a rank owes to a checkpoint, made durable: its share of the tensors as one safetensors file, and of rank 0 also
everything that is no tensor. No torch: this runs in a process that is left behind when the file system hangs.

Where the image's bytes come from is the caller's: shared memory (`agent side`, see `carrier`), or the tensors
themselves (`share.save_share`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft import durable
from hpcft.checkpoint.fields import Fields
from hpcft.checkpoint.image import Placed
from hpcft.checkpoint.layout import STATE, seal, shard_name, sidecar_name, staging_name, unseal
from hpcft.checkpoint.manifest import FileEntry, Metric, ShardReport, Sidecar, parse_placed, placed_to_json
from hpcft.errors import UnusableError
from hpcft.ids import Rank

_MEND = "training goes on with the older checkpoints; look at free space, quota and permissions"


class SaveError(UnusableError):
    """A rank's files could not be made durable. The older checkpoints are untouched, training can go on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which bytes a rank owes, the same in every save as long as the state keeps its tensors and shapes."""

    rank: Rank
    world_size: int
    index: str
    """`index_digest` of the whole state."""
    placed: tuple[Placed, ...]
    """The pieces, and where they are in the image."""
    size: int
    """Of the image."""

    def to_bytes(self) -> bytes:
        body = {
            "rank": self.rank,
            "world_size": self.world_size,
            "index": self.index,
            "size": self.size,
            "placed": [placed_to_json(each) for each in self.placed],
        }
        return seal("plan", body)

    @classmethod
    def parse(cls, data: bytes) -> Plan:
        """ValueError: not a plan, or not as it was written."""
        body, _ = unseal("plan", data)
        fields = Fields(body, "plan")
        return cls(
            rank=Rank(fields.whole("rank")),
            world_size=fields.whole("world_size", 1),
            index=fields.text("index"),
            placed=fields.each("placed", parse_placed),
            size=fields.whole("size", 1),
        )


@dataclass(frozen=True, slots=True)
class Words:
    """What a rank says beside its tensors. All but rank 0 say nothing."""

    values: bytes | None = None
    """Content of `state.json`."""
    position: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    metrics: Mapping[str, Metric] | None = None


TOLD_SECONDS = 0.2
"""Between two words of how far a writing is."""


def paced(bandwidth: float | None, told: Callable[[int], None]) -> durable.Before:
    """Keeps a writing, which begins with the first call, to so many bytes per second; None: as many as there are.

    `told` hears now and then how many bytes are written, also while it waits.
    """
    began: float | None = None
    heard = time.monotonic()

    def before(written: int) -> None:
        nonlocal began, heard
        began = time.monotonic() if began is None else began
        due = began if bandwidth is None else began + written / bandwidth
        while True:
            now = time.monotonic()
            if now >= heard + TOLD_SECONDS:
                heard = now
                told(written)
            if now >= due:
                return
            time.sleep(min(due - now, TOLD_SECONDS))

    return before


Store = Callable[[Path], durable.Written]
"""Writes the image to a new file of this name."""


def write_share(root: Path, name: str, nonce: str, plan: Plan, words: Words, store: Store) -> ShardReport:
    """Makes the share durable, as part of the checkpoint `name` that is not committed yet.

    SaveError: nothing of it counts; the next save has another name.
    """
    rank, world_size = plan.rank, plan.world_size
    staging = root / staging_name(name, nonce)
    try:
        if short := _shortage(root, plan.size + len(words.values or b"")):
            raise SaveError(f"rank {rank} did not begin to write its part of {name}: {short}", _MEND)
        durable.make_directory(staging)
        shard = shard_name(rank, world_size)
        written = store(staging / shard)
        files = [FileEntry(shard, written.size, written.digests, plan.placed)]
        if words.values is not None:
            written = durable.write_file(staging / STATE, [words.values])
            files.insert(0, FileEntry(STATE, written.size, written.digests))
        sidecar = Sidecar(tuple(files), words.position, words.versions or {}, words.metrics or {}).to_bytes()
        durable.write_file(staging / sidecar_name(rank, world_size), [sidecar])
    except OSError as error:
        why = f"{error.strerror or error} ({error.filename or staging})"
        raise SaveError(f"rank {rank} could not write its part of {name}: {why}", _MEND) from error
    return ShardReport(
        name=name,
        nonce=nonce,
        rank=rank,
        world_size=world_size,
        index=plan.index,
        sidecar=durable.digest(sidecar),
        size=sum(entry.size for entry in files),
    )


def _shortage(root: Path, needed: int) -> str:
    """Why so many bytes would not fit; empty where they would. Quotas show here on some file systems only."""
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if needed > free:
        return f"it has {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free ({root})"
    if found.f_files and not found.f_favail:
        return f"no more files can be created, there are no free inodes ({root})"
    return ""
