"""Retention by hand: which checkpoints of a run an operator may delete, and deleting them. No torch.

The rules are those of the leader's own retention (`checkpoint.retention`), over the same lineage; what stays in
addition has a reason that is shown: it is pinned, the run would go on from it, its present generation was restored
from it, another command reads it. What manifest and sizes of files show to be damaged counts as none of those that
are kept. The leader may be at work meanwhile. It only ever adds checkpoints of its own
generation, which are none of ours, and turns to older ones when it finds the newest damaged; so the plan is made once
more right before anything goes, and only what both plans name is retired.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import orjson

from hpcft import durable, journal, lineage, terms
from hpcft.checkpoint import read, retention
from hpcft.checkpoint.layout import QUARANTINE, TRASH, CheckpointDamagedError, CheckpointEntry, checkpoint_name
from hpcft.checkpoint.marks import pinned, verified
from hpcft.checkpoint.readers import excluded
from hpcft.errors import DamagedError, NotFoundError, UnusableError
from hpcft.events import CheckpointRef
from hpcft.ids import Generation, RunId
from hpcft.rundir import RunDirectory, is_live
from hpcft.units import counted, human_size

_BINNED = f"{TRASH}/"
_SET_ASIDE = f"{QUARANTINE}/"


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator has asked for."""

    keep: int | None
    """The newest ones of the lineage; None: no checkpoint is retired."""
    keep_every: int | None
    """And those of every so many steps."""
    trash: bool
    """Also what failed saves have left."""
    quarantined: bool = False
    """Also what was set aside because it was damaged."""


@dataclass(frozen=True, slots=True)
class Plan:
    run: str
    live: bool
    """Its leader is at work."""
    retired: tuple[CheckpointEntry, ...]
    """Oldest first."""
    protected: Mapping[str, str]
    """Names of those that the rules alone would retire, and why they stay."""
    damaged: Mapping[str, str]
    """Names of those of the run's branch that stay and are none of those that are kept, and what is wrong with them."""
    leftovers: tuple[str, ...]
    """Unfinished checkpoints that nobody will finish, what is in the trash, and damaged ones that were set aside."""
    bytes: int

    @property
    def empty(self) -> bool:
        return not self.retired and not self.leftovers

    def as_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "live": self.live,
            "retired": [each.name for each in self.retired],
            "protected": dict(self.protected),
            "damaged": dict(self.damaged),
            "leftovers": list(self.leftovers),
            "bytes": self.bytes,
        }

    def text(self) -> str:
        lines = [f"{each.name}: to be deleted" for each in self.retired]
        lines += [f"{name}: stays, {why}" for name, why in self.protected.items()]
        lines += [f"{name}: damaged, does not count: {what}" for name, what in self.damaged.items()]
        lines += [f"{name}: left over, to be deleted" for name in self.leftovers]
        return "\n".join([*lines, self.summary() if not self.empty else "there is nothing to delete"])

    def text_of_done(self) -> str:
        """What to say when it has been carried out."""
        if self.empty:
            return "nothing was deleted: all of it is needed now"
        names = [*(each.name for each in self.retired), *self.leftovers]
        return "\n".join([*(f"{name}: deleted" for name in names), f"deleted: {self.summary()}"])

    def summary(self) -> str:
        parts = [counted(len(self.retired), "checkpoint")] if self.retired else []
        parts += [counted(len(self.leftovers), "leftover")] if self.leftovers else []
        return f"{' and '.join(parts)}, {human_size(self.bytes)}"


def plan(run: RunDirectory, rules: Rules) -> Plan:
    """What would be deleted now.

    Raises:
        DamagedError: the journal does not say which checkpoints count, or none of them is sound.
        UnusableError: one cannot be read here, so that nobody knows.
    """
    root = run.checkpoints
    live = is_live(run)
    over = not live and _is_over(run)
    before = journal.replay(run.journal).world
    on_disk = read.entries(root)
    nothing_known = not before.checkpoints and before.generation == Generation(0)
    counting = lineage.on_disk(before, on_disk, run.run_id()) if on_disk and not nothing_known else []
    if on_disk and not counting:
        raise DamagedError(
            f"{root} has {counted(len(on_disk), 'checkpoint')}, but the journal of {run.name} knows none of them",
            "which of them count is not known, so none is deleted; `hpcft ckpt ls` lists them",
        )
    protected: dict[str, str] = dict.fromkeys(pinned(root), "it is pinned")
    if not over and before.formation is not None and before.formation.restore is not None:
        protected[_name(before.formation.restore)] = "the present generation was restored from it"
    names = {_name(each) for each in counting}
    mine = [each for each in on_disk if each.name in names]
    damaged = _damaged(mine, run.run_id()) if on_disk else {}
    sound = [each for each in counting if _name(each) not in damaged]
    if counting and not sound:
        raise DamagedError(
            f"of the {counted(len(counting), 'checkpoint')} that {run.name} could go on from, none is sound",
            "so nothing is deleted; `hpcft ckpt verify` says what is wrong with them",
        )
    good = [each for each in mine if each.name not in damaged]
    protected |= dict.fromkeys(retention.newest(good, verified(root)), "it is the newest that was read back")
    protected |= dict.fromkeys(_best(run, good), "it is one of checkpoint.keep_best")
    if sound:
        protected[_name(sound[-1])] = "the run would go on from it"
    retired = _retired(on_disk, counting, before.generation, rules, frozenset(), damaged.keys())
    for entry in on_disk:
        if entry.name in retired and entry.name not in protected:
            with excluded(entry.directory) as alone:
                if not alone:
                    protected[entry.name] = "it is being read"
    gone = _retired(on_disk, counting, before.generation, rules, protected.keys(), damaged.keys())
    unfinished = _unfinished(root, before.generation, over) if rules.trash else ()
    leftovers = (*unfinished, *_binned(root), *(_quarantined(root) if rules.quarantined else ()))
    chosen = tuple(each for each in on_disk if each.name in gone)
    return Plan(
        run=run.name,
        live=live,
        retired=chosen,
        protected={name: why for name, why in protected.items() if name in retired},
        damaged={name: what for name, what in damaged.items() if name not in gone},
        leftovers=leftovers,
        bytes=sum(_size(each.directory) for each in chosen) + sum(_size(root / name) for name in leftovers),
    )


def _damaged(mine: Sequence[CheckpointEntry], run: RunId) -> dict[str, str]:
    """Names of those that can be seen to be damaged without reading all of them, and what is wrong."""
    found = {}
    for entry in mine:
        try:
            damages = read.glance(entry.directory, run)
        except NotFoundError:
            found[entry.name] = "it has just been retired, or set aside"
        else:
            if damages:
                found[entry.name] = "; ".join(map(str, damages))
    return found


def _best(run: RunDirectory, mine: Sequence[CheckpointEntry]) -> frozenset[str]:
    """Those that the run's own retention keeps for their metric, by its stored configuration.

    UnusableError: that, or a manifest, cannot be read, so that nobody knows.
    """
    try:
        match orjson.loads(run.config.read_bytes()):
            case {"checkpoint": {"best_metric": str() as metric, "keep_best": int() as count, **kept}}:
                pass
            case {"checkpoint": {}}:
                return frozenset()
            case _:
                raise ValueError("it has no section [checkpoint]")
    except FileNotFoundError:
        return frozenset()  # it has never been started
    except ValueError as error:
        raise UnusableError(
            f"{run.config} cannot be understood, so it is not known whether checkpoint.keep_best keeps some: {error}",
            "the next start of the run writes it again",
        ) from error
    if not count:
        return frozenset()
    values = {}
    for entry in mine:
        with suppress(CheckpointDamagedError, NotFoundError):
            found = read.read_manifest(entry.directory)[0].metrics.get(metric)
            if found is not None:
                values[entry.name] = found.value
    return retention.best(mine, values, count, str(kept.get("best_mode", "min")))


def carry_out(
    run: RunDirectory,
    agreed: Plan,
    rules: Rules,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Deletes what was agreed on, as far as it may still go; returns that.

    Whatever ends it early, a checkpoint is there as a whole or not at all, and the next one goes on with the rest.
    `progress` is told how many bytes have been deleted, and of how many.
    """
    root = run.checkpoints
    names = {each.name for each in agreed.retired}
    now = plan(run, rules)
    retired = [each for each in now.retired if each.name in names]
    leftovers = tuple(name for name in now.leftovers if name in agreed.leftovers)
    done = replace(now, leftovers=leftovers, bytes=sum(_size(root / name) for name in leftovers))
    with ExitStack() as stack:
        retired = [each for each in retired if stack.enter_context(excluded(each.directory))]
        size = sum(_size(each.directory) for each in retired)
        binned = {name.removeprefix(_BINNED) for name in leftovers if name.startswith(_BINNED)}
        staging = [name for name in leftovers if not name.startswith((_BINNED, _SET_ASIDE))]
        binned |= retention.put_into_trash(root, [*(each.name for each in retired), *staging])
    gone = tuple(each for each in retired if not each.directory.exists())  # one was pinned at the last moment
    count = read.Tally(progress, done.bytes + size)
    aside = (retention.deleting(root / name) for name in leftovers if name.startswith(_SET_ASIDE))
    # of the trash ours alone: what its leader puts there is the leader's
    for nbytes in chain(retention.emptying(root, binned), *aside):
        count(nbytes)
        time.sleep(1 / retention.PER_SECOND)
    return replace(done, retired=gone, bytes=done.bytes + size)


def _retired(
    on_disk: list[CheckpointEntry],
    counting: list[CheckpointRef],
    generation: Generation,
    rules: Rules,
    protected: AbstractSet[str],
    damaged: AbstractSet[str],
) -> frozenset[str]:
    if rules.keep is None:
        return frozenset()
    live = frozenset(map(_name, counting))
    lineage_entries = [each for each in on_disk if each.name in live]
    return frozenset(
        (
            *retention.retire(lineage_entries, rules.keep, rules.keep_every, protected, damaged),
            *retention.retire_abandoned(on_disk, live, generation, rules.keep, rules.keep_every, protected, damaged),
        )
    )


def _unfinished(root: Path, generation: Generation, over: bool) -> tuple[str, ...]:
    """Of a generation that may still be at work, nothing is left over; nor is what its leader is just writing."""
    stale = retention.stale(root, Generation(generation + 1) if over else generation)
    return tuple(name for name in stale if over or not durable.is_aside(name))


def _binned(root: Path) -> tuple[str, ...]:
    """What somebody has begun to delete, who may have been interrupted."""
    return tuple(f"{_BINNED}{name}" for name in retention.in_trash(root))


def _quarantined(root: Path) -> tuple[str, ...]:
    """Each with its reason beside it."""
    return tuple(f"{_SET_ASIDE}{name}" for name in retention.listed(root / QUARANTINE))


def _is_over(run: RunDirectory) -> bool:
    """Whether its last leader has let go: one that is only silent may come back."""
    try:
        if orjson.loads(run.status.read_bytes()).get("verdict") is not None:
            return True
    except (OSError, ValueError, AttributeError):
        pass
    holder = terms.newest(run.terms)
    return holder is None or terms.lease(run.terms, holder.term).released


def _name(checkpoint: CheckpointRef) -> str:
    return checkpoint_name(checkpoint.step, checkpoint.generation)


def _size(path: Path) -> int:
    """Bytes that deleting it would free; what goes meanwhile counts nothing."""
    inside = (Path(directory, name) for directory, _, files in os.walk(path) for name in files)
    return sum(map(_length, inside)) or _length(path)


def _length(file: Path) -> int:
    try:
        found = os.lstat(file)
    except OSError:
        return 0
    return 0 if S_ISDIR(found.st_mode) else found.st_size
