"""What doctor looks at. Facts only; `rules` judges them.

`look_at_…` runs here; `probe_…` runs in a process of its own, `python -m hpcft.doctor.probes PROBE ARGUMENT`, asked by
a `Question`, and answers with one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from hpcft.errors import UsageError
from hpcft.slurm import control
from hpcft.units import human_duration

if TYPE_CHECKING:
    from hpcft.config import Config

_PATIENCE = {"torch": 120.0, "directory": 30.0, "address": 20.0, "gpus": 30.0}
"""Seconds until a probe is killed."""
_SYNCS = 9


def look_at_program(config: Config) -> UsageError | None:
    """Why the training program could not be started; nothing of it is run."""
    from hpcft.config import check_program

    try:
        check_program(config)
    except UsageError as error:
        return error
    return None


# --- processes that may be lost --------------------------------------------------------------------------------


class Question:
    """A probe in a process of its own; the clock of its patience starts with it."""

    def __init__(self, probe: str, argument: str = "") -> None:
        self._patience = _PATIENCE[probe]
        self._until = time.monotonic() + self._patience
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpcft.doctor.probes", probe, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def answer(self) -> dict[str, Any]:
        """What the probe found; `{"error": …}` where it failed or did not end in time."""
        try:
            output, errors = self._process.communicate(timeout=max(0.1, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.drop()
            return {"error": f"no answer within {human_duration(self._patience)}", "silent": True}
        try:
            found: dict[str, Any] = json.loads(output)
        except ValueError:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            return {"error": "".join(last) or f"the probe ended with status {self._process.returncode}"}
        return found

    def drop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep: left behind
                self._process.wait(timeout=1)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


# --- Python and what is installed ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PythonFacts:
    version: str
    system: str
    kernel: tuple[int, int]
    requirements: tuple[tuple[str, str, str | None], ...]
    """Distribution, minimum, and the version that is there."""


def look_at_python() -> PythonFacts:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    kernel = (int(found[1]), int(found[2])) if found else (0, 0)
    requirements = []
    for name, minimum in _requirements():
        try:
            version: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        requirements.append((name, minimum, version))
    return PythonFacts(platform.python_version(), platform.system(), kernel, tuple(requirements))


def _requirements() -> Iterator[tuple[str, str]]:
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("hpcft") or ():
            found = re.fullmatch(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)", line.strip())
            if found and found[1] != "torch":  # asked in a process of its own
                yield found[1], found[2]


def version_number(text: str) -> tuple[int, ...]:
    """The numbers a version starts with: 2.13.0+cpu is (2, 13, 0), 23.02.6-1 is (23, 2, 6)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


# --- torch -----------------------------------------------------------------------------------------------------


def probe_torch(_: str) -> dict[str, Any]:
    began = time.monotonic()
    import torch
    import torch.distributed as dist

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "seconds": time.monotonic() - began,
    }


# --- Slurm -----------------------------------------------------------------------------------------------------


SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "squeue")


@dataclass(frozen=True, slots=True)
class SlurmFacts:
    missing: tuple[str, ...]
    settings: Mapping[str, str] | None
    """As `scontrol show config` has them; None: not asked or no answer."""
    trouble: str = ""


def look_at_slurm(patience: float) -> SlurmFacts:
    missing = tuple(command for command in SLURM_COMMANDS if shutil.which(command) is None)
    if "scontrol" in missing:
        return SlurmFacts(missing, None)
    try:
        return SlurmFacts(missing, asyncio.run(control.show_config(patience)))
    except control.SlurmError as error:
        return SlurmFacts(missing, None, error.message)


# --- the run directory -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mount:
    point: str
    kind: str
    options: frozenset[str]


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """The mount that holds `path`, from the text of /proc/self/mountinfo; the last one mounted wins."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if not dash or len(fields) < 6 or len(rest) < 2:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):
            options = frozenset(fields[5].split(",")) | frozenset("".join(rest[2:3]).split(","))
            best = Mount(point, rest[0], options)
    return best


def probe_directory(argument: str) -> dict[str, Any]:
    """Does in `argument`, or the nearest directory above it that exists, what a run does in its directory."""
    wanted = Path(argument)
    existing = next(path for path in (wanted, *wanted.parents) if path.exists())
    place = existing.resolve()
    facts: dict[str, Any] = {"existing": str(existing), "there": existing == wanted, "directory": place.is_dir()}
    mount = mount_of(str(place), Path("/proc/self/mountinfo").read_text())
    facts["mount"] = None if mount is None else [mount.point, mount.kind, sorted(mount.options)]
    room = os.statvfs(place)
    facts["free"] = room.f_bavail * room.f_frsize
    facts["free_files"] = room.f_favail if room.f_files else None
    try:
        with tempfile.TemporaryDirectory(prefix=".hpcft-doctor-", dir=place) as name:
            facts |= _try_files(Path(name))
    except OSError as error:
        facts["trouble"] = f"{error.strerror or error}"
    return facts


def _try_files(directory: Path) -> dict[str, Any]:
    took = []
    skew = 0.0
    for number in range(_SYNCS):
        path = directory / f"aside{number}"
        before = time.time()
        began = time.monotonic()
        with path.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        took.append(time.monotonic() - began)
        stamped, after = path.stat().st_mtime, time.time()
        skew = stamped - min(max(stamped, before), after)
    facts: dict[str, Any] = {"sync_seconds": median(took), "skew_seconds": skew}
    target = directory / "target"
    (directory / "aside0").rename(target)
    (directory / "aside1").rename(target)
    facts["rename"] = target.stat().st_size == 4096 and not (directory / "aside1").exists()
    claim = directory / "claim"
    try:
        os.link(target, claim)
        try:
            os.link(directory / "aside2", claim)
            facts["link"] = "a second link(2) took the name over"
        except FileExistsError:
            facts["link"] = ""
    except OSError as error:
        facts["link"] = f"link(2): {error.strerror}"
    secret = directory / "secret"
    secret.touch(mode=0o600)
    facts["private"] = secret.stat().st_mode & 0o077 == 0
    return facts


# --- memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    total: int
    limit: int | None
    """The lowest limit along the memory cgroup's path."""
    shm_free: int | None
    memfd: bool
    open_files: int
    """The hard limit."""


def look_at_memory() -> MemoryFacts:
    shm: int | None = None
    with suppress(OSError):
        room = os.statvfs("/dev/shm")
        shm = room.f_bavail * room.f_frsize
    memfd = True
    try:
        os.close(os.memfd_create("hpcft-doctor"))
    except OSError:
        memfd = False
    return MemoryFacts(
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_limit(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")),
        shm,
        memfd,
        resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    )


def memory_limit(cgroups: str, mounted: Path) -> int | None:
    """The lowest memory limit from this process's cgroup up to the root, in bytes; None where there is none.

    `cgroups` is the text of /proc/self/cgroup, `mounted` where the hierarchies are (version 1, 2 or both).
    """
    limits: list[int] = []
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops, name = [mounted, mounted / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = [mounted / "memory"], "memory.limit_in_bytes"
        else:
            continue
        for top in tops:
            group = top / path.lstrip("/")
            for directory in (group, *group.parents):
                with suppress(OSError, ValueError):
                    limits.append(int((directory / name).read_text()))
                if directory == top:
                    break
    # Version 1 writes "no limit" as the largest multiple of a page that fits into 63 bits.
    real = [limit for limit in limits if limit < 1 << 60]
    return min(real) if real else None


# --- the node's address ----------------------------------------------------------------------------------------


def probe_address(_: str) -> dict[str, Any]:
    """Listens on the address that this machine's name leads to, and connects to it."""
    name = socket.gethostname()
    began = time.monotonic()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return {"name": name, "trouble": f"its name {name} has no address: {error.strerror}"}
    family, address = found[0][0], found[0][4]
    facts: dict[str, Any] = {"name": name, "address": str(address[0]), "lookup_seconds": time.monotonic() - began}
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.bind((str(address[0]), 0))
            listening.listen()
            with socket.create_connection(listening.getsockname()[:2], timeout=5):
                pass
    except OSError as error:
        facts["trouble"] = f"cannot listen on {address[0]}, the address of {name}: {error.strerror or error}"
        return facts
    began = time.monotonic()
    with suppress(OSError):
        socket.getnameinfo(address, 0)
    facts["reverse_seconds"] = time.monotonic() - began
    return facts


# --- GPUs ------------------------------------------------------------------------------------------------------


def probe_gpus(_: str) -> dict[str, Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        found = type(error).__name__
        return {"names": []} if found == "NVMLError_LibraryNotFound" else {"names": [], "trouble": str(error)}
    names, lost = [], []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            names.append(_text(pynvml.nvmlDeviceGetName(device)))
        except pynvml.NVMLError as error:
            lost.append(f"GPU {index}: {error}")
            continue
        with suppress(pynvml.NVMLError):
            _, uncorrectable, pending, failed = pynvml.nvmlDeviceGetRemappedRows(device)
            if pending or failed:
                lost.append(f"GPU {index}: {uncorrectable} rows remapped, {'failed' if failed else 'pending a reset'}")
    return {"names": names, "driver": _text(pynvml.nvmlSystemGetDriverVersion()), "lost": lost}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


_PROBES = {"torch": probe_torch, "directory": probe_directory, "address": probe_address, "gpus": probe_gpus}

if __name__ == "__main__":
    print(json.dumps(_PROBES[sys.argv[1]](sys.argv[2])))
