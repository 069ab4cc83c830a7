"""`hpcft ckpt export`: what stock readers get, and that they get all of it or nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_samples import RUN, bits, contents, facts, listing, quick_directory, save, training_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from hpcft.checkpoint import target as target_module
from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.export import Format, export
from hpcft.checkpoint.layout import CheckpointDamagedError
from hpcft.checkpoint.read import read_manifest
from hpcft.checkpoint.tree import DTYPE_NAMES, flatten
from hpcft.errors import NotFoundError, UnusableError, UsageError
from hpcft.rundir import RunDirectory

torch.set_num_threads(1)

ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
UNIT = Path(__file__).resolve().parent


def state() -> dict[str, Any]:
    """A training state, and every type of tensor, number and container that is kept."""
    torch.manual_seed(7)
    noise = torch.randint(0, 256, (48,), dtype=torch.uint8)
    kinds = {name: noise.view(dtype).clone() for dtype, name in DTYPE_NAMES.items() if dtype is not torch.bool}
    return {
        **training_state(2),
        "kinds": {
            **kinds,
            "BOOL": torch.tensor([True, False]),
            "zero_d": torch.tensor(5),
            "empty": torch.empty(0, 4),
            "c128": torch.randn(3, dtype=torch.complex128),
            "c128_0d": torch.tensor(1 + 2j, dtype=torch.complex128),
            "e8": noise.view(torch.float8_e8m0fnu).clone(),
            "wide": torch.randn(40, 50),
        },
        "odd": {
            "array": np.arange(6.0).reshape(2, 3),
            "number": np.float32(1.5),
            "frozen": frozenset({1, 2}),
            "pair": (torch.ones(2), 3, [torch.zeros(2, 2), {"deep": torch.ones(())}]),
            "counter": Counter({"a": 2}),
            "size": torch.Size([1, 2]),
            "huge": 1 << 80,
            "bytes": b"\0\1",
            "inf": float("inf"),
            "dtype": torch.bfloat16,
            3: "three",
        },
    }


CONVERTED = ("odd.array", "odd.number", "odd.frozen")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    return commit(root, save(root, flatten(state()), 2), facts()).directory


def same(one: object, other: object) -> bool:
    """Types, order and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def expected() -> dict[str, Any]:
    """With what stock readers take in place of what they do not."""
    found = state()
    found["odd"] |= {"array": torch.arange(6.0, dtype=torch.float64).reshape(2, 3), "number": 1.5, "frozen": (1, 2)}
    return found


# --- torch ---


def test_a_torch_file_holds_the_nested_state(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "state.pt"
    done = export(checkpoint, target, Format.TORCH, run=RUN, progress=lambda *each: seen.append(each))
    loaded = torch.load(target, weights_only=True)
    assert same(loaded, expected())
    assert loaded["model"]._metadata == state()["model"]._metadata
    assert same(torch.load(target, weights_only=True, mmap=True), expected())
    assert done.converted == CONVERTED and (done.files, done.bytes) == (1, target.stat().st_size)
    assert seen[-1][0] == seen[-1][1] > 0
    with zipfile.ZipFile(target) as archive:  # others than torch look at the checksums
        assert archive.testzip() is None
    assert listing(tmp_path) == ["state.pt"]


def test_a_model_comes_out_as_its_own_state_dict(checkpoint: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.BatchNorm1d(65), torch.nn.Linear(65, 7))
    export(checkpoint, tmp_path / "model.pt", Format.TORCH, only=("model",))
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert same(OrderedDict(model.state_dict()), OrderedDict(state()["model"]))
    export(checkpoint, tmp_path / "model.safetensors", Format.SAFETENSORS, only=("model",))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    export(checkpoint, tmp_path / "two.pt", Format.TORCH, only=("model", "scheduler"))
    assert list(torch.load(tmp_path / "two.pt", weights_only=True)) == ["model", "scheduler"]
    with pytest.raises(NotFoundError) as caught:
        export(checkpoint, tmp_path / "no.pt", Format.TORCH, only=("modle",))
    assert caught.value.hint == "it holds: model, optimizer, scheduler, extra, kinds, odd"


# --- safetensors ---


def stored() -> dict[str, torch.Tensor]:
    """As safetensors has them: complex numbers of 128 bits are pairs, what it does not know are bytes."""
    return flatten(state()).tensors


def test_a_safetensors_file_holds_every_tensor(checkpoint: Path, tmp_path: Path) -> None:
    done = export(checkpoint, tmp_path / "all.safetensors", Format.SAFETENSORS)
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == stored().keys()
    assert all(same(loaded[name], tensor.contiguous()) for name, tensor in stored().items())
    assert done.left_out > 0
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_shards_have_the_usual_index(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "sharded"
    done = export(checkpoint, target, Format.SAFETENSORS, only=("model", "optimizer"), max_shard_bytes=9000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = {name: each for name, each in stored().items() if name.startswith(("model.", "optimizer."))}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert [*files, "model.safetensors.index.json"] == listing(target) and done.files == len(files) + 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    for file in files:
        loaded = load_file(target / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == loaded.keys()
        assert all(same(loaded[name], tensors[name].contiguous()) for name in loaded)
        assert sum(each.nbytes for each in loaded.values()) <= 9000
    export(checkpoint, tmp_path / "one", Format.SAFETENSORS, max_shard_bytes=1 << 30)
    assert listing(tmp_path / "one") == ["model.safetensors"]
    with pytest.raises(UsageError, match="no shards"):
        export(checkpoint, tmp_path / "no", Format.TORCH, max_shard_bytes=1 << 30)


# --- torch's distributed format, and its reader of safetensors ---


@ALONE
def test_the_distributed_format_loads_into_objects(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcft.checkpoint.export.FILE_BYTES", 10_000)
    done = export(checkpoint, tmp_path / "dcp", Format.DCP)
    assert done.files > 4 and done.converted == CONVERTED
    target, reference = blank(expected()), blank(expected())
    dcp.load(target, checkpoint_id=str(tmp_path / "dcp"))
    dcp.save(expected(), checkpoint_id=str(tmp_path / "torch's own"))
    dcp.load(reference, checkpoint_id=str(tmp_path / "torch's own"))
    assert same(target, reference)
    for name in ("model", "optimizer", "kinds"):
        assert same(target[name], expected()[name]), name
    export(checkpoint, tmp_path / "model", Format.DCP, only=("model",))
    model = blank(dict(state()["model"]))
    dcp.load(model, checkpoint_id=str(tmp_path / "model"))
    assert same(model, dict(state()["model"]))


def blank(value: Any) -> Any:
    """The same structure without its content."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape).to(value.dtype)
    if isinstance(value, Counter):
        return Counter(dict.fromkeys(value, 0))
    if isinstance(value, dict):
        return type(value)((key, blank(item)) for key, item in value.items())
    if isinstance(value, list):
        return [blank(item) for item in value]
    return None


def resharded(reader: Any, name: str, whole: torch.Tensor) -> torch.Tensor:
    """What four ranks get of a tensor, each a slice of its columns."""
    found = []
    for rank in range(4):
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (4,))
            local = torch.zeros_like(whole.chunk(4, dim=1)[rank]).contiguous()
            tensor = DTensor.from_local(
                local, mesh, [Shard(1)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
            found.append(tensor.to_local())
        finally:
            dist.destroy_process_group()
    return torch.cat(found, dim=1)


@ALONE
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_committed_and_exported_tensors_are_resharded_by_the_stock_reader(checkpoint: Path, tmp_path: Path) -> None:
    whole = state()["kinds"]["wide"]
    manifest, _ = read_manifest(checkpoint)
    assert sum(item.piece.name == "kinds.wide" for entry in manifest.files for item in entry.tensors) == 2
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    assert torch.equal(resharded(reader, "kinds.wide", whole), whole)
    export(checkpoint, tmp_path / "dcp", Format.DCP, only=("kinds", "odd"))
    assert torch.equal(resharded(dcp.FileSystemReader(tmp_path / "dcp"), "kinds.wide", whole), whole)


@ALONE
def test_the_stock_reader_takes_every_type_from_a_committed_checkpoint(checkpoint: Path) -> None:
    target = blank(state()["kinds"])
    for name in ("c128", "c128_0d", "e8"):
        del target[name]
    dcp.load({"kinds": target}, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    assert same(target, {name: tensor for name, tensor in state()["kinds"].items() if name in target})


# --- all or nothing ---


TARGETS = [(Format.TORCH, None), (Format.SAFETENSORS, None), (Format.SAFETENSORS, 9000), (Format.DCP, None)]


@pytest.mark.parametrize(("to", "limit"), TARGETS)
def test_a_flipped_bit_is_named_and_leaves_nothing(tmp_path: Path, to: Format, limit: int | None) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    done = commit(root, save(root, flatten(training_state(1)), 1), facts())
    shard = done.directory / "shard-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=f"{shard.name}, chunk 0: .*tensors "):
        export(done.directory, tmp_path / "out", to, max_shard_bytes=limit)
    assert listing(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize(("to", "limit"), TARGETS)
def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path, to: Format, limit: int | None) -> None:
    def interrupt(done: int, total: int) -> None:
        if total and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", to, max_shard_bytes=limit, progress=interrupt)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("to", "limit"), TARGETS)
def test_what_is_there_is_replaced_only_when_told_to(
    checkpoint: Path, tmp_path: Path, to: Format, limit: int | None
) -> None:
    target = tmp_path / "out"
    export(checkpoint, target, to, max_shard_bytes=limit, only=("model",))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="out exists already") as caught:
        export(checkpoint, target, to, max_shard_bytes=limit)
    assert "--force" in caught.value.hint and contents(tmp_path) == before
    export(checkpoint, target, to, max_shard_bytes=limit, force=True)
    assert listing(tmp_path) == ["out"] and contents(tmp_path) != before


def test_force_deletes_nothing_but_exports(checkpoint: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for target, to, what in (
        (home, Format.DCP, "holds 'thesis.tex', which is no part of an export"),
        (home, Format.TORCH, "is a directory"),
        (tmp_path / "file", Format.DCP, "is no directory"),
    ):
        with pytest.raises(UsageError, match=what):
            export(checkpoint, target, to, force=True)
    assert listing(home) == ["thesis.tex"]
    with pytest.raises(UsageError, match="never changes"):
        export(checkpoint, checkpoint / "model.pt", Format.TORCH)
    with pytest.raises(UsageError, match="there is no directory"):
        export(checkpoint, tmp_path / "nowhere" / "model.pt", Format.TORCH)


def test_force_replaces_no_files_that_others_have_made(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2)}
    (tmp_path / "thesis.txt").write_text("chapter one")
    torch.save(tensors, tmp_path / "mine.pt")
    save_file(tensors, tmp_path / "mine.safetensors")
    with zipfile.ZipFile(tmp_path / "letters.zip", "w") as archive:
        archive.writestr("letter", "Dear")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "hub").mkdir()
    save_file(tensors, tmp_path / "hub" / "model.safetensors")
    for name in ("thesis.txt", "mine.pt", "mine.safetensors", "letters.zip", "pipe"):
        for to in (Format.TORCH, Format.SAFETENSORS):
            with pytest.raises(UsageError, match="no earlier export"):
                export(checkpoint, tmp_path / name, to, force=True)
    with pytest.raises(UsageError, match=r"holds 'model\.safetensors', which is no part of an export"):
        export(checkpoint, tmp_path / "hub", Format.SAFETENSORS, max_shard_bytes=4000, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "chapter one"
    export(checkpoint, tmp_path / "ours", Format.SAFETENSORS)
    export(checkpoint, tmp_path / "ours", Format.TORCH, force=True)
    assert torch.load(tmp_path / "ours", weights_only=True)["extra"]["step"] == 2


@ALONE
def test_force_does_not_replace_another_programs_distributed_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="is no part of an export"):
        export(checkpoint, tmp_path / "theirs", Format.DCP, force=True)
    assert contents(tmp_path) == before


def test_nothing_is_exported_to_where_a_run_keeps_its_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    (run.checkpoints / "LATEST").touch()
    for target, what in (
        (run.checkpoints / "LATEST", "keeps its checkpoints"),
        (run.checkpoints / ".trash" / "x", "keeps its checkpoints"),
        (checkpoint.parent / "model.pt", "keeps its checkpoints"),
        (tmp_path / "step-00000050-g0001", "name of a checkpoint"),
    ):
        for force in (False, True):
            with pytest.raises(UsageError, match=what):
                export(checkpoint, target, Format.SAFETENSORS, force=force)
    assert listing(run.checkpoints) == ["LATEST"] and listing(tmp_path) == ["run"]


def test_a_file_system_that_cannot_exchange_keeps_the_old_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS: the system call is there, and refuses."""
    export(checkpoint, tmp_path / "out", Format.DCP, only=("model",))
    before = contents(tmp_path)
    monkeypatch.setattr(target_module, "_RENAME_EXCHANGE", 1 << 20)
    with pytest.raises(UnusableError, match="cannot exchange two directories"):
        export(checkpoint, tmp_path / "out", Format.DCP, force=True)
    assert contents(tmp_path) == before


def test_leftovers_of_killed_exports_go_and_those_at_work_stay(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.0123456789ab.aside").mkdir()
    (tmp_path / ".out.0123456789ab.aside" / "__0_0.distcp").touch()
    (tmp_path / ".out.ba9876543210.aside").touch()
    (tmp_path / ".other.ba9876543210.aside").touch()
    (tmp_path / ".out.aaaaaaaaaaaa.aside").touch()
    fd = os.open(tmp_path / ".out.aaaaaaaaaaaa.aside", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        export(checkpoint, tmp_path / "out", Format.TORCH, only=("scheduler",))
        assert listing(tmp_path) == [".other.ba9876543210.aside", ".out.aaaaaaaaaaaa.aside", "out"]
    finally:
        os.close(fd)


def test_two_exports_to_one_target(checkpoint: Path, tmp_path: Path) -> None:
    """The second one to be ready finds that there is something."""
    target = tmp_path / "out"

    def meanwhile(done: int, total: int) -> None:
        if total and not target.exists():
            target.write_text("somebody else's")

    with pytest.raises(UsageError, match="exists already"):
        export(checkpoint, target, Format.TORCH, progress=meanwhile)
    assert listing(tmp_path) == ["out"] and target.read_text() == "somebody else's"


def test_without_room_nothing_is_begun(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)
    full = os.statvfs_result((*found[:4], 0, *found[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(UnusableError, match=r"0\.0 MiB are free"):
        export(checkpoint, tmp_path / "out", Format.TORCH)
    assert listing(tmp_path) == []


def test_a_disk_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, tmp_path / "out", Format.SAFETENSORS)
    assert listing(tmp_path) == []


def test_an_export_that_is_killed_anywhere_leaves_the_target_old_or_new() -> None:
    with quick_directory() as directory:
        done = subprocess.run(
            [sys.executable, UNIT / "export_faults.py", directory],
            env={**os.environ, "PYTHONPATH": f"{UNIT}:{UNIT.parents[1]}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6
    for name, counts in found.items():
        assert counts["before"] >= 4, (name, "calls before it has its name")
        assert counts["after"] >= 2, (name, "and after")
