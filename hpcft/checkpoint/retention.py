"""Which checkpoints may go, and how they go. Deciding is pure; deleting is slow on purpose.

A checkpoint that goes is first renamed into `.trash/`, so that nobody is offered half of one, and then unlinked
file by file with pauses: a burst of unlinks is felt by everyone on a parallel file system. The two need not be done by
the same thread: nothing but what was put into the trash is ever unlinked. Emptying it also finishes what an earlier
one left, so a crash costs nothing; and what was pinned in the meantime comes back. Only whole ones do: what is
unlinked has been renamed once more before (`_take`), and of two threads one rename or the other succeeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from hpcft import durable
from hpcft.checkpoint.layout import MARKS, TRASH, CheckpointEntry, parse_name, parse_staging, staging_name
from hpcft.checkpoint.marks import pinned
from hpcft.checkpoint.read import glance
from hpcft.checkpoint.readers import excluded
from hpcft.errors import HpcftError
from hpcft.ids import Generation, Step

PER_SECOND = 200.0
"""Files unlinked, by whoever empties the trash."""
_GOING = ".going"
"""Ends the name of what is being unlinked."""


def retire(
    entries: Sequence[CheckpointEntry],
    keep: int,
    keep_every: int | None,
    protected: AbstractSet[str],
    damaged: AbstractSet[str] = frozenset(),
) -> tuple[str, ...]:
    """Names of the checkpoints of a lineage that need not be kept, oldest first.

    Kept are the `keep` committed last (at least one, whatever was asked), those of every `keep_every` steps, and
    the `protected`: pinned, restored from, the best ones, the newest verified one. Last means generation first, then
    step: after a restart from an earlier step the abandoned branch has the higher steps, and the live one must not
    lose its place to it.

    One that is known to be `damaged` takes nobody's place: it is none of the `keep`, but stays as long as older ones.
    """
    ordered = sorted(entries, key=lambda entry: (entry.generation, entry.step))
    sound = [entry for entry in ordered if entry.name not in damaged]
    if not sound:
        return ()
    counting = sound[-max(keep, 1) :]
    kept = {entry.name for entry in ordered[ordered.index(counting[0]) :]} | protected
    if keep_every:
        # Of a step that two branches have passed, the newer branch keeps its milestone; a sound one in any case.
        ranked = [*(entry for entry in ordered if entry.name in damaged), *sound]
        milestones: dict[Step, str] = {e.step: e.name for e in ranked if e.step % keep_every == 0}
        kept |= set(milestones.values())
    return tuple(entry.name for entry in ordered if entry.name not in kept)


def best(entries: Sequence[CheckpointEntry], values: Mapping[str, float], count: int, mode: str) -> frozenset[str]:
    """Names of the `count` checkpoints with the lowest (mode "min") or highest ("max") value.

    `values` is by name; who has none does not compete. Of equal ones the newer counts as better.
    """
    sign = 1.0 if mode == "max" else -1.0
    competing = [entry for entry in entries if entry.name in values]
    ranked = sorted(competing, key=lambda entry: (sign * values[entry.name], entry.generation, entry.step))
    return frozenset(entry.name for entry in ranked[len(ranked) - min(count, len(ranked)) :])


def newest(entries: Sequence[CheckpointEntry], names: AbstractSet[str]) -> frozenset[str]:
    """The name of that one of `names` which was committed last; empty where none of them is there."""
    there = [entry for entry in entries if entry.name in names]
    return frozenset({max(there, key=lambda entry: (entry.generation, entry.step)).name} if there else ())


def retire_abandoned(
    entries: Sequence[CheckpointEntry],
    live: AbstractSet[str],
    current: Generation,
    keep: int,
    keep_every: int | None,
    protected: AbstractSet[str],
    damaged: AbstractSet[str] = frozenset(),
) -> tuple[str, ...]:
    """Names of those that are not of the lineage `live` and may go, oldest first: somebody went on from an older one.

    They are the way back until the branch that took their place has `keep` checkpoints of later generations. Those of
    the generation `current` are none of them: the lineage may just not know them yet. Those of the lineage that are
    `damaged` take nobody's place.
    """
    lineage = [each for each in entries if each.name in live and each.name not in damaged]
    steps = {each.step for each in lineage}
    gone = []
    for entry in sorted(entries, key=lambda entry: (entry.generation, entry.step)):
        if entry.name in live or entry.name in protected or entry.generation >= current:
            continue
        replaced = sum(each.generation > entry.generation for each in lineage) >= max(keep, 1)
        milestone = keep_every and entry.step % keep_every == 0 and entry.step not in steps
        if replaced and not milestone:
            gone.append(entry.name)
    return tuple(gone)


def stale(root: Path, current: Generation) -> tuple[str, ...]:
    """What generations before `current` left unfinished: nobody writes there any more, or nobody should.

    What is just being restored from elsewhere is locked, and none of it.
    """
    found = []
    for name in listed(root):
        staging = parse_staging(name)
        parsed = parse_name(staging[0]) if staging else None
        if parsed is not None and parsed[1] < current:
            with excluded(root / name) as alone:
                if alone:
                    found.append(name)
        elif durable.is_aside(name):
            found.append(name)
    return tuple(sorted(found))


def discard(root: Path, name: str, nonce: str) -> None:
    """Puts the unfinished checkpoint of a save that failed into the trash, so that the next one finds its room."""
    put_into_trash(root, [staging_name(name, nonce)])


def put_into_trash(root: Path, names: Sequence[str]) -> frozenset[str]:
    """Takes them out of sight, into the trash: a few renames, however large they are. Returns their names in there.

    Those that are not there are passed over, and unfinished ones that are locked (`readers`). One that was pinned
    meanwhile is put back (see `marks.pin`), unless somebody has begun to delete it by then.
    """
    if not names:
        return frozenset()
    trash = root / TRASH
    durable.make_directory(trash)
    gone: dict[str, Path] = {}
    unfinished = set()
    for name in names:
        if parse_name(name) is None and parse_staging(name) is None and not durable.is_aside(name):
            raise ValueError(f"{name!r} is not a checkpoint")
        if parse_name(name) is None:
            with excluded(root / name) as alone:
                if alone and (binned := _bin(root, trash, name)) is not None:
                    unfinished.add(binned.name)
        elif (binned := _bin(root, trash, name)) is not None:
            gone[name] = binned
    for name in pinned(root) & gone.keys():
        with suppress(FileNotFoundError):
            gone[name].rename(root / name)
            del gone[name]
    durable.sync_directory(root)
    for file in listed(root / MARKS):
        if file.rpartition(".")[0] in gone:
            with suppress(FileNotFoundError):
                (root / MARKS / file).unlink()
    return frozenset((*(path.name for path in gone.values()), *unfinished))


def emptying(root: Path, only: AbstractSet[str] | None = None) -> Iterator[int]:
    """Deletes what is in the trash, or these of it, one file at each turn, and says how many bytes that was.

    A checkpoint that is pinned is none of it: who put it there was killed before it could put it back. Now it is put
    back, if it is whole.
    """
    trash = root / TRASH
    for name in listed(trash):
        if _is_wanted(root, name):
            with suppress(OSError, HpcftError):
                if parse_name(name) is not None and not glance(trash / name):
                    (trash / name).rename(root / name)
        elif (only is None or name in only) and (taken := _take(trash, name)) is not None:
            yield from deleting(taken)


def in_trash(root: Path) -> list[str]:
    """Names of what is to be deleted there."""
    return [name for name in listed(root / TRASH) if not _is_wanted(root, name)]


def _is_wanted(root: Path, name: str) -> bool:
    """Whether this in the trash is a pinned checkpoint, and the only one of its name."""
    checkpoint = name.partition(".")[0]  # a second one of a name has a number
    return checkpoint in pinned(root) and not (root / checkpoint).exists()


def _take(trash: Path, name: str) -> Path | None:
    """What may be unlinked from now on: nobody finds it by its name and puts it back. None: it is gone already."""
    if name.endswith(_GOING):
        return trash / name
    taken = trash / f"{name}.{token_hex(4)}{_GOING}"
    with suppress(FileNotFoundError):
        return (trash / name).rename(taken)
    return None


def _bin(root: Path, trash: Path, name: str) -> Path | None:
    """Where it is now; None: there was nothing."""
    for attempt in range(1000):
        # The same unfinished name can come a second time, from a rank that was late.
        target = trash / (name if attempt == 0 else f"{name}.{attempt}")
        if target.exists():
            continue
        with suppress(FileNotFoundError):
            (root / name).rename(target)
            return target
        return None
    return None


def deleting(path: Path) -> Iterator[int]:
    """Deletes it, with all that is in it, one file at each turn, and says how many bytes that was."""
    if path.is_dir() and not path.is_symlink():
        for name in listed(path):
            yield from deleting(path / name)
        with suppress(FileNotFoundError):
            path.rmdir()
        return
    size = 0
    with suppress(FileNotFoundError):
        size = path.lstat().st_size
        path.unlink()
    yield size


def listed(directory: Path) -> list[str]:
    """Names of what is in it, nothing where it is not there."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        return []
