"""How much memory this process may still take before the kernel kills somebody for it.

Slurm bounds a job by cgroups, one inside another (job, step, task), and the tightest of them counts. Shared memory is
charged to whoever touches it first. Pages of files that were read or written count as used as well, but are given up
before anybody is killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 62
"""cgroup v1 says a number near 2**63 where there is no limit."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """`free` bytes under the tightest limit, which is that of `where`."""

    free: int
    where: str


def headroom(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Headroom:
    """The smallest of what the machine and every cgroup above this process still give out."""
    found = [_of_the_machine(proc / "meminfo")]
    for line in _lines(proc / "self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for level in _levels(path):
                found.append(_v2(cgroups / level.lstrip("/"), level))
                found.append(_v2(cgroups / "unified" / level.lstrip("/"), level))
        elif "memory" in controllers.split(","):
            found += [_v1(cgroups / "memory" / level.lstrip("/"), level) for level in _levels(path)]
    return min((each for each in found if each is not None), key=lambda each: each.free, default=Headroom(0, "nothing"))


def _levels(path: str) -> list[str]:
    """The cgroup and all above it. In a namespace the path may begin above what is mounted: then only that counts."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/" + "/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _of_the_machine(meminfo: Path) -> Headroom | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return Headroom(int(line.split()[1]) * 1024, "the machine")
    return None


def _v1(directory: Path, name: str) -> Headroom | None:
    limit, used = _number(directory / "memory.limit_in_bytes"), _number(directory / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    return Headroom(max(0, limit - used + _cached(directory, "total_inactive_file")), f"cgroup {name}")


def _v2(directory: Path, name: str) -> Headroom | None:
    limit, used = _number(directory / "memory.max"), _number(directory / "memory.current")
    if limit is None or used is None:
        return None
    return Headroom(max(0, limit - used + _cached(directory, "inactive_file")), f"cgroup {name}")


def _cached(directory: Path, key: str) -> int:
    for line in _lines(directory / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
