"""The benchmark of checkpoints runs from end to end, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"


def rows(place: Path, *arguments: str, timeout: float = 120) -> dict[tuple[str, str], dict[str, Any]]:
    found = place / "rows.json"
    quick = ("--sizes", "2MiB", "--repeats", "1", "--warm-up", "1")
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *quick, "--directory", str(place), "--json", str(found)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [each.name for each in place.iterdir()] == ["rows.json"]
    return {(row["case"], row["system"]): row for row in json.loads(found.read_bytes())}


def test_cases_are_chosen_by_how_they_begin(tmp_path: Path) -> None:
    found = rows(tmp_path, "blocking-2MiB-1r", "write", "--ranks", "1", "--small-tensors", "0", "--systems", "hpcft")
    assert {case for case, _ in found} == {"blocking-2MiB-1r", "write-2MiB-1r"}
    for row in found.values():  # so small a save may take less than a busy machine makes of the step that is subtracted
        assert row["median"] is not None and row["limit"] > 0, row


@pytest.mark.drill
def test_every_case_of_ours_has_a_figure_and_its_limit(tmp_path: Path) -> None:
    found = rows(tmp_path, "--ranks", "1,2", "--small-tensors", "100", "--systems", "hpcft", timeout=600)
    families = {"blocking", "write", "slowdown", "load", "restore", "memory"}
    assert {case.partition("-")[0] for case, _ in found} == families
    for row in found.values():
        assert row["median"] > 0 and row["limit"] > 0, row


@pytest.mark.drill
def test_a_peer_has_a_figure_or_a_reason(tmp_path: Path) -> None:
    found = rows(tmp_path, "blocking-2MiB-1r", "--ranks", "1", "--small-tensors", "0", timeout=600)
    assert {"hpcft", "torch.save", "DCP async", "torchsnapshot async"} <= {system for _, system in found}
    for row in found.values():
        assert row["median"] or row["note"], row
