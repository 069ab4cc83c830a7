"""What several end-to-end tests compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.localrun import LocalRun, exact


@dataclass(frozen=True)
class Undisturbed:
    run: LocalRun
    out: Path
    digest: str
    """Of the final state: what every run with the same world has to end with, whatever happens to it."""
    seen: list[dict[str, Any]]
    """Its statuses, one after the other."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The training of `exact` on 2 x 2 workers, with nothing done to it."""
    root = tmp_path_factory.mktemp("undisturbed")
    out = root / "digest"
    with LocalRun(root, exact(out, pause=0.05)).start() as run:
        seen = list(run.changes())
        run.ends(0)
    return Undisturbed(run, out, out.read_text(), seen)
