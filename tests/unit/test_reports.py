"""What `hpcft ckpt` and `hpcft ledger` print, of real checkpoints and real ledgers."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import orjson
import pytest
from checkpoint_samples import RUN, committed, pin

from hpcft import reports
from hpcft.checkpoint import read
from hpcft.checkpoint.layout import seal, unseal
from hpcft.checkpoint.readers import excluded
from hpcft.data.account import EpochReport, LedgerReport
from hpcft.errors import ExitCode, NotFoundError
from hpcft.ids import Step
from hpcft.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    run.identity.write_bytes(orjson.dumps({"id": RUN, "name": "run"}))
    return run


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_checkpoints_are_listed_newest_first_with_what_is_known_of_them(run: RunDirectory) -> None:
    for step, generation in ((100, 1), (200, 1), (200, 2)):
        committed(run.checkpoints, step, generation)
    pin(run.checkpoints, "step-00000100-g0001")
    flip(run.checkpoints / "step-00000200-g0001" / "manifest.json", 40)
    listing = reports.list_checkpoints(run)
    assert [each.name for each in listing.checkpoints] == [
        "step-00000200-g0002", "step-00000200-g0001", "step-00000100-g0001",
    ]  # fmt: skip
    newest, damaged, pinned = listing.checkpoints
    assert newest.name == listing.latest
    assert newest.bytes == sum(path.stat().st_size for path in (run.checkpoints / newest.name).iterdir()) - (
        (run.checkpoints / newest.name / "manifest.json").stat().st_size
    )
    assert (newest.world_size, newest.damage) == (3, None)
    assert damaged.damage is not None
    assert "manifest.json" in damaged.damage
    assert pinned.marks == ("pinned",)
    lines = listing.text().splitlines()
    assert lines[1].endswith("latest")
    assert "DAMAGED: manifest.json" in lines[2]
    assert lines[3].endswith("pinned")
    assert json.loads(json.dumps(listing.as_dict()))["checkpoints"][2]["step"] == 100


def test_checkpoints_of_a_branch_that_was_left_are_marked(run: RunDirectory) -> None:
    for step, generation in ((100, 1), (200, 1), (150, 2), (200, 2)):
        committed(run.checkpoints, step, generation)
    lineage = [{"step": 100, "generation": 1}, {"step": 150, "generation": 2}]
    run.status.write_bytes(orjson.dumps({"state": "training", "generation": 2, "checkpoints": lineage}))
    listing = reports.list_checkpoints(run)
    left = {(each.step, each.generation) for each in listing.checkpoints if each.abandoned}
    assert left == {(200, 1)}, "(200, 2) is newer than the status"
    assert [line.split()[0] for line in listing.text().splitlines() if "abandoned" in line] == ["200"]
    run.status.write_bytes(b"half a sta")
    assert not any(each.abandoned for each in reports.list_checkpoints(run).checkpoints)


def test_quarantined_checkpoints_are_named(run: RunDirectory) -> None:
    committed(run.checkpoints, 100)
    read.quarantine(run.checkpoints / "step-00000100-g0001", "a flipped bit")
    listing = reports.list_checkpoints(run)
    assert listing.checkpoints == ()
    assert [name.startswith("step-00000100-g0001") for name in listing.quarantined] == [True]
    assert "quarantined: step-00000100-g0001" in listing.text()


def test_a_missing_file_is_listed_without_reading_any(run: RunDirectory) -> None:
    directory = committed(run.checkpoints, 100).directory
    (directory / "state.json").unlink()
    (listed,) = reports.list_checkpoints(run).checkpoints
    assert listed.damage is not None and "state.json" in listed.damage and listed.world_size is not None
    assert "DAMAGED: state.json" in reports.list_checkpoints(run).text()


def test_a_run_without_checkpoints(run: RunDirectory) -> None:
    assert reports.list_checkpoints(run).text() == "the run run has no checkpoint yet"


def test_verification_names_the_damaged_file_and_its_tensors(run: RunDirectory) -> None:
    for step in (100, 200):
        committed(run.checkpoints, step)
    assert reports.verify_run(run).sound
    shard = next((run.checkpoints / "step-00000200-g0001").glob("shard-*.safetensors"))
    flip(shard, shard.stat().st_size - 1)
    verification = reports.verify_run(run)
    assert not verification.sound
    newest, older = verification.as_dict()["checkpoints"]
    assert (newest["step"], newest["sound"], older["sound"]) == (200, False, True)
    assert newest["damages"][0]["file"] == shard.name
    assert newest["damages"][0]["tensors"]
    assert "step-00000200-g0001: DAMAGED" in verification.text()
    assert "step-00000100-g0001: sound" in verification.text()
    assert reports.verify_checkpoints([read.of_step(run.checkpoints, Step(100))], run.run_id()).sound


def test_a_checkpoint_of_another_run_does_not_pass(run: RunDirectory) -> None:
    committed(run.checkpoints, 100)
    run.identity.write_bytes(orjson.dumps({"id": "another", "name": "run"}))
    assert not reports.verify_run(run).sound


def unreadable(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """As a bad sector, or another user's directory, makes it."""
    opened, read_bytes = os.open, Path.read_bytes

    def refuse(path: object) -> None:
        if Path(str(path)) == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def opening(path: object, *more: Any, **others: Any) -> int:
        refuse(path)
        return opened(path, *more, **others)  # type: ignore[call-overload]

    def reading(path: Path) -> bytes:
        refuse(path)
        return read_bytes(path)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(Path, "read_bytes", reading)


def test_a_checkpoint_that_cannot_be_read_hides_no_other(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (100, 200, 300):
        committed(run.checkpoints, step)
    unreadable(monkeypatch, run.checkpoints / "step-00000200-g0001" / "manifest.json")
    listing = reports.list_checkpoints(run)
    assert [(each.step, each.unreadable, each.damage) for each in listing.checkpoints] == [
        (300, None, None), (200, "manifest.json: Input/output error", None), (100, None, None),
    ]  # fmt: skip
    assert listing.text().splitlines()[2].endswith("?  cannot be read: manifest.json: Input/output error")
    assert listing.as_dict()["checkpoints"][1]["unreadable"] == "manifest.json: Input/output error"

    verification = reports.verify_run(run)
    assert (verification.sound, verification.exit_code) == (False, ExitCode.UNUSABLE)
    assert verification.text().splitlines() == [
        "step-00000300-g0001: sound",
        "step-00000200-g0001: cannot be read: manifest.json: Input/output error",
        "step-00000100-g0001: sound",
    ]
    (entry,) = [each for each in verification.as_dict()["checkpoints"] if each["step"] == 200]
    assert (entry["sound"], entry["damages"]) == (False, [])
    assert entry["unreadable"] == "manifest.json: Input/output error"

    flip(run.checkpoints / "step-00000100-g0001" / "state.json", 40)
    assert reports.verify_run(run).exit_code == ExitCode.DAMAGED
    assert reports.verify_checkpoints([read.of_step(run.checkpoints, Step(300))], None).exit_code == ExitCode.OK


def test_what_is_damaged_beside_what_cannot_be_read_is_named(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = committed(run.checkpoints, 100).directory
    shards = sorted(directory.glob("shard-*.safetensors"))
    flip(shards[0], shards[0].stat().st_size - 1)
    flip(shards[2], shards[2].stat().st_size - 1)
    unreadable(monkeypatch, shards[1])
    verification = reports.verify_run(run)
    assert verification.exit_code == ExitCode.DAMAGED
    title, first, last, other = verification.text().splitlines()
    assert title == "step-00000100-g0001: DAMAGED"
    assert first.startswith(f"  {shards[0].name}, chunk 0: ") and last.startswith(f"  {shards[2].name}, chunk 0: ")
    assert other == f"  cannot be read: {shards[1].name}: Input/output error"


def test_a_checkpoint_of_another_format_hides_no_other(run: RunDirectory) -> None:
    for step in (100, 200):
        committed(run.checkpoints, step)
    manifest = run.checkpoints / "step-00000200-g0001" / "manifest.json"
    body, _ = unseal("manifest", manifest.read_bytes())
    manifest.write_bytes(seal("manifest", body | {"format": 2}))
    newer, known = reports.list_checkpoints(run).checkpoints
    assert newer.unreadable is not None and "has format 2, this version of hpcft reads format 1" in newer.unreadable
    assert (newer.damage, known.unreadable) == (None, None)
    verification = reports.verify_run(run)
    assert verification.exit_code == ExitCode.UNUSABLE
    assert "step-00000200-g0001: cannot be read: the checkpoint has format 2" in verification.text()
    assert "step-00000100-g0001: sound" in verification.text()


def test_a_hint_that_cannot_be_read_hides_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(run.checkpoints, 100)
    unreadable(monkeypatch, run.checkpoints / "LATEST")
    listing = reports.list_checkpoints(run)
    assert (listing.latest, len(listing.checkpoints)) == (None, 1)


def test_where_nothing_could_be_read_nothing_is_called_sound(run: RunDirectory) -> None:
    committed(run.checkpoints, 100)
    directory = run.checkpoints / "step-00000100-g0001"
    with excluded(directory), pytest.raises(NotFoundError, match="is just being deleted"):  # as `prune` does
        reports.verify_run(run)


def ledger(**changes: object) -> LedgerReport:
    epoch = EpochReport(0, 1000, 1000, 0, 0, 0, False)
    facts = {
        "samples": 1000, "seed": 0, "last_step": 60, "superseded": 0, "open_step": None,
        "epochs": (epoch,), "generations": (), "problems": (),
    }  # fmt: skip
    return LedgerReport(**{**facts, **changes})  # type: ignore[arg-type]


def test_a_ledger_that_adds_up() -> None:
    text = reports.ledger_text(ledger(superseded=3, open_step=61))
    assert text.splitlines()[-1] == "each sample that was reached has been used exactly once"
    assert "3 steps were undone by a rollback and do not count" in text
    assert "step 61 is being recorded" in text
    assert reports.ledger_as_dict(ledger())["exact"] is True


def test_a_ledger_that_does_not_add_up_names_samples() -> None:
    epoch = EpochReport(0, 1000, 995, 2, 3, 0, False, (4, 5), (7, 8, 9))
    report = ledger(epochs=(epoch,), problems=("step 12: rank 3 is missing",))
    text = reports.ledger_text(report)
    assert "epoch 0: used more than once: 4, 5" in text
    assert "epoch 0: never used: 7, 8, 9" in text
    assert "PROBLEM: step 12: rank 3 is missing" in text
    assert text.splitlines()[-1] == "NOT EXACT"
    assert json.loads(json.dumps(reports.ledger_as_dict(report)))["exact"] is False


def test_epochs_that_are_alike_share_a_row() -> None:
    whole = [EpochReport(number, 1000, 1000, 0, 0, 0, False) for number in range(4)]
    odd = EpochReport(4, 1000, 999, 0, 1, 0, False, (), (7,))
    last = EpochReport(5, 1000, 200, 0, 0, 800, True)
    rows = reports.ledger_text(ledger(epochs=(*whole, odd, last))).splitlines()[3:6]
    assert [row.split() for row in rows] == [
        ["0-3", "1000", "0", "0", "0", "each"],
        ["4", "999", "0", "1", "0"],
        ["5", "200", "0", "0", "800"],
    ]
