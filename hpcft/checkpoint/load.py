"""From a checkpoint to tensors: each byte is read once, to where it belongs, and digested on the way.

The manifest says where each piece lies, so neither headers nor other files are looked at. A chunk is scattered
over the tensors it holds by one system call; a piece that is not contiguous in its tensor goes through a copy.
What does not match its digest raises before anything is returned: no caller sees half a state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import orjson
import torch
from torch import Tensor

from hpcft.checkpoint.layout import STATE, CheckpointDamagedError, Damage
from hpcft.checkpoint.manifest import FileEntry
from hpcft.checkpoint.read import chunk_damage, damage_of, read_chunk, read_manifest, stat_damage
from hpcft.checkpoint.share import cut_out, raw
from hpcft.checkpoint.tree import DTYPES, FlatState
from hpcft.durable import CHUNK_BYTES
from hpcft.ids import RunId


def load(directory: Path, *, run: RunId | None = None) -> FlatState:
    """The state of a committed checkpoint, on the CPU.

    Every byte is verified. CheckpointDamagedError: the file, the chunk and the tensors it costs; or it is not one of
    `run`. NotFoundError: no such checkpoint.
    """
    manifest, _ = read_manifest(directory, run)
    tensors = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]) for name, tensor in manifest.tensors().items()
    }
    values = b""
    for entry in manifest.files:
        if entry.name == STATE:
            values = _read_whole(directory, entry)
        else:
            _read_pieces(directory, entry, tensors)
    try:
        state = orjson.loads(values)["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamagedError(directory, Damage(STATE, f"it holds no state: {error!r}")) from error
    return FlatState(tensors, state)


def _read_whole(directory: Path, entry: FileEntry) -> bytes:
    data = bytearray(entry.size)
    _read(directory, entry, [(0, entry.size, memoryview(data))])
    return bytes(data)


def _read_pieces(directory: Path, entry: FileEntry, tensors: dict[str, Tensor]) -> None:
    spans: list[tuple[int, int, memoryview]] = []
    detours: list[tuple[Tensor, Tensor]] = []
    for item in entry.tensors:
        if item.begin == item.end:
            continue
        place = cut_out(tensors[item.piece.name], item.piece)
        if not place.is_contiguous():
            detour = torch.empty_like(place, memory_format=torch.contiguous_format)
            detours.append((place, detour))
            place = detour
        spans.append((item.begin, item.end, raw(place)))
    _read(directory, entry, spans)
    for place, detour in detours:
        place.copy_(detour)


def _read(directory: Path, entry: FileEntry, spans: list[tuple[int, int, memoryview]]) -> None:
    """Fills each span (begin, end, memory) from the file; bytes outside of all spans are only verified."""
    scratch = memoryview(bytearray(min(CHUNK_BYTES, entry.size)))
    try:
        fd = os.open(directory / entry.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if damage := stat_damage(entry, os.fstat(fd)):
                raise CheckpointDamagedError(directory, damage)
            for chunk, buffers in _scatter(entry, spans, scratch):
                length = read_chunk(fd, buffers, chunk * CHUNK_BYTES)
                if found := chunk_damage(entry, chunk, length, buffers):
                    raise CheckpointDamagedError(directory, found)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointDamagedError(directory, damage_of(entry.name, error, directory)) from error


def _scatter(
    entry: FileEntry, spans: list[tuple[int, int, memoryview]], scratch: memoryview
) -> Iterator[tuple[int, list[memoryview]]]:
    """For each chunk of the file: where its bytes go, in order."""
    position = 0
    for chunk in range(len(entry.digests)):
        reached, end = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, entry.size)
        buffers: list[memoryview] = []
        spare = 0
        while reached < end:
            while position < len(spans) and spans[position][1] <= reached:
                position += 1
            begin, stop, memory = spans[position] if position < len(spans) else (end, end, scratch)
            if begin > reached:
                gap = min(begin, end) - reached
                # Gaps of one chunk get scratch memory of their own: the digest is taken when all of it is read.
                buffers.append(scratch[spare : spare + gap])
                spare += gap
                reached += gap
            else:
                part = memory[reached - begin : min(stop, end) - begin]
                buffers.append(part)
                reached += len(part)
        yield chunk, buffers
