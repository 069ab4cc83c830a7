"""How doctor judges what its probes have found: pure functions from facts to findings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcft.doctor.finding import Finding, Grade
from hpcft.doctor.probes import SLURM_COMMANDS, MemoryFacts, PythonFacts, SlurmFacts, version_number
from hpcft.errors import ExitCode, UsageError
from hpcft.units import human_duration, human_size

if TYPE_CHECKING:
    from hpcft.config import Config

GIB = 1024**3

# --- Python and what is installed ------------------------------------------------------------------------------


def judge_python(facts: PythonFacts) -> Iterator[Finding]:
    if facts.system != "Linux":
        yield Finding("fail", "system", f"{facts.system} has no memfd, pidfd or namespaces", "hpcft runs on Linux")
    elif facts.kernel < (5, 3):
        kernel = ".".join(map(str, facts.kernel))
        yield Finding("fail", "system", f"Linux {kernel} has no pidfd", "hpcft needs Linux 5.3 or newer")
    else:
        yield Finding("ok", "system", f"Linux {'.'.join(map(str, facts.kernel))}, Python {facts.version}")
    wrong = [
        f"{name} {version or 'is missing'} (needs {minimum} or newer)"
        for name, minimum, version in facts.requirements
        if version is None or version_number(version) < version_number(minimum)
    ]
    if wrong:
        yield Finding(
            "fail", "packages", ", ".join(wrong), "in the checkout of hpcft: pip install -e . -c constraints.txt"
        )
    elif facts.requirements:
        yield Finding("ok", "packages", ", ".join(f"{name} {version}" for name, _, version in facts.requirements))


def judge_program(refused: UsageError | None) -> Finding:
    if refused is None:
        return Finding("ok", "program", "is there, and compiles")
    return Finding("fail", "program", refused.message, refused.hint or "correct it, or the section job")


# --- torch -----------------------------------------------------------------------------------------------------


def judge_torch(facts: Mapping[str, Any], *, gpus: int) -> Iterator[Finding]:
    if "error" in facts:
        advice = "install torch 2.8 or newer into the environment of this Python; it is not part of hpcft"
        if facts.get("silent"):
            advice = "the file system that holds torch is overloaded or stuck; put the environment elsewhere"
        yield Finding("fail", "torch", f"cannot be imported: {facts['error']}", advice)
        return
    detail = f"{facts['version']}, CUDA {facts['cuda'] or 'none'}, imported in {human_duration(facts['seconds'])}"
    if version_number(facts["version"]) < (2, 8):
        yield Finding("fail", "torch", detail, "hpcft needs torch 2.8 or newer")
    elif not facts["gloo"]:
        yield Finding("fail", "torch", f"{detail}, built without gloo", "install a build with torch.distributed")
    elif gpus and not facts["cuda"]:
        yield Finding("fail", "torch", f"{detail}, but there are {gpus} GPUs", "install a CUDA build of torch")
    elif gpus and not facts["nccl"]:
        yield Finding("warn", "torch", f"{detail}, built without NCCL", "collectives between GPUs would use gloo")
    elif facts["seconds"] > 20:
        advice = "every start and every restarted pool waits for this: keep the environment on a local or faster disk"
        yield Finding("warn", "torch", detail, advice)
    else:
        yield Finding("ok", "torch", detail)


# --- Slurm -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What of the configuration has to fit Slurm's settings."""

    grace: float = 10.0
    heartbeat_timeout: float = 5.0
    requeue: bool = True

    @classmethod
    def of(cls, config: Config | None) -> Limits:
        if config is None:
            return cls()
        return cls(config.recovery.grace, config.heartbeat.timeout, config.slurm.requeue)


def judge_slurm(facts: SlurmFacts, limits: Limits) -> Iterator[Finding]:
    if len(facts.missing) == len(SLURM_COMMANDS):
        advice = "here only `hpcft run` works; on a cluster, load the module that has sbatch and scontrol"
        yield Finding("warn", "slurm", "none of its commands is on PATH", advice)
        return
    if facts.missing:
        yield Finding(
            "fail", "slurm", f"not on PATH: {', '.join(facts.missing)}", "agents call them on the compute nodes, too"
        )
    if facts.settings is not None:
        yield from judge_settings(facts.settings, limits)
    elif "configuration source" in facts.trouble:
        advice = "here only `hpcft run` works; on a cluster, set SLURM_CONF to its slurm.conf"
        yield Finding("warn", "slurm", "its commands are here, but no slurm.conf", advice)
    elif facts.trouble:
        advice = "try `scontrol ping`; is SLURM_CONF right?"
        yield Finding("fail", "slurm", facts.trouble, advice)


def judge_settings(settings: Mapping[str, str], limits: Limits) -> Iterator[Finding]:
    version = settings.get("SLURM_VERSION", "")
    contained = "contain" in settings.get("PrologFlags", "").lower()
    if version and version_number(version) < (23, 2, 6) and contained:
        yield Finding(
            "warn", "slurm", f"{version}, which kills the extern step of every node when one node fails",
            "training survives in the steps of `hpcft agent`; processes adopted by ssh do not",
        )  # fmt: skip
    else:
        yield Finding("ok", "slurm", version or "of an unknown version")
    yield from _judge_requeue(settings, limits)
    yield from _judge_times(settings, limits)
    mode = settings.get("PreemptMode", "OFF").upper()
    if "SUSPEND" in mode or "GANG" in mode:
        yield Finding(
            "warn", "PreemptMode", f"{mode}: preempted jobs are stopped, not ended",
            "a stopped node's lease runs out, so its workers start again from the last checkpoint when it goes on",
        )  # fmt: skip
    elif "CANCEL" in mode:
        yield Finding(
            "warn", "PreemptMode", f"{mode}: preempted jobs are cancelled, not requeued",
            "a last checkpoint is made within the grace time; submit again to go on, or ask for PreemptMode=REQUEUE",
        )  # fmt: skip
    else:
        yield Finding("ok", "PreemptMode", mode)
    tracking = settings.get("ProctrackType", "")
    if tracking and "cgroup" not in tracking:
        yield Finding(
            "warn", "Proctrack", f"{tracking} may lose sight of processes",
            "hpcft ends its own; ask for proctrack/cgroup to be sure of everybody's",
        )  # fmt: skip


def _judge_requeue(settings: Mapping[str, str], limits: Limits) -> Iterator[Finding]:
    requeue = settings.get("JobRequeue", "")
    if limits.requeue and requeue == "0":
        yield Finding(
            "warn", "JobRequeue", "0: jobs are not requeued unless they ask for it",
            "keep `#SBATCH --requeue` in the batch script (slurm/train.sbatch has it)",
        )  # fmt: skip
    elif requeue:
        yield Finding("ok", "JobRequeue", requeue)
    ours = {int(code) for code in ExitCode if code not in (ExitCode.OK, ExitCode.REQUEUED)}
    for name in ("RequeueExit", "RequeueExitHold"):
        caught = sorted(ours & exit_codes(settings.get(name, "")))
        if caught:
            yield Finding(
                "warn", name, f"{settings[name]} includes {', '.join(map(str, caught))}, by which hpcft says: no retry",
                "such a job would be started again and again; see docs/exit-codes.md",
            )  # fmt: skip
        elif name in settings:
            yield Finding("ok", name, settings[name])


def exit_codes(text: str) -> set[int]:
    """The codes of a list such as `1,5-7`; `(null)` has none."""
    codes: set[int] = set()
    for part in text.split(","):
        if found := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part):
            codes.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return codes


def _judge_times(settings: Mapping[str, str], limits: Limits) -> Iterator[Finding]:
    kill = _seconds(settings.get("KillWait"))
    if kill is not None and kill <= limits.grace:
        yield Finding(
            "warn", "KillWait", f"{kill} s from SIGTERM to SIGKILL, recovery.grace is {human_duration(limits.grace)}",
            f"set recovery.grace below {kill}s, or the last checkpoint after scancel or a preemption is cut off",
        )  # fmt: skip
    elif kill is not None and kill < 30:
        yield Finding(
            "warn", "KillWait", f"only {kill} s from SIGTERM to SIGKILL",
            "if a checkpoint takes longer, steps since the last one are lost at a preemption: make them more often",
        )  # fmt: skip
    elif kill is not None:
        yield Finding("ok", "KillWait", f"{kill} s")
    dead = _seconds(settings.get("SlurmdTimeout"))
    silence = human_duration(limits.heartbeat_timeout)
    if dead is not None and 0 < dead < 4 * limits.heartbeat_timeout:
        yield Finding(
            "warn", "SlurmdTimeout", f"{dead} s, close to heartbeat.timeout ({silence})",
            "Slurm takes a node away before a cut network has had time to heal; ask for 300 s",
        )  # fmt: skip
    elif dead == 0:
        yield Finding(
            "warn", "SlurmdTimeout", "0: Slurm never gives up a dead node",
            "a job that lost a node ends only when hpcft or you end it",
        )  # fmt: skip
    elif dead is not None:
        yield Finding("ok", "SlurmdTimeout", f"{dead} s")


def _seconds(text: str | None) -> int | None:
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


# --- the run directory -----------------------------------------------------------------------------------------


NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "panfs", "wekafs",
        "pvfs2", "orangefs", "gfs2", "ocfs2", "afs", "9p", "glusterfs", "quobyte",
    }
)  # fmt: skip
_SHORT_LIVED = frozenset({"tmpfs", "ramfs"})


def judge_directory(root: str, facts: Mapping[str, Any], *, shared: bool) -> Iterator[Finding]:
    """`shared`: other nodes have to see it, too."""
    if "error" in facts:
        advice = "the mount is stuck, or its server is away: df, dmesg" if facts.get("silent") else "check run.root"
        yield Finding("fail", "run root", f"{root}: {facts['error']}", advice)
        return
    where = root if facts["there"] else f"{root} (to be made in {facts['existing']})"
    if not facts["directory"]:
        yield Finding("fail", "run root", f"{facts['existing']} is not a directory", "set run.root to a directory")
        return
    if "trouble" in facts:
        yield Finding("fail", "run root", f"{where} cannot be written: {facts['trouble']}", "set run.root elsewhere")
        return
    yield _judge_mount(where, facts["mount"], shared)
    yield _judge_room(facts["free"], facts["free_files"])
    sync = facts["sync_seconds"]
    detail = f"{human_duration(sync)} to make a small file durable"
    if sync > 1:
        advice = "terms and requeues wait for this; a run directory on a faster file system shortens recovery"
        yield Finding("warn", "fsync", detail, advice)
    else:
        yield Finding("ok", "fsync", detail)
    if not facts["rename"]:
        yield Finding("fail", "rename", "does not replace a file", "hpcft needs a POSIX file system: set run.root")
    elif facts["link"]:
        advice = "leadership is claimed by link(2): set run.root to a file system that has hard links"
        yield Finding("fail", "rename", f"works, but {facts['link']}", advice)
    else:
        yield Finding("ok", "rename", "rename(2) replaces, link(2) refuses an existing name")
    if not facts["private"]:
        advice = "the run's secret would be readable by others: set run.root to a file system with permissions"
        yield Finding("fail", "permissions", "mode 0600 is not kept", advice)
    skew = facts["skew_seconds"]
    if abs(skew) > 5:
        yield Finding(
            "warn", "clock", f"the file server's clock differs by {human_duration(abs(skew))}",
            "`hpcft status` judges by it whether a run is live: synchronise the clocks (chrony)",
        )  # fmt: skip
    else:
        yield Finding("ok", "clock", "agrees with the file server's")


def _judge_mount(where: str, mount: Sequence[Any] | None, shared: bool) -> Finding:
    if mount is None:
        return Finding("warn", "run root", f"{where}, on an unknown file system", "make sure that all nodes see it")
    kind, options = str(mount[1]), frozenset(mount[2])
    detail = f"{where}, on {kind}"
    if "soft" in options and kind.startswith("nfs"):
        advice = "a slow server then fails writes halfway: ask for a hard mount"
        return Finding("warn", "run root", f"{detail}, mounted soft", advice)
    if kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse") or not shared:
        if kind in _SHORT_LIVED:
            advice = "set run.root to a disk, or lose the run with the next reboot"
            return Finding("warn", "run root", f"{detail}, which is memory", advice)
        return Finding("ok", "run root", detail)
    advice = "set run.root to a directory that all nodes of the cluster share, unless this one is"
    return Finding("warn", "run root", f"{detail}, which looks local to this machine", advice)


def _judge_room(free: int, files: int | None) -> Finding:
    detail = f"{human_size(free)} free"
    if free < GIB // 4:
        return Finding("fail", "free space", detail, "checkpoints would fail: make room, or set run.root elsewhere")
    if files is not None and files < 1000:
        return Finding("fail", "free space", f"{detail}, but only {files} files", "make room for more files")
    if free < 10 * GIB:
        return Finding("warn", "free space", detail, "see that checkpoint.keep + 1 checkpoints fit")
    return Finding("ok", "free space", detail)


# --- memory ----------------------------------------------------------------------------------------------------


def judge_memory(facts: MemoryFacts) -> Iterator[Finding]:
    usable = min(facts.total, facts.limit) if facts.limit is not None else facts.total
    detail = human_size(usable) + (", the limit of the cgroup" if usable != facts.total else "")
    if not facts.memfd:
        yield Finding("fail", "memory", "memfd_create is refused", "the container's seccomp profile has to allow it")
    elif usable < GIB:
        advice = "a pool with torch takes 220 MiB and each worker more: ask for more memory (--mem)"
        yield Finding("warn", "memory", detail, advice)
    else:
        yield Finding("ok", "memory", detail)
    if facts.shm_free is None or facts.shm_free < GIB // 4:
        free = "is missing" if facts.shm_free is None else f"has {human_size(facts.shm_free)} free"
        advice = "NCCL and data loader processes need it: docker --shm-size, or a larger tmpfs"
        yield Finding("warn", "/dev/shm", free, advice)
    else:
        yield Finding("ok", "/dev/shm", f"{human_size(facts.shm_free)} free")
    if facts.open_files != -1 and facts.open_files < 4096:
        advice = "a leader holds several connections a node: raise the hard limit of nofile"
        yield Finding("warn", "open files", f"at most {facts.open_files}", advice)


# --- the node's address ----------------------------------------------------------------------------------------


def judge_address(facts: Mapping[str, Any], *, shared: bool) -> Iterator[Finding]:
    if "error" in facts:
        yield Finding("fail", "network", f"name lookup: {facts['error']}", "check /etc/resolv.conf and its servers")
        return
    if "trouble" in facts:
        advice = "check /etc/hosts and DNS: agents listen on the address that Slurm or the host name gives"
        yield Finding("fail" if shared else "warn", "network", facts["trouble"], advice)
        return
    detail = f"{facts['name']} is {facts['address']}, a port there can be bound and reached"
    slowest = max(facts["lookup_seconds"], facts["reverse_seconds"])
    if facts["address"].startswith("127.") or facts["address"] == "::1":
        grade: Grade = "warn" if shared else "ok"
        advice = "other nodes cannot reach that: give the host name its real address" if shared else ""
        yield Finding(grade, "network", detail, advice)
    elif slowest > 0.5:
        advice = "every connection of a TCPStore looks names up: add the nodes to /etc/hosts, or run nscd"
        yield Finding("warn", "network", f"{detail}; name lookup takes {human_duration(slowest)}", advice)
    else:
        yield Finding("ok", "network", detail)


# --- GPUs ------------------------------------------------------------------------------------------------------


def judge_gpus(facts: Mapping[str, Any], workers_per_node: int | None) -> Iterator[Finding]:
    if "error" in facts:
        yield Finding("fail", "GPUs", f"NVML: {facts['error']}", "the driver is in trouble: nvidia-smi, dmesg")
        return
    if "trouble" in facts:
        yield Finding("fail", "GPUs", f"NVML: {facts['trouble']}", "the driver is in trouble: nvidia-smi, dmesg")
        return
    if facts.get("lost"):
        advice = "drain the node: the administrator resets or replaces the GPU"
        yield Finding("fail", "GPUs", "; ".join(facts["lost"]), advice)
        return
    names = facts["names"]
    if not names and workers_per_node == 0:
        advice = "on nodes without GPUs set nodes.workers_per_node; fine on a login node"
        yield Finding("warn", "GPUs", "none here, and nodes.workers_per_node = 0 means one worker per GPU", advice)
    elif not names:
        yield Finding("ok", "GPUs", "none here: workers train on the CPU, over gloo")
    else:
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        yield Finding("ok", "GPUs", f"{kinds}, driver {facts['driver']}")
