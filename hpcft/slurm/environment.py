"""The allocation this process runs in, read from the environment: the only reader of SLURM_* variables.

A local cluster (`hpcft run`) describes itself with HPCFT_LOCAL_* variables and gives the same `Allocation`, so that
nothing above this module knows the difference but `kind`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from hpcft.errors import UnusableError, UsageError
from hpcft.slurm.nodelist import expand


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes a job was given, and this node's place among them."""

    kind: Literal["slurm", "local"]
    job_id: str
    restart_count: int
    node: str
    nodes: tuple[str, ...]
    address: str | None
    """Numeric, where it is given (local cluster); else resolved from the node's name."""
    gpus: tuple[str, ...] = ()
    """Entries of CUDA_VISIBLE_DEVICES, by position: indices relative to the cgroup, or UUIDs."""
    """Of the time limit, seconds since the epoch."""
    requeue_target: str = ""
    """What `scontrol requeue` is to be given: in an array `<array>_<task>`, or the whole array is requeued."""

    @property
    def node_index(self) -> int:
        return self.nodes.index(self.node)

    @property
    def start(self) -> str:
        """Names this start of the job: a requeued job has the same id and another restart count."""
        return f"{self.job_id}.{self.restart_count}"


def from_environment(environ: Mapping[str, str]) -> Allocation:
    """The allocation that `environ` describes.

    Raises:
        UsageError: there is none, or it is incomplete.
    """
    if "HPCFT_LOCAL_NODE" in environ:
        return Allocation(
            kind="local",
            job_id=environ["HPCFT_LOCAL_JOB"],
            restart_count=int(environ["HPCFT_LOCAL_RESTARTS"]),
            node=environ["HPCFT_LOCAL_NODE"],
            nodes=tuple(environ["HPCFT_LOCAL_NODES"].split(",")),
            address=environ["HPCFT_LOCAL_ADDRESS"],
            gpus=_gpus(environ),
        )
    try:
        job_id, nodelist = environ["SLURM_JOB_ID"], environ["SLURM_JOB_NODELIST"]
    except KeyError as error:
        raise UsageError(
            f"this is not inside a Slurm job: {error.args[0]} is not set",
            "submit with `sbatch slurm/train.sbatch` or `hpcft submit CONFIG`; `hpcft run CONFIG` needs no Slurm",
        ) from error
    nodes = expand(nodelist)
    node = environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    if node not in nodes:
        raise UsageError(
            f"this node calls itself {node}, which is not in the job's node list {nodelist}",
            "start the agents with srun, which sets SLURMD_NODENAME",
        )
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return Allocation(
        kind="slurm",
        job_id=job_id,
        restart_count=int(environ.get("SLURM_RESTART_COUNT", "0")),
        node=node,
        nodes=nodes,
        address=None,
        gpus=_gpus(environ),
        requeue_target=f"{array}_{task}" if array and task else job_id,
    )


def own_address(allocation: Allocation) -> str:
    """The one numeric address this node's agent binds to: where the other nodes reach it.

    That is the address of the node's name, unless /etc/hosts points the own name at the loopback interface, as Debian
    does (127.0.1.1); then it is the address that packets to another node leave from. Blocks on name resolution.

    Raises:
        UnusableError: the node's name does not resolve, or to loopback only.
    """
    if allocation.address is not None:
        return allocation.address
    own = _addresses(allocation.node)
    for address in own:
        if not ipaddress.ip_address(address).is_loopback:
            return address
    others = [node for node in allocation.nodes if node != allocation.node]
    if not others:
        return own[0]
    for peer in _addresses(others[0]):
        family = socket.AF_INET6 if ":" in peer else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((peer, 9))  # sends nothing, but chooses the way
            address = str(probe.getsockname()[0])
            if not ipaddress.ip_address(address).is_loopback:
                return address
    raise UnusableError(
        f"the name of this node, {allocation.node}, means {own[0]} here, where other nodes do not reach it",
        "give the node's own name its network address in /etc/hosts or DNS",
    )


def _addresses(node: str) -> list[str]:
    """Numeric, IPv4 first: what a name has of either may differ from node to node."""
    try:
        found = socket.getaddrinfo(node, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnusableError(
            f"the name of the node {node} has no address: {error}",
            "agents reach each other by the nodes' names; ask the administrator about /etc/hosts or DNS",
        ) from error
    return [str(address[0]) for _, _, _, _, address in sorted(found, key=lambda each: each[0] != socket.AF_INET)]


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(each for each in visible.split(",") if each and each != "NoDevFiles")
