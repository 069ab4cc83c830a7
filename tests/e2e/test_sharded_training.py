"""A sharded model (FSDP2) in a run: workers die, and another number of them goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.localrun import PROGRAMS, LocalRun

pytestmark = [pytest.mark.local, pytest.mark.timeout(600)]


def test_a_sharded_training_goes_on_exactly_and_in_a_world_of_another_size(tmp_path: Path) -> None:
    out = tmp_path / "story"
    settings = {
        "job.script": str(PROGRAMS / "sharded.py"),
        "checkpoint.every": "4 steps",
        "data.ledger": True,
        "train.out": str(out),
        "train.kill": [1, 7, 1],
    }

    def story(generation: int) -> list[dict[str, Any]]:
        lines = map(json.loads, out.read_text().splitlines())
        return [line for line in lines if line["generation"] == generation]

    def losses(generation: int) -> dict[int, str]:
        return {line["step"]: line["loss"] for line in story(generation) if "loss" in line}

    with LocalRun(tmp_path, {**settings, "train.steps": 10}, nodes=1, workers=3).start() as run:
        status = run.ends(0)
    run.assert_exact(10)
    assert [each["cause"] for each in status["incidents"]] == ["worker failed"]
    first, second = losses(1), losses(2)
    since = story(2)[0]["step"]
    assert since in (0, 4), "where the commit was slow, from the beginning"
    assert set(first) >= {1, 2, 3, 4, 5, 6} and set(second) == set(range(since + 1, 11))
    assert all(second[step] == first[step] for step in first.keys() & second.keys()), "the same steps, to the last bit"
    assert len(set(first.values())) == len(first)

    end = story(2)[-1]
    with LocalRun(tmp_path, {**settings, "train.steps": 14}, nodes=1).start("--from", "10") as run:
        run.ends(0)
    run.assert_exact(14)
    begin = story(3)[0]
    assert (end["world"], begin["world"]) == (3, 2)
    assert (end["step"], begin["step"]) == (10, 10) and begin["digest"] == end["digest"]
    assert set(losses(3)) == {11, 12, 13, 14}
