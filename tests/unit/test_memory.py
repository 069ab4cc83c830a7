"""How much memory there is: cgroups as files, in a tree that a test has made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from hpcft.memory import Headroom, headroom

MIB = 1 << 20


def tree(root: Path, files: Mapping[str, object]) -> Headroom:
    """What `headroom` says of a /proc and a /sys/fs/cgroup that hold these files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return headroom(root / "proc", root / "cgroup")


def meminfo(mebibytes: int) -> str:
    return f"MemTotal:       99999999 kB\nMemFree:  1 kB\nMemAvailable:   {mebibytes << 10} kB"


def v2(path: str, limit: int | str, used: int, inactive: int = 0) -> dict[str, object]:
    """Numbers in MiB."""
    return {
        f"{path}/memory.max": limit if isinstance(limit, str) else limit * MIB,
        f"{path}/memory.current": used * MIB,
        f"{path}/memory.stat": f"anon 4096\nfile 8192\ninactive_file {inactive * MIB}\nactive_file 5",
    }


def v1(path: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    return {
        f"{path}/memory.limit_in_bytes": limit * MIB,
        f"{path}/memory.usage_in_bytes": used * MIB,
        f"{path}/memory.stat": f"inactive_file 7\ntotal_inactive_file {inactive * MIB}",
    }


def test_without_cgroups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert tree(tmp_path, {"proc/meminfo": meminfo(900)}) == Headroom(900 * MIB, "the machine")


def test_the_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    """Slurm's: job, step, task. The limit of the job is the one that bites, though the task has none."""
    found = tree(
        tmp_path,
        {
            "proc/meminfo": meminfo(9000),
            "proc/self/cgroup": "0::/slurm/job_7/step_0/task_3",
            **v2("cgroup/slurm/job_7/step_0/task_3", "max", 100),
            **v2("cgroup/slurm/job_7/step_0", 4000, 700),
            **v2("cgroup/slurm/job_7", 2000, 800, inactive=50),
            **v2("cgroup/slurm", "max", 5000),
        },
    )
    assert found == Headroom(1250 * MIB, "cgroup /slurm/job_7")


def test_version_1_has_other_names_and_a_number_for_no_limit(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        {
            "proc/meminfo": meminfo(9000),
            "proc/self/cgroup": "5:cpu,cpuacct:/slurm\n4:memory:/slurm/job_7\n0::/elsewhere",
            **v1("cgroup/memory/slurm/job_7", 600, 500, inactive=30),
            **v1("cgroup/memory/slurm", (1 << 63) // MIB - 1, 10),
            **v1("cgroup/memory/slurm/job_8", 1, 1),
        },
    )
    assert found == Headroom(130 * MIB, "cgroup /slurm/job_7")


def test_both_versions_at_once(tmp_path: Path) -> None:
    """`hybrid`: memory is of version 1, and version 2 is mounted beside it, at times with a limit of its own."""
    files = {
        "proc/meminfo": meminfo(9000),
        "proc/self/cgroup": "4:memory:/a\n0::/b",
        **v1("cgroup/memory/a", 600, 100),
        **v2("cgroup/unified/b", 300, 100),
    }
    assert tree(tmp_path, files) == Headroom(200 * MIB, "cgroup /b")


@pytest.mark.parametrize("shown", ["0::/system.slice/docker-7", "0::/../../outside"])
def test_in_a_container_only_what_is_mounted_can_be_seen(tmp_path: Path, shown: str) -> None:
    files = {"proc/meminfo": meminfo(9000), "proc/self/cgroup": shown, **v2("cgroup", 700, 100)}
    assert tree(tmp_path, files) == Headroom(600 * MIB, "cgroup /")


def test_more_than_allowed_is_nothing_free(tmp_path: Path) -> None:
    files = {"proc/meminfo": meminfo(9000), "proc/self/cgroup": "0::/a", **v2("cgroup/a", 100, 120)}
    assert tree(tmp_path, files) == Headroom(0, "cgroup /a")


def test_a_machine_that_says_nothing_has_nothing_to_give(tmp_path: Path) -> None:
    assert tree(tmp_path, {}).free == 0


def test_this_machine_has_some() -> None:
    assert headroom().free > 0
