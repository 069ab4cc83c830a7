"""What makes a directory a checkpoint: the manifest; and the two messages that lead to it.

Each rank writes its files and a *sidecar* with their index: every tensor piece, every digest. Its *report*, which
travels over a message of at most 64 KiB, only names the sidecar by digest; thousands of tensors or a hundred GiB
would not fit otherwise, and the leader would have to open every shard. The committer reads each sidecar once,
checks it against the report, joins all of them to the manifest, and removes them.

The manifest is thus enough to read a checkpoint, to verify each byte of it, and to say which tensors a damage hit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from hpcft.checkpoint.fields import Fields
from hpcft.checkpoint.image import ALIGNMENT, Placed
from hpcft.checkpoint.layout import (
    FORMAT,
    SHARD_SUFFIX,
    STATE,
    checkpoint_name,
    parse_name,
    seal,
    shard_name,
    unseal,
)
from hpcft.checkpoint.pieces import DTYPE_BYTES, Piece, TensorShape, find_gap, index_digest
from hpcft.durable import CHUNK_BYTES, chunk_count
from hpcft.errors import UnusableError
from hpcft.ids import Generation, Rank, RunId, Step, Term

_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its size, the digest of each 16 MiB of it, and the tensor pieces it holds in order."""

    name: str
    size: int
    digests: tuple[str, ...]
    tensors: tuple[Placed, ...] = ()

    def tensors_at(self, chunk: int) -> tuple[str, ...]:
        """Names of the tensors that have bytes in this chunk."""
        begin, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
        return tuple(item.piece.name for item in self.tensors if item.begin < end and item.end > begin)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that the program has reported of its training, and the step after which it did."""

    value: float
    step: Step


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What one rank wrote. `position`, `versions` and `metrics` come from rank 0."""

    files: tuple[FileEntry, ...]
    position: Mapping[str, Any] | None
    versions: Mapping[str, str]
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        body = {
            "files": [_file_to_json(entry) for entry in self.files],
            "position": self.position,
            "versions": self.versions,
            "metrics": metrics_to_json(self.metrics),
        }
        return seal("sidecar", body)

    @classmethod
    def parse(cls, data: bytes) -> Sidecar:
        """ValueError: not a sidecar, or not as it was written."""
        body, _ = unseal("sidecar", data)
        fields = Fields(body, "sidecar")
        return cls(
            fields.each("files", _parse_file),
            fields.optional_table("position"),
            fields.named("versions"),
            parse_metrics(fields.optional_table("metrics"), "sidecar"),
        )


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A rank's word that its files are durable. Small, whatever the state: see the module's text."""

    name: str
    nonce: str
    rank: Rank
    world_size: int
    index: str
    """`index_digest` of the state it held: equal on all ranks, or they did not share out the same state."""
    sidecar: str
    """Digest of the sidecar's bytes."""
    size: int
    """Bytes written."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "nonce": self.nonce,
            "rank": self.rank,
            "world_size": self.world_size,
            "index": self.index,
            "sidecar": self.sidecar,
            "size": self.size,
        }

    @classmethod
    def parse(cls, value: object) -> ShardReport:
        """ValueError: not a report."""
        fields = Fields(value, "report")
        report = cls(
            name=fields.text("name"),
            nonce=fields.text("nonce"),
            rank=Rank(fields.whole("rank")),
            world_size=fields.whole("world_size", 1),
            index=fields.text("index"),
            sidecar=fields.text("sidecar"),
            size=fields.whole("size"),
        )
        if parse_name(report.name) is None or report.rank >= report.world_size:
            raise fields.refuse("names no checkpoint or no rank of its world")
        return report


@dataclass(frozen=True, slots=True)
class Manifest:
    run: RunId
    term: Term
    generation: Generation
    step: Step
    nonce: str
    world_size: int
    mesh: Mapping[str, int]
    """Names and lengths of the dimensions in which the ranks were arranged; their product is the world size."""
    index: str
    """`index_digest` of the whole state, as every rank reported it: what the pieces must add up to."""
    parent: str | None
    """The checkpoint that this branch of the run started from or committed before."""
    created: float
    """Seconds since the epoch by the committer's clock; for people, nothing is decided by it."""
    position: Mapping[str, Any] | None
    """Data position, the same that is in the state."""
    versions: Mapping[str, str]
    files: tuple[FileEntry, ...]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """What the program has reported since the checkpoint before; by name."""
    adopted: str | None = None
    """Id of the run that has made it, if that was another one (see `mirror.restore`)."""

    @property
    def name(self) -> str:
        return checkpoint_name(self.step, self.generation)

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files)

    def file(self, name: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.name == name), None)

    def tensors(self) -> dict[str, TensorShape]:
        """Every tensor of the state, by name."""
        pieces = (item.piece for entry in self.files for item in entry.tensors)
        return {piece.name: TensorShape(piece.dtype, piece.shape) for piece in pieces}

    def to_bytes(self) -> bytes:
        tensors = self.tensors()
        body = {
            "format": FORMAT,
            "run": self.run,
            "term": self.term,
            "generation": self.generation,
            "step": self.step,
            "nonce": self.nonce,
            "world_size": self.world_size,
            "mesh": self.mesh,
            "parent": self.parent,
            "created": self.created,
            "position": self.position,
            "metrics": metrics_to_json(self.metrics),
            "versions": self.versions,
            "coverage": {
                "index": self.index,
                "tensors": len(tensors),
                "pieces": sum(len(entry.tensors) for entry in self.files),
                "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            },
            "files": [_file_to_json(entry) for entry in self.files],
        }
        if self.adopted is not None:
            body["adopted"] = self.adopted
        return seal("manifest", body)

    @classmethod
    def parse(cls, data: bytes) -> tuple[Manifest, str]:
        """The manifest and its digest. ValueError: damaged. UnusableError: written by another version."""
        body, digest = unseal("manifest", data)
        fields = Fields(body, "manifest")
        if (found := fields.whole("format", 1)) != FORMAT:
            # Not a damage: nothing may be quarantined because an older hpcft looked at it.
            raise UnusableError(
                f"the checkpoint has format {found}, this version of hpcft reads format {FORMAT}",
                "use the version of hpcft that wrote it, or a newer one",
            )
        manifest = cls(
            run=RunId(fields.text("run")),
            term=Term(fields.whole("term")),
            generation=Generation(fields.whole("generation")),
            step=Step(fields.whole("step")),
            nonce=fields.text("nonce"),
            world_size=fields.whole("world_size", 1),
            mesh=_parse_mesh(fields),
            index=Fields(fields.table("coverage"), "manifest.coverage").text("index"),
            parent=fields.optional_text("parent"),
            created=fields.number("created"),
            position=fields.optional_table("position"),
            versions=fields.named("versions"),
            files=fields.each("files", _parse_file),
            metrics=parse_metrics(fields.optional_table("metrics"), "manifest"),
            adopted=fields.optional_text("adopted"),
        )
        if flaw := manifest.flaw():
            raise fields.refuse(flaw)
        return manifest, digest

    def flaw(self) -> str:
        """Why these are not the complete files of one state; empty when they are."""
        names = [entry.name for entry in self.files]
        expected = {STATE, *(shard_name(rank, self.world_size) for rank in range(self.world_size))}
        if sorted(names) != sorted(expected):
            missing = sorted(expected.difference(names))
            return f"{missing[0]} is not among its files" if missing else "it names files that do not belong to it"
        if prod(self.mesh.values()) != self.world_size:
            return f"its mesh {dict(self.mesh)} does not hold {self.world_size} ranks"
        if gap := find_gap(item.piece for entry in self.files for item in entry.tensors):
            return gap
        if index_digest(self.tensors()) != self.index:
            return "its tensors are not those that the ranks held"
        return ""


def _parse_mesh(fields: Fields) -> Mapping[str, int]:
    mesh = Fields(fields.table("mesh"), "manifest.mesh")
    return {name: mesh.whole(name, 1) for name in fields.table("mesh")}


def metrics_to_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: {"value": metric.value, "step": metric.step} for name, metric in metrics.items()}


def parse_metrics(table: Mapping[str, Any] | None, where: str) -> Mapping[str, Metric]:
    """The inverse; None: none, as earlier versions have it. MalformedError: not metrics."""
    found = {}
    for name, value in (table or {}).items():
        metric = Fields(value, f"{where}.metrics.{name}")
        found[name] = Metric(metric.number("value"), Step(metric.whole("step")))
    return found


def _file_to_json(entry: FileEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "size": entry.size,
        "digests": entry.digests,
        "tensors": [placed_to_json(item) for item in entry.tensors],
    }


def placed_to_json(item: Placed) -> dict[str, Any]:
    return {
        "name": item.piece.name,
        "dtype": item.piece.dtype,
        "shape": item.piece.shape,
        "offsets": item.piece.offsets,
        "extent": item.piece.extent,
        "begin": item.begin,
        "end": item.end,
    }


def _parse_file(fields: Fields) -> FileEntry:
    entry = FileEntry(
        name=fields.text("name"),
        size=fields.whole("size", 1),
        digests=fields.texts("digests"),
        tensors=fields.each("tensors", parse_placed),
    )
    if len(entry.digests) != chunk_count(entry.size):
        raise fields.refuse(f"has {len(entry.digests)} digests for {entry.size} bytes")
    if any(not _DIGEST.fullmatch(digest) for digest in entry.digests):
        raise fields.refuse("has a digest that is none")
    if not entry.name.endswith(SHARD_SUFFIX):
        if entry.name != STATE or entry.tensors:
            raise fields.refuse(f"{entry.name!r} is not a file of a checkpoint")
        return entry
    reached = entry.tensors[0].begin if entry.tensors else entry.size
    if reached % ALIGNMENT or not reached:
        raise fields.refuse(f"its tensors start at {reached}, which is no multiple of {ALIGNMENT}")
    for item in entry.tensors:
        if item.begin != reached or item.end - item.begin != item.piece.nbytes:
            raise fields.refuse(f"tensor {item.piece.name!r} is not where the one before it ends")
        reached = item.end
    if reached != entry.size:
        raise fields.refuse(f"its tensors end at {reached}, the file at {entry.size}")
    if len({item.piece.name for item in entry.tensors}) != len(entry.tensors):
        raise fields.refuse("holds two pieces of one tensor")
    return entry


def parse_placed(fields: Fields) -> Placed:
    """The inverse. MalformedError: not a piece in its place."""
    piece = Piece(
        name=fields.text("name"),
        dtype=fields.text("dtype"),
        shape=fields.wholes("shape"),
        offsets=fields.wholes("offsets"),
        extent=fields.wholes("extent"),
    )
    if piece.dtype not in DTYPE_BYTES:
        raise fields.refuse(f"has the unknown type {piece.dtype!r}")
    return Placed(piece, fields.whole("begin"), fields.whole("end"))
