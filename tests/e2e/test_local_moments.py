"""A long campaign: a worker killed at every single step, each time ending with the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.localrun import LocalRun, exact

pytestmark = [pytest.mark.local, pytest.mark.drill, pytest.mark.timeout(600)]

STEPS = 44


MOMENTS = [
    *(f"{step} {step % 4} kill" for step in range(1, STEPS)),
    # while the state is being taken; at 0 the start is hit
    *(f"{step} {rank} kill saving" for step in (0, 10, 20, 30, 40, STEPS) for rank in (0, 3)),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_at_any_step_changes_nothing(tmp_path: Path, undisturbed: Any, moment: str) -> None:
    out = tmp_path / "digest"
    with LocalRun(tmp_path, exact(out, strikes=(f"1 {moment}",))).start() as run:
        status = run.ends(0)
    assert out.read_text() == undisturbed.digest
    run.assert_exact(STEPS)
    assert status["generation"] == 2 and [each["cause"] for each in status["incidents"]] == ["worker failed"]
