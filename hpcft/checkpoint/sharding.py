"""Sharded tensors (torch's DTensor, which FSDP2 makes of parameters): which part of the whole a rank holds.

A DTensor is a mesh of ranks and, for each dimension of the mesh, a placement: cut along a dimension of the tensor,
or the same on all ranks. From these alone follows which box of the whole tensor the local part is, on every rank
without asking another. Where several ranks hold the same part (replicas: HSDP), one of them writes it; which one
depends on the tensor's name, so that the bytes are spread over the replicas. A mesh of some ranks only (a parameter
that tensor parallelism leaves alone) has others beside it that hold the same; the one with rank 0 writes.

DTensor is imported only where there is one already: who trains without has nothing to wait for.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcft.checkpoint.boxes import Box, Runs, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MODULE = "torch.distributed.tensor"


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How a tensor lies on the ranks: what makes a DTensor of a local part."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    """Of the whole tensor."""

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold different parts; else each holds all of it."""
        return any(
            not placement.is_replicate() and self.mesh.size(dimension) > 1
            for dimension, placement in enumerate(self.placements)
        )

    def box(self, name: str) -> Box:
        """This rank's part of the tensor `name`. ValueError says why it is no box of the whole."""
        coordinates = self.mesh.get_coordinate()
        if coordinates is None:
            raise ValueError("lies on a mesh that this rank has no part in")
        first = self.mesh.size() == dist.get_world_size() or bool((self.mesh.mesh == 0).any())
        runs: list[Runs] = [((0, length),) for length in self.shape]
        replica, replicas = 0, 1
        origin = True
        for dimension, groups in _cuts(self.placements, tuple(self.mesh.shape)):
            placement, size, at = self.placements[dimension], self.mesh.size(dimension), coordinates[dimension]
            if placement.is_replicate():
                replica, replicas = replica * size + at, replicas * size
            elif _is_cut(placement):
                runs[placement.dim] = shard(runs[placement.dim], size, at, groups)
                origin = origin and at == 0
            else:
                raise ValueError(f"has the placement {placement!r}")
        if any(len(each) > 1 for each in runs):
            raise ValueError(f"has a local part that is not in one piece (placements {self.placements})")
        extent = tuple(sum(stop - start for start, stop in each) for each in runs)
        # Of a tensor without any element, one rank writes that it is there.
        something = origin if 0 in self.shape else 0 not in extent
        return Box(
            shape=tuple(self.shape),
            offsets=tuple(each[0][0] if each else 0 for each in runs),
            extent=extent,
            writes=first and something and zlib.crc32(name.encode()) % replicas == replica,
        )

    def join(self, local: Tensor) -> Tensor:
        """The DTensor of which `local` is this rank's part. No communication."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)


def _is_cut(placement: Any) -> bool:
    return type(placement).__name__ in ("Shard", "_StridedShard")


def _cuts(placements: Sequence[Any], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Dimensions of the mesh in the order in which they cut a tensor, and into how many groups each cuts it first.

    FSDP2 cuts what tensor parallelism has left to a rank, and calls that a `_StridedShard`: its split factor is the
    number of parts that those to its right have made. To take the same part of each of so many groups is the same where
    lengths divide, and only there; it is what a split factor of another number means.
    """
    order: list[tuple[int, int]] = []
    for dimension, placement in reversed(list(enumerate(placements))):
        groups = int(getattr(placement, "split_factor", 1))
        to_the_right = zip(placements[dimension + 1 :], sizes[dimension + 1 :], strict=True)
        if groups > 1 and groups == prod(n for each, n in to_the_right if _is_cut(each) and each.dim == placement.dim):
            order.append((dimension, 1))
        else:
            order.insert(0, (dimension, groups))
    return order


def sharding_is_used() -> bool:
    """Whether there can be a DTensor in this process."""
    return _MODULE in sys.modules


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def split(sharded: Tensor) -> tuple[Layout, Tensor]:
    """A DTensor's layout, and its local part, not copied."""
    tensor: Any = sharded
    with torch.no_grad():  # the part itself, and not a function of it: half the time
        local: Tensor = tensor.to_local()
    return Layout(tensor.device_mesh, tuple(tensor.placements), tensor.shape), local
