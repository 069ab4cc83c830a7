"""File systems that are full, broken, gone or silent cost a save, never training; and later saves succeed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_samples import quick_directory, small_file_system
from saving_node import SavingNode, saving_node, until
from torch import nn

from hpcft import carriers, process, writing
from hpcft.carriers import is_carrier
from hpcft.checkpoint.read import entries
from hpcft.events import CheckpointFailed
from hpcft.ids import Generation, Step
from tests import fuse

torch.set_num_threads(1)

pytestmark = pytest.mark.skipif(bool(fuse.MISSING), reason=fuse.MISSING or "there is one")

Fault = Callable[[Path], Iterator[str]]
"""From here to there it holds; names the words that a user is to read."""


def removed(root: Path) -> Iterator[str]:
    root.rename(root.with_name("elsewhere"))
    yield "No such file or directory"
    root.with_name("elsewhere").rename(root)


def immutable(root: Path) -> Iterator[str]:
    subprocess.run(["chattr", "+i", str(root)], check=True)
    yield "Operation not permitted"
    subprocess.run(["chattr", "-i", str(root)], check=True)


def read_only(root: Path) -> Iterator[str]:
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    yield "Read-only file system"
    subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)


def full(root: Path) -> Iterator[str]:
    filler = root / "lost+found" / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    yield r"did not begin to write its part of .*: it has .* MiB, and 0\.0 MiB are free"
    filler.unlink()


def served(mood: int, words: str) -> Fault:
    def fault(root: Path) -> Iterator[str]:
        server = fuse.server_of(root.parent / "served")
        server.now(mood)
        yield words
        server.now(fuse.GOOD)

    return fault


FAULTS: dict[str, tuple[str, Fault]] = {
    "removed": ("ext4", removed),
    "immutable": ("ext4", immutable),
    "read-only": ("ext4", read_only),
    "full": ("ext4", full),
    "quota": ("fuse", served(fuse.QUOTA, "Disk quota exceeded")),
    "broken": ("fuse", served(fuse.BROKEN, "Input/output error")),
    "fsync fails": ("fuse", served(fuse.UNSYNCED, "Input/output error")),
    "denied": ("fuse", served(fuse.DENIED, "Permission denied")),
}


@contextmanager
def file_system(place: Path, kind: str) -> Iterator[Path]:
    """A run directory whose checkpoints are on such a file system."""
    if kind == "ext4":
        with small_file_system(place, kind, 16) as disk:
            yield disk
        return
    with fuse.served(place / "served", place / "checkpoints"):
        yield place / "checkpoints"


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_costs_the_saves_that_it_lasts(name: str) -> None:
    kind, fault = FAULTS[name]
    with ExitStack() as stack:
        place = stack.enter_context(quick_directory())
        root = stack.enter_context(file_system(place, kind))
        if name == "removed":  # a mount point cannot be
            root = root / "checkpoints"
        async with saving_node(place, ranks=2, root=root) as node:
            model = nn.Linear(300, 300)
            node.begin(model=model)
            await node.prepare()
            await node.committed(1, await node.save(1, wait=True))
            holding = fault(root)
            words = next(holding)
            for step in (2, 3):
                await node.save(step, wait=True)
                failed = await node.outcome()
                assert isinstance(failed, CheckpointFailed) and failed.step == step
                assert re.search(words, failed.reason), failed.reason
            assert next(holding, None) is None
            change(model)
            await node.committed(4, await node.save(4, wait=True))
            node.begin(model=model)  # whatever is left of the others goes
            await until(lambda: not [path for path in root.iterdir() if path.name.startswith(".tmp")])
            assert node.left() == [1, 4]


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("mood", [fuse.HANG, fuse.NO_ANSWER], ids=["stopped", "no answer"])
async def test_a_file_system_that_hangs_holds_nobody_up(mood: int) -> None:
    """Of the second kind not even a killed process comes back; the next generation has carriers of its own."""
    with quick_directory() as place, fuse.served(place / "served", place / "checkpoints") as server:
        async with saving_node(place, slots=2) as node:
            try:
                await hang(node, server, mood)
            finally:
                server.now(fuse.GOOD if mood == fuse.NO_ANSWER else fuse.GO_ON)


async def hang(node: SavingNode, server: fuse.Server, mood: int) -> None:
    model = nn.Linear(30, 30)
    node.begin(model=model)
    await node.prepare()
    await node.committed(1, await node.save(1, wait=True))
    server.now(mood)
    for step in (2, 3):
        change(model)
        await node.save(step, wait=True)
    await until(lambda: len(node.report().saves) == 2)
    await node.save(4)
    skipped = await node.outcome()
    assert skipped.step == 4 and "still being written" in getattr(skipped, "reason", "")
    hanging = node.carrier(0)
    # by then its call has come to the file system
    await until(lambda: all(each.silent > 0.3 for each in node.report().saves))
    assert {each.step for each in node.report().saves} == {2, 3}
    node.begin(model=model)
    await node.prepare()
    saved = await node.save(5, wait=True)
    await until(lambda: [each.step for each in node.report().saves] == [5])
    assert node.carrier(0) != hanging
    if mood == fuse.NO_ANSWER:
        assert process.lives(hanging) and is_carrier(hanging), "killed, and still known for what it is"
    server.now(fuse.GO_ON if mood == fuse.HANG else fuse.GOOD)
    await node.committed(5, saved)
    await until(lambda: not process.lives(hanging))
    await node.committed(6, await node.save(6, wait=True))
    assert [entry.step for entry in entries(node.root)] == [1, 5, 6]


async def test_saves_that_hang_for_good_fail_and_later_ones_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many processes left behind as there may be, saves fail at once."""
    monkeypatch.setattr(carriers, "LEFT_BEHIND", 1)
    with quick_directory() as place, fuse.served(place / "served", place / "checkpoints") as server:
        async with saving_node(place, slots=2) as node:
            try:
                model = nn.Linear(30, 30)
                node.begin(model=model)
                await node.prepare()
                await node.committed(1, await node.save(1, wait=True))
                hanging = node.carrier(0)
                server.now(fuse.NO_ANSWER)
                with monkeypatch.context() as impatient:
                    impatient.setattr(writing, "STUCK_SECONDS", 0.2)
                    await node.save(2, wait=True)
                    failed = await node.outcome()
                assert isinstance(failed, CheckpointFailed) and "no progress in 0.2 s" in failed.reason
                assert process.lives(hanging)
                node.snapshots.keep(Generation(1), Step(3))
                await node.save(3, wait=True)
                failed = await node.outcome()
                assert isinstance(failed, CheckpointFailed)
                assert f"still hang in the kernel ({hanging})" in failed.reason
            finally:
                server.now(fuse.GOOD)
            await until(lambda: not process.lives(hanging))
            node.snapshots.keep(Generation(1), Step(4))
            await node.committed(4, await node.save(4, wait=True))
