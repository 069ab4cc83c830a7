"""Where no cluster can be started, the Slurm tests say why and how to get it, in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cluster import cluster
from tests.cluster.files import REPOSITORY

WITHOUT = """
import sys, pytest, tests.cluster
tests.cluster.missing = lambda: "the Slurm tests need slurmd: apt-get install slurmd"
sys.exit(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "-m", "slurm", *sys.argv[1:]]))
"""


def test_absent_programs_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster, "PROGRAMS", ("sh", "no-such-program"))
    why = cluster.missing()
    assert why == ("the Slurm tests need no-such-program: apt-get install slurmctld slurmd slurm-client munge iproute2")


def test_an_ordinary_user_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    why = cluster.missing()
    assert why is not None
    assert "need root" in why


def test_all_of_them_are_skipped_with_one_line() -> None:
    modules = ["tests/unit/test_nodelist.py", "tests/e2e/test_slurm_commands.py", "tests/e2e/test_cluster_itself.py"]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, *modules], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = [line for line in ran.stdout.splitlines() if "need" in line]
    assert len(told) == 1
    assert told[0].endswith("the Slurm tests need slurmd: apt-get install slurmd")
    assert "passed" not in ran.stdout
