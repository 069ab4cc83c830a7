"""What is said of a checkpoint after its commit; kept beside it, for what is committed never changes.

`.marks/<checkpoint>.pinned`, an operator's, keeps it from being retired. Only the file's name counts: `touch` pins,
`rm` unpins, and so do `hpcft ckpt pin` and `unpin`. `.marks/<checkpoint>.verified` says that all of it was read back
after the commit, and is what was written.
"""

from __future__ import annotations

from pathlib import Path

from hpcft import durable
from hpcft.checkpoint.layout import MARKS, CheckpointEntry, parse_name
from hpcft.errors import NotFoundError

PINNED = "pinned"
VERIFIED = "verified"


def pinned(root: Path) -> frozenset[str]:
    """Names of the checkpoints that are never retired, whether or not they still exist."""
    return _marked(root, PINNED)


def verified(root: Path) -> frozenset[str]:
    """Names of the checkpoints that were read back after their commit, whether or not they still exist."""
    return _marked(root, VERIFIED)


def mark_verified(root: Path, name: str) -> None:
    """All of the checkpoint `name` was read, and is what its manifest says."""
    durable.make_directory(root / MARKS)
    durable.replace(root / MARKS / f"{name}.{VERIFIED}", b"")


def _marked(root: Path, mark: str) -> frozenset[str]:
    try:
        names = [path.name.rpartition(".") for path in (root / MARKS).iterdir()]
    except FileNotFoundError:
        return frozenset()
    return frozenset(name for name, _, suffix in names if suffix == mark and parse_name(name) is not None)


def pin(entry: CheckpointEntry) -> bool:
    """Keeps the checkpoint from being retired, durably; False: it was pinned already.

    NotFoundError: it has just been retired. On return it is there and stays: whoever retires looks at the marks once
    more after it has taken a checkpoint out of sight, and puts it back.
    """
    mark = _mark(entry)
    durable.make_directory(mark.parent)
    try:
        mark.touch(exist_ok=False)
        new = True
    except FileExistsError:
        new = False
    durable.sync_directory(mark.parent)
    if not entry.directory.is_dir():
        mark.unlink(missing_ok=True)
        raise NotFoundError(f"{entry.name} has just been retired", "`hpcft ckpt ls` lists those that there are")
    return new


def unpin(entry: CheckpointEntry) -> bool:
    """Lets the checkpoint be retired again; False: it was not pinned."""
    mark = _mark(entry)
    try:
        mark.unlink()
    except FileNotFoundError:
        return False
    durable.sync_directory(mark.parent)
    return True


def _mark(entry: CheckpointEntry) -> Path:
    return entry.directory.parent / MARKS / f"{entry.name}.{PINNED}"
