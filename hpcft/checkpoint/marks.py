"""What became known of a checkpoint after its commit: kept beside it, for what is committed never changes.

A mark is an empty-handed fact (`pinned`, `verified`, `suspect`) with a sentence, in `.marks/<checkpoint>.<mark>`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from hpcft import durable
from hpcft.checkpoint.layout import MARKS, parse_name, seal


class Mark(StrEnum):
    PINNED = "pinned"
    """An operator wants to keep it: never retired."""
    VERIFIED = "verified"
    """Another node has read back every byte of it."""
    SUSPECT = "suspect"
    """The run failed early again and again after it: passed over while there is another."""


def mark(root: Path, name: str, kind: Mark, reason: str) -> None:
    """Marks the checkpoint; a mark that it has already gets the new reason."""
    durable.make_directory(root / MARKS)
    durable.replace(root / MARKS / f"{name}.{kind}", seal("mark", {"reason": reason}))


def unmark(root: Path, name: str, kind: Mark) -> bool:
    """Takes the mark away; False when there was none."""
    try:
        (root / MARKS / f"{name}.{kind}").unlink()
    except FileNotFoundError:
        return False
    durable.sync_directory(root / MARKS)
    return True


def marked(root: Path, kind: Mark) -> frozenset[str]:
    """Names of the checkpoints that carry this mark, whether or not they still exist."""
    try:
        names = [path.name.rpartition(".") for path in (root / MARKS).iterdir()]
    except FileNotFoundError:
        return frozenset()
    return frozenset(name for name, _, suffix in names if suffix == kind and parse_name(name) is not None)
