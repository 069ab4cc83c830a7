"""A rank's share of the state: which pieces it is, and their bytes, for a file or for shared memory.

What is contiguous and on the CPU is written from the tensors' own memory; the rest is copied a slab at a time. So
`save_share` needs about `SLAB_BYTES` of memory, whatever the size of the state, and the state must not change until
it has returned.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

import hpcft
from hpcft import durable
from hpcft.checkpoint.boxes import Box
from hpcft.checkpoint.image import Image, lay_out
from hpcft.checkpoint.layout import FORMAT
from hpcft.checkpoint.manifest import Metric, ShardReport
from hpcft.checkpoint.pieces import CUT_BYTES, TensorShape, index_digest, owed
from hpcft.checkpoint.tree import FlatState
from hpcft.checkpoint.write import Plan, Words, write_share
from hpcft.ids import Rank

SLAB_BYTES = 64 * 1024 * 1024
"""Copied at a time, of tensors whose bytes are not at hand."""


def save_share(
    root: Path,
    name: str,
    nonce: str,
    rank: Rank,
    world_size: int,
    flat: FlatState,
    *,
    pinned: AbstractSet[str] = frozenset(),
    position: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    cut_above: int = CUT_BYTES,
    before: durable.Before = lambda written: None,
) -> ShardReport:
    """Writes what `rank` owes to the checkpoint `name` without a copy in memory, all of it durable on return.

    `flat` is the whole state, the same on every rank but for the parts of sharded tensors; `pinned` are the tensors
    that count on rank 0 alone, such as buffers. `position` is the data position, `metrics` what the program has
    reported; both are taken from rank 0. `before` is called as in `durable.write_file`.
    SaveError: nothing of it counts; the next save has another name.
    """
    plan, image = plan_share(flat.index(), flat.boxes, rank, world_size, pinned, cut_above)
    words = words_of(rank, flat, position, metrics)

    def store(path: Path) -> durable.Written:
        return durable.write_file(path, content(flat, image), before=before)

    return write_share(root, name, nonce, plan, words, store)


def plan_share(
    index: Mapping[str, TensorShape],
    boxes: Mapping[str, Box],
    rank: Rank,
    world_size: int,
    pinned: AbstractSet[str] = frozenset(),
    cut_above: int = CUT_BYTES,
) -> tuple[Plan, Image]:
    """What `rank` owes of a state with this index, of which it holds these boxes of sharded tensors; and its image."""
    image = lay_out(owed(index, boxes, rank, world_size, pinned, cut_above))
    return Plan(rank, world_size, index_digest(index), image.placed, image.size), image


def content(flat: FlatState, image: Image) -> Iterator[durable.Buffer]:
    """The bytes of the image, in order."""
    yield image.header
    for placed in image.placed:
        yield from _bytes(flat.part(placed.piece))


def words_of(
    rank: Rank, flat: FlatState, position: Mapping[str, Any] | None, metrics: Mapping[str, Metric] | None = None
) -> Words:
    """What `rank` says beside its tensors."""
    if rank != 0:
        return Words()
    versions = {
        "hpcft": hpcft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return Words(orjson.dumps({"format": FORMAT, "state": flat.values}), position, versions, metrics)


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel() == 0:
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        yield raw(tensor)
    elif tensor.nbytes <= SLAB_BYTES:
        yield raw(tensor.cpu().resolve_conj().resolve_neg().contiguous())
    elif tensor.shape[0] == 1:
        yield from _bytes(tensor[0])
    else:
        rows = tensor.shape[0]
        at_once = max(1, SLAB_BYTES * rows // tensor.nbytes)
        for start in range(0, rows, at_once):
            yield from _bytes(tensor.narrow(0, start, min(at_once, rows - start)))


def raw(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, of at least one element."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array.data
