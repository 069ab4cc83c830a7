"""What is said of a checkpoint after its commit; kept beside it, for what is committed never changes.

`.marks/<checkpoint>.pinned`, an operator's, keeps it from being retired. Only the file's name counts: `touch` pins,
`rm` unpins. `.marks/<checkpoint>.verified` says that all of it was read back after the commit, and is what was written.
"""

from __future__ import annotations

from pathlib import Path

from hpcft import durable
from hpcft.checkpoint.layout import MARKS, parse_name

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
