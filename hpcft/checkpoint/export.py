"""A checkpoint, or some of it, in the formats that others read: torch's file, torch's distributed one, safetensors.

Where every tensor goes is known from the manifest alone. So the target is laid out first, with room for the tensors,
and then each chunk of the checkpoint is read once, verified, and its bytes are put where they belong (`_scatter`).
That needs a few chunks of memory, whatever the size of the state, and a damaged byte ends the export before it is
written. The distributed format has a writer of its own (torch's), which is given one piece after another.

Of values that stock readers refuse, the next best thing is written: numpy arrays become tensors, numpy's numbers
plain ones, frozensets tuples. safetensors holds tensors only.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from hpcft.checkpoint import values
from hpcft.checkpoint.chunks import Chunks, chunk_bytes, chunks_of, opened, runs
from hpcft.checkpoint.image import PLACES, Image, header_length, lay_out
from hpcft.checkpoint.layout import parse_name
from hpcft.checkpoint.pieces import Piece, TensorShape, whole
from hpcft.checkpoint.read import Tally
from hpcft.checkpoint.share import raw
from hpcft.checkpoint.target import written_aside
from hpcft.checkpoint.tree import DTYPES, FlatState, flatten, unflatten
from hpcft.durable import CHUNK_BYTES
from hpcft.errors import UnusableError, UsageError
from hpcft.ids import RunId
from hpcft.rundir import RunDirectory
from hpcft.units import counted, human_size

FILE_BYTES = 1 << 30
"""About as much goes into one file of the distributed format: torch's writer holds all of a file in memory."""

_MODEL = "model"
_INDEX = "model.safetensors.index.json"
_METADATA = ".metadata"
_MARK = b"hpcft-export-"
"""In the metadata of the distributed format, before the id that torch gives to a save: so an export is told from
another program's checkpoint, without unpickling anything."""


class Format(StrEnum):
    TORCH = "torch"
    """One file, for `torch.load(weights_only=True)`: the nested state dicts."""
    DCP = "dcp"
    """A directory, for `torch.distributed.checkpoint.load`, into any world."""
    SAFETENSORS = "safetensors"
    """One file of tensors; with a limit, a directory of several and an index, as model hubs have it."""


@dataclass(frozen=True, slots=True)
class Exported:
    checkpoint: str
    format: Format
    target: str
    files: int
    bytes: int
    tensors: int
    left_out: int
    """Values that the format has no place for."""
    converted: tuple[str, ...]
    """Paths of values that became something else that stock readers take."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [
            f"{self.target}: {self.checkpoint} for {self.format}, {counted(self.tensors, 'tensor')}, "
            f"{human_size(self.bytes)} in {counted(self.files, 'file')}"
        ]
        if self.left_out:
            lines.append(f"left out, for it is no tensor: {counted(self.left_out, 'value')}")
        if self.converted:
            lines.append(f"converted to what stock readers take: {', '.join(self.converted)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is exported. `names` are the tensors' with the names they get; `state` is JSON as in `state.json`."""

    state: Any
    names: Mapping[str, str]


def export(
    directory: Path,
    target: Path,
    to: Format,
    *,
    only: Sequence[str] = (),
    max_shard_bytes: int | None = None,
    force: bool = False,
    run: RunId | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Writes a committed checkpoint to `target`, complete or not at all.

    `only` names parts of the state, the names given to `run.restore`. With one, what is written is that part itself:
    its tensors are called as in its own state dict. `max_shard_bytes` (safetensors) makes `target` a directory.
    `progress` is told how many bytes have been read, and of how many.

    Raises:
        CheckpointDamagedError: file, chunk and tensors; nothing has been written.
        NotFoundError: no such checkpoint, or no such part.
        UsageError: the target exists, or cannot be written.
        UnusableError: there is no room.
    """
    if max_shard_bytes is not None and to is not Format.SAFETENSORS:
        raise UsageError(f"there are no shards in the format {to}", "--max-shard-size is for --to safetensors")
    _refuse_place(target, directory)
    count = Tally(progress)
    with opened(directory, run, count) as chunks:
        chosen = _choose(chunks, only)
        count.total = chunk_bytes(chunks.manifest, chunks_of(chunks.manifest, chosen.names.__contains__))
        needed = sum(chunks.tensors[name].nbytes for name in chosen.names)
        _make_sure_of_room(target.parent, needed)
        count(0)
        match to:
            case Format.TORCH:
                converted = _to_torch(chunks, chosen, target, force)
            case Format.DCP:
                converted = _to_dcp(chunks, chosen, target, force)
            case Format.SAFETENSORS:
                converted = _to_safetensors(chunks, chosen, target, force, max_shard_bytes)
    files = list(target.iterdir()) if target.is_dir() else [target]
    return Exported(
        checkpoint=directory.name,
        format=to,
        target=str(target),
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        tensors=len(chosen.names),
        left_out=values.count_others(chosen.state) if to is Format.SAFETENSORS else 0,
        converted=tuple(converted),
    )


def _refuse_place(target: Path, checkpoint: Path) -> None:
    """Nothing is written where a run keeps its checkpoints, or would be taken for one."""
    place = target.resolve()
    if any(parse_name(each.name) for each in place.parents):
        raise UsageError(f"{target} is inside of a checkpoint, which never changes", "give another place")
    if parse_name(place.name):
        raise UsageError(f"{target} would have the name of a checkpoint, and is none", "give another name")
    for each in place.parents:
        run = RunDirectory(each.parent)
        if each == checkpoint.resolve().parent or (each == run.checkpoints and run.identity.exists()):
            raise UsageError(f"{target} is where a run keeps its checkpoints ({each})", "give another place")


def _choose(chunks: Chunks, only: Sequence[str]) -> _Chosen:
    parts = values.select(chunks.state(), only)
    if len(only) == 1:
        state, prefix = parts[only[0]], f"{only[0]}."
        return _Chosen(state, {each: each.removeprefix(prefix) for each in values.tensor_names(state)})
    state = {"dict": parts}
    return _Chosen(state, {each: each for each in values.tensor_names(state)})


def _make_sure_of_room(place: Path, needed: int) -> None:
    try:
        found = os.statvfs(place)
    except FileNotFoundError:
        return  # said by whoever opens the target
    free = found.f_bavail * found.f_frsize
    if needed > free:
        raise UnusableError(
            f"the export has {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free in {place}",
            "make room, or export less of it with --only",
        )


# --- what may be replaced ---


def _is_export(path: Path) -> bool:
    """Whether a file is one of the two kinds that an export makes of one file."""
    return _is_safetensors(path) or _is_torch(path)


def _is_safetensors(path: Path) -> bool:
    """With the places of tensors in its header that ours have, and models from elsewhere have not."""
    try:
        with path.open("rb") as file:
            length = header_length(file.read(8)) - 8
            return length <= path.stat().st_size and PLACES in orjson.loads(file.read(length))["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_torch(path: Path) -> bool:
    """torch names the archive in the file after the file, unless it is given an open one, as here."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "archive/data.pkl" in archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


# --- where bytes go --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the first byte of a tensor goes."""

    fd: int
    offset: int


def _scatter(chunks: Chunks, places: Mapping[str, _Place]) -> None:
    """Copies tensors, each chunk that holds some of them read once, front to back."""
    for entry in chunks.manifest.files:
        wanted = [item for item in entry.tensors if item.piece.name in places and item.begin < item.end]
        for item in wanted:
            place = places[item.piece.name]
            position = 0
            for part in chunks.parts(entry, item.begin, item.end):
                for start, where, length in runs(item.piece, position, position + len(part)):
                    _write(place.fd, part[start - position : start - position + length], place.offset + where)
                position += len(part)


def _write(fd: int, data: memoryview | bytes, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


# --- safetensors -----------------------------------------------------------------------------------------------


def _to_safetensors(
    chunks: Chunks, chosen: _Chosen, target: Path, force: bool, max_shard_bytes: int | None
) -> Sequence[str]:
    names = {new: old for old, new in chosen.names.items()}
    pieces = [whole(new, chunks.tensors[old]) for new, old in names.items()]

    def write(fd: int, image: Image) -> dict[str, _Place]:
        _write(fd, image.header, 0)
        return {names[item.piece.name]: _Place(fd, item.begin) for item in image.placed}

    def is_shard(path: Path) -> bool:
        return path.name == _INDEX or (path.name.startswith(_MODEL) and _is_safetensors(path))

    is_ours = _is_export if max_shard_bytes is None else is_shard
    with written_aside(target, directory=max_shard_bytes is not None, replace=force, is_ours=is_ours) as aside:
        if max_shard_bytes is None:
            groups, paths = [pieces], [aside]
        else:
            groups = _group(pieces, max_shard_bytes)
            paths = [aside / name for name in _shard_names(len(groups))]
        images = [_lay_out(group) for group in groups]
        with ExitStack() as stack:
            places: dict[str, _Place] = {}
            fds = []
            for path, image in zip(paths, images, strict=True):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, fd)
                fds.append(fd)
                places |= write(fd, image)
            _scatter(chunks, places)
            for fd in fds:
                os.fsync(fd)
        if len(groups) > 1:
            where = {
                item.piece.name: path.name for path, image in zip(paths, images, strict=True) for item in image.placed
            }
            index = {"metadata": {"total_size": sum(piece.nbytes for piece in pieces)}, "weight_map": where}
            _write_synced(aside / _INDEX, orjson.dumps(index, option=orjson.OPT_INDENT_2))
    return ()


def _group(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """As many as fit into each file, in order; what is too large alone gets a file of its own."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    return groups


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [f"{_MODEL}.safetensors"]
    return [f"{_MODEL}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _lay_out(pieces: Iterable[Piece]) -> Image:
    try:
        return lay_out(pieces)
    except ValueError as error:
        raise UsageError(f"these tensors cannot go into one file: {error}", "try --max-shard-size") from error


def _write_synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


# --- torch -----------------------------------------------------------------------------------------------------


def _to_torch(chunks: Chunks, chosen: _Chosen, target: Path, force: bool) -> Sequence[str]:
    state, names, converted = _empty(chunks, chosen)
    with written_aside(target, directory=False, replace=force, is_ours=_is_export) as aside:
        # torch writes the file with holes in place of the tensors: the memory of `state` is never touched.
        # It is given a file and not a path, whose name would be in the archive.
        with torch.serialization.skip_data(), aside.open("r+b") as file:
            torch.save(state, file)
        fd = os.open(aside, os.O_RDWR | os.O_CLOEXEC)
        try:
            _scatter(chunks, _places_in(aside, state, names, fd))
            _write_checksums(aside, fd)
        finally:
            os.close(fd)
    return converted


def _empty(chunks: Chunks, chosen: _Chosen) -> tuple[Any, dict[int, str], list[str]]:
    """The state that is exported, its tensors without content; their names, by storage; what was converted."""
    converted: list[str] = []
    state = _for_stock_readers(chosen.state, (), converted)
    tensors = {name: torch.empty(shape.shape, dtype=DTYPES[shape.dtype]) for name, shape in _shapes(chunks, chosen)}
    # `unflatten` takes a whole state, and what is exported may be a part of one.
    found = unflatten(FlatState(tensors, {"dict": {"state": state}}))["state"]
    return found, {_storage(tensor): name for name, tensor in tensors.items()}, converted


def _shapes(chunks: Chunks, chosen: _Chosen) -> Iterator[tuple[str, TensorShape]]:
    return ((name, chunks.tensors[name]) for name in chosen.names)


def _storage(tensor: Tensor) -> int:
    """The same for all views of a tensor."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _tensors(value: Any) -> Iterator[Tensor]:
    """In an order that depends on nothing but the structure."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
        if isinstance(value, OrderedDict):
            yield from _tensors(vars(value))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True, slots=True)
class _Record:
    """A file inside of torch's, which is a zip archive without compression."""

    header: int
    begin: int
    size: int


def _records(path: Path) -> list[_Record]:
    """Those of the tensors, in order, without those that are empty."""
    found = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for each in archive.infolist():
            if each.filename.partition("/")[2].startswith("data/") and each.file_size:
                file.seek(each.header_offset + 26)
                begin = each.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                found.append(_Record(each.header_offset, begin, each.file_size))
    return sorted(found, key=lambda record: record.begin)


def _places_in(path: Path, state: Any, names: Mapping[int, str], fd: int) -> dict[str, _Place]:
    """Where the file has room for each tensor. A reader that maps it into memory finds them in the same order."""
    loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    pairs = zip(_tensors(state), _tensors(loaded), strict=True)
    found = {names[_storage(mine)]: theirs.untyped_storage().data_ptr() for mine, theirs in pairs if mine.numel()}
    ordered = sorted(found, key=lambda name: found[name])
    return {name: _Place(fd, record.begin) for name, record in zip(ordered, _records(path), strict=True)}


def _write_checksums(path: Path, fd: int) -> None:
    """torch looks at no checksum of a zip archive, others do; they could not be known before the content."""
    checksums: dict[int, bytes] = {}
    for record in _records(path):
        checksum = 0
        for begin in range(record.begin, record.begin + record.size, CHUNK_BYTES):
            checksum = zlib.crc32(os.pread(fd, min(CHUNK_BYTES, record.begin + record.size - begin), begin), checksum)
        digits = checksums[record.header] = struct.pack("<I", checksum)
        _write(fd, digits, record.header + 14)
        end = record.begin + record.size
        if os.pread(fd, 4, end) == b"PK\x07\x08":  # the same once more, behind the content
            _write(fd, digits, end + 4)
    with zipfile.ZipFile(path) as archive:
        entries, position = archive.infolist(), archive.start_dir
    for each in entries:  # the table of contents, in the order in which it is read
        if each.header_offset in checksums:
            _write(fd, checksums[each.header_offset], position + 16)
        position += 46 + sum(struct.unpack("<HHH", os.pread(fd, 6, position + 28)))


def _for_stock_readers(value: Any, path: tuple[str, ...], converted: list[str]) -> Any:
    """The same JSON without what `torch.load(weights_only=True)` refuses."""
    if isinstance(value, list):
        return [_for_stock_readers(item, (*path, str(index)), converted) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    match value:
        case {"dict": dict() as table}:
            return {"dict": {key: _for_stock_readers(item, (*path, key), converted) for key, item in table.items()}}
        case {"array": leaf}:
            converted.append(".".join(path))
            return leaf
        case {"numpy": _}:
            converted.append(".".join(path))
            number = unflatten(FlatState({}, {"dict": {"it": value}}))["it"].item()
            plain = number if isinstance(number, bool | int | float | complex | str | bytes) else str(number)
            return values.parts(flatten({"it": plain}).values)["it"]
        case {"frozenset": list() as elements}:
            converted.append(".".join(path))
            return {"tuple": _for_stock_readers(elements, path, converted)}
    for tag in values.ROWS:
        if isinstance(rows := value.get(tag), list):
            named = [[key, _for_stock_readers(item, (*path, values.key_text(key)), converted)] for key, item in rows]
            return {**value, tag: named}
    return {tag: _for_stock_readers(inner, path, converted) for tag, inner in value.items()}


# --- torch's distributed format --------------------------------------------------------------------------------


def _to_dcp(chunks: Chunks, chosen: _Chosen, target: Path, force: bool) -> Sequence[str]:
    state, names, converted = _empty(chunks, chosen)
    if not isinstance(state, Mapping):
        raise UsageError("what is exported is no dict, which the format dcp cannot hold", "try --to torch")

    @cache
    def is_marked(metadata: Path) -> bool:
        return metadata.is_file() and _MARK in metadata.read_bytes()

    def is_ours(path: Path) -> bool:
        known = path.name == _METADATA or path.name.endswith(".distcp")
        return known and is_marked(path.with_name(_METADATA))

    with written_aside(target, directory=True, replace=force, is_ours=is_ours) as aside:
        planner = _Planner(chunks, names)
        writer = _Writer(aside, target)
        planner.set_up_planner(dict(state), writer.storage_meta(), is_coordinator=True)
        writer.set_up_storage_writer(True)
        # As if each file came from a rank of its own. None has to be there: this is the writer's own protocol.
        plans = [writer.prepare_local_plan(plan) for plan in planner.plans()]
        plans, metadata = planner.create_global_plan(plans)
        results = [
            writer.write_data(planner.finish_plan(plan), planner).wait() for plan in writer.prepare_global_plan(plans)
        ]
        writer.finish(metadata, results)
    return converted


class _Writer(FileSystemWriter):
    """Writes aside, and says of the target where it is."""

    def __init__(self, aside: Path, target: Path) -> None:
        super().__init__(aside, sync_files=True)
        self._target = target

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self._target), save_id=f"{_MARK.decode()}{self.save_id}")


class _Planner(DefaultSavePlanner):
    """Gives torch's writer one piece after another, in the order in which they lie in the checkpoint."""

    def __init__(self, chunks: Chunks, names: Mapping[int, str]) -> None:
        super().__init__()
        self._chunks = chunks
        self._names = names
        self._sources: dict[MetadataIndex, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

    def plans(self) -> list[SavePlan]:
        local = self.create_local_plan()
        tensors = {
            self._names[_storage(found)]: item for item in local.items if (found := self._tensor(item)) is not None
        }
        others = [item for item in local.items if self._tensor(item) is None]
        groups: list[list[WriteItem]] = [others]
        size = 0
        for entry in self._chunks.manifest.files:
            for placed in entry.tensors:
                if (item := tensors.get(placed.piece.name)) is None:
                    continue
                if groups[-1] and size + placed.piece.nbytes > FILE_BYTES:
                    groups.append([])
                    size = 0
                groups[-1] += self._items(item, placed.piece)
                size += placed.piece.nbytes
        return [replace(local, items=items) for items in groups]

    def _tensor(self, item: WriteItem) -> Tensor | None:
        found = self.state_dict[item.index.fqn]
        return found if isinstance(found, Tensor) else None

    def _items(self, item: WriteItem, piece: Piece) -> Iterator[WriteItem]:
        tensor = self._tensor(item)
        assert tensor is not None and item.tensor_data is not None
        if tensor.shape != torch.Size(piece.shape):
            # Stored as another type (complex numbers as pairs): written whole, with the first of its pieces.
            if any(piece.offsets):
                return
            offsets, extent, box = (0,) * tensor.dim(), tuple(tensor.shape), (piece.offsets, piece.shape)
        else:
            offsets, extent, box = piece.offsets, piece.extent, (piece.offsets, piece.extent)
        index = MetadataIndex(item.index.fqn, torch.Size(offsets))
        self._sources[index] = (piece.name, *box)
        yield WriteItem(
            index=index,
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(extent)),
                properties=TensorProperties.create_from_tensor(tensor),
                size=tensor.size(),
            ),
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            value = self.state_dict[write_item.index.fqn]
            for tensor in _tensors(value):  # in a tuple, say: torch writes that as one value
                self._fill(tensor)
            written = io.BytesIO()
            torch.save(value, written)
            return written
        assert write_item.tensor_data is not None and write_item.tensor_data.chunk is not None
        name, offsets, extent = self._sources[MetadataIndex(write_item.index.fqn, write_item.tensor_data.chunk.offsets)]
        data: Tensor = torch.from_numpy(self._chunks.box(name, offsets, extent)).reshape(-1)
        return data.view(write_item.tensor_data.properties.dtype).reshape(write_item.tensor_data.chunk.sizes)

    def _fill(self, tensor: Tensor) -> None:
        if tensor.numel():
            name = self._names[_storage(tensor)]
            shape = self._chunks.tensors[name].shape
            raw(tensor)[:] = self._chunks.box(name, (0,) * len(shape), shape).reshape(-1).data
