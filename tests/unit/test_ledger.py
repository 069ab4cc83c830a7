"""The ledger of samples: what counts after rollbacks, torn files, full disks; and that nothing amiss stays unnamed."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.data import order
from hpcft.data.account import LedgerReport, report
from hpcft.data.batches import Position, advance, global_batch, slice_for
from hpcft.data.ledger import LedgerWriter, ledger_path
from hpcft.errors import NotFoundError, UnusableError
from tests.search import sampled

N, BATCH, SEED = 100, 9, 11


class Ranks:
    """The writers of one generation, driven through steps as workers would."""

    def __init__(
        self,
        run: Path,
        generation: int,
        world: int,
        restored: int = 0,
        of: int | None = None,
        only: range | None = None,
        n: int = N,
        batch: int = BATCH,
    ) -> None:
        (run / "ledger").mkdir(exist_ok=True)
        self.n, self.batch, self.world = n, batch, world
        self.position = Position()
        for _ in range(restored):
            self.position = advance(global_batch(self.position, n, batch), n)
        self.step = restored
        self.writers = {
            rank: LedgerWriter(
                ledger_path(run / "ledger", generation, rank),
                generation=generation,
                rank=rank,
                world_size=world,
                restored_step=restored,
                restored_generation=of,
            )
            for rank in (only or range(world))
        }
        for writer in self.writers.values():
            writer.begin(samples=n, seed=SEED, shuffle=True)

    def train(self, steps: int, ranks: range | None = None) -> "Ranks":
        for _ in range(steps):
            self.step += 1
            batch = global_batch(self.position, self.n, self.batch)
            for rank in ranks or self.writers:
                first, end = slice_for(batch, rank, self.world)
                ids = order.ids(SEED, batch.epoch, self.n, first, end)
                self.writers[rank].record(self.step, batch, ids)
                assert self.writers[rank].failed is None
            self.position = advance(batch, self.n)
        return self


def once_and_pending(account: LedgerReport) -> list[tuple[int, int]]:
    return [(epoch.once, epoch.pending) for epoch in account.epochs]


def test_an_undisturbed_run_is_exact(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 4).train(14)
    account = report(tmp_path)
    assert account.exact
    assert once_and_pending(account) == [(100, 0), (18, 82)]
    assert [epoch.in_progress for epoch in account.epochs] == [False, True]
    assert (account.samples, account.seed, account.last_step, account.superseded) == (N, SEED, 14, 0)
    assert account.generations[0].steps == 14


def test_an_epoch_that_just_ended_is_complete(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2).train(12)
    account = report(tmp_path)
    assert once_and_pending(account) == [(100, 0)] and not account.epochs[0].in_progress


def test_steps_undone_by_a_rollback_are_superseded(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 4).train(8)
    assert report(tmp_path).epochs[0].once == 72
    Ranks(tmp_path, 2, 3, restored=5)
    assert report(tmp_path).epochs[0].once == 45  # nothing done again yet, and yet undone
    Ranks(tmp_path, 2 + 1, 3, restored=5).train(7)
    account = report(tmp_path)
    assert account.exact and account.superseded == 3
    assert once_and_pending(account) == [(100, 0)]
    assert [each.steps for each in account.generations] == [5, 0, 7]


def test_a_chosen_checkpoint_counts_by_its_own_ancestors(tmp_path: Path) -> None:
    """Generation 2 goes back to step 3; generation 3 then starts from step 6 of generation 1, not of generation 2."""
    Ranks(tmp_path, 1, 2).train(8)
    two = Ranks(tmp_path, 2, 2, restored=3, of=1)
    two.position = Position(0, 63)  # what it does next is other than what generation 1 did
    two.train(4)
    assert not report(tmp_path).exact
    Ranks(tmp_path, 3, 2, restored=6, of=1).train(2)
    account = report(tmp_path)
    assert account.exact, account.problems
    assert [each.steps for each in account.generations] == [6, 0, 2]
    assert account.epochs[0].once == 72


def test_a_step_written_again_voids_what_followed_it(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 1, 2).train(6)
    ranks.step, ranks.position = 3, Position(0, 27)
    ranks.train(9)
    account = report(tmp_path)
    assert account.exact and account.superseded == 3 and account.epochs[0].once == 100


def test_the_step_that_some_ranks_have_yet_to_record_is_left_out(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 4).train(5).train(1, range(2))
    account = report(tmp_path)
    assert account.exact and account.open_step == 6 and account.last_step == 5
    assert account.epochs[0].once == 45 and account.superseded == 0


def test_a_missing_rank_is_named_and_its_samples_are_missed(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 3).train(5).train(1, range(2)).train(6)
    account = report(tmp_path)
    assert not account.exact
    assert account.problems == ("step 6 of generation 1 has no record of rank 2",)
    lost = sorted(order.ids(SEED, 0, N, 51, 54).tolist())
    assert account.epochs[0].never == 3 and list(account.epochs[0].missing_ids) == lost


def test_in_an_epoch_in_progress_missed_and_pending_samples_differ(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 3).train(2).train(1, range(1, 3)).train(4)
    (epoch,) = report(tmp_path).epochs
    assert (epoch.once, epoch.never, epoch.pending, epoch.in_progress) == (60, 3, 37, True)


def test_a_step_that_repeats_samples_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 1, 2).train(4)
    ranks.position = Position(0, 27)
    ranks.train(2)
    account = report(tmp_path)
    assert "step 5 starts at place 27 of epoch 0" in account.problems[0]
    assert "place 36 of epoch 0" in account.problems[0]
    assert account.epochs[0].more_than_once == 9
    assert set(account.epochs[0].repeated_ids) < set(order.ids(SEED, 0, N, 27, 36).tolist())


def test_a_generation_without_a_ledger_is_named(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2).train(3)
    Ranks(tmp_path, 5, 2, restored=6, of=4).train(3)
    account = report(tmp_path)
    assert "generation 4 trained steps up to 6 and left no ledger" in account.problems[0]
    assert account.epochs[0].once == 54 and account.epochs[0].never == 27


def test_many_problems_are_counted_not_listed(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2, only=range(1), n=10_000).train(100)
    account = report(tmp_path)
    assert len(account.problems) == 21 and account.problems[-1] == "and 79 more"


def says(run: Path, *checkpoints: tuple[int, int]) -> None:
    """The leader's view: the checkpoints (step, generation) of the lineage."""
    lineage = [{"step": step, "generation": generation} for step, generation in checkpoints]
    (run / "status.json").write_bytes(orjson.dumps({"generation": 1, "checkpoints": lineage}))


def test_a_record_that_ends_before_the_newest_checkpoint_is_not_exact(tmp_path: Path) -> None:
    """All ranks stopped recording at the same step, of a full disk: nothing of what is there looks amiss."""
    Ranks(tmp_path, 1, 4).train(8)
    says(tmp_path, (5, 1), (8, 1))
    assert report(tmp_path).exact
    says(tmp_path, (5, 1), (12, 1))
    account = report(tmp_path)
    assert not account.exact and account.last_step == 8
    assert account.problems[0].startswith("the record ends at step 8, and the run has gone on at least to step 12")


def test_a_record_that_ends_before_the_run_did_is_not_exact(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 4).train(8)
    (tmp_path / "finished.json").write_bytes(orjson.dumps({"outcome": "finished", "step": 8}))
    assert report(tmp_path).exact
    (tmp_path / "finished.json").write_bytes(orjson.dumps({"outcome": "finished", "step": 9}))
    assert "the run has gone on at least to step 9" in report(tmp_path).problems[0]


def test_a_newest_generation_without_a_ledger_is_named(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2).train(8)
    says(tmp_path, (5, 1), (8, 2))
    account = report(tmp_path)
    assert not account.exact
    assert account.problems == ("generation 2 trained steps up to 8 and left no ledger",)


def test_what_a_generation_went_on_from_has_to_be_recorded(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2).train(3)
    Ranks(tmp_path, 2, 2, restored=6, of=1)
    assert "the run has gone on at least to step 6" in report(tmp_path).problems[0]


def test_of_a_branch_that_was_left_nothing_is_missed(tmp_path: Path) -> None:
    """The status is written by the second; a new generation may have begun since, from an older checkpoint."""
    Ranks(tmp_path, 1, 2).train(8)
    says(tmp_path, (5, 1), (8, 1))
    Ranks(tmp_path, 2, 2, restored=5, of=1).train(1)
    account = report(tmp_path)
    assert account.exact and account.last_step == 6, account.problems


def test_a_step_that_a_checkpoint_rests_on_is_not_open(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 4).train(5).train(1, range(2))
    says(tmp_path, (6, 1))
    account = report(tmp_path)
    assert account.open_step is None
    assert account.problems == ("step 6 of generation 1 has no record of rank 2, 3",)


def test_a_status_that_cannot_be_read_leaves_it_open_whether_all_is_recorded(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2).train(3)
    (tmp_path / "status.json").write_bytes(b"half a sta")
    account = report(tmp_path)
    assert not account.exact and account.last_step == 3
    assert "status.json cannot be read" in account.problems[0]


@sampled(60)
@given(st.integers(1, 900))
def test_a_torn_file_gives_its_whole_records(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A file that ends anywhere, or ends in zeros as after a loss of power."""
    run = tmp_path_factory.mktemp("run")
    Ranks(run, 1, 1).train(8)
    path = ledger_path(run / "ledger", 1, 0)
    whole = path.read_bytes()
    record = 32 + BATCH * 4 + 8
    header = len(whole) - 8 * record
    kept = max(0, len(whole) - cut)
    path.write_bytes(whole[:kept])
    if kept < header:
        with pytest.raises(NotFoundError):
            report(run)
        return
    assert report(run).last_step == (kept - header) // record
    path.write_bytes(whole[:kept] + bytes(len(whole) - kept))
    assert report(run).last_step == (kept - header) // record


def test_a_flipped_bit_ends_what_is_believed(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 1).train(8)
    path = ledger_path(tmp_path / "ledger", 1, 0)
    damaged = bytearray(path.read_bytes())
    damaged[-1 - 2 * 76 - 8] ^= 1
    path.write_bytes(damaged)
    assert report(tmp_path).last_step == 5


def test_a_full_disk_does_not_raise_and_what_waits_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, 1, 1).train(2)
    (writer,) = ranks.writers.values()
    batch = global_batch(ranks.position, N, BATCH)
    ids = order.ids(SEED, 0, N, batch.start, batch.stop)
    real = os.pwrite

    def full(fd: int, content: bytearray, offset: int) -> int:
        if len(content) > 40:  # a first part still fits
            return real(fd, content[:40], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    writer.record(3, batch, ids)
    writer.sync()
    assert (
        writer.failed is not None and "No space left on device" in writer.failed and str(writer.path) in writer.failed
    )
    monkeypatch.undo()
    assert report(tmp_path).last_step == 2
    writer.sync()
    assert writer.failed is None
    assert report(tmp_path).exact and report(tmp_path).last_step == 3


def test_a_directory_that_is_gone_is_remembered_not_raised(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "missing" / "g0001-r0000.led", generation=1, rank=0, world_size=1)
    writer.begin(samples=10, seed=0, shuffle=True)
    writer.record(1, global_batch(Position(), 10, 5), np.arange(5))
    writer.sync()
    assert writer.failed is not None and "No such file or directory" in writer.failed
    (tmp_path / "missing").mkdir()
    writer.record(2, global_batch(Position(0, 5), 10, 5), np.arange(5, 10))
    assert writer.failed is None
    writer.close()


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.data.ledger._WAITING_BYTES", 1000)
    writer = LedgerWriter(tmp_path / "missing" / "x.led", generation=1, rank=0, world_size=1)
    writer.begin(samples=10, seed=0, shuffle=True)
    for step in range(100):
        writer.record(step, global_batch(Position(), 10, 5), np.arange(5))
    assert writer.failed is not None and "no more samples are recorded" in writer.failed


def test_an_older_file_is_never_written_over(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 1).train(3)
    before = ledger_path(tmp_path / "ledger", 1, 0).read_bytes()
    late = LedgerWriter(ledger_path(tmp_path / "ledger", 1, 0), generation=1, rank=0, world_size=1)
    late.begin(samples=N, seed=SEED, shuffle=True)
    late.record(1, global_batch(Position(), N, BATCH), np.arange(9))
    late.sync()
    assert late.failed is not None and "File exists" in late.failed
    assert ledger_path(tmp_path / "ledger", 1, 0).read_bytes() == before


def test_a_failed_fsync_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (writer,) = Ranks(tmp_path, 1, 1).train(2).writers.values()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    writer.sync()
    monkeypatch.undo()
    writer.sync()
    assert writer.failed is not None and "Input/output error" in writer.failed


def test_large_data_sets_have_ids_of_eight_bytes(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    path = ledger_path(tmp_path / "ledger", 1, 0)
    writer = LedgerWriter(path, generation=1, rank=0, world_size=1)
    writer.begin(samples=2**40, seed=0, shuffle=True)
    header = path.stat().st_size
    ids = order.ids(0, 0, 2**40, 0, 4)
    writer.record(1, global_batch(Position(), 2**40, 4), ids)
    assert ids.max() > 2**32
    assert ids.astype("<u8").tobytes() in path.read_bytes()[header:]


def test_no_ledger_and_another_data_set_are_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no ledger"):
        report(tmp_path)
    Ranks(tmp_path, 1, 2).train(2)
    Ranks(tmp_path, 2, 2, restored=1, n=50)
    with pytest.raises(UnusableError, match="mixes data sets: generation 1 has 100 samples"):
        report(tmp_path)


def test_millions_of_samples_are_counted_in_seconds(tmp_path: Path) -> None:
    Ranks(tmp_path, 1, 2, n=2_000_003, batch=4096).train(600)
    start = time.perf_counter()
    account = report(tmp_path)
    assert time.perf_counter() - start < 10  # about 0.2
    assert account.exact
    assert once_and_pending(account) == [(2_000_003, 0), (111 * 4096, 2_000_003 - 111 * 4096)]


def test_the_account_needs_no_torch() -> None:
    check = "import sys, hpcft.data.account; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
