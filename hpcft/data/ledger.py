"""The ledger: which samples the steps of a run have consumed, recorded by every rank.

Theory of operation
-------------------
Each rank of each generation has a file of its own, ``<run>/ledger/g0007-r0003.led``, created O_EXCL and only ever
appended to: a header, then one record per completed step, written with one system call before the next step starts.
So a killed process loses no record, and `sync` before a checkpoint makes durable what the checkpoint rests on.
All is little-endian:

    header  magic "hpcft.l1", u32 length, JSON of that length, u64 xxh3 of the JSON
    record  u64 step, u32 epoch, u32 count, u64 start, u64 stop   places of the global batch in the epoch's order
            count ids of 4 bytes (8 above 2^32 samples)           this rank's own, without stand-ins
            u64 xxh3 of the record so far

A reader stops at the first record that is cut off or does not match its checksum: nothing after it was synced, and
what was not synced before a failure is undone by the recovery. A step that is written again (a rollback within a
generation) voids its older record and what followed it. What all files together say is `account`'s part.

A failed write never raises into training: `LedgerWriter.failed` says what happened; the records wait and are written
again, at the same place of the file, with the next step.
"""

from __future__ import annotations

import os
import re
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from hpcft.data.batches import GlobalBatch
from hpcft.data.order import Ids
from hpcft.errors import UnusableError

_MAGIC = b"hpcft.l1"
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<QIIQQ")
_SUM = struct.Struct("<Q")
_NAME = re.compile(r"g(\d{4,})-r(\d{4,})\.led")
_WAITING_BYTES = 16 * 1024 * 1024


def ledger_path(directory: Path, generation: int, rank: int) -> Path:
    return directory / f"g{generation:04}-r{rank:04}.led"


class LedgerWriter:
    """Records one rank's samples in one generation. No method raises OSError: `failed` holds the reason instead."""

    def __init__(
        self,
        path: Path,
        *,
        generation: int,
        rank: int,
        world_size: int,
        restored_step: int = 0,
        restored_generation: int | None = None,
    ) -> None:
        """`restored_generation` made the state of `restored_step`; None: not known, or there is none."""
        self.failed: str | None = None
        """Why records are missing on disk; None while all is well, and again once they could be written."""
        self.path = path
        self._header: dict[str, Any] = {
            "generation": generation,
            "rank": rank,
            "world_size": world_size,
            "restored_step": restored_step,
            "restored_generation": restored_generation,
        }
        self._fd: int | None = None
        self._waiting = bytearray()
        self._written = 0
        self._synced = 0
        self._lost = False
        self._id_type = np.dtype("<u4")

    def begin(self, *, samples: int, seed: int, shuffle: bool) -> None:
        """Creates the file and writes its header: what the ids of the records to come mean."""
        self._id_type = np.dtype("<u4" if samples <= 2**32 else "<u8")
        header = orjson.dumps(self._header | {"samples": samples, "seed": seed, "shuffle": shuffle})
        self._waiting += _MAGIC + _LENGTH.pack(len(header)) + header
        self._waiting += _SUM.pack(xxhash.xxh3_64_intdigest(header))
        self._write()

    def record(self, step: int, batch: GlobalBatch, ids: Ids) -> None:
        """Step number `step` is completed: it trained on `batch`, and this rank on the samples `ids` of it."""
        if self._lost:
            return
        body = _RECORD.pack(step, batch.epoch, len(ids), batch.start, batch.stop)
        body += ids.astype(self._id_type).tobytes()
        self._waiting += body
        self._waiting += _SUM.pack(xxhash.xxh3_64_intdigest(body))
        self._write()

    def sync(self) -> None:
        """Makes all records so far durable; to be called before a checkpoint that rests on them is reported."""
        self._write()
        if self._lost or self._fd is None or self._synced == self._written:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:  # its pages may be gone, and a second fsync would report success
            self._give_up(error)
        else:
            self._synced = self._written

    def close(self) -> None:
        self.sync()
        if self._fd is not None:
            with suppress(OSError):  # after a successful sync there is nothing left to fail
                os.close(self._fd)
            self._fd = None
        self._lost = True

    def _write(self) -> None:
        if self._lost or not self._waiting:
            return
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            while self._waiting:
                count = os.pwrite(self._fd, self._waiting, self._written)
                self._written += count
                del self._waiting[:count]
        except FileExistsError as error:
            self._give_up(error)
        except OSError as error:
            if len(self._waiting) > _WAITING_BYTES:
                self._give_up(error)
            else:
                self.failed = f"{self.path}: {error.strerror or error}"
        else:
            self.failed = None

    def _give_up(self, error: OSError) -> None:
        self.failed = f"{self.path}: {error.strerror or error}; no more samples are recorded in this generation"
        self._lost = True
        self._waiting.clear()


@dataclass(frozen=True, slots=True)
class Header:
    generation: int
    rank: int
    world_size: int
    restored_step: int
    restored_generation: int | None
    samples: int
    seed: int
    shuffle: bool

    @property
    def origin(self) -> tuple[int, int, int | None]:
        return self.world_size, self.restored_step, self.restored_generation

    @property
    def order(self) -> tuple[int, int, bool]:
        return self.samples, self.seed, self.shuffle


@dataclass(frozen=True, slots=True)
class Record:
    rank: int
    step: int
    batch: GlobalBatch
    ids: Ids


@dataclass(frozen=True, slots=True)
class LedgerFile:
    records: list[Record]
    written: int
    """Records in the file, voided ones included."""

    @property
    def last(self) -> int:
        return self.records[-1].step if self.records else 0


def read_headers(directory: Path) -> dict[int, dict[int, Header]]:
    """By generation and rank. A file without a whole header, of a process killed at once, holds no record."""
    found: dict[int, dict[int, Header]] = {}
    try:
        for path in sorted(directory.iterdir()):
            if _NAME.fullmatch(path.name) and (header := _read_header(path)) is not None:
                found.setdefault(header.generation, {})[header.rank] = header
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UnusableError(f"the ledger {directory} cannot be read: {error.strerror or error}") from error
    return found


def _read_header(path: Path) -> Header | None:
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + _LENGTH.size)
        if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
            return None
        (length,) = _LENGTH.unpack_from(start, len(_MAGIC))
        body = file.read(length)
        if file.read(_SUM.size) != _SUM.pack(xxhash.xxh3_64_intdigest(body)):
            return None
    return Header(**orjson.loads(body))


def read_file(path: Path, header: Header) -> LedgerFile:
    """The records of a file, without those that a later one of the same file voids."""
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise UnusableError(f"the ledger {path} cannot be read: {error.strerror or error}") from error
    id_type = np.dtype("<u4" if header.samples <= 2**32 else "<u8")
    (length,) = _LENGTH.unpack_from(content, len(_MAGIC))
    at = len(_MAGIC) + _LENGTH.size + length + _SUM.size
    records: list[Record] = []
    written = 0
    while at + _RECORD.size <= len(content):
        step, epoch, count, start, stop = _RECORD.unpack_from(content, at)
        end = at + _RECORD.size + count * id_type.itemsize
        if end + _SUM.size > len(content):
            break
        if _SUM.unpack_from(content, end)[0] != xxhash.xxh3_64_intdigest(content[at:end]):
            break
        while records and records[-1].step >= step:
            records.pop()
        ids = np.frombuffer(content, id_type, count, at + _RECORD.size)
        records.append(Record(header.rank, step, GlobalBatch(epoch, start, stop), ids))
        written += 1
        at = end + _SUM.size
    return LedgerFile(records, written)
