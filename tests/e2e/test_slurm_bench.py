"""`hpcft bench` in an allocation: its trials are steps of the job, on all its nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.drill]

SCRIPT = """#!/bin/bash
exec {hpcft} bench checkpoint-frequency --params 20k --every 5 --mode async --steps 12 --mtbf 1h --json \
  --root {root} >{results}
"""


def test_a_bench_trains_on_all_nodes_of_its_allocation(cluster: Cluster) -> None:
    root, results, output = (cluster.shared / name for name in ("bench", "bench.json", "bench.out"))
    script = SCRIPT.format(hpcft=Path(sys.executable).parent / "hpcft", root=root, results=results)
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", f"--output={output}", script=script)
    try:
        cluster.wait_job(job, "COMPLETED", timeout=300)
    except AssertionError as error:
        logs = [path.read_text(errors="replace")[-3000:] for path in (output, *root.glob("*/trials/*.log"))]
        raise AssertionError(f"{error}\n" + "\n---\n".join(logs)) from None
    found = json.loads(results.read_text())
    assert found["complete"]
    assert found["site"] == "2 nodes of this allocation, 1 worker on each"
    assert found["ranks"] == 2
    saved = found["rows"][1]
    assert (saved["mode"], saved["every"]) == ("asynchronous", 5)
    assert saved["recovery_seconds"] > 0, "a worker on the other node was killed"
    assert list(root.glob("*/trials/*/checkpoints")) == []
