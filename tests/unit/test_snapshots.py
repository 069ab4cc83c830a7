"""From a copy in shared memory to a committed checkpoint: workers, agent, carriers and leader, without training."""

from __future__ import annotations

import asyncio
import json
import math
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import NONCE, quick_directory
from saving_node import SavingNode, carriers_of, saving_node, until
from torch import nn

from hpcft import process
from hpcft.checkpoint.layout import checkpoint_name, staging_name
from hpcft.checkpoint.read import read_manifest
from hpcft.checkpoint.share import plan_share
from hpcft.checkpoint.tree import DTYPES
from hpcft.commits import Retention
from hpcft.events import CheckpointCommitted, CheckpointFailed, CheckpointRef, CheckpointSkipped
from hpcft.ids import Generation, Rank, Step
from hpcft.worker import saving
from hpcft.writing import TELLING_BYTES, TRIED_ANEW, Ways

torch.set_num_threads(1)

BIG = 1 << 30
ROOT = Path(__file__).parents[2]


def test_each_way_of_writing_is_tried_and_then_the_faster_one_is_taken() -> None:
    ways = Ways()
    assert ways.goes_direct(BIG)
    ways = ways.seen(True, BIG, 1.0)
    assert not ways.goes_direct(BIG)
    ways = ways.seen(False, BIG, 2.0)
    assert ways.goes_direct(BIG), "twice as fast"
    for _ in range(3):
        ways = ways.seen(True, BIG, 4.0)
    assert not ways.goes_direct(BIG), "what was is not what is: the latest three count"


def test_one_slow_save_says_nothing() -> None:
    ways = Ways().seen(True, BIG, 1.0).seen(False, BIG, 2.0).seen(True, BIG, 1.1).seen(True, BIG, 60.0)
    assert ways.goes_direct(BIG)


def test_the_slower_way_has_another_chance_now_and_then() -> None:
    ways = Ways().seen(True, BIG, 1.0).seen(False, BIG, 2.0)
    taken = []
    for _ in range(2 * TRIED_ANEW):
        taken.append(ways.goes_direct(BIG))
        ways = ways.seen(taken[-1], BIG, 1.0 if taken[-1] else 2.0)
    assert taken.count(False) == 2


def test_a_way_on_which_a_save_has_failed_is_not_the_next_ones() -> None:
    ways = Ways().seen(True, BIG, math.inf)
    assert not ways.goes_direct(BIG)
    ways = ways.seen(False, BIG, math.inf)  # the file system itself is broken
    for _ in range(3):
        assert not ways.goes_direct(BIG), "through the cache it goes everywhere"
        ways = ways.seen(False, BIG, 1.0)
    assert not ways.goes_direct(BIG)


def test_small_files_say_nothing_of_a_way() -> None:
    small = TELLING_BYTES - 1
    assert not Ways().goes_direct(small)
    assert Ways().seen(False, small, 1.0) == Ways()
    assert Ways().seen(False, BIG, 0.0) == Ways()


class Everything(nn.Module):
    """Parameters of each type that there is, some of them cut; a buffer beside them."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        for name, dtype in DTYPES.items():
            for shape in ((6, 40), (), (0, 3)):
                parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
                self.register_parameter(f"{name}_{len(shape)}_{sum(shape)}", parameter)
        for number in range(more):
            self.register_parameter(f"more{number}", nn.Parameter(torch.randn(100 + number)))
        self.register_buffer("seen", torch.zeros(3))
        self.change(0)

    def change(self, step: int) -> None:
        """Other bits in all of it."""
        torch.manual_seed(step)
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if not tensor.numel():
                    continue
                drawn = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8)
                if tensor.dtype is torch.bool:
                    drawn = drawn % 2
                tensor.copy_(drawn.view(tensor.dtype).view(tensor.shape))


class Settings:
    """What is no tensor."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "names": ("a", float("inf")), "bytes": b"\0"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that would not fill a page are cut, too."""
    monkeypatch.setattr(saving, "plan_share", partial(plan_share, cut_above=128))


@pytest.fixture
def place() -> Iterator[Path]:
    """Where an fsync costs nothing: who waits for a disk says nothing here."""
    with quick_directory() as place:
        yield place


@pytest.fixture
async def node(place: Path) -> AsyncIterator[SavingNode]:
    """One rank, one slot."""
    async with saving_node(place, slots=1) as node:
        yield node


def stop(node: SavingNode, rank: int = 0) -> int:
    """The rank's carrier makes no step from here on: what a hanging file system does to it."""
    pid = node.carrier(rank)
    assert pid, "it has not written anything yet"
    os.kill(pid, signal.SIGSTOP)
    return pid


async def test_what_was_copied_is_what_is_committed(place: Path) -> None:
    async with saving_node(place, ranks=2) as node:
        model = Everything()
        node.begin(model=model, settings=Settings())
        await node.prepare()
        for step in (1, 2, 3):
            model.change(step)
            saved = await node.save(step, wait=True)
            model.change(-step)  # training goes on at once
            await node.committed(step, saved)
        manifest, _ = read_manifest(node.root / "step-00000001-g0001")
        assert sum(len(entry.tensors) for entry in manifest.files) > len(manifest.tensors()), "some are cut"
        assert {shape.dtype for shape in manifest.tensors().values()} == set(DTYPES)
        assert node.report().reserved > 0
        assert node.report().saves == () and node.report().low_memory == ""
    assert node.left() == [1, 2, 3]


async def test_with_all_copies_busy_a_save_is_left_out_or_waits(place: Path) -> None:
    async with saving_node(place) as node:
        model = Everything()
        node.begin(model=model)
        await node.prepare()
        await node.committed(1, await node.save(1))
        stopped = stop(node)
        states = {}
        for step in (2, 3):
            model.change(step)
            states[step] = await node.save(step, wait=True)
        await until(lambda: len(node.report().saves) == 2)
        assert {each.step for each in node.report().saves} == {2, 3}
        await node.save(4)
        skipped = await node.outcome()
        assert isinstance(skipped, CheckpointSkipped) and skipped.step == 4
        assert "still being written" in skipped.reason
        model.change(5)

        def go_on() -> None:
            os.kill(stopped, signal.SIGCONT)

        node._loop.call_later(0.2, go_on)
        states[5] = await node.save(5, wait=True)
        for step in (2, 3, 5):
            await node.committed(step, states[step])
    assert node.left() == [1, 2, 3, 5]


async def test_a_carrier_killed_in_a_save_costs_that_save(node: SavingNode) -> None:
    model = Everything()
    node.begin(model=model)
    await node.prepare()
    await node.committed(1, await node.save(1))
    stopped = stop(node)
    await node.save(2, wait=True)
    await until(lambda: node.report().saves)
    os.kill(stopped, signal.SIGKILL)
    failed = await node.outcome()
    assert isinstance(failed, CheckpointFailed)
    assert failed.reason == "rank 0: the process that was to do it has died (out of memory, perhaps)"
    await node.committed(3, await node.save(3, wait=True))

    os.kill(node.carrier(0), signal.SIGKILL)  # between two saves: nobody need know
    await until(lambda: not process.lives(node.carrier(0)))
    model.change(4)
    await node.committed(4, await node.save(4, wait=True))
    assert node.left() == [1, 3, 4]


async def test_a_state_that_changes_gets_arenas_of_its_own(node: SavingNode) -> None:
    """Larger, smaller, and other tensors in as many bytes, each while the copy before is still being written."""
    layouts: list[nn.Module] = [Everything(), Everything(3), Everything(1)]
    layouts += [nn.Linear(70, 70), nn.ParameterDict({name: nn.Parameter(torch.randn(70)) for name in "ab"})]
    node.begin(model=nn.Linear(1, 1))
    await node.prepare()
    await node.committed(1, await node.save(1))
    saved = {}
    for step, model in enumerate(layouts, start=2):
        node.workers[0].saving.remember({"model": model}, None, None)
        stopped = stop(node)
        node._loop.call_later(0.05, os.kill, stopped, signal.SIGCONT)
        saved[step] = await node.save(step, wait=True)
    for step in saved:
        await node.committed(step, saved[step])
    rest = node.report().reserved - node.snapshots._shares[0].size
    assert 0 <= rest < 1 << 16, "what was outgrown is gone; a plan and digests may be there"


async def test_ranks_with_one_arena_and_with_two_go_on_saving(place: Path) -> None:
    """Nothing can be started from what only some have in memory: it makes room as soon as it is written."""
    model = Everything()
    share = 2 << 20
    model.register_parameter("large", nn.Parameter(torch.zeros(share // 2)))
    async with saving_node(place, ranks=2, memory=int(3.5 * share)) as node:
        node.begin(model=model)
        await node.prepare()
        assert sorted(len(each.slots) for each in node.snapshots._shares.values()) == [1, 2]
        for step in range(1, 6):
            model.change(step)
            await node.committed(step, await node.save(step, wait=True))


def arenas_of(pid: int) -> set[int]:
    """Inodes of the arenas whose memory a process keeps."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if str(path.readlink()).startswith("/memfd:hpcft-arena"):
            found.add(path.stat().st_ino)
    return found


@pytest.mark.parametrize("meanwhile", ["other orders", "another generation"])
async def test_no_process_keeps_an_arena_that_was_made_too_many(place: Path, meanwhile: str) -> None:
    model = nn.Linear(100, 100)
    async with saving_node(place, memory=60_000) as node:
        node.begin(model=model)
        await node.prepare()
        (share,) = node.snapshots._shares.values()
        assert len(share.slots) == 1
        node.snapshots._memory._limit = 1 << 30  # others have left
        making = share.memory._process
        assert making is not None
        os.kill(making.pid, signal.SIGSTOP)
        for step in (1, 2, 3):
            node.snapshots.keep(Generation(1), Step(step))
            await asyncio.sleep(0)  # each is a message of its own
        if meanwhile == "another generation":
            node.begin(model=model)
        os.kill(making.pid, signal.SIGCONT)
        await until(lambda: not node._tasks)
        known = {os.fstat(slot.fd).st_ino for slot in share.slots}
        assert len(known) == (2 if meanwhile == "other orders" else 1)
        assert share.memory._process is making and arenas_of(making.pid) <= known
        if meanwhile == "other orders":
            assert arenas_of(making.pid), "it has the one that is used"


def obstruct(node: SavingNode, step: int) -> None:
    """Where the first attempt to write this step needs a directory, there is a file."""
    (node.root / staging_name(checkpoint_name(Step(step), Generation(node.generation)), NONCE)).touch()


async def test_a_copy_that_cannot_be_written_is_one_to_start_from_and_is_written_in_another_attempt(
    place: Path,
) -> None:
    model = Everything()
    async with saving_node(place, ranks=2) as node:
        node.begin(model=model)
        await node.prepare()
        for step in (1, 2, 3):
            model.change(step)
            obstruct(node, step)
            saved = await node.save(step, wait=True)
            assert isinstance(await node.outcome(), CheckpointFailed)
            await until(lambda step=step: node.held == step)  # type: ignore[misc]
        node.persist(3)
        await node.committed(3, saved)
        await until(lambda: not list(node.root.glob(".tmp-*")))
        assert node.left() == [3]


async def test_a_copy_that_another_rank_of_the_node_has_passed_makes_room(place: Path) -> None:
    """One rank copied a step, and the other has not heard of it in time."""
    model = Everything()
    async with saving_node(place, ranks=2) as node:
        node.begin(model=model)
        await node.prepare()
        await node.committed(1, await node.save(1, wait=True))
        await asyncio.to_thread(node.workers[0].saving.copy, Step(2))
        for step in (3, 4):
            model.change(step)
            await node.committed(step, await node.save(step, wait=True))
        assert node.held == 4


async def test_of_a_step_that_was_copied_twice_one_copy_stays(place: Path) -> None:
    model = Everything()
    async with saving_node(place) as node:
        node.begin(model=model)
        await node.prepare()
        share = node.snapshots._shares[0]
        await asyncio.to_thread(node.workers[0].saving.copy, Step(1))
        await until(lambda: node.held == 1)
        await node.committed(1, await node.save(1, wait=True))
        assert [copy.label.step for _, copy in share.filled] == [1, 1]
        node.snapshots.missed(Rank(0), Step(1))  # were the second one's to fail
        await asyncio.sleep(0)
        assert node.held == 1
        share.keep_only(CheckpointRef(Step(1), Generation(1)))
        ((_, left),) = share.filled
        assert left.progress == 2


async def test_a_copy_that_has_changed_since_it_was_sealed_is_not_committed(place: Path) -> None:
    async with saving_node(place) as node:
        node.begin(model=Everything())
        await node.prepare()
        obstruct(node, 1)
        await node.save(1, wait=True)
        assert isinstance(await node.outcome(), CheckpointFailed)
        await until(lambda: node.held == 1)
        with memoryview(mmap.mmap(node.snapshots._shares[0].slots[0].fd, 0)) as memory:
            memory[1000] ^= 1
        node.persist(1)
        failed = await node.outcome()
        assert isinstance(failed, CheckpointFailed) and "has changed since it was sealed" in failed.reason
        await until(lambda: not list(node.root.glob(".tmp-*")))
        assert node.left() == []


async def test_arenas_outlive_their_worker_and_what_a_generation_left_unwritten_goes_with_it(place: Path) -> None:
    async with saving_node(place, ranks=2) as node:

        def arenas() -> list[int]:
            return [os.fstat(slot.fd).st_ino for share in node.snapshots._shares.values() for slot in share.slots]

        model = Everything()
        node.begin(model=model)
        await node.prepare()
        await node.committed(1, await node.save(1, wait=True))
        before, reserved = arenas(), node.report().reserved
        stop(node, 1)
        await node.save(2, wait=True)
        # it has got its job; the other rank has written its share, or will not any more
        await until(lambda: [each.rank for each in node.report().saves] == [1])
        model.change(5)
        node.begin(model=model)
        await node.prepare()
        assert (arenas(), node.report().saves) == (before, ())
        assert node.report().reserved < reserved, "what belonged to the copies has gone with them"
        assert len(before) == 4
        await node.committed(2, await node.save(2, wait=True))
    assert [path.name for path in sorted(node.root.glob("step-*"))] == ["step-00000001-g0001", "step-00000002-g0002"]
    assert node.left() == [1, 2]


@pytest.mark.parametrize(("slot", "more"), [(2, 0), (-1, 0), (0, 4096), (0, -1)])
async def test_a_copy_that_is_not_what_was_agreed_on_is_a_failed_save(place: Path, slot: int, more: int) -> None:
    """Of an arena that there is not, or of another plan: it must neither end the agent nor become a checkpoint."""
    async with saving_node(place) as node:
        node.begin(model=Everything())
        await node.prepare()
        size = node.snapshots._shares[0].planned + more
        reader, writer = os.pipe()  # to see that the agent does not keep what came along
        node.workers[0].link.say_snapshot({"slot": slot, "size": size, "step": 1}, writer)
        event = await node.outcome()
        assert isinstance(event, CheckpointFailed) and "does not fit the plan" in event.reason
        assert os.read(reader, 1) == b""
        os.close(reader)
        await node.committed(2, await node.save(2))


V1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


@pytest.mark.skipif(not (os.geteuid() == 0 and V1.parent.is_dir()), reason="needs root and memory cgroups, version 1")
def test_a_cgroup_that_is_too_small_is_said_and_lived_with(tmp_path: Path) -> None:
    """Fewer copies, then none and training waits, or no training; see low_memory."""
    script = Path(__file__).with_name("low_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    needs = r"rank 0 needs 32 MiB for 2 copies of its share, and cgroup /.*hpcft-test-\d+ has [\d.]+ MiB to spare"
    (warning,) = found["fewer"]["warnings"]
    assert found["fewer"]["slots"] == 1 and re.fullmatch(rf"node1: {needs}: it gets 1", warning), warning
    (warning,) = found["none"]["warnings"]
    assert found["none"]["slots"] == 0
    assert re.fullmatch(rf"node1: {needs}: its checkpoints are written while training waits", warning), warning
    assert "no memory for copies of the state, and checkpoint.low_memory is 'stop': rank 0" in found["stop"]["message"]
    assert "ask Slurm for more memory" in found["stop"]["hint"]


def moments(place: Path, number: int, seed: int) -> dict[str, Any]:
    """Hit a node that saves so many times; see checkpoint_moments."""
    script = Path(__file__).with_name("checkpoint_moments.py")
    done = subprocess.run(
        [sys.executable, str(script), str(place), str(number), str(seed)],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_whoever_is_killed_at_some_moments_nothing_committed_is_lost(place: Path) -> None:
    found = moments(place, 5, 2)
    assert sum(found["hits"].values()) == 5 and found["last step"] > 5


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_whoever_is_killed_at_any_moment_nothing_committed_is_lost(place: Path) -> None:
    found = moments(place, 500, int(time.time()))
    assert min(found["hits"].values()) > 80


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    memory: int
    """Bytes that are its own, or its share of what it has in common with others (PSS)."""
    descriptors: int

    @classmethod
    def by(cls, pid: int) -> Held:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        (pss,) = (int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss:"))
        return cls(pss, len(list(Path(f"/proc/{pid}/fd").iterdir())))


def named_memory() -> list[str]:
    """What torch and we might leave in shared memory; others use it for files, too."""
    return sorted(path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("torch_", "hpcft")))


async def grown(node: SavingNode, saves: int) -> None:
    """So many saves leave processes and file system as they found them."""
    model = Everything(50)
    node.begin(model=model)
    await node.prepare()

    async def save(first: int, last: int) -> None:
        for step in range(first, last):
            model.change(step)
            await node.save(step, wait=True)
            event = await node.outcome()
            assert isinstance(event, CheckpointCommitted), event
            lineage.append(event.checkpoint)
            node.retain(tuple(lineage[-5:]))

    lineage: list[CheckpointRef] = []
    warm = max(20, saves // 10)
    await save(1, warm)
    carriers = sorted(carriers_of(os.getpid()))
    assert len(carriers) == 4
    shared = named_memory()
    before = {pid: Held.by(pid) for pid in (os.getpid(), *carriers)}
    await save(warm, warm + saves)
    for pid, then in before.items():
        now = Held.by(pid)
        assert now.descriptors <= then.descriptors, (pid, then, now)
        # what an interpreter's memory varies by; a leak of a share in each save would be more
        assert now.memory < then.memory + (4 << 20), (pid, then, now)
    assert sorted(carriers_of(os.getpid())) == carriers
    assert named_memory() == shared
    await until(lambda: len(list(node.root.iterdir())) <= 6 and not list((node.root / ".trash").iterdir()))


async def test_saves_leave_nothing_behind(place: Path) -> None:
    async with saving_node(place, ranks=2, retained=Retention(2, 0)) as node:
        await grown(node, 60)


@pytest.mark.drill
async def test_a_thousand_saves_leave_nothing_behind(place: Path) -> None:
    async with saving_node(place, ranks=2, retained=Retention(2, 0)) as node:
        await grown(node, 1000)
