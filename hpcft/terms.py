"""Terms in the run directory: the one place where it is decided who may lead.

`terms/<t>` is created complete by `link(2)`, which succeeds for exactly one agent on NFS and Lustre too; it never
changes afterwards. Beside it the holder rewrites `terms/<t>.lease` with a growing count. Nobody reads a time
stamp: a claimant watches the count stand still on its own clock (`membership.may_claim`).

All functions block on the file system: they run on threads.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from hpcft import durable
from hpcft.ids import Incarnation, NodeId, Term


@dataclass(frozen=True, slots=True)
class TermRecord:
    """Who holds a term, and where its agents find it."""

    term: Term
    node: NodeId
    incarnation: Incarnation
    host: str
    port: int
    allocation: str


@dataclass(frozen=True, slots=True)
class TermLease:
    """The holder's sign of life."""

    count: int = 0
    released: bool = False


def newest(directory: Path) -> TermRecord | None:
    """The record of the highest term claimed so far."""
    numbers = [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]
    if not numbers:
        return None
    raw = orjson.loads((directory / f"{max(numbers):06}").read_bytes())
    return TermRecord(**raw)


def lease(directory: Path, term: Term) -> TermLease:
    """The holder's last sign; a holder that never renewed has count 0."""
    try:
        return TermLease(**orjson.loads((directory / f"{term:06}.lease").read_bytes()))
    except FileNotFoundError:
        return TermLease()


def claim(directory: Path, record: TermRecord) -> bool:
    """Try to become the holder of `record.term`. False: another agent was first."""
    try:
        durable.create(directory / f"{record.term:06}", orjson.dumps(asdict(record)))
    except FileExistsError:
        return False
    return True


def not_led(directory: Path, allocation: str) -> int:
    """How many terms of this start were claimed and given back without having been led."""
    found = 0
    for path in directory.iterdir():
        if path.name.isdecimal() and lease(directory, Term(int(path.name))) == TermLease(0, released=True):
            found += orjson.loads(path.read_bytes())["allocation"] == allocation
    return found


class Deposed(OSError):
    """A later term has been claimed: this one cannot be renewed any more."""


def renew(directory: Path, term: Term, sign: TermLease) -> None:
    """Show that the holder lives, or (`released`) that it has let go.

    Whoever claims after this has seen it stand still for a full lease; whoever claimed before is seen here.

    Raises:
        Deposed: another agent holds a later term.
    """
    durable.replace(directory / f"{term:06}.lease", orjson.dumps(asdict(sign)))
    holder = newest(directory)
    if holder is not None and holder.term > term:
        raise Deposed(f"{holder.node} has claimed term {holder.term}")


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at the terms directory."""

    holder: TermRecord | None
    lease: TermLease
    unchanged_for: float
    """Seconds, on this process's clock, since the holder's record was last seen to change."""
    renewals: int
    """How often this holder's record has been seen to change."""

    @property
    def next_term(self) -> Term:
        return Term(1 if self.holder is None else self.holder.term + 1)


class TermWatch:
    """Watches the newest term on this process's own clock; no two clocks are ever compared."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: tuple[TermRecord | None, TermLease] | None = None
        self._since = 0.0
        self._renewals = 0

    def look(self) -> Sight:
        """Blocks on the file system."""
        began = time.monotonic()
        holder = newest(self._directory)
        seen = (holder, lease(self._directory, holder.term) if holder is not None else TermLease())
        if seen != self._seen:
            same_holder = self._seen is not None and self._seen[0] == holder
            self._renewals = self._renewals + 1 if same_holder else 0
            self._seen, self._since = seen, time.monotonic()
        # what was read may be as old as the call: an answer that was long on its way proves no standstill
        return Sight(*seen, max(0.0, began - self._since), self._renewals)
