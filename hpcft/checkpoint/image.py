"""The image of a shard: a complete safetensors file, whether it lies in memory or on disk.

Eight bytes with the header's length, the header (JSON, padded with spaces so that the tensors start at a multiple
of 4096), then the tensors, largest element type first: so each is aligned to its type and there are no holes. The
header names, under ``__metadata__``, the place of each piece within its tensor the way torch's distributed
checkpoint does (`DCP_SHARDING_INFO`), so that stock readers take these files as their own.

The header depends on the pieces alone, not on step or run: the same state makes the same bytes, which is what
comparing replicas and writing the header once per arena need.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from hpcft.checkpoint.pieces import DTYPE_BYTES, Piece

ALIGNMENT = 4096
"""Of the first tensor: what O_DIRECT and a memory map want."""

HEADER_LIMIT = 100_000_000
"""safetensors refuses longer headers."""

PLACES = "DCP_SHARDING_INFO"
"""In the header's metadata: where each piece begins in its tensor."""

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece and where its bytes are, counted from the start of the file."""

    piece: Piece
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Image:
    header: bytes
    """From the first byte of the file to the first tensor."""
    placed: tuple[Placed, ...]
    """In the order of the file, without holes."""

    @property
    def size(self) -> int:
        return self.placed[-1].end if self.placed else len(self.header)


def lay_out(pieces: Iterable[Piece]) -> Image:
    """Where each piece goes. At most one piece of a tensor; ValueError when there are too many for one file."""
    ordered = sorted(pieces, key=lambda piece: (-DTYPE_BYTES[piece.dtype], piece.name))
    if len({piece.name for piece in ordered}) != len(ordered):
        raise ValueError("two pieces of one tensor in one file")
    offsets = {piece.name: {"saved_offsets": piece.offsets} for piece in ordered}
    table: dict[str, object] = {"__metadata__": {PLACES: orjson.dumps(offsets).decode(), "format": "pt"}}
    spans = []
    reached = 0
    for piece in ordered:
        spans.append((reached, reached + piece.nbytes))
        table[piece.name] = {"dtype": piece.dtype, "shape": piece.extent, "data_offsets": spans[-1]}
        reached += piece.nbytes
    text = orjson.dumps(table)
    text += b" " * (-(_LENGTH.size + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"{len(ordered)} tensors are too many for one file: its header has {len(text)} bytes")
    header = _LENGTH.pack(len(text)) + text
    start = len(header)
    placed = tuple(Placed(piece, start + a, start + b) for piece, (a, b) in zip(ordered, spans, strict=True))
    return Image(header, placed)


def header_length(start: bytes) -> int:
    """Length of the whole header, from the first 8 bytes of a file. ValueError: it cannot be one."""
    if len(start) < _LENGTH.size:
        raise ValueError("the file is too short for a safetensors header")
    length: int = _LENGTH.unpack_from(start)[0]
    if length > HEADER_LIMIT:
        raise ValueError("its first bytes are no safetensors header")
    return _LENGTH.size + length


def contradiction(header: bytes, placed: Iterable[Placed]) -> str:
    """Why a file's header does not say what the manifest says of the file; empty when it does."""
    try:
        table: dict[str, Any] = orjson.loads(header[_LENGTH.size :])
        offsets: dict[str, Any] = orjson.loads(table.pop("__metadata__")[PLACES])
        found = {
            name: (row["dtype"], row["shape"], row["data_offsets"], offsets[name]["saved_offsets"])
            for name, row in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its header cannot be understood ({error!r})"
    start = len(header)
    expected = {
        item.piece.name: (
            item.piece.dtype,
            list(item.piece.extent),
            [item.begin - start, item.end - start],
            list(item.piece.offsets),
        )
        for item in placed
    }
    for name in found.keys() | expected.keys():
        if found.get(name) != expected.get(name):
            return f"its header and the manifest disagree about tensor {name!r}"
    return ""
