"""What an operator says of a checkpoint; kept beside it, for what is committed never changes.

`.marks/<checkpoint>.pinned` keeps it from being retired. Only the file's name counts: `touch` pins, `rm` unpins.
"""

from __future__ import annotations

from pathlib import Path

from hpcft.checkpoint.layout import MARKS, parse_name

PINNED = "pinned"


def pinned(root: Path) -> frozenset[str]:
    """Names of the checkpoints that are never retired, whether or not they still exist."""
    try:
        names = [path.name.rpartition(".") for path in (root / MARKS).iterdir()]
    except FileNotFoundError:
        return frozenset()
    return frozenset(name for name, _, suffix in names if suffix == PINNED and parse_name(name) is not None)
