"""The mirror by hand: `hpcft mirror ls`, `push` and `pull`. All of it blocks until it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcft.bucket import Bucket
from hpcft.checkpoint import read
from hpcft.checkpoint.manifest import Manifest
from hpcft.errors import DamagedError, NotFoundError, UsageError
from hpcft.ids import RunId, Step
from hpcft.mirror.plan import Keys, Mirrored, Settings
from hpcft.mirror.restore import Restored, restore
from hpcft.mirror.upload import Throttle, Uploads
from hpcft.places import Place
from hpcft.rundir import RunDirectory
from hpcft.units import human_size

if TYPE_CHECKING:
    from hpcft.config import Config


@dataclass(frozen=True, slots=True)
class Copy:
    """One checkpoint in the store. Of a damaged manifest nothing but the name is known."""

    step: int
    generation: int
    checkpoint: str
    size: int | None
    """Bytes of its files."""
    created: float | None
    """When it was committed, in seconds since the epoch."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return f"{self.checkpoint} is mirrored" + ("" if self.size is None else f" ({human_size(self.size)})")


def settings_of(config: Config, run: RunId, checkpoints: Path) -> Settings:
    """What the mirror's processes need of a configuration."""
    wanted = config.mirror
    return Settings(
        place=Place(wanted.url, wanted.endpoint, wanted.region),
        name=config.run.name,
        run=run,
        root=str(checkpoints),
        every=wanted.every,
        keep=wanted.keep,
        bandwidth=wanted.max_bandwidth,
        read_back=wanted.read_back,
        adopt=wanted.adopt,
    )


def list_copies(run: RunDirectory) -> list[Copy]:
    """The newest first. UsageError: the run has no mirror. BucketError: the store failed."""
    uploads, _ = _uploads(run)
    copies = []
    for which in reversed(uploads.offered()):
        manifest: Manifest | None = None
        try:
            manifest = uploads.manifest(which)
        except NotFoundError:
            continue  # deleted since
        except DamagedError:
            pass
        copies.append(_copy(which, manifest))
    return copies


def listing(copies: list[Copy]) -> str:
    """For people."""
    if not copies:
        return "there are no copies"
    rows = [f"{'STEP':>10}  {'GENERATION':>10}  {'SIZE':>10}  COMMITTED"]
    for each in copies:
        size = "damaged" if each.size is None else human_size(each.size)
        when = "" if each.created is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created))
        rows.append(f"{each.step:>10}  {each.generation:>10}  {size:>10}  {when}")
    return "\n".join(rows)


def push(run: RunDirectory, step: int | None, progress: Callable[[int, int], None]) -> Copy:
    """Mirrors the newest checkpoint, or that of `step`. Nothing is deleted from the store.

    `progress` is told the bytes done, of how many; also by other threads, one after the other.

    NotFoundError: there is no such checkpoint. CheckpointDamagedError: it is not what was committed.
    """
    uploads, settings = _uploads(run)
    there = read.entries(run.checkpoints)
    if step is None and not there:
        raise NotFoundError(f"{run.name} has no checkpoint")
    entry = there[-1] if step is None else read.of_step(run.checkpoints, Step(step))
    told = _Told(progress)
    manifest = uploads.upload(entry.directory, settings.run, told)
    return _copy(Mirrored.of(manifest), manifest)


def pull(run: RunDirectory, step: int | None, progress: Callable[[int, int], None]) -> Restored:
    """Restores the newest copy that is sound, or that of `step`, unless it is there. `progress`: as of `push`.

    NotFoundError: there is none. RefusedError: see `restore.restore`.
    """
    _, settings = _uploads(run)
    told = _Told(progress)
    restored = restore(
        Bucket(settings.place, settings.request_seconds),
        run.checkpoints,
        settings.name,
        settings.run,
        adopt=settings.adopt,
        step=None if step is None else Step(step),
        progress=lambda checkpoint, left: told(left),
    )
    if restored is None:
        raise NotFoundError(f"the mirror has no checkpoint of a run {settings.name}", settings.place.url)
    return restored


def _uploads(run: RunDirectory) -> tuple[Uploads, Settings]:
    from hpcft.config import Config

    try:
        config = Config.from_json(run.config.read_bytes(), str(run.config))
    except FileNotFoundError:
        raise NotFoundError(f"the run {run.name} has not been started yet", "hpcft submit CONFIG") from None
    if not config.mirror.url:
        raise UsageError(f"the run {run.name} has no mirror", "set mirror.url; the next start of the run reads it")
    settings = settings_of(config, run.run_id(), run.checkpoints)
    bucket = Bucket(settings.place, settings.request_seconds)
    keys, throttle = Keys(settings.name, settings.run), Throttle(settings.bandwidth)
    return Uploads(bucket, keys, throttle, read_back=settings.read_back), settings


def _copy(which: Mirrored, manifest: Manifest | None) -> Copy:
    size, created = (None, None) if manifest is None else (manifest.size, manifest.created)
    return Copy(which.step, which.generation, which.checkpoint, size, created)


class _Told:
    """From the bytes that are to go, of which the first are all, to those that are done."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress
        self._total = 0

    def __call__(self, left: int) -> None:
        self._total = max(self._total, left)
        self._progress(self._total - left, self._total)
