"""The commit: from files that ranks wrote to a checkpoint that readers are offered. Runs in the leader.

The steps, each durable before the next begins (docs/checkpoint-format.md gives the reasons):

1. every rank has reported, under the same name, nonce and index; each sidecar is the one reported;
2. the files have the sizes they should, and their pieces cover every tensor exactly once;
3. `manifest.json` is written, in the temporary directory;
4. the sidecars are removed: what is committed holds nothing but what the manifest names;
5. the directory gets its name: **from here on the checkpoint exists**;
6. `LATEST` is rewritten. It is a hint; when that fails, the checkpoint exists all the same.

Any step may be the last one (a crash, a full disk): before 5 there is only a directory that nobody is offered and
that is swept later; a second `commit` with the same reports picks up where the first one ended. Nothing is ever
replaced: the name carries the generation, and a checkpoint that is found there is either this very one (the nonce
is in its manifest) or an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft import durable
from hpcft.checkpoint.layout import LATEST, MANIFEST, parse_name, seal, sidecar_name, staging_name, unseal
from hpcft.checkpoint.manifest import Manifest, Metric, ShardReport, Sidecar
from hpcft.checkpoint.read import read_latest, read_manifest
from hpcft.errors import DamagedError, HpcftError, NotFoundError, UnusableError
from hpcft.ids import RunId, Term


class CommitError(UnusableError):
    """The checkpoint was not committed; older ones are untouched."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the leader knows about a checkpoint and the ranks do not."""

    run: RunId
    term: Term
    parent: str | None
    """Name of the checkpoint before it in this branch of the run."""
    created: float
    """Seconds since the epoch."""
    mesh: Mapping[str, int] | None = None
    """None: all ranks are replicas of one another."""


@dataclass(frozen=True, slots=True)
class Committed:
    name: str
    directory: Path
    size: int
    """Bytes, the manifest not counted."""
    digest: str
    """Of the manifest."""
    metrics: Mapping[str, Metric]
    latest_failure: str = ""
    """Why `LATEST` could not be rewritten, which costs nothing but the hint."""


def commit(root: Path, reports: Sequence[ShardReport], facts: Facts) -> Committed:
    """Makes the ranks' files a checkpoint. CommitError says what was missing or which step failed."""
    name, nonce = _agreed(reports)
    staging, target = root / staging_name(name, nonce), root / name
    step = "reading what the ranks wrote"
    joined, written = None, b""
    try:
        if not _is_ours(target, nonce):
            if not _is_ours(staging, nonce):
                joined = _join(staging, reports, facts)
                step, written = "writing the manifest", joined.to_bytes()
                durable.replace(staging / MANIFEST, written)
            step = "removing the sidecars"
            _remove_others(staging, joined or read_manifest(staging)[0])
            step = "giving the directory its name"
            _rename(staging, target, nonce)
        durable.sync_directory(root)
        step = "reading it back"
        if joined is not None and (target / MANIFEST).read_bytes() == written:
            manifest, digest = joined, unseal("manifest", written)[1]  # of many tensors, parsing it would take long
        else:
            manifest, digest = read_manifest(target, facts.run)
    except CommitError:
        raise
    except HpcftError as error:  # damaged; or gone, swept by the leader of a later generation
        raise CommitError(f"{name} could not be committed, {step}: {error.message}") from error
    except OSError as error:
        raise CommitError(
            f"{name} could not be committed, {step}: {error.strerror or error} ({error.filename or root})",
            "the older checkpoints are untouched; look at free space, quota and permissions",
        ) from error
    return Committed(name, target, manifest.size, digest, manifest.metrics, _point_latest(root, manifest, digest))


def _agreed(reports: Sequence[ShardReport]) -> tuple[str, str]:
    if not reports:
        raise CommitError("no rank has reported anything to commit")
    first = min(reports, key=lambda report: report.rank)
    refused = f"{first.name} cannot be committed: rank"
    for report in reports:
        if report.index != first.index:
            raise CommitError(
                f"{refused} {report.rank} holds another set of tensors than rank {first.rank}",
                "every rank must give the same state to a checkpoint",
            )
        for what in ("name", "nonce", "world_size"):
            mine, other = getattr(first, what), getattr(report, what)
            if mine != other:
                raise CommitError(f"{refused} {report.rank} reports {what} {other!r}, rank {first.rank} {mine!r}")
    missing = sorted(set(range(first.world_size)).difference(report.rank for report in reports))
    if missing or len(reports) != first.world_size:
        what = f"ranks {missing} have not reported" if missing else "a rank has reported twice"
        raise CommitError(f"{first.name} cannot be committed: {what}")
    return first.name, first.nonce


def _is_ours(directory: Path, nonce: str) -> bool:
    """Whether an earlier try of this very commit got so far. CommitError: the name belongs to another one."""
    try:
        manifest, _ = read_manifest(directory)
    except NotFoundError:
        return False
    except DamagedError as error:
        if directory.name.startswith(".") or not directory.exists():
            return False
        raise CommitError(f"{directory.name} exists already, and is damaged", "quarantine it") from error
    if manifest.nonce != nonce:
        raise CommitError(
            f"{directory.name} exists already, committed under nonce {manifest.nonce}, not {nonce}",
            "two generations of the same number: is another job using this run directory?",
        )
    return True


def _join(staging: Path, reports: Sequence[ShardReport], facts: Facts) -> Manifest:
    sidecars = []
    for report in sorted(reports, key=lambda report: report.rank):
        file = sidecar_name(report.rank, report.world_size)
        data = (staging / file).read_bytes()
        if durable.digest(data) != report.sidecar:
            raise CommitError(f"{report.name} cannot be committed: {file} is not what rank {report.rank} reported")
        try:
            sidecars.append(Sidecar.parse(data))
        except ValueError as error:
            raise CommitError(f"{report.name} cannot be committed: {file}: {error}") from error
    first = reports[0]
    name = parse_name(first.name)
    if name is None:
        raise CommitError(f"{first.name!r} is no name of a checkpoint")
    step, generation = name
    manifest = Manifest(
        run=facts.run,
        term=facts.term,
        generation=generation,
        step=step,
        nonce=first.nonce,
        world_size=first.world_size,
        mesh=facts.mesh or {"replica": first.world_size},
        index=first.index,
        parent=facts.parent,
        created=facts.created,
        position=sidecars[0].position,
        versions=sidecars[0].versions,
        files=tuple(entry for sidecar in sidecars for entry in sidecar.files),
        metrics=sidecars[0].metrics,
    )
    if flaw := manifest.flaw():
        raise CommitError(f"{first.name} cannot be committed: {flaw}")
    for entry in manifest.files:
        if (found := (staging / entry.name).stat().st_size) != entry.size:
            raise CommitError(
                f"{first.name} cannot be committed: {entry.name} has {found} bytes, {entry.size} were written"
            )
    return manifest


def _remove_others(staging: Path, manifest: Manifest) -> None:
    """Whatever the manifest does not name: the sidecars, and what a killed try may have left."""
    kept = {MANIFEST, *(entry.name for entry in manifest.files)}
    for path in list(staging.iterdir()):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    durable.sync_directory(staging)


def _rename(staging: Path, target: Path, nonce: str) -> None:
    try:
        staging.rename(target)
    except OSError:
        # An NFS client repeats a rename whose answer was lost and is told ENOENT; or a second leader was faster.
        if not _is_ours(target, nonce):
            raise


def _point_latest(root: Path, manifest: Manifest, digest: str) -> str:
    try:
        known = read_latest(root)
        if known is not None and (known.generation, known.step) > (manifest.generation, manifest.step):
            return ""  # a leader that has slept does not turn the hint back
    except (DamagedError, OSError):
        pass  # about to be rewritten
    body = {
        "name": manifest.name,
        "generation": manifest.generation,
        "step": manifest.step,
        "nonce": manifest.nonce,
        "manifest": digest,
    }
    try:
        durable.replace(root / LATEST, seal("latest", body))
    except OSError as error:
        return f"LATEST could not be rewritten: {error.strerror or error}"
    return ""
