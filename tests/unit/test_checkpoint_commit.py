from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from checkpoint_samples import (
    NONCE,
    committed,
    contents,
    facts,
    latest_flaw,
    listing,
    mounted,
    quick_directory,
    same_tensors,
    save,
    small_file_system,
    training_state,
)
from system_calls import interrupted

from hpcft import durable
from hpcft.checkpoint.commit import CommitError, commit
from hpcft.checkpoint.layout import checkpoint_name, parse_name, parse_staging, staging_name
from hpcft.checkpoint.load import load
from hpcft.checkpoint.manifest import ShardReport
from hpcft.checkpoint.read import entries, read_latest, read_manifest, verify
from hpcft.checkpoint.retention import discard
from hpcft.checkpoint.share import save_share
from hpcft.checkpoint.tree import FlatState, flatten
from hpcft.checkpoint.write import SaveError
from hpcft.ids import Generation, Rank, Step

torch.set_num_threads(1)


def test_names_are_read_back_and_others_are_not() -> None:
    name = checkpoint_name(Step(1200), Generation(7))
    assert name == "step-00001200-g0007"
    assert parse_name(name) == (1200, 7)
    assert parse_name(checkpoint_name(Step(10**9), Generation(12345))) == (10**9, 12345)
    assert parse_staging(staging_name(name, NONCE)) == (name, NONCE)
    for other in (
        *("LATEST", ".trash", "step-1200-g7", "step-0000001200-g0007", name + "x", staging_name(name, NONCE)),
    ):
        assert parse_name(other) is None
    for other in (name, f".tmp-{name}", f".tmp-{name}-UPPER", ".tmp-step-0000001200-g0007-5eed5eed"):
        assert parse_staging(other) is None
    with pytest.raises(ValueError):
        staging_name(name, "../..")


def test_committed_holds_exactly_what_the_manifest_names(tmp_path: Path) -> None:
    state = flatten(training_state(5))
    reports = save(tmp_path, state, 5, world_size=3)
    assert all(len(orjson.dumps(report.to_json())) < 1000 for report in reports)
    assert [ShardReport.parse(orjson.loads(orjson.dumps(report.to_json()))) for report in reports] == reports
    done = commit(tmp_path, reports[::-1], facts("step-00000004-g0001"))
    manifest, digest = read_manifest(done.directory)
    assert listing(tmp_path) == ["LATEST", "step-00000005-g0001"]
    assert set(listing(done.directory)) == {"manifest.json", *(entry.name for entry in manifest.files)}
    assert done.size == manifest.size == sum((done.directory / e.name).stat().st_size for e in manifest.files)
    assert manifest.parent == "step-00000004-g0001"
    assert manifest.position == {"samples": 160}
    assert manifest.mesh == {"replica": 3}
    assert manifest.versions["torch"] == torch.__version__
    latest = read_latest(tmp_path)
    assert latest is not None
    assert (latest.name, latest.nonce, latest.manifest) == (done.name, NONCE, digest)
    pinned = [name for name in manifest.tensors() if "running" in name]
    assert pinned
    assert set(pinned) <= {item.piece.name for item in manifest.files[0].tensors + manifest.files[1].tensors}


def test_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    """What comparing replicas, and runs with and without failures, is built on."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    state = flatten(training_state(5))
    one = commit(tmp_path / "one", save(tmp_path / "one", state, 5), facts())
    other = commit(tmp_path / "other", save(tmp_path / "other", state, 6, nonce="0ther"), facts())
    a, b = contents(one.directory), contents(other.directory)
    assert {name for name in a if a[name] != b[name]} == {"manifest.json"}


def test_thousands_of_tensors_fit_a_message(tmp_path: Path) -> None:
    state = flatten({f"layer{n}": {"weight": torch.full((3,), float(n)), "bias": torch.ones(1)} for n in range(3000)})
    reports = save(tmp_path, state, 1, world_size=2)
    assert max(len(orjson.dumps(report.to_json())) for report in reports) < 1000
    assert same_tensors(load(commit(tmp_path, reports, facts()).directory), state)


def test_again_with_the_same_reports_is_the_same_checkpoint(tmp_path: Path) -> None:
    reports = save(tmp_path, flatten(training_state(5)), 5)
    first = commit(tmp_path, reports, facts())
    before = contents(tmp_path)
    assert commit(tmp_path, reports, facts(created=9.9)) == first
    assert contents(tmp_path) == before


def test_another_nonce_never_takes_the_place(tmp_path: Path) -> None:
    first = committed(tmp_path, 5)
    before = contents(first.directory)
    reports = save(tmp_path, flatten(training_state(6)), 5, nonce="0ther")
    with pytest.raises(CommitError, match="under nonce 5eed5eed, not 0ther"):
        commit(tmp_path, reports, facts())
    assert contents(first.directory) == before


def test_a_save_is_never_written_over(tmp_path: Path) -> None:
    state = flatten(training_state(5))
    save(tmp_path, state, 5)
    with pytest.raises(SaveError, match="File exists"):
        save(tmp_path, state, 5)


def refused(root: Path, reports: list[ShardReport], words: str) -> None:
    with pytest.raises(CommitError, match=words):
        commit(root, reports, facts())
    assert entries(root) == []
    assert read_latest(root) is None


def test_refuses_what_is_not_complete_or_not_of_one_piece(tmp_path: Path) -> None:
    state = flatten(training_state(5))
    reports = save(tmp_path, state, 5)
    refused(tmp_path, [], "no rank")
    refused(tmp_path, reports[:-1], r"ranks \[2\] have not reported")
    refused(tmp_path, [*reports, reports[0]], "reported twice")
    refused(tmp_path, [*reports[:2], replace(reports[2], nonce="0ther")], "nonce '0ther'")
    refused(tmp_path, [*reports[:2], replace(reports[2], name="step-00000006-g0001")], "name")
    refused(tmp_path, [*reports[:2], replace(reports[2], index="0" * 32)], "another set of tensors")
    refused(tmp_path, [*reports[:2], replace(reports[2], sidecar="0" * 32)], "is not what rank 2 reported")
    refused(tmp_path, [replace(report, index="0" * 32) for report in reports], "not those that the ranks held")
    shard = tmp_path / staging_name(reports[0].name, NONCE) / "shard-00001-of-00003.safetensors"
    with shard.open("ab") as file:
        file.write(b"x")
    refused(tmp_path, reports, "were written")
    shard.unlink()
    refused(tmp_path, reports, "No such file")


def test_ranks_that_cut_differently_are_found_out(tmp_path: Path) -> None:
    state = flatten({"w": torch.randn(64, 64), "v": torch.randn(40, 40)})
    name = checkpoint_name(Step(1), Generation(1))
    reports = [
        save_share(tmp_path, name, NONCE, Rank(rank), 2, state, cut_above=1000 if rank else 1 << 30)
        for rank in range(2)
    ]
    refused(tmp_path, reports, "exactly once")


def test_rename_whose_answer_was_lost_has_succeeded(tmp_path: Path) -> None:
    """An NFS client repeats the request and is told that there is nothing to rename."""
    reports = save(tmp_path, flatten(training_state(5)), 5)
    name = reports[0].name

    def rename_before(call: str) -> None:
        assert call == "rename"
        (tmp_path / staging_name(name, NONCE)).rename(tmp_path / name)

    shutil.copytree(tmp_path, tmp_path / "rehearsal")
    with interrupted(0, rename_before) as seen:
        commit(tmp_path / "rehearsal", reports, facts())
    shutil.rmtree(tmp_path / "rehearsal")
    second = [place for place, call in enumerate(seen) if call == "rename"][1]
    with interrupted(second + 1, rename_before):
        done = commit(tmp_path, reports, facts())
    assert verify(done.directory) == []
    assert latest_flaw(tmp_path) == ""


def test_a_sleeping_leader_does_not_turn_the_hint_back(tmp_path: Path) -> None:
    old = save(tmp_path, flatten(training_state(5)), 5, generation=1)
    newer = committed(tmp_path, 3, generation=2)
    commit(tmp_path, old, facts())
    latest = read_latest(tmp_path)
    assert latest is not None
    assert latest.name == newer.name
    assert latest_flaw(tmp_path) == ""


def test_commit_outlives_a_hint_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "LATEST").mkdir()
    (tmp_path / "LATEST" / "in the way").touch()
    done = committed(tmp_path, 5)
    assert "LATEST could not be rewritten" in done.latest_failure
    assert verify(done.directory) == []


def test_commit_needs_no_torch(tmp_path: Path) -> None:
    reports = save(tmp_path, flatten(training_state(5)), 5)
    script = (
        "import sys, json; from pathlib import Path\n"
        "from hpcft.checkpoint import commit, read, retention, marks\n"
        "from hpcft.checkpoint.manifest import ShardReport\n"
        "root = Path(sys.argv[1]); reports = [ShardReport.parse(r) for r in json.loads(sys.argv[2])]\n"
        "done = commit.commit(root, reports, commit.Facts('r', 1, None, 0.0))\n"
        "assert read.verify(done.directory) == []\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    told = json.dumps([report.to_json() for report in reports])
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path), told], check=True, timeout=60)


def test_faults_at_every_step() -> None:
    """Killed, failing with EIO, and stopped at every durable call of save, commit, retirement: checkpoint_faults."""
    script = Path(__file__).with_name("checkpoint_faults.py")
    with quick_directory() as place:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script), str(place)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    old, new = "step-00000001-g0001", "step-00000002-g0001"
    # Both sides of the decisive rename were met, many times.
    assert found["killed"][old] > 30
    assert found["killed"][new] > 10
    assert found["failed"].keys() == {old, new}
    assert found["carrier"] > 30
    # A leader that wakes too late finds its files swept, or adds a checkpoint of its own generation.
    assert min(found["late"].values()) > 5
    assert found["retries"] > 15


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk_costs_only_that_save(tmp_path: Path, kind: str) -> None:
    large = flatten({"w": torch.ones(24 << 18)})  # 24 MiB
    medium, small = flatten({"w": torch.ones(8 << 18)}), flatten({"w": torch.ones(1 << 18)})
    name = checkpoint_name(Step(2), Generation(1))
    with small_file_system(tmp_path, kind, 16) as disk:
        done = commit(disk, save(disk, small, 1, world_size=1), facts())
        with pytest.raises(SaveError, match=r"rank 0 did not begin to write .*24\.0 MiB.* MiB are free"):
            save(disk, large, 2, world_size=1)
        assert [entry.name for entry in disk.iterdir() if entry.name.startswith(".tmp")] == []
        with (
            pytest.raises(SaveError, match=r"rank 0 could not write .* No space left on device"),
            interrupted(6, lambda call: fill(disk)) as calls,
        ):
            save(disk, medium, 2, world_size=1)
        assert calls[5] == "write"
        (disk / "filler").unlink()
        discard(disk, name, NONCE)
        assert [entry.name for entry in entries(disk)] == [done.name]
        assert same_tensors(load(done.directory), small)
        again = commit(disk, save(disk, small, 3, world_size=1), facts(done.name))
        assert verify(again.directory) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_disk_that_fills_up_during_the_commit(tmp_path: Path) -> None:
    with small_file_system(tmp_path, "tmpfs", 8) as disk:
        reports = save(disk, flatten({"w": torch.ones(1 << 18)}), 2, world_size=1)
        fill(disk)
        with pytest.raises(CommitError, match="writing the manifest: No space left on device"):
            commit(disk, reports, facts())
        assert entries(disk) == []
        (disk / "filler").unlink()
        assert verify(commit(disk, reports, facts()).directory) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system read-only")
def test_read_only_file_system(tmp_path: Path) -> None:
    with small_file_system(tmp_path, "ext4", 16) as disk:
        done = committed(disk, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(SaveError, match="Read-only file system"):
            save(disk, flatten(training_state(2)), 2)
        assert verify(done.directory) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a loop device")
def test_power_cut_at_moments_of_a_save_and_commit() -> None:
    """What has reached the device at one moment is what a power cut leaves: the image of a mounted file system,
    copied, is exactly that. Nothing unsynced is in it, and ext4's own guess at renames is switched off."""
    with quick_directory() as place:
        image, copied = place / "image", place / "copied"
        moments = sealed = 0
        state = flatten(training_state(2))
        while True:
            moments += 1
            number = 3 * moments
            with image.open("wb") as file:
                file.truncate(8 << 20)
            subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
            with mounted(place, "-o", "loop,noauto_da_alloc", str(image)) as disk:
                first = committed(disk, 1)

                def cut(name: str) -> None:
                    copied.write_bytes(image.read_bytes())

                with interrupted(number, cut) as seen:
                    second = commit(disk, save(disk, state, 2), facts(first.name))
                after = len(seen) < number
                if after:
                    cut("after the commit")
            (place / "mounted").rmdir()
            with mounted(place, "-o", "loop", str(copied)) as disk:
                names = [entry.name for entry in entries(disk)]
                assert all(verify(disk / name) == [] for name in names), number
                # The second rename is that of the directory; once its parent is synced, nothing takes it back.
                done = seen[: number - 1]
                at = [place for place, call in enumerate(done) if call == "rename"]
                there = len(at) > 1 and "fsync" in done[at[1] :]
                sealed += there and not after
                assert names == [first.name, second.name] if there else names[0] == first.name, number
                if after:
                    assert latest_flaw(disk) == ""
                    assert same_tensors(load(disk / second.name), state)
            (place / "mounted").rmdir()
            if after:
                break
        assert moments > 10
        assert sealed, "no moment between the commit and its hint was met"


def test_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No such file or directory"):
        save(tmp_path / "gone", FlatState({}, {}), 1)
    assert durable.is_aside(".LATEST.0123.aside")


def test_memory_for_a_save_does_not_grow_with_the_state() -> None:
    """Largest case: nothing is contiguous. A child measures its own peak, before and after."""
    script = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from hpcft.checkpoint.tree import flatten; from hpcft.checkpoint.share import save_share\n"
        "torch.set_num_threads(1)\n"
        "state = flatten({'t': torch.ones(4096, 12288).T, 'c': torch.ones(1 << 24)})\n"
        "save_share(Path(sys.argv[1]), 'step-00000001-g0001', 'warm', 0, 1, flatten({'x': torch.ones(5).flip(0)}))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "save_share(Path(sys.argv[1]), 'step-00000001-g0001', '5eed', 0, 1, state)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    with quick_directory() as place:
        done = subprocess.run(
            [sys.executable, "-c", script, str(place)], check=True, timeout=120, capture_output=True, text=True
        )
    assert int(done.stdout) < 160 * 1024, "KiB beyond the state of 256 MiB"
