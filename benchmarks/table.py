"""What every benchmark prints: rows of one shape, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    system: str
    median: float | None
    """None: it never came to it."""
    min: float | None
    max: float | None
    unit: str
    limit: float | None = None
    """What is possible at best, measured in the same run."""
    ratio: float | None = None
    """To the limit, or to the system named in the note."""
    note: str = ""


def row(
    case: str, system: str, values: Sequence[float], unit: str, *, limit: float | None = None, note: str = ""
) -> Row:
    if not values:
        return Row(case, system, None, None, None, unit, limit, None, note)
    middle = statistics.median(values)
    ratio = middle / limit if limit else None
    return Row(case, system, middle, min(values), max(values), unit, limit, ratio, note)


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {system}"


def show(rows: Sequence[Row], to: Path | None) -> None:
    """Print the table; with `to`, write the rows as JSON, too."""
    print(f"\n{machine()}\n")
    print(f"{'case':<26}{'system':<26}{'median':>10}{'min':>10}{'max':>10} {'unit':<5}{'limit':>9}{'ratio':>8}  note")
    for each in rows:
        figures = "".join(f"{_number(value):>10}" for value in (each.median, each.min, each.max))
        print(
            f"{each.case:<26}{each.system:<26}{figures} {each.unit:<5}"
            f"{_number(each.limit):>9}{_number(each.ratio):>8}  {each.note}"
        )
    if to is not None:
        to.write_text(json.dumps([asdict(each) for each in rows], indent=2) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
