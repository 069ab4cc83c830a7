"""States and committed checkpoints that the checkpoint tests share."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import torch

from hpcft.carrier import Carrier
from hpcft.checkpoint.arena import Arena, memory_file
from hpcft.checkpoint.commit import Committed, Facts, commit
from hpcft.checkpoint.layout import MARKS, checkpoint_name
from hpcft.checkpoint.manifest import Metric, ShardReport
from hpcft.checkpoint.read import read_latest, read_manifest
from hpcft.checkpoint.retention import emptying, put_into_trash
from hpcft.checkpoint.share import content, plan_share, save_share, words_of
from hpcft.checkpoint.tree import FlatState, flatten
from hpcft.checkpoint.write import SaveError
from hpcft.errors import NotFoundError
from hpcft.ids import Generation, Rank, RunId, Step, Term

RUN = RunId("0f" * 16)
NONCE = "5eed5eed"


def training_state(step: int) -> dict[str, object]:
    """A small model with BatchNorm, an optimizer with moments, a scheduler, and values of many types."""
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.BatchNorm1d(65), torch.nn.Linear(65, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    model(torch.randn(8, 33)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "extra": {
            "half": torch.randn(5, 3).bfloat16(),
            "flags": torch.tensor([True, False, True]),
            "empty": torch.empty(0, 4),
            "step": step,
            "best": float("inf"),
        },
    }


def save(
    root: Path,
    state: FlatState,
    step: int,
    generation: int = 1,
    world_size: int = 3,
    nonce: str = NONCE,
    cut_above: int = 4096,
    metrics: Mapping[str, float] | None = None,
) -> list[ShardReport]:
    """What all ranks write."""
    name = checkpoint_name(Step(step), Generation(generation))
    return [
        save_share(
            root,
            name,
            nonce,
            Rank(rank),
            world_size,
            state,
            pinned=frozenset(n for n in state.tensors if "running" in n),
            position={"samples": 32 * step},
            metrics={key: Metric(value, Step(step)) for key, value in (metrics or {}).items()},
            cut_above=cut_above,
        )
        for rank in range(world_size)
    ]


@dataclass(frozen=True)
class Copy:
    """A rank's share in shared memory, and what a carrier is told to do with it."""

    job: dict[str, object]
    fds: tuple[int, ...]

    def carry(self) -> ShardReport:
        """Have it written by a carrier in this process. SaveError: it says that it could not."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            socket.send_fds(ours, [orjson.dumps(self.job)], self.fds)
            ours.shutdown(socket.SHUT_WR)
            with suppress(OSError):  # giving back what came along, after its word: then it ends
                Carrier(theirs).serve()
            theirs.close()
            while packet := ours.recv(1 << 17):
                match orjson.loads(packet):
                    case {"done": {"report": report}}:
                        return ShardReport.parse(report)
                    case {"failed": str() as reason}:
                        raise SaveError(reason)
        raise AssertionError("the carrier has said nothing")


@contextmanager
def copied(
    root: Path, step: int, generation: int = 1, world_size: int = 2, ledger: Path | None = None
) -> Iterator[list[Copy]]:
    """What workers leave in their arenas of `training_state(step)`."""
    flat = flatten(training_state(step))
    job = {
        "do": "write",
        "root": str(root),
        "name": checkpoint_name(Step(step), Generation(generation)),
        "nonce": NONCE,
        "direct": True,
        "bandwidth": None,
        "metrics": {},
        "ledger": None if ledger is None else str(ledger),
    }
    arenas, copies = [], []
    for rank in range(world_size):
        plan, image = plan_share(flat.index(), flat.boxes, Rank(rank), world_size, cut_above=4096)
        arenas.append(arena := Arena.reserve(plan.size))
        arena.view[:] = b"".join(content(flat, image))
        words = words_of(Rank(rank), flat, {"samples": 32 * step})
        files = [("plan", plan.to_bytes())]
        files += [] if words.values is None else [("values", words.values)]
        fds = (arena.fd, *(memory_file(name, data) for name, data in files))
        copies.append(Copy({**job, "position": words.position, "versions": words.versions}, fds))
    try:
        yield copies
    finally:
        for arena, copy in zip(arenas, copies, strict=True):
            arena.close()
            for fd in copy.fds[1:]:
                os.close(fd)


def facts(parent: str | None = None, run: RunId = RUN, created: float = 1.7e9) -> Facts:
    return Facts(run=run, term=Term(1), parent=parent, created=created)


def committed(root: Path, step: int, generation: int = 1, world_size: int = 3) -> Committed:
    state = flatten(training_state(step))
    return commit(root, save(root, state, step, generation, world_size), facts())


def pin(root: Path, name: str) -> None:
    """As an operator does it."""
    (root / MARKS).mkdir(exist_ok=True)
    (root / MARKS / f"{name}.pinned").touch()


def sweep(root: Path, names: Sequence[str]) -> int:
    """Deletes them, and what else is in the trash, as the leader's threads do it; returns how many files."""
    put_into_trash(root, names)
    return sum(1 for _ in emptying(root))


def latest_flaw(root: Path) -> str:
    """Why the hint is of no use; empty when it is right or there is none."""
    latest = read_latest(root)
    if latest is None:
        return ""
    try:
        _, digest = read_manifest(root / latest.name)
    except NotFoundError:
        return f"LATEST names {latest.name}, which is not there"
    return "" if digest == latest.manifest else f"LATEST names {latest.name}, but with another manifest"


def same_tensors(one: FlatState, other: FlatState) -> bool:
    """Bit for bit: names, types, shapes, content."""
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.dtype == other.tensors[name].dtype
        and tensor.shape == other.tensors[name].shape
        and bits(tensor) == bits(other.tensors[name])
        for name, tensor in one.tensors.items()
    )


def bits(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj().resolve_neg())
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def quick_directory() -> Iterator[Path]:
    """In memory where there is such a place: for thousands of fsyncs whose cost is not what is tested."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[Path]:
    """A file system of its own, for as long as the block runs."""
    point = directory / "mounted"
    point.mkdir()
    subprocess.run(["mount", *arguments, str(point)], check=True, capture_output=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, capture_output=True)


@contextmanager
def small_file_system(directory: Path, kind: str, mebibytes: int, options: str = "rw") -> Iterator[Path]:
    if kind == "tmpfs":
        with mounted(directory, "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs") as point:
            yield point
        return
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
    with mounted(directory, "-o", f"loop,{options}", str(image)) as point:
        yield point
