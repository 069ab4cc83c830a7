"""Reading by several threads, and by several ranks of a node."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import facts, same_tensors, save

from hpcft.checkpoint import files
from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.files import Peers, in_turn
from hpcft.checkpoint.layout import CheckpointDamagedError, Damage
from hpcft.checkpoint.load import SavedState, load
from hpcft.checkpoint.read import UnreadableError
from hpcft.checkpoint.tree import FlatState, flatten

torch.set_num_threads(1)

SHAREDFS = Path(__file__).parents[1] / "cluster" / "sharedfs.py"
SHARDS = 8


def some_state(nbytes: int) -> FlatState:
    generator = torch.Generator().manual_seed(4)
    length = nbytes // 4 // SHARDS
    return flatten({f"t{n}": torch.randint(2**31, (length,), dtype=torch.int32, generator=generator) for n in range(8)})


def saved_in(root: Path, state: FlatState) -> Path:
    return commit(root, save(root, state, 1, world_size=SHARDS, cut_above=1 << 40), facts()).directory


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def flip_last_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize("peers", [1, 2, 3, 4, 8])
def test_each_rank_comes_to_every_chunk_and_one_of_them_brings_it(peers: int) -> None:
    for count in (0, 1, 2, 5, 4 * peers - 1, 4 * peers, 4 * peers + 1, 131):
        brought: Counter[int] = Counter()
        for index in range(peers):
            order = list(in_turn(count, Peers(index, peers)))
            assert sorted(at for at, _ in order) == list(range(count))
            assert all(at // (4 * peers) == place // (4 * peers) for place, (at, _) in enumerate(order)), "windows"
            brought.update(at for at, own in order if own)
        assert brought == Counter(range(count))


def test_what_one_of_many_files_lacks_is_told_and_the_rest_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight files, the first of them damaged, or out of reach: the others are not read to the end, no thread stays."""
    state = some_state(8 << 20)
    directory = saved_in(tmp_path, state)
    shards = sorted(directory.glob("*.safetensors"))
    before = open_files(), threading.active_count()
    assert same_tensors(load(directory), state)
    flip_last_bit(shards[0])
    read: list[int] = []
    found = threading.Event()
    read_chunk, content_damage = files.read_chunk, files.content_damage

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name.endswith(".safetensors") and name != shards[0].name:
            read.append(offset)
            assert found.wait(60)
        return read_chunk(fd, buffers, offset)

    def telling(*arguments: Any) -> Damage | None:
        if (damage := content_damage(*arguments)) is not None:
            found.set()
        return damage

    monkeypatch.setattr(files, "read_chunk", counting)
    monkeypatch.setattr(files, "content_damage", telling)
    with pytest.raises(CheckpointDamagedError, match=rf"{shards[0].name}, chunk 0.*tensors"):
        load(directory)
    assert found.is_set() and len(read) < SHARDS - 1
    monkeypatch.undo()
    flip_last_bit(shards[0])

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == shards[3]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_chunk(fd, buffers, offset)

    monkeypatch.setattr(files, "read_chunk", failing)
    with pytest.raises(UnreadableError, match=rf"{shards[3].name} cannot be read: Input/output error"):
        load(directory)
    monkeypatch.undo()
    shards[5].unlink()
    with pytest.raises(CheckpointDamagedError, match=rf"{shards[5].name}: it is missing"):
        load(directory)
    assert (open_files(), threading.active_count()) == before


@contextmanager
def served(source: Path, target: Path) -> Iterator[list[str]]:
    """`target` is `source` behind a file system that counts; what it says at its end is in the list, then."""
    reading, writing = os.pipe()
    said: list[str] = []
    try:
        subprocess.run([sys.executable, "-I", SHAREDFS, source, target], check=True, stderr=writing)
    finally:
        os.close(writing)
    with os.fdopen(reading) as stderr:
        try:
            yield said
        finally:
            subprocess.run(["umount", target], check=True)
            said.append(stderr.read())


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and FUSE to mount a file system"
)
@pytest.mark.parametrize("nbytes", [16 << 20, pytest.param(1 << 30, marks=pytest.mark.drill)])
def test_ranks_of_a_node_read_each_byte_once_from_the_storage(tmp_path: Path, nbytes: int) -> None:
    state = some_state(nbytes)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    directory = saved_in(source, state)
    size = sum(path.stat().st_size for path in directory.iterdir())
    with served(source, target) as said:
        waiting, go = os.pipe()
        ranks = []
        for index in range(4):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.close(go)
                    os.read(waiting, 1)  # until all are there
                    read = SavedState.open(target / directory.name, peers=Peers(index, 4)).read()
                    status = 0 if same_tensors(read, state) else 2
                finally:
                    os._exit(status)
            ranks.append(pid)
        os.close(go)
        os.close(waiting)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks] == [0] * 4
    found = re.search(r"read: (\d+) bytes", said[0])
    assert found is not None, said
    assert size <= int(found[1]) <= 1.1 * size
