"""The process group of a generation: formed over the generation's own keys of the store, left without hanging.

Each generation has a prefix of its own, so that nobody dials the address of a dead peer (in a shared store, restarts
with four workers met 1 time in 18). The collectives run over NCCL between GPUs and over gloo between CPUs.

gloo listens at the address that the machine's host name resolves to, which may be another machine's, or loopback
only; it takes a network interface instead, so the one that carries the node's own address is named to it.
A process that trains alone forms a group of one, so that collectives of the user's work there, too.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from datetime import timedelta

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from hpcft.errors import UsageError
from hpcft.worker.spec import WorkerSpec

_CONNECT_SECONDS = 60.0
_INTERFACE = "GLOO_SOCKET_IFNAME"


def choose_device(spec: WorkerSpec) -> torch.device:
    """The device of this rank, made current.

    Every process of the node sees all its GPUs (peers copy directly between them); its own is the one at the
    position of `spec.device` in CUDA_VISIBLE_DEVICES.
    """
    if spec.alone:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if spec.device is None:
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = visible.index(spec.device) if spec.device in visible else spec.local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def form(spec: WorkerSpec, device: torch.device) -> None:
    """Forms the default process group, which every rank of the generation has to do.

    UsageError: there is one already. DistNetworkError, DistStoreError: the others cannot be reached in time.
    """
    if dist.is_initialized():
        raise UsageError(
            "a process group exists already when hpcft.main is called",
            "leave `init_process_group` out: hpcft forms a group for every generation",
        )
    if interface := interface_of(spec.address):
        os.environ.setdefault(_INTERFACE, interface)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=_store(spec),
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timedelta(seconds=spec.group_timeout),
        device_id=device if device.type == "cuda" and not spec.alone else None,
    )


def leave(seconds: float = 10.0) -> bool:
    """Leaves the group after the last collective. False: it did not end in time, and a thread is stuck in it."""
    if not dist.is_initialized():
        return True
    thread = threading.Thread(target=dist.destroy_process_group, name="hpcft-leave-group", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def interface_of(address: str) -> str | None:
    """The network interface that carries this address of the machine; None: none does."""
    wanted = ipaddress.ip_address(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            try:
                found = ipaddress.ip_address(entry.address.partition("%")[0])
            except ValueError:  # a hardware address
                continue
            # All of 127.0.0.0/8 is this machine, though only 127.0.0.1 is listed.
            if found == wanted or (found.is_loopback and wanted.is_loopback and found.version == wanted.version):
                return str(name)
    return None


def _store(spec: WorkerSpec) -> Store:
    if spec.store is None:
        return HashStore()
    host, port = spec.store
    connect = timedelta(seconds=min(_CONNECT_SECONDS, spec.group_timeout))
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=connect)
    store.set_timeout(timedelta(seconds=spec.group_timeout))
    return PrefixStore(spec.store_prefix, store)
