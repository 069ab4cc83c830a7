"""The names of everything under `checkpoints/`, the seal on its small files, and the word for damage.

A committed checkpoint is a directory whose name carries step and generation. The generation of a run only grows,
so no two writers ever mean the same name, and nothing durable is ever replaced. What starts with a dot is never
offered to a reader.

Small files are *sealed*: JSON of the form ``{"digest":"<xxh3-128>","<kind>":<body>}``, where the digest is that of
the body's bytes as they stand in the file. Everything around the body is compared byte by byte, so that a single
flipped bit anywhere in the file is noticed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from hpcft import durable
from hpcft.errors import DamagedError
from hpcft.ids import Generation, Rank, Step

FORMAT = 1
"""Changed only when a reader of the old format would misunderstand the new one; unknown keys are ignored."""

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "LATEST"
TRASH = ".trash"
QUARANTINE = ".quarantine"
MARKS = ".marks"
SHARD_SUFFIX = ".safetensors"

_NAME = re.compile(r"step-(\d{8,20})-g(\d{4,20})")
_STAGING = re.compile(r"\.tmp-(step-\d{8,20}-g\d{4,20})-([0-9a-z]{4,32})")
_NONCE = re.compile(r"[0-9a-z]{4,32}")
_DIGEST_LENGTH = 32


def checkpoint_name(step: Step, generation: Generation) -> str:
    return f"step-{step:08d}-g{generation:04d}"


def parse_name(name: str) -> tuple[Step, Generation] | None:
    """Step and generation of a committed checkpoint's directory; None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    step, generation = Step(int(match[1])), Generation(int(match[2]))
    return (step, generation) if checkpoint_name(step, generation) == name else None


def staging_name(name: str, nonce: str) -> str:
    """The directory in which the checkpoint `name` is written; beside the final one: rename(2) is enough."""
    if not _NONCE.fullmatch(nonce):
        raise ValueError(f"{nonce!r} is no nonce: 4 to 32 of 0-9 and a-z")
    return f".tmp-{name}-{nonce}"


def parse_staging(name: str) -> tuple[str, str] | None:
    """Checkpoint name and nonce of a directory in progress; None for any other name."""
    match = _STAGING.fullmatch(name)
    return None if match is None or parse_name(match[1]) is None else (match[1], match[2])


def shard_name(rank: Rank | int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}{SHARD_SUFFIX}"


def sidecar_name(rank: Rank | int, world_size: int) -> str:
    """What a rank tells the committer of its files, too long for a message; gone once it is in the manifest."""
    return f"shard-{rank:05d}-of-{world_size:05d}.json"


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """A committed checkpoint, as far as its name tells."""

    step: Step
    generation: Generation
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a checkpoint: the file, where in it, and which tensors it costs."""

    file: str
    reason: str
    chunk: int | None = None
    """Which 16 MiB of the file, counted from 0; None: the file as a whole."""
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = self.file if self.chunk is None else f"{self.file}, chunk {self.chunk}"
        hit = ""
        if self.tensors:
            more = f" and {len(self.tensors) - 4} more" if len(self.tensors) > 4 else ""
            hit = f" (tensors {', '.join(self.tensors[:4])}{more})"
        return f"{where}: {self.reason}{hit}"


class CheckpointDamagedError(DamagedError):
    """A checkpoint is not what was committed. `damages` says what exactly."""

    def __init__(self, path: Path, *damages: Damage) -> None:
        super().__init__(
            f"{path} is damaged: {'; '.join(str(damage) for damage in damages)}",
            "a start passes over it for an older one, unless it was asked for; `hpcft ckpt verify` lists every damage",
        )
        self.path = path
        self.damages = damages


def seal(kind: str, body: object) -> bytes:
    data = orjson.dumps(body)
    return b'{"digest":"%s","%s":%s}\n' % (durable.digest(data).encode(), kind.encode(), data)


def unseal(kind: str, data: bytes) -> tuple[Any, str]:
    """The body and its digest. ValueError: not a sealed file of this kind, or not as it was written."""
    head, middle, tail = b'{"digest":"', b'","%s":' % kind.encode(), b"}\n"
    start = len(head) + _DIGEST_LENGTH
    if not (data.startswith(head) and data[start:].startswith(middle) and data.endswith(tail)):
        raise ValueError(f"not a complete sealed {kind}")
    body = data[start + len(middle) : -len(tail)]
    expected = data[len(head) : start]
    if durable.digest(body).encode() != expected:
        raise ValueError("its content does not match its digest")
    return orjson.loads(body), expected.decode()
