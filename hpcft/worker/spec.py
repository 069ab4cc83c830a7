"""What a worker is told at its start, and how it ends: its side of the contract with agent and pool.

The specification is JSON. A forked worker has it in memory. An exec'd one finds it in its environment and takes it out
before its program begins: what that starts, data loaders and other programs, must not take itself for this worker. A
plain command gets it in its environment, too, since a wrapper may stand before a program that calls `hpcft.main`. Keys
that are not known here belong to others (the pool reads which program to run), or to a newer agent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from hpcft.errors import HpcftError, UsageError
from hpcft.ids import Generation, Rank, RunId, Step

SPEC_VARIABLE = "HPCFT_WORKER_SPEC"

STATUS_FAILED = 1
STATUS_FENCED = 113
STATUS_DAMAGED = 114
STATUS_STOPPED = 115
STATUS_UNREADABLE = 116
STATUS_FORGOTTEN = 117
"""Exit statuses of a worker, which the agent reads too; 0: the training function has returned."""


class SpecError(HpcftError):
    """The specification in the environment cannot be understood."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A node with the shares of these ranks of the world that made them; `source` is the first rank there now."""

    ranks: range
    source: Rank


@dataclass(frozen=True, slots=True)
class Restore:
    """The state to start from: a checkpoint, or what would be one, from memory."""

    step: Step
    directory: Path
    memory: tuple[Holder, ...] = ()
    """Who has it in memory. Empty: it is read from the directory."""
    local: bool = False
    """Every rank has all of it on its own node."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker of one generation. The defaults are those of a process that trains alone."""

    rank: Rank = Rank(0)
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    generation: Generation = Generation(0)
    nonce: str = ""
    run: RunId | None = None
    """Which run this is; None: alone."""
    run_directory: Path | None = None
    """None: alone, without a run directory: nothing is saved."""
    store: tuple[str, int] | None = None
    """Address and port of the generation's TCPStore; None: alone."""
    store_prefix: str = ""
    address: str = "127.0.0.1"
    """This node's own numeric address: where its part of the process group listens."""
    group_timeout: float = 600.0
    restore: Restore | None = None
    seed: int = 0
    save_every: int | None = None
    """Steps between two checkpoints; None: only when the agent asks."""
    copy_every: int | None = None
    """Steps between two copies that are kept in memory; None: only when the agent asks."""
    copies: bool = False
    """A save is a copy into shared memory, and the agent writes; else this rank writes, and training waits."""
    bandwidth: float | None = None
    """Bytes per second that this rank writes at most, where it writes itself; None: as many as it can."""
    compare_every: int = 0
    """With every so many copies a rank compares what another one has; 0: never."""
    waits: bool = False
    """A save that finds no memory free waits for it; else it is left out."""
    needs_copies: bool = False
    """Without memory for copies there is no training."""
    ledger: bool = False
    loader_workers: int | None = None
    prefetch: int | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    """The `[train]` table of the configuration."""
    device: str | None = None
    """Entry of CUDA_VISIBLE_DEVICES; None: this rank has no GPU."""
    slot: int = 0
    page_fd: int | None = None
    control_fd: int | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no agent."""
        return self.page_fd is None

    @classmethod
    def parse(cls, text: str | bytes) -> WorkerSpec:
        """SpecError: something that a worker cannot do without is missing or of the wrong type."""
        try:
            spec = orjson.loads(text)
            restore = spec["restore"]
            data = spec["data"]
            return cls(
                rank=Rank(int(spec["rank"])),
                world_size=int(spec["world_size"]),
                local_rank=int(spec["local_rank"]),
                local_world_size=int(spec.get("local_world_size", 1)),
                generation=Generation(int(spec["generation"])),
                nonce=str(spec["nonce"]),
                run=RunId(str(spec["run_id"])),
                run_directory=Path(spec["run_dir"]),
                store=(str(spec["master_addr"]), int(spec["master_port"])),
                store_prefix=str(spec["store_prefix"]),
                address=str(spec["address"]),
                group_timeout=float(spec["group_timeout"]),
                restore=None if restore is None else _restore(restore),
                seed=int(spec["seed"]),
                save_every=spec["checkpoint"]["every_steps"],
                copy_every=spec["checkpoint"].get("copy_steps"),
                copies=bool(spec["checkpoint"].get("copies", False)),
                bandwidth=spec["checkpoint"].get("bandwidth"),
                compare_every=int(spec["checkpoint"].get("compare_every", 0)),
                waits=bool(spec["checkpoint"].get("waits", False)),
                needs_copies=bool(spec["checkpoint"].get("needs_copies", False)),
                ledger=bool(data["ledger"]),
                loader_workers=data["workers"],
                prefetch=data["prefetch"],
                train=spec["train"],
                device=spec["device"],
                slot=int(spec["slot"]),
                page_fd=int(spec["page_fd"]),
                control_fd=int(spec["control_fd"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(
                f"the worker's specification in {SPEC_VARIABLE} cannot be understood: {error!r}",
                "agent and worker must come from the same installation of hpcft",
            ) from error


def _restore(found: Mapping[str, Any]) -> Restore:
    memory = tuple(
        Holder(range(first, first + count), Rank(source)) for first, count, source in found.get("memory", ())
    )
    return Restore(Step(found["step"]), Path(found["directory"]), memory, bool(found.get("local", False)))


_held: tuple[int, bytes] | None = None
"""The process that was told, and what."""


def hold_spec(spec: Mapping[str, Any]) -> None:
    """Keep the specification in memory, for `take_spec` in this process, and not in those that it forks."""
    global _held
    _held = os.getpid(), orjson.dumps(dict(spec))


def take_spec(environment: MutableMapping[str, str]) -> WorkerSpec:
    """What this process was told, taken from memory or from `environment`; else that of a process that trains alone.

    UsageError: another launcher has started this as one of several.
    """
    global _held
    text = _held[1] if _held is not None and _held[0] == os.getpid() else environment.pop(SPEC_VARIABLE, None)
    _held = None
    if text is not None:
        spec = WorkerSpec.parse(text)
        for descriptor in (spec.page_fd, spec.control_fd):
            if descriptor is not None:
                os.set_inheritable(descriptor, False)  # a command got them inheritable; its children must not
        return spec
    others = environment.get("WORLD_SIZE", "1")
    if others != "1":
        raise UsageError(
            f"another launcher (torchrun?) has started this program as one of {others} (WORLD_SIZE), "
            "and hpcft.main would train as often, each alone",
            "start it with `hpcft run` or `hpcft submit`, or by itself as `python train.py`",
        )
    return WorkerSpec()
