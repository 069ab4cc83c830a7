from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_samples import RUN, bits, committed, contents, facts, same_tensors, save, training_state
from safetensors import safe_open
from safetensors.torch import load_file

from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.image import lay_out
from hpcft.checkpoint.layout import CheckpointDamagedError, checkpoint_name, seal, unseal
from hpcft.checkpoint.load import load
from hpcft.checkpoint.manifest import Manifest
from hpcft.checkpoint.pieces import Piece, index_digest
from hpcft.checkpoint.read import (
    UnreadableError,
    entries,
    losses,
    quarantine,
    read_latest,
    read_manifest,
    verify,
)
from hpcft.checkpoint.share import content, words_of
from hpcft.checkpoint.tree import flatten, unflatten
from hpcft.checkpoint.write import Plan, write_share
from hpcft.durable import CHUNK_BYTES, digest, write_file
from hpcft.errors import NotFoundError, UnusableError
from hpcft.ids import Generation, Rank, Step

torch.set_num_threads(1)

ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
"""What a stock reader says when it is used by one process."""


FROZEN_DIGESTS = {
    "shard-00000-of-00002.safetensors": "0977b679",
    "shard-00001-of-00002.safetensors": "5133b7be",
    "state.json": "0dee8f54",
}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_one_flipped_bit_anywhere_is_detected_and_named(tmp_path: Path) -> None:
    older, newest = committed(tmp_path, 1), committed(tmp_path, 2)
    expected = flatten(training_state(1))
    files = [*sorted(newest.directory.iterdir()), tmp_path / "LATEST"]
    assert {path.suffix for path in files} == {".safetensors", ".json", ""}
    dice = random.Random(20)
    for turn in range(210):
        path = files[turn % len(files)]
        bit = dice.randrange(path.stat().st_size * 8)
        flip(path, bit)
        where = f"bit {bit} of {path.name}"
        if path.name == "LATEST":
            with pytest.raises(CheckpointDamagedError, match="LATEST"):
                read_latest(tmp_path)
            assert entries(tmp_path)[-1].directory == newest.directory, where
        else:
            assert {damage.file for damage in verify(newest.directory, RUN)} == {path.name}, where
            assert verify(older.directory, RUN) == [], where
            with pytest.raises(CheckpointDamagedError, match=path.name):
                load(newest.directory, run=RUN)
        flip(path, bit)
    assert verify(newest.directory, RUN) == []
    assert same_tensors(load(older.directory), expected)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of about 40 MiB: three chunks each, tensors across their borders."""
    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(3)
    state = {f"t{n}": torch.randn(1 << 20) for n in range(4)} | {
        "wide": torch.randn(4, 4 << 20),
        "many": [torch.randn(3) for _ in range(3000)],
    }
    reports = save(root, flatten(state), 1, world_size=2, cut_above=32 << 20)
    return commit(root, reports, facts()).directory


def test_damage_names_file_chunk_and_tensors(large: Path) -> None:
    manifest, _ = read_manifest(large)
    assert verify(large) == []
    for entry in manifest.files[1:]:
        assert len(entry.digests) == 3
        for chunk in range(3):
            path, place = large / entry.name, chunk * CHUNK_BYTES + 5_000_000
            flip(path, place * 8)
            (damage,) = verify(large)
            assert (damage.file, damage.chunk) == (entry.name, chunk)
            hit = {item.piece.name for item in entry.tensors if item.begin <= place < item.end}
            assert hit and hit <= set(damage.tensors)
            assert f"{entry.name}, chunk {chunk}" in str(damage)
            with pytest.raises(CheckpointDamagedError, match=f"{entry.name}, chunk {chunk}"):
                load(large)
            flip(path, place * 8)


@ALONE
def test_pieces_cut_in_any_dimension_are_put_together(tmp_path: Path) -> None:
    """What sharded optimizers write: here one shard is written by hand, cut into columns."""
    whole = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    state = flatten({"w": whole})
    name = checkpoint_name(Step(1), Generation(1))
    boxes = [((0, 0), (6, 4)), ((0, 4), (2, 6)), ((2, 4), (4, 6))]
    reports = []
    for rank, (offsets, extent) in enumerate(boxes):
        piece = Piece("w", "F32", (6, 10), offsets, extent)
        image = lay_out([piece])
        plan = Plan(Rank(rank), 3, index_digest(state.index()), image.placed, image.size)
        words = words_of(Rank(rank), state, None)
        bytes_of = partial(content, state, image)
        reports.append(
            write_share(tmp_path, name, "c0de", plan, words, lambda path, of=bytes_of: write_file(path, of()))
        )
    done = commit(tmp_path, reports, replace(facts(), mesh={"shard": 3}))
    assert verify(done.directory) == []
    assert torch.equal(load(done.directory).tensors["w"], whole)
    target = {"w": torch.zeros(6, 10)}
    stock_load(target, done.directory)
    assert torch.equal(target["w"], whole)


def stock_load(target: dict[str, object], directory: Path) -> None:
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(directory)))


@ALONE
@pytest.mark.parametrize("world_size", [1, 3, 40])
def test_stock_readers_take_the_shards_as_their_own(tmp_path: Path, world_size: int) -> None:
    state = training_state(4)
    done = committed(tmp_path, 4, world_size=world_size)
    flat = flatten(state)
    shards = sorted(done.directory.glob("*.safetensors"))
    assert len(shards) == world_size
    manifest, _ = read_manifest(done.directory)
    for shard in shards:
        loaded = load_file(shard)
        entry = manifest.file(shard.name)
        assert entry is not None
        assert {item.piece.name: item.piece.extent for item in entry.tensors} == {
            name: tuple(tensor.shape) for name, tensor in loaded.items()
        }
        with safe_open(shard, "pt") as file:
            for item in entry.tensors:
                name, offsets, extent = item.piece.name, item.piece.offsets, item.piece.extent
                part = flat.tensors[name][tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))]
                assert bits(file.get_tensor(name)) == bits(part)
    target = training_state(9)
    del target["scheduler"]
    assert isinstance(target["optimizer"], dict)
    groups = target["optimizer"].pop("param_groups")
    assert groups
    target["extra"] = {key: v for key, v in target["extra"].items() if isinstance(v, torch.Tensor)}  # type: ignore[attr-defined]
    stock_load(target, done.directory)
    assert same_tensors(flatten(target), flat)


def break_manifest(directory: Path, **changes: object) -> None:
    body, _ = unseal("manifest", (directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_bytes(seal("manifest", body | changes))


SHARD = "shard-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("spoil", "file", "words"),
    [
        (lambda d: (d / SHARD).unlink(), SHARD, "missing"),
        (lambda d: (d / "state.json").unlink(), "state.json", "missing"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json", "missing"),
        (lambda d: os.truncate(d / SHARD, 4096), SHARD, "4096 bytes instead of"),
        (lambda d: os.truncate(d / SHARD, 0), SHARD, "0 bytes instead of"),
        (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size + 1), SHARD, "bytes instead of"),
        (lambda d: os.truncate(d / "manifest.json", 300), "manifest.json", "not a complete sealed manifest"),
        (lambda d: os.truncate(d / "manifest.json", 0), "manifest.json", "not a complete sealed manifest"),
        (lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), SHARD, "directory"),
        (lambda d: break_manifest(d, run="another"), "manifest.json", "belongs to run another"),
        (lambda d: break_manifest(d, step=3), "manifest.json", "belongs to step-00000003-g0001"),
        (lambda d: break_manifest(d, generation=2), "manifest.json", "belongs to step-00000002-g0002"),
        (lambda d: break_manifest(d, step="2"), "manifest.json", "manifest.step is not a whole number"),
        (lambda d: break_manifest(d, step=True), "manifest.json", "manifest.step is not a whole number"),
        (lambda d: break_manifest(d, files=[]), "manifest.json", "is not among its files"),
        (lambda d: break_manifest(d, world_size=2), "manifest.json", "is not among its files"),
        (lambda d: break_manifest(d, mesh={"replica": 2}), "manifest.json", "does not hold 3 ranks"),
        (lambda d: break_manifest(d, position=7), "manifest.json", "position is not an object"),
    ],
)
def test_what_disks_and_people_do(tmp_path: Path, spoil: object, file: str, words: str) -> None:
    newest = committed(tmp_path, 2)
    spoil(newest.directory)  # type: ignore[operator]
    for check in (verify, losses):
        damages = check(newest.directory, RUN)
        assert file in {damage.file for damage in damages}
        assert any(words in damage.reason for damage in damages), damages
    with pytest.raises(CheckpointDamagedError, match=words):
        load(newest.directory, run=RUN)


def test_manifest_of_another_checkpoint(tmp_path: Path) -> None:
    one, other = committed(tmp_path, 1), committed(tmp_path, 2)
    shutil.copy(one.directory / "manifest.json", other.directory)
    (damage,) = verify(other.directory)
    assert damage.reason == "it belongs to step-00000001-g0001"


def test_every_changed_number_in_the_index_is_found(tmp_path: Path) -> None:
    """A manifest with a right digest and a wrong index, as a defect of a writer would leave it."""
    newest = committed(tmp_path, 2)
    original = (newest.directory / "manifest.json").read_bytes()
    body, _ = unseal("manifest", original)
    for key, value in [
        *(("begin", 0), ("end", 10**9), ("dtype", "F64"), ("dtype", "X"), ("name", "other"), ("shape", [1])),
        *(("offsets", [1, 1]), ("extent", [2]), ("extent", [-1]), ("begin", "4096"), ("begin", True)),
    ]:
        body, _ = unseal("manifest", original)
        body["files"][1]["tensors"][0][key] = value
        with pytest.raises(ValueError):
            Manifest.parse(seal("manifest", body))
    for key, value in [("size", 5), ("digests", []), ("digests", ["x"]), ("name", "../x"), ("name", "state.json")]:
        body, _ = unseal("manifest", original)
        body["files"][1][key] = value
        with pytest.raises(ValueError):
            Manifest.parse(seal("manifest", body))
    body, _ = unseal("manifest", original)
    body["coverage"]["index"] = "0" * 32
    with pytest.raises(ValueError, match="not those that the ranks held"):
        Manifest.parse(seal("manifest", body))
    body, _ = unseal("manifest", original)
    body["files"][1]["later version"] = 1
    body["later version"] = 2
    assert Manifest.parse(seal("manifest", body))[0].step == 2


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    newest = committed(tmp_path, 2)
    break_manifest(newest.directory, format=2)
    with pytest.raises(UnusableError, match="format 2"):
        verify(newest.directory)


def test_files_that_do_not_belong_are_named(tmp_path: Path) -> None:
    newest = committed(tmp_path, 2)
    (newest.directory / "shard-00009-of-00010.safetensors").write_bytes(b"stock readers would read this")
    (damage,) = verify(newest.directory)
    assert damage.reason == "it is no part of the checkpoint"
    assert losses(newest.directory) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_what_a_node_cannot_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    newest = committed(tmp_path, 2)

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    for read in (load, verify, losses):
        with pytest.raises(UnreadableError, match=os.strerror(number)):
            read(newest.directory)


def test_a_checkpoint_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    gone = committed(tmp_path, 2).directory
    gone.rename(tmp_path / "elsewhere")
    for read in (load, verify, losses):
        with pytest.raises(NotFoundError, match="there is no checkpoint"):
            read(gone)


def test_permission_is_no_damage() -> None:
    """In a child that becomes another user where the tests are run by root, who may read everything."""
    with tempfile.TemporaryDirectory() as name:
        newest = committed(Path(name), 2)
        Path(name).chmod(0o755)
        (newest.directory / SHARD).chmod(0)
        pid = os.fork()
        if pid == 0:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                verify(newest.directory)
            except UnusableError as error:
                os._exit(0 if "Permission denied" in error.message else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_only_committed_checkpoints_are_offered(tmp_path: Path) -> None:
    assert entries(tmp_path / "not yet") == []
    one = committed(tmp_path, 7, generation=2)
    save(tmp_path, flatten(training_state(8)), 8)
    for name in (".trash", ".quarantine", "step-9-g1", "notes"):
        (tmp_path / name).mkdir()
    (entry,) = entries(tmp_path)
    assert (entry.step, entry.generation, entry.directory) == (7, 2, one.directory)
    with pytest.raises(NotFoundError):
        load(tmp_path / "step-00000009-g0001")


def test_quarantine_keeps_everything(tmp_path: Path) -> None:
    one, two = committed(tmp_path, 1), committed(tmp_path, 2)
    before = contents(two.directory)
    place = quarantine(two.directory, "its content does not match its digest")
    assert place == tmp_path / ".quarantine" / two.name
    assert contents(place) == before
    assert [entry.name for entry in entries(tmp_path)] == [one.name]
    reason, _ = unseal("reason", (tmp_path / ".quarantine" / f"{two.name}.reason.json").read_bytes())
    assert "digest" in reason["reason"]
    assert quarantine(two.directory, "again") is None
    place.rename(two.directory)
    assert verify(two.directory) == []
    assert quarantine(two.directory, "once more") == place
    assert len(contents(place)) == len(before)


def test_state_comes_back_as_it_went(tmp_path: Path) -> None:
    done = committed(tmp_path, 3)
    back = unflatten(load(done.directory))
    state = training_state(3)
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.BatchNorm1d(65), torch.nn.Linear(65, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    model.load_state_dict(back["model"])
    optimizer.load_state_dict(back["optimizer"])
    assert back["scheduler"] == state["scheduler"]
    assert back["extra"]["best"] == float("inf")
    assert same_tensors(flatten({"m": model.state_dict()}), flatten({"m": state["model"]}))


def test_format_1_is_frozen(tmp_path: Path) -> None:
    """Whoever changes one of these changes the format: docs/checkpoint-format.md, a new number, the CHANGELOG."""
    state = flatten(
        {
            "model": {"w": torch.arange(12.0).reshape(4, 3), "b": torch.arange(3).bfloat16(), "n": torch.tensor(7)},
            "values": [1, 2.5, (None, float("inf")), {3: b"x"}, np.arange(2, dtype=np.int16), 1j],
        }
    )
    done = commit(tmp_path, save(tmp_path, state, 1, world_size=2, cut_above=16), facts())
    digests = {name: digest(data)[:8] for name, data in contents(done.directory).items() if name != "manifest.json"}
    assert digests == FROZEN_DIGESTS
    body, _ = unseal("manifest", (done.directory / "manifest.json").read_bytes())
    assert list(body) == [
        *("format", "run", "term", "generation", "step", "nonce", "world_size", "mesh", "parent", "created"),
        *("position", "metrics", "versions", "coverage", "files"),
    ]
    assert body["format"] == 1
    assert body["coverage"]["pieces"] == 5
    assert set(body["files"][0]) == {"name", "size", "digests", "tensors"}
    assert set(body["files"][1]["tensors"][0]) == {"name", "dtype", "shape", "offsets", "extent", "begin", "end"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_on_a_gpu(tmp_path: Path) -> None:
    state = {"w": torch.randn(40 << 20, device="cuda"), "turned": torch.randn(300, 200, device="cuda").T}
    state |= {"half": torch.randn(5, device="cuda").half(), "scalar": torch.tensor(3, device="cuda")}
    done = commit(tmp_path, save(tmp_path, flatten(state), 1, world_size=2, cut_above=32 << 20), facts())
    back = unflatten(load(done.directory))
    assert all(bits(back[name]) == bits(tensor.cpu()) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["step-00000009-g0001", "step-00000001-g0001", "nothing"])
def test_a_hint_that_dangles_or_lies_decides_nothing_and_is_put_right(tmp_path: Path, name: str) -> None:
    older, newest = committed(tmp_path, 1), committed(tmp_path, 2)
    body = {"name": name, "step": 9, "generation": 1, "nonce": "0ther", "manifest": older.digest}
    (tmp_path / "LATEST").write_bytes(seal("latest", body))
    assert [entry.name for entry in entries(tmp_path)] == [older.name, newest.name]
    assert same_tensors(load(newest.directory, run=RUN), flatten(training_state(2)))
    again = committed(tmp_path, 2, generation=2)
    latest = read_latest(tmp_path)
    assert latest is not None and (latest.name, latest.manifest) == (again.name, again.digest)
