"""What a rank writes: its share of the tensors as one safetensors file; rank 0 also everything that is no tensor.

The bytes go from the tensors' own memory to the file, digested on the way; what is not contiguous or not on the CPU
is copied a slab at a time. So saving needs about `SLAB_BYTES` of memory, whatever the size of the state.
The state must not change until `save_share` has returned.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

import hpcft
from hpcft import durable
from hpcft.checkpoint.image import lay_out
from hpcft.checkpoint.layout import FORMAT, STATE, shard_name, sidecar_name, staging_name
from hpcft.checkpoint.manifest import FileEntry, ShardReport, Sidecar
from hpcft.checkpoint.pieces import CUT_BYTES, Piece, assign, index_digest
from hpcft.checkpoint.tree import FlatState
from hpcft.errors import UnusableError
from hpcft.ids import Rank

_MEND = "training goes on with the older checkpoints; look at free space, quota and permissions"
SLAB_BYTES = 64 * 1024 * 1024
"""Copied at a time, of tensors whose bytes are not at hand."""


class SaveError(UnusableError):
    """A rank's files could not be made durable. The older checkpoints are untouched, training can go on."""


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
    cut_above: int = CUT_BYTES,
) -> ShardReport:
    """Writes what `rank` owes to the checkpoint `name`, all of it durable on return.

    `flat` is the whole state, the same on every rank; `pinned` are the tensors that count on rank 0 alone, such as
    buffers. `position` is the data position, taken from rank 0. SaveError: nothing of it counts; the next save has
    another name.
    """
    index = flat.index()
    share = assign(index, world_size, pinned, cut_above)[rank]
    staging = root / staging_name(name, nonce)
    try:
        if short := _shortage(root, sum(piece.nbytes for piece in share)):
            raise SaveError(f"rank {rank} did not begin to write its part of {name}: {short}", _MEND)
        durable.make_directory(staging)
        files = _write_files(staging, rank, world_size, flat, share)
        mine = (position, _versions()) if rank == 0 else (None, {})
        sidecar = Sidecar(files, *mine).to_bytes()
        durable.write_file(staging / sidecar_name(rank, world_size), [sidecar])
    except OSError as error:
        why = f"{error.strerror or error} ({error.filename or staging})"
        raise SaveError(f"rank {rank} could not write its part of {name}: {why}", _MEND) from error
    return ShardReport(
        name=name,
        nonce=nonce,
        rank=rank,
        world_size=world_size,
        index=index_digest(index),
        sidecar=durable.digest(sidecar),
        size=sum(entry.size for entry in files),
    )


def _shortage(root: Path, needed: int) -> str:
    """Why so many bytes would not fit; empty where they would. Quotas show here on some file systems only."""
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if needed > free:
        return f"it has {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free ({root})"
    if found.f_files and not found.f_favail:
        return f"no more files can be created, there are no free inodes ({root})"
    return ""


def _write_files(
    staging: Path, rank: Rank, world_size: int, flat: FlatState, share: Sequence[Piece]
) -> tuple[FileEntry, ...]:
    image = lay_out(share)

    def content() -> Iterator[durable.Buffer]:
        yield image.header
        for placed in image.placed:
            yield from _bytes(_cut_out(flat.tensors[placed.piece.name], placed.piece))

    shard = shard_name(rank, world_size)
    written = durable.write_file(staging / shard, content())
    entry = FileEntry(shard, written.size, written.digests, image.placed)
    if rank != 0:
        return (entry,)
    values = orjson.dumps({"format": FORMAT, "state": flat.values})
    written = durable.write_file(staging / STATE, [values])
    return (FileEntry(STATE, written.size, written.digests), entry)


def _versions() -> dict[str, str]:
    return {
        "hpcft": hpcft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _cut_out(tensor: Tensor, piece: Piece) -> Tensor:
    for dimension, (start, length) in enumerate(zip(piece.offsets, piece.extent, strict=True)):
        tensor = tensor.narrow(dimension, start, length)
    return tensor


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
