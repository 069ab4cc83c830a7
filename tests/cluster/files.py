"""The files of a test cluster: its configuration, and which directories its machines may see."""

from __future__ import annotations

import secrets
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
HEAD = "head"
USER, UID = "hpcft-test", 64_777
"""The ordinary user of the cluster; exists on its machines only."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a test may choose. Times in seconds."""

    nodes: int = 4
    gpus: int = 0
    """Per node; made of /dev/null."""
    slurmd_timeout: int = 60
    """Silence after which Slurm gives a node up (it notices up to a third later). Production: 300."""
    kill_wait: int = 5
    """From SIGTERM to SIGKILL (Slurm uses at least 5). Production: 30."""
    hold: int = 5
    """How long a requeued job is held, plus 1. Production: 120."""
    slurm_options: tuple[str, ...] = ()
    """Further lines of slurm.conf, `PreemptMode=REQUEUE` say."""


def node_name(index: int) -> str:
    return f"node{index}" if index else HEAD


def address(index: int) -> str:
    return f"{NETWORK}.{10 + index}" if index else f"{NETWORK}.1"


def write(directory: Path, size: Size) -> None:
    """Lay the cluster out below `directory`."""
    etc = directory / "etc"
    slurm = etc / "slurm"
    for path in (slurm, directory / "state", directory / "munge", directory / "log", directory / "dev"):
        path.mkdir(parents=True)
    for index in range(1, size.nodes + 1):
        (directory / node_name(index) / "spool").mkdir(parents=True)
        (directory / node_name(index) / "tmp").mkdir()
        (directory / node_name(index) / "tmp").chmod(0o1777)
    (directory / "state").chmod(0o700)
    key = directory / "munge" / "key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(1024))
    machines = range(size.nodes + 1)
    hosts = [f"{address(index)} {node_name(index)}" for index in machines]
    (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    home = directory / "home"
    passwd = Path("/etc/passwd").read_text()
    (etc / "passwd").write_text(f"{passwd}{USER}:x:{UID}:{UID}::{home}:/bin/bash\n")
    (etc / "group").write_text(f"{Path('/etc/group').read_text()}{USER}:x:{UID}:\n")
    (slurm / "slurm.conf").write_text(slurm_conf(directory, size))
    (slurm / "gres.conf").write_text(gres_conf(directory, size))


def slurm_conf(directory: Path, size: Size) -> str:
    gres = f" Gres=gpu:{size.gpus}" if size.gpus else ""
    nodes = [
        f"NodeName={node_name(index)} NodeAddr={address(index)} CPUs=8 RealMemory=8000{gres} State=UNKNOWN"
        for index in range(1, size.nodes + 1)
    ]
    return f"""\
ClusterName=lab
SlurmctldHost={HEAD}({address(0)})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket,cred_expire={size.hold}
StateSaveLocation={directory}/state
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile={directory}/state/slurmctld.pid
SlurmdPidFile={directory}/%n/slurmd.pid
SlurmctldLogFile={directory}/log/slurmctld
SlurmdLogFile={directory}/log/slurmd-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
JobRequeue=1
ReturnToService=2
SlurmdTimeout={size.slurmd_timeout}
MessageTimeout=5
KillWait={size.kill_wait}
MinJobAge=3600
InactiveLimit=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{"".join(f"{line}{chr(10)}" for line in size.slurm_options)}\
{chr(10).join(nodes)}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def gres_conf(directory: Path, size: Size) -> str:
    devices = f"{directory}/dev/gpu[0-{size.gpus - 1}]"
    names = [f"NodeName={node_name(index)} Name=gpu AutoDetect=off" for index in range(1, size.nodes + 1)]
    return "".join(f"{name} File={devices}\n" for name in names) if size.gpus else ""


def closed_top(path: Path) -> Path | None:
    """The uppermost directory above `path` that other users may not enter."""
    for parent in reversed(path.parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            return parent
    return None


def to_open(directory: Path) -> list[Path]:
    """What an ordinary user of the cluster must reach: the project, its interpreter, the cluster's files."""
    wanted = {Path(path).resolve() for path in (REPOSITORY, sys.prefix, sys.base_prefix, directory)}
    return sorted(path for path in wanted if not any(parent in wanted for parent in path.parents))
