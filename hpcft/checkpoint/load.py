"""From a checkpoint to tensors: each byte is read once, to where it belongs, and digested on the way.

The manifest says where each piece lies, so neither headers nor other files are looked at. Of a sharded tensor a rank
wants a box, and reads the chunks that have bytes of it, whichever world has written them. Bytes that lie together
both in the file and in memory are read to where they belong, many tensors by one system call; others (a tensor cut
into columns) go through a scratch buffer. So loading takes the memory of what is loaded, and 16 MiB for each thread.

What does not match its digest raises before anything is returned: no caller sees half a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import torch
from torch import Tensor

from hpcft.checkpoint.boxes import Box
from hpcft.checkpoint.files import ALONE, Peers, read_files
from hpcft.checkpoint.image import Placed
from hpcft.checkpoint.layout import STATE, CheckpointDamagedError, Damage
from hpcft.checkpoint.needs import Contiguous, Need, need_of
from hpcft.checkpoint.pieces import TensorShape
from hpcft.checkpoint.read import read_manifest
from hpcft.checkpoint.tree import DTYPES, FlatState, Json, unflatten
from hpcft.ids import RunId

Fetch: TypeAlias = Callable[[Sequence[Sequence[Need]], bool], None]
"""Puts what is needed of each image where it belongs; with True, all the rest of them is verified as well."""


def load(directory: Path, *, run: RunId | None = None) -> FlatState:
    """The state of a committed checkpoint, on the CPU, whole.

    Every byte is verified. CheckpointDamagedError: the file, the chunk and the tensors it costs; or it is not one of
    `run`. NotFoundError: no such checkpoint.
    """
    return SavedState.open(directory, run).read()


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state of which no tensor has been read yet."""

    name: str
    """For messages: which one it is."""
    index: Mapping[str, TensorShape]
    values: Json
    images: tuple[Sequence[Placed], ...]
    """What lies where in the files, or copies in memory, that hold it."""
    fetch: Fetch

    @classmethod
    def open(cls, directory: Path, run: RunId | None = None, peers: Peers = ALONE) -> SavedState:
        """That of a committed checkpoint: reads the manifest and the values. Errors as of `load`."""
        manifest, _ = read_manifest(directory, run)
        entry = manifest.file(STATE)
        assert entry is not None, "a manifest without it is refused"
        data = bytearray(entry.size)
        read_files(directory, [entry], [[Contiguous(0, entry.size, memoryview(data))]], True)
        try:
            values = orjson.loads(data)["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamagedError(directory, Damage(STATE, f"it holds no state: {error!r}")) from error
        shards = [entry for entry in manifest.files if entry.name != STATE]
        images = tuple(entry.tensors for entry in shards)
        fetch = partial(read_files, directory, shards, peers=peers)
        return cls(directory.name, manifest.tensors(), values, images, fetch)

    def outline(self) -> dict[str, Any]:
        """The state, with tensors that have a shape and a type but no content (`meta`)."""
        tensors = {
            name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
            for name, tensor in self.index.items()
        }
        return unflatten(FlatState(tensors, self.values))

    def read(self, boxes: Mapping[str, Box] | None = None, places: Mapping[str, Tensor] | None = None) -> FlatState:
        """The state on the CPU: of tensors that are in `boxes` that part, the others whole. Errors as of `load`.

        Without `boxes` every byte is verified; with them, every byte of the chunks that are read. What has a place in
        `places` is read to there, and that tensor is the state's: contiguous, of its shape and type, on the CPU. After
        an error, it may have been written.
        """
        boxes = boxes or {}
        places = places or {}
        wanted = {
            name: box.region if (box := boxes.get(name)) is not None else ((0,) * len(tensor.shape), tensor.shape)
            for name, tensor in self.index.items()
        }
        tensors = {
            name: places[name] if name in places else torch.empty(wanted[name][1], dtype=DTYPES[tensor.dtype])
            for name, tensor in self.index.items()
        }
        needs = [
            [
                need
                for item in placed
                if (need := need_of(item, wanted[item.piece.name], tensors[item.piece.name])) is not None
            ]
            for placed in self.images
        ]
        self.fetch(needs, not boxes)
        return FlatState(tensors, self.values, boxes)
