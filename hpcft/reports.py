"""What commands say about checkpoints and sample ledgers: the same facts as text and as JSON.

Each report has `as_dict`, which is printed under `--json` and only ever grows, and `text` for a person.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcft import status
from hpcft.checkpoint import marks, read, readers, values
from hpcft.checkpoint.layout import QUARANTINE, CheckpointDamagedError, CheckpointEntry, Damage
from hpcft.errors import ExitCode, HpcftError, NotFoundError, UnusableError
from hpcft.ids import RunId
from hpcft.rundir import RunDirectory
from hpcft.units import counted, human_duration, human_size

if TYPE_CHECKING:
    from hpcft.data.account import EpochReport, LedgerReport


# --- checkpoints -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """`created` is in seconds since the epoch; what only the manifest knows is None where that cannot be used."""

    name: str
    step: int
    generation: int
    created: float | None
    bytes: int | None
    world_size: int | None
    parent: str | None
    abandoned: bool
    """Of a branch that the run has left: it goes on from here only when told to, with `--from`."""
    marks: tuple[str, ...]
    damage: str | None
    unreadable: str | None
    """Why it cannot be read, which says nothing about it."""


@dataclass(frozen=True, slots=True)
class Listing:
    run: str
    checkpoints: tuple[ListedCheckpoint, ...]
    """In the order of their commits, the newest first."""
    latest: str | None
    """What LATEST names: a hint, nothing depends on it."""
    quarantined: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self.checkpoints:
            yield f"the run {self.run} has no checkpoint yet"
        else:
            yield f"{'STEP':>10}  {'GENERATION':>10}  {'SIZE':>10}  {'AGE':>9}  {'RANKS':>5}  NOTES"
        for each in self.checkpoints:
            size = human_size(each.bytes) if each.bytes is not None else "?"
            age = human_duration(max(0.0, time.time() - each.created)) if each.created is not None else "?"
            ranks = each.world_size if each.world_size is not None else "?"
            notes = [*(["latest"] if each.name == self.latest else []), *each.marks]
            notes += ["of an abandoned branch"] if each.abandoned else []
            notes += [f"DAMAGED: {each.damage}"] if each.damage else []
            notes += [f"cannot be read: {each.unreadable}"] if each.unreadable else []
            row = f"{each.step:>10}  {each.generation:>10}  {size:>10}  {age:>9}  {ranks:>5}  {', '.join(notes)}"
            yield row.rstrip()
        if self.quarantined:
            yield f"quarantined: {', '.join(self.quarantined)}"


def list_checkpoints(run: RunDirectory) -> Listing:
    root = run.checkpoints
    pinned = marks.pinned(root)
    generation, lineage = _lineage(run)
    listed = []
    for entry in reversed(read.entries(root)):
        mine = (marks.PINNED,) if entry.name in pinned else ()
        abandoned = entry.generation < generation and (entry.step, entry.generation) not in lineage
        manifest = damage = unreadable = None
        try:
            manifest, _ = read.read_manifest(entry.directory)
            damage = "; ".join(map(str, read.glance(entry.directory))) or None
        except NotFoundError:
            continue  # retired while we looked
        except CheckpointDamagedError as error:
            damage = "; ".join(map(str, error.damages))
        except UnusableError as error:
            unreadable = _reason(error)
        listed.append(
            ListedCheckpoint(
                entry.name,
                entry.step,
                entry.generation,
                manifest.created if manifest else None,
                manifest.size if manifest else None,
                manifest.world_size if manifest else None,
                manifest.parent if manifest else None,
                abandoned,
                mine,
                damage,
                unreadable,
            )
        )
    return Listing(run.name, tuple(listed), _latest(root), _names(root / QUARANTINE))


def _reason(error: UnusableError) -> str:
    """Why a checkpoint cannot be read: its node cannot, or it is of another format."""
    return error.reason if isinstance(error, read.UnreadableError) else error.message


def _lineage(run: RunDirectory) -> tuple[int, set[tuple[int, int]]]:
    """The generation, and what the leader would go on from; of this generation there may be newer ones already."""
    try:
        found = status.read(run)
    except UnusableError:
        return 0, set()  # the checkpoints can be listed all the same
    if found["state"] == "not started":
        return 0, set()
    return found["generation"], {(each["step"], each["generation"]) for each in found["checkpoints"]}


def _latest(root: Path) -> str | None:
    try:
        latest = read.read_latest(root)
    except (CheckpointDamagedError, OSError):
        return None
    return latest.name if latest is not None else None


def _names(directory: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(path.name for path in directory.iterdir() if path.is_dir()))
    except FileNotFoundError:
        return ()


@dataclass(frozen=True, slots=True)
class VerifiedCheckpoint:
    """Of one checkpoint, all that is wrong with what could be read of it."""

    entry: CheckpointEntry
    damages: tuple[Damage, ...]
    unreadable: str | None = None
    """Why not all of it could be read."""

    @property
    def sound(self) -> bool:
        return not self.damages and self.unreadable is None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.entry.name,
            "step": self.entry.step,
            "generation": self.entry.generation,
            "sound": self.sound,
            "damages": [asdict(damage) for damage in self.damages],
            "unreadable": self.unreadable,
        }

    def lines(self) -> Iterator[str]:
        unreadable = f"cannot be read: {self.unreadable}"
        if not self.damages:
            yield f"{self.entry.name}: {'sound' if self.sound else unreadable}"
            return
        yield f"{self.entry.name}: DAMAGED"
        yield from (f"  {damage}" for damage in self.damages)
        if self.unreadable is not None:
            yield f"  {unreadable}"


@dataclass(frozen=True, slots=True)
class Verification:
    run: str | None
    """Its name; None where a directory was named."""
    checkpoints: tuple[VerifiedCheckpoint, ...]

    @property
    def sound(self) -> bool:
        return all(each.sound for each in self.checkpoints)

    @property
    def exit_code(self) -> ExitCode:
        if any(each.damages for each in self.checkpoints):
            return ExitCode.DAMAGED
        return ExitCode.OK if self.sound else ExitCode.UNUSABLE

    def as_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "sound": self.sound,
            "checkpoints": [each.as_dict() for each in self.checkpoints],
        }

    def text(self) -> str:
        return "\n".join(line for each in self.checkpoints for line in each.lines())


def verify_run(run: RunDirectory, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Reads every byte of all its checkpoints, the newest first; see `verify_checkpoints`."""
    entries = read.entries(run.checkpoints)
    if not entries:
        raise NotFoundError(f"the run {run.name} has no checkpoint yet", "`hpcft status` says how far it is")
    return replace(verify_checkpoints(entries[::-1], run.run_id(), progress), run=run.name)


def verify_checkpoints(
    chosen: Sequence[CheckpointEntry],
    identity: RunId | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Reads every byte of these, which have to be of the run `identity`, if it is given.

    `progress` is told how many bytes have been read, and of how many.

    Raises:
        NotFoundError: none of them is there any more by the time that it would be read.
    """
    checked = []
    gone: NotFoundError | None = None
    count = read.Tally(progress, sum(_size(entry) for entry in chosen))
    for entry in chosen:
        try:
            with readers.reading(entry.directory):
                found = tuple(read.verify(entry.directory, identity, count))
            checked.append(VerifiedCheckpoint(entry, found))
        except NotFoundError as error:
            gone = error  # retired while we looked
        except read.UnreadableError as error:
            checked.append(VerifiedCheckpoint(entry, error.damages, _reason(error)))
        except UnusableError as error:
            checked.append(VerifiedCheckpoint(entry, (), _reason(error)))
    if gone is not None and not checked:
        raise gone
    return Verification(None, tuple(checked))


def _size(entry: CheckpointEntry) -> int:
    """As its manifest has it; 0 where that cannot be used, which whoever verifies it will say."""
    try:
        return read.read_manifest(entry.directory)[0].size
    except (HpcftError, OSError):
        return 0


@dataclass(frozen=True, slots=True)
class Part:
    """What was given to `run.restore` under one name."""

    name: str
    tensors: int
    bytes: int
    others: int
    """Values that are no tensors."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    pieces: int


@dataclass(frozen=True, slots=True)
class Details:
    """One checkpoint, as its manifest and `state.json` tell."""

    name: str
    directory: str
    run: str
    step: int
    generation: int
    term: int
    created: float
    parent: str | None
    marks: tuple[str, ...]
    world_size: int
    mesh: Mapping[str, int]
    versions: Mapping[str, str]
    position: Mapping[str, Any] | None
    files: int
    bytes: int
    parts: tuple[Part, ...]
    tensors: tuple[HeldTensor, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, every_tensor: bool) -> str:
        mesh = ", ".join(f"{name} {length}" for name, length in self.mesh.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        age = human_duration(max(0.0, time.time() - self.created))
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.created))
        rows = [
            ("checkpoint", ", ".join([self.name, *self.marks])),
            ("directory", self.directory),
            ("run", self.run),
            ("step", str(self.step)),
            ("written", f"{created} ({age} ago), generation {self.generation}, term {self.term}"),
            ("after", self.parent or "nothing: the first of its run"),
            ("ranks", f"{self.world_size} ({mesh})"),
            ("size", f"{human_size(self.bytes)} in {counted(self.files, 'file')}"),
            ("versions", versions or "unknown"),
        ]
        if self.position is not None:
            rows.append(("data", ", ".join(f"{key} {value}" for key, value in self.position.items())))
        lines = [f"{name:>10}  {value}" for name, value in rows]
        lines += ["", f"{'PART':<20}  {'TENSORS':>8}  {'SIZE':>10}  {'OTHER VALUES':>12}"]
        lines += [f"{p.name:<20}  {p.tensors:>8}  {human_size(p.bytes):>10}  {p.others:>12}" for p in self.parts]
        if every_tensor:
            lines += ["", *(f"{t.name}  {t.dtype} {list(t.shape)}  {human_size(t.bytes)}" for t in self.tensors)]
        return "\n".join(lines)


def describe(directory: Path, run: RunId | None = None) -> Details:
    """What is in a checkpoint. Only manifest and `state.json` are read.

    Raises:
        CheckpointDamagedError: one of the two is damaged. NotFoundError: no such checkpoint.
    """
    from hpcft.checkpoint import chunks  # with numpy, for which a listing need not wait

    with chunks.opened(directory, run) as opened:
        manifest = opened.manifest
        pieces = Counter(item.piece.name for entry in manifest.files for item in entry.tensors)
        parts = []
        for name, value in values.parts(opened.state()).items():
            held = [opened.tensors[each] for each in values.tensor_names(value)]
            parts.append(Part(name, len(held), sum(each.nbytes for each in held), values.count_others(value)))
    return Details(
        name=manifest.name,
        directory=str(directory.resolve()),
        run=manifest.run,
        step=manifest.step,
        generation=manifest.generation,
        term=manifest.term,
        created=manifest.created,
        parent=manifest.parent,
        marks=(marks.PINNED,) if manifest.name in marks.pinned(directory.parent) else (),
        world_size=manifest.world_size,
        mesh=manifest.mesh,
        versions=manifest.versions,
        position=manifest.position,
        files=len(manifest.files),
        bytes=manifest.size,
        parts=tuple(parts),
        tensors=tuple(
            HeldTensor(name, each.dtype, each.shape, each.nbytes, pieces[name]) for name, each in opened.tensors.items()
        ),
    )


# --- the ledger ------------------------------------------------------------------------------------------------


def ledger_as_dict(report: LedgerReport) -> dict[str, Any]:
    facts: Mapping[str, Any] = asdict(report)
    return {"exact": report.exact, **facts}


def ledger_text(report: LedgerReport) -> str:
    lines = [f"{report.samples} samples, seed {report.seed}, recorded up to step {report.last_step}", ""]
    lines.append(f"{'EPOCH':>9}  {'ONCE':>10}  {'MORE THAN ONCE':>14}  {'NEVER':>10}  {'STILL TO COME':>13}")
    lines += list(_epoch_rows(report.epochs))
    lines += [line for each in report.epochs for line in _examples(each)]
    if report.superseded:
        undone = "was undone by a rollback and does" if report.superseded == 1 else "were undone by a rollback and do"
        lines.append(f"{counted(report.superseded, 'step')} {undone} not count")
    if report.open_step is not None:
        lines.append(f"step {report.open_step} is being recorded")
    lines += [f"PROBLEM: {problem}" for problem in report.problems]
    lines.append("each sample that was reached has been used exactly once" if report.exact else "NOT EXACT")
    return "\n".join(lines)


def _epoch_rows(epochs: Sequence[EpochReport]) -> Iterator[str]:
    """One for each epoch; one for all in a row that are alike."""
    for _, alike in groupby(epochs, lambda each: replace(each, epoch=0)):
        first, *others = alike
        numbers = f"{first.epoch}-{others[-1].epoch}" if others else f"{first.epoch}"
        row = f"{numbers:>9}  {first.once:>10}  {first.more_than_once:>14}  {first.never:>10}  {first.pending:>13}"
        yield row + ("  each" if others else "")


def _examples(epoch: EpochReport) -> Iterator[str]:
    for what, ids in (("used more than once", epoch.repeated_ids), ("never used", epoch.missing_ids)):
        if ids:
            yield f"epoch {epoch.epoch}: {what}: {', '.join(map(str, ids))} …"
