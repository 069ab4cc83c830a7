"""The leader's commit thread on a real directory: what it looks at, and what it lets go."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_samples import NONCE, RUN, committed, pin, save, training_state
from hypothesis import given
from hypothesis import strategies as st

from hpcft import commits as commits_module
from hpcft import durable
from hpcft.checkpoint import marks, read
from hpcft.checkpoint.layout import CheckpointEntry, checkpoint_name, parse_staging, staging_name
from hpcft.checkpoint.read import Damage, entries, losses
from hpcft.checkpoint.retention import retire_abandoned
from hpcft.checkpoint.tree import flatten
from hpcft.commits import Commits, Retention
from hpcft.events import (
    CheckpointCommitted,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointKept,
    CheckpointRef,
    CheckpointsRetired,
    CheckpointVerified,
    Event,
    Formation,
    Member,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from tests.search import sampled

WORKERS = 2


def ref(step: int, generation: int = 1) -> CheckpointRef:
    return CheckpointRef(Step(step), Generation(generation))


def formation(generation: int, restore: CheckpointRef | None) -> Formation:
    member = Member(NodeId("node1"), Incarnation("node1/1"), "10.0.0.1", WORKERS, Rank(0))
    return Formation(Term(1), Generation(generation), (member,), restore, NONCE)


@contextmanager
def thread(
    root: Path, keep: int = 2, keep_every: int = 0, *, best: int = 0, verify: bool = False
) -> Iterator[tuple[Commits, Callable[[], Event]]]:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    retained = Retention(keep, keep_every, best, "val_loss" if best else None)
    commits = Commits(root, RUN, retained, said.put, verify=verify)
    try:
        yield commits, lambda: said.get(timeout=30)
    finally:
        commits.close(30)


def report(commits: Commits, root: Path, step: int, generation: int, **metrics: float) -> None:
    state = flatten(training_state(step))
    for rank, shard in enumerate(save(root, state, step, generation, world_size=WORKERS, metrics=metrics)):
        commits.reported(Generation(generation), Step(step), Rank(rank), shard.to_json())


def unfinished(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if parse_staging(path.name))


def left(root: Path) -> list[tuple[int, int]]:
    return [(each.step, each.generation) for each in entries(root)]


def test_a_branch_keeps_what_it_started_from_and_the_abandoned_one_waits(tmp_path: Path) -> None:
    """`--from 100` with 200 … 400 on disk."""
    for step in (100, 200, 300, 400):
        committed(tmp_path, step)
    lineage = [ref(100)]
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(2, ref(100)))
        for step in (150, 160, 170):
            report(commits, tmp_path, step, 2)
            event = next_event()
            assert isinstance(event, CheckpointCommitted)
            lineage.append(event.checkpoint)
            commits.retain(tuple(lineage))
            if step == 150:
                report(commits, tmp_path, 155, 2)
                assert isinstance(next_event(), CheckpointCommitted)
                assert left(tmp_path) == [(100, 1), (200, 1), (300, 1), (400, 1), (150, 2), (155, 2)]
                lineage.append(ref(155, 2))
            if step == 160:
                retired = next_event()
                assert isinstance(retired, CheckpointsRetired)
                assert set(retired.checkpoints) == {ref(200), ref(300), ref(400), ref(150, 2)}
    assert left(tmp_path) == [(100, 1), (160, 2), (170, 2)], "what it was restored from stays"


def test_what_an_operator_has_deleted_is_no_longer_counted(tmp_path: Path) -> None:
    lineage = []
    with thread(tmp_path, keep=9) as (commits, next_event):
        commits.follow(formation(1, None))
        for step in (100, 200, 300):
            report(commits, tmp_path, step, 1)
            assert isinstance(next_event(), CheckpointCommitted)
            lineage.append(ref(step))
        for step in (100, 200):
            shutil.rmtree(tmp_path / checkpoint_name(Step(step), Generation(1)))
        for _ in range(2):  # the world of the second may not have heard of it yet
            commits.retain(tuple(lineage))
        assert next_event() == CheckpointsRetired((ref(100), ref(200)))
        report(commits, tmp_path, 400, 1)
        assert isinstance(next_event(), CheckpointCommitted), "it is said once"


def test_a_straggler_costs_nothing(tmp_path: Path) -> None:
    """It is committed for a generation that is over: the world does not count it, and nothing goes for it."""
    committed(tmp_path, 100)
    committed(tmp_path, 200)
    with thread(tmp_path, keep=1) as (commits, next_event):
        commits.follow(formation(2, ref(200)))
        report(commits, tmp_path, 300, 2)
        assert isinstance(next_event(), CheckpointCommitted)
        commits.follow(formation(3, ref(200)))
        report(commits, tmp_path, 250, 3)
        assert isinstance(next_event(), CheckpointCommitted)
        assert left(tmp_path) == [(100, 1), (200, 1), (300, 2), (250, 3)]
        commits.retain((ref(100), ref(200), ref(250, 3)))
        assert isinstance(next_event(), CheckpointsRetired)
    assert left(tmp_path) == [(200, 1), (250, 3)]


def test_what_is_reported_again_is_committed_once(tmp_path: Path) -> None:
    """An agent repeats its last words when its connection was lost, for some of them may have been lost with it."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        report(commits, tmp_path, 100, 1)
        commits.reported(Generation(1), Step(100), Rank(0), {"not": "looked at"})
        commits.failed(Generation(1), Step(100), Rank(0), "too late")
        report(commits, tmp_path, 200, 1)
        events = [next_event(), next_event()]
    assert [getattr(event, "checkpoint", event) for event in events] == [ref(100), ref(200)]


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    lineage = []
    with thread(tmp_path, keep=1, best=1) as (commits, next_event):
        commits.follow(formation(1, None))
        for step, loss in ((100, 0.5), (200, 0.1), (300, 0.9), (400, 0.8)):
            report(commits, tmp_path, step, 1, val_loss=loss)
            event = next_event()
            assert isinstance(event, CheckpointCommitted)
            lineage.append(event.checkpoint)
        next((tmp_path / checkpoint_name(Step(200), Generation(1))).glob("*.safetensors")).unlink()
        commits.retain(tuple(lineage))
        retired = next_event()
        assert isinstance(retired, CheckpointsRetired)
        assert ref(100) not in retired.checkpoints, "the best of those that are whole"
        assert ref(300) in retired.checkpoints
    assert {100, 400} <= {step for step, _ in left(tmp_path)}


def test_what_is_in_memory_can_be_written_once_more(tmp_path: Path) -> None:
    """A state of which some file could not be written, tried again under another nonce."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        state = flatten(training_state(100))
        first = save(tmp_path, state, 100, world_size=WORKERS)
        commits.reported(Generation(1), Step(100), Rank(0), first[0].to_json())
        commits.failed(Generation(1), Step(100), Rank(1), "no space left")
        assert isinstance(next_event(), CheckpointFailed)
        assert commits.has_failed(ref(100))
        member = formation(1, None).members
        commits.follow(replace(formation(2, ref(100)), memory=member))
        assert commits.has_failed(ref(100))
        nonce = commits.attempt(ref(100), anew=False)
        assert nonce not in (NONCE, commits.attempt(ref(100), anew=True)), "each attempt has its own"
        nonce = commits.attempt(ref(100), anew=False)
        assert not commits.has_failed(ref(100))
        commits.reported(Generation(1), Step(100), Rank(0), first[0].to_json())  # late, of the first attempt
        commits.failed(Generation(1), Step(100), Rank(1), "no space left")
        for rank, shard in enumerate(save(tmp_path, state, 100, world_size=WORKERS, nonce=nonce)):
            commits.reported(Generation(1), Step(100), Rank(rank), shard.to_json())
        done = next_event()
        assert isinstance(done, CheckpointCommitted) and done.checkpoint == ref(100)
        assert commits.attempt(ref(100), anew=True) is None, "nothing is left to be tried"
    assert left(tmp_path) == [(100, 1)]
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("reported", [False, True])
def test_another_attempt_has_nothing_of_what_a_lost_node_has_written(tmp_path: Path, reported: bool) -> None:
    """Whether that was half of a file, or all of them; its neighbour writes in its place, and the others once more."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        state = flatten(training_state(100))
        first = save(tmp_path, state, 100, world_size=WORKERS)
        staging = tmp_path / staging_name(first[0].name, NONCE)
        if reported:
            commits.reported(Generation(1), Step(100), Rank(1), first[1].to_json())
        else:
            (shard,) = staging.glob("shard-00001-*.safetensors")
            os.truncate(shard, 1000)
        commits.follow(replace(formation(2, ref(100)), memory=formation(1, None).members))
        nonce = commits.attempt(ref(100), anew=True)
        assert nonce not in (None, NONCE) and not commits.has_failed(ref(100))
        commits.failed(Generation(1), Step(100), Rank(0), "what it wrote is in the trash", NONCE)  # late
        commits.reported(Generation(1), Step(100), Rank(0), first[0].to_json())
        for rank, shard_report in enumerate(save(tmp_path, state, 100, world_size=WORKERS, nonce=nonce or "")):
            commits.reported(Generation(1), Step(100), Rank(rank), shard_report.to_json())
        done = next_event()
        assert isinstance(done, CheckpointCommitted) and done.checkpoint == ref(100), done
    assert left(tmp_path) == [(100, 1)] and unfinished(tmp_path) == []


def test_what_all_have_written_is_not_written_again(tmp_path: Path) -> None:
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        report(commits, tmp_path, 100, 1)
        assert commits.attempt(ref(100), anew=True) is None, "its commit is on its way, if not done"
        commits.follow(replace(formation(2, ref(100)), memory=formation(1, None).members))
        assert commits.attempt(ref(100), anew=True) is None
        assert isinstance(next_event(), CheckpointCommitted)
    assert left(tmp_path) == [(100, 1)] and unfinished(tmp_path) == []


def test_a_commit_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        shards = save(tmp_path, flatten(training_state(100)), 100, world_size=WORKERS)
        for path in tmp_path.glob(".tmp-*/*.safetensors"):
            path.unlink()
        for rank, shard in enumerate(shards):
            commits.reported(Generation(1), Step(100), Rank(rank), shard.to_json())
        assert isinstance(next_event(), CheckpointFailed)
        assert commits.has_failed(ref(100))
        assert commits.attempt(ref(100), anew=False) != NONCE


def test_what_the_lineage_does_not_know_yet_stays(tmp_path: Path) -> None:
    """The next commit is through before the world has answered to the last one."""
    with thread(tmp_path, keep=1) as (commits, next_event):
        commits.follow(formation(1, None))
        for step in (100, 200):
            report(commits, tmp_path, step, 1)
            next_event()
        commits.retain((ref(100),))
    assert left(tmp_path) == [(100, 1), (200, 1)]


def test_one_whose_files_are_not_all_there_takes_no_sound_ones_place(tmp_path: Path) -> None:
    lineage = []
    with thread(tmp_path, keep=1) as (commits, next_event):
        commits.follow(formation(1, None))
        for step, lost in ((100, ""), (200, "manifest.json"), (300, "shard-00001-of-00002.safetensors"), (400, "")):
            report(commits, tmp_path, step, 1)
            assert isinstance(next_event(), CheckpointCommitted)
            if lost:
                os.truncate(tmp_path / checkpoint_name(Step(step), Generation(1)) / lost, 100)
            lineage.append(ref(step))
            commits.retain(tuple(lineage))
        assert next_event() == CheckpointsRetired((ref(100), ref(200), ref(300)))
    assert left(tmp_path) == [(400, 1)], "none has gone for 200 and 300"


def test_pinned_ones_stay_on_any_branch(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        committed(tmp_path, step)
    pin(tmp_path, checkpoint_name(Step(300), Generation(1)))
    with thread(tmp_path, keep=1) as (commits, next_event):
        commits.follow(formation(2, ref(100)))
        report(commits, tmp_path, 150, 2)
        next_event()
        commits.retain((ref(100), ref(150, 2)))
    assert left(tmp_path) == [(100, 1), (300, 1), (150, 2)]


def test_a_commit_says_how_long_training_stood_still_and_when_the_save_had_begun(tmp_path: Path) -> None:
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        first, second = save(tmp_path, flatten(training_state(5)), 5, 1, world_size=WORKERS)
        commits.reported(Generation(1), Step(5), Rank(0), first.to_json(), {"blocked": 0.25, "took": 100.0})
        commits.reported(Generation(1), Step(5), Rank(0), first.to_json(), {"blocked": 0.25, "took": 100.0})
        commits.reported(Generation(1), Step(5), Rank(1), second.to_json(), {"blocked": 7.5})
        done = next_event()
        assert isinstance(done, CheckpointCommitted)
        assert done.blocked == 7.5
        assert 100.0 < done.lag < 130.0, "since the first rank began"
        first, second = save(tmp_path, flatten(training_state(6)), 6, 1, world_size=WORKERS)
        commits.reported(Generation(1), Step(6), Rank(0), first.to_json(), {"blocked": "x", "took": float("nan")})
        commits.reported(Generation(1), Step(6), Rank(1), second.to_json())
        unmeasured = next_event()
        assert isinstance(unmeasured, CheckpointCommitted)
        assert (unmeasured.blocked, unmeasured.lag) == (0.0, 0.0)


def test_the_best_stay_also_for_the_next_leader(tmp_path: Path) -> None:
    lineage: list[CheckpointRef] = []

    def train(generation: int, losses: dict[int, float]) -> None:
        with thread(tmp_path, keep=1, best=2) as (commits, next_event):
            commits.follow(formation(generation, lineage[-1] if lineage else None))
            for step, loss in losses.items():
                report(commits, tmp_path, step, generation, **({"val_loss": loss} if loss else {}))
                while not isinstance(done := next_event(), CheckpointCommitted):
                    assert isinstance(done, CheckpointsRetired)
                lineage.append(done.checkpoint)
                commits.retain(tuple(lineage))

    train(1, {10: 0.9, 20: 0.0, 30: 0.4, 40: 0.5, 50: 0.8})
    assert left(tmp_path) == [(30, 1), (40, 1), (50, 1)]
    train(2, {60: 0.7, 70: 0.3, 80: 0.6, 90: 0.0})
    assert left(tmp_path) == [(30, 1), (50, 1), (70, 2), (90, 2)], "50 is what the second leader started from"


def test_what_is_read_back_is_marked_and_the_newest_of_it_outlasts_damaged_ones(tmp_path: Path) -> None:
    with thread(tmp_path, keep=1, verify=True) as (commits, next_event):
        commits.follow(formation(1, None))
        lineage = []
        for step in (100, 200, 300):
            report(commits, tmp_path, step, 1)
            assert isinstance(next_event(), CheckpointCommitted)
            if step > 100:
                shard = tmp_path / checkpoint_name(Step(step), Generation(1)) / "shard-00001-of-00002.safetensors"
                content = bytearray(shard.read_bytes())
                content[-9] ^= 4
                shard.write_bytes(content)
            lineage.append(ref(step))
            commits.retain(tuple(lineage))
            events = [next_event()]
            if step == 300:
                events.append(next_event())
                (gone,) = [each for each in events if isinstance(each, CheckpointsRetired)]
                assert gone.checkpoints == (ref(200),)
            (found,) = [each for each in events if isinstance(each, CheckpointVerified)]
            assert found.checkpoint == ref(step)
            assert ("its content does not match its digest" in found.damage) == (step > 100)
    assert left(tmp_path) == [(100, 1), (300, 1)], "what the leader alone finds damaged is not set aside"
    assert marks.verified(tmp_path) == {checkpoint_name(Step(100), Generation(1))}


def test_one_that_is_being_read_back_is_not_retired_and_older_ones_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, answer = threading.Event(), threading.Event()
    read_back: list[str] = []

    def slow(directory: Path, run: RunId) -> list[Damage]:
        read_back.append(directory.name)
        reading.set()
        assert answer.wait(60)
        assert (directory / "manifest.json").exists()
        return []

    monkeypatch.setattr(read, "losses", slow)
    with thread(tmp_path, keep=1, verify=True) as (commits, next_event):
        commits.follow(formation(1, None))
        lineage, gone = [], []
        for step in (100, 200, 300, 400):
            report(commits, tmp_path, step, 1)
            while not isinstance(event := next_event(), CheckpointCommitted):
                gone.append(event)
            lineage.append(ref(step))
            commits.retain(tuple(lineage))
            if step == 100:
                assert reading.wait(30)
        while len(gone) < 2:
            gone.append(next_event())
        assert gone == [CheckpointsRetired((ref(200),)), CheckpointsRetired((ref(300),))]
        answer.set()
        assert [next_event(), next_event()] == [CheckpointVerified(ref(100)), CheckpointVerified(ref(400))]
    assert read_back == [checkpoint_name(Step(step), Generation(1)) for step in (100, 400)]


def test_a_commit_does_not_wait_until_the_trash_is_empty(tmp_path: Path) -> None:
    """Of eight thousand ranks, whose files are unlinked one by one."""
    trash = tmp_path / ".trash"
    old = trash / checkpoint_name(Step(1), Generation(1))
    old.mkdir(parents=True)
    for rank in range(8000):
        (old / f"{rank}").touch()
    save(tmp_path, flatten(training_state(50)), 50, 1, world_size=WORKERS)  # which nobody finished
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    commits = Commits(tmp_path, RUN, Retention(2, 0), said.put)
    commits.follow(formation(2, None))
    report(commits, tmp_path, 60, 2)
    assert isinstance(said.get(timeout=30), CheckpointCommitted)
    assert left(tmp_path) == [(60, 2)]
    assert unfinished(tmp_path) == [], "out of the way"
    began = time.monotonic()
    commits.close(0.5)
    assert time.monotonic() - began < 10
    assert any(any(each.iterdir()) for each in trash.glob(f"{old.name}.*")), "what remains is for the next leader"


def test_leftovers_go_and_the_generation_that_writes_meanwhile_loses_nothing(tmp_path: Path) -> None:
    for step in range(10, 20):
        save(tmp_path, flatten(training_state(step)), step, 1, world_size=WORKERS)
    assert len(unfinished(tmp_path)) == 10
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(2, None))
        for step in (20, 30):
            report(commits, tmp_path, step, 2)
            assert isinstance(next_event(), CheckpointCommitted)
        save(tmp_path, flatten(training_state(40)), 40, 2, world_size=WORKERS)
    assert list((tmp_path / ".trash").iterdir()) == []
    assert left(tmp_path) == [(20, 2), (30, 2)]
    assert unfinished(tmp_path) == [staging_name(checkpoint_name(Step(40), Generation(2)), NONCE)]
    assert not any(losses(tmp_path / checkpoint_name(Step(step), Generation(2)), RUN) for step in (20, 30))


def test_a_commit_does_not_wait_until_another_checkpoint_has_been_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(tmp_path, 100)
    reading, answer = threading.Event(), threading.Event()

    def hang(directory: Path, run: RunId) -> list[Damage]:
        reading.set()
        assert answer.wait(60)
        return []

    monkeypatch.setattr(read, "losses", hang)
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    commits = Commits(tmp_path, RUN, Retention(2, 0), said.put)
    try:
        commits.quarantine(ref(100), "a digest differs")
        assert reading.wait(30)
        commits.follow(formation(2, ref(100)))
        report(commits, tmp_path, 150, 2)
        assert isinstance(said.get(timeout=30), CheckpointCommitted)
        began = time.monotonic()
        commits.close(30)
        assert time.monotonic() - began < 10, "nothing is left to wait for but the reader"
    finally:
        answer.set()
    assert said.empty()


@sampled(200)
@given(
    st.sets(st.tuples(st.integers(0, 40), st.integers(1, 4))),
    st.sets(st.tuples(st.integers(0, 40), st.integers(1, 4))),
    st.integers(0, 4),
    st.integers(0, 10),
)
def test_abandoned_ones_go_only_for_enough_later_ones(
    live: set[tuple[int, int]], others: set[tuple[int, int]], keep: int, keep_every: int
) -> None:
    def named(each: tuple[int, int]) -> str:
        return checkpoint_name(Step(each[0]), Generation(each[1]))

    held = [CheckpointEntry(Step(s), Generation(g), Path("/run") / named((s, g))) for s, g in live | others]
    gone = set(
        retire_abandoned(held, frozenset(map(named, live)), Generation(4), keep, keep_every or None, frozenset())
    )
    assert gone <= {named(each) for each in others - live if each[1] < 4}
    for step, generation in others:
        if named((step, generation)) in gone:
            assert sum(later > generation for _, later in live) >= max(keep, 1)


def test_only_what_the_leader_finds_damaged_is_set_aside(tmp_path: Path) -> None:
    done = committed(tmp_path, 100)
    committed(tmp_path, 200)
    shard = done.directory / "shard-00001-of-00003.safetensors"
    with thread(tmp_path) as (commits, next_event):
        commits.quarantine(ref(100), "a bit was wrong")
        kept = next_event()
        assert kept == CheckpointKept(ref(100), "the leader has read all of it and finds it sound")
        (done.directory / ".nfs0000000000000001").write_bytes(b"an NFS client holds a deleted file")
        commits.quarantine(ref(100), "a bit was wrong")
        assert isinstance(next_event(), CheckpointKept)

        content = bytearray(shard.read_bytes())
        content[-9] ^= 4
        shard.write_bytes(content)
        commits.quarantine(ref(100), "a bit was wrong")
        damaged = next_event()
        assert isinstance(damaged, CheckpointDamaged) and damaged.checkpoint == ref(100)
        assert "its content does not match its digest" in damaged.detail

        commits.quarantine(ref(100), "there is no checkpoint")
        assert next_event() == CheckpointDamaged(
            ref(100), "there is no checkpoint; for the leader it is not there either"
        )
    assert left(tmp_path) == [(200, 1)]
    assert (tmp_path / ".quarantine" / done.directory.name / shard.name).exists()


def test_a_leader_that_cannot_read_condemns_nothing(tmp_path: Path) -> None:
    done = committed(tmp_path, 100)
    manifest = done.directory / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # whose first page cannot be read: EIO
    with thread(tmp_path) as (commits, next_event):
        commits.quarantine(ref(100), "a bit was wrong")
        kept = next_event()
    assert isinstance(kept, CheckpointKept)
    assert "the leader cannot tell" in kept.why and os.strerror(5) in kept.why
    assert left(tmp_path) == [(100, 1)]


def test_damage_counts_where_it_cannot_be_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = committed(tmp_path, 100)
    shutil.copy(done.directory / "state.json", done.directory / "manifest.json")
    (tmp_path / ".quarantine").write_bytes(b"no directory")
    with thread(tmp_path) as (commits, next_event):
        commits.quarantine(ref(100), "a bit was wrong")
        assert isinstance(next_event(), CheckpointDamaged)
    assert "could not be set aside" in caplog.text


def test_a_save_that_was_superseded_is_no_failure_and_leaves_nothing(tmp_path: Path) -> None:
    """One rank had passed the step when the order reached it; another one has saved it, and goes on to the next."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        first, second = save(tmp_path, flatten(training_state(12)), 12, 1, world_size=WORKERS)
        commits.reported(Generation(1), Step(12), Rank(0), first.to_json())
        commits.supersede(Step(12))
        report(commits, tmp_path, 14, 1)
        event = next_event()
        assert isinstance(event, CheckpointCommitted) and event.checkpoint == ref(14)
        commits.reported(Generation(1), Step(12), Rank(1), second.to_json())
        commits.failed(Generation(1), Step(12), Rank(1), "its directory has gone")
    assert (left(tmp_path), unfinished(tmp_path)) == ([(14, 1)], [])


def test_saves_of_long_ago_cost_no_memory_and_stay_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits_module, "REMEMBERED", 3)
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        report(commits, tmp_path, 10, 1)
        assert isinstance(next_event(), CheckpointCommitted)
        late, _ = save(tmp_path, flatten(training_state(20)), 20, 1, world_size=WORKERS)
        for step in range(20, 120, 10):
            commits.supersede(Step(step))
            commits.failed(Generation(1), Step(step), Rank(1), "its disk is full")
            assert isinstance(next_event(), CheckpointFailed)
        saves = commits._saves
        assert saves is not None
        assert [len(each) for each in (saves.settled, saves.dropped, saves.superseded)] == [3, 3, 3]
        commits.reported(Generation(1), Step(20), Rank(0), late.to_json())
        commits.failed(Generation(1), Step(20), Rank(1), "its disk is full")
        for rank in (0, 1):
            commits.failed(Generation(1), Step(10), Rank(rank), "said once more")
        assert commits.settled(Step(20)) and not commits.settled(Step(120))
        report(commits, tmp_path, 130, 1)
        event = next_event()
        assert isinstance(event, CheckpointCommitted) and event.checkpoint == ref(130)
    assert (left(tmp_path), unfinished(tmp_path)) == ([(10, 1), (130, 1)], [])


def test_a_save_that_all_have_made_counts_whatever_was_ordered_after_it(tmp_path: Path) -> None:
    """They were writing it when they were told to leave."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        first, second = save(tmp_path, flatten(training_state(12)), 12, 1, world_size=WORKERS)
        commits.reported(Generation(1), Step(12), Rank(0), first.to_json())
        commits.supersede(Step(12))
        commits.reported(Generation(1), Step(12), Rank(1), second.to_json())
        event = next_event()
        assert isinstance(event, CheckpointCommitted) and event.checkpoint == ref(12)
    assert left(tmp_path) == [(12, 1)]


def test_what_cannot_be_committed_does_not_stay(tmp_path: Path) -> None:
    """All ranks have written all of it: save after save it would fill the disk."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        for step in (10, 20):
            first, second = save(tmp_path, flatten(training_state(step)), step, 1, world_size=WORKERS)
            for rank, shard in enumerate((first, replace(second, index=durable.digest(b"of another state")))):
                commits.reported(Generation(1), Step(step), Rank(rank), shard.to_json())
            failed = next_event()
            assert isinstance(failed, CheckpointFailed)
            assert "holds another set of tensors" in failed.reason
    assert (left(tmp_path), unfinished(tmp_path)) == ([], [])


def test_what_a_late_rank_leaves_behind_its_failure_goes_too(tmp_path: Path) -> None:
    """A full disk fails all ranks of a save, one after another: each may have written something before."""
    with thread(tmp_path) as (commits, next_event):
        commits.follow(formation(1, None))
        first, _ = save(tmp_path, flatten(training_state(10)), 10, 1, world_size=WORKERS)
        staging = tmp_path / staging_name(first.name, NONCE)
        commits.failed(Generation(1), Step(10), Rank(1), "no space left on device")
        assert isinstance(next_event(), CheckpointFailed)
        while staging.exists():
            time.sleep(0.001)
        staging.mkdir()
        (staging / "shard-00000-of-00002.safetensors").write_bytes(b"as far as it came")
        commits.failed(Generation(1), Step(10), Rank(0), "no space left on device")
        report(commits, tmp_path, 20, 1)
        event = next_event()
        assert isinstance(event, CheckpointCommitted) and event.checkpoint == ref(20), "and it is said once"
    assert (left(tmp_path), unfinished(tmp_path)) == ([(20, 1)], [])


def test_the_copy_that_a_generation_starts_from_becomes_durable_meanwhile(tmp_path: Path) -> None:
    """One rank's files of it are written already, by a carrier that outlives the worker; the other's come later."""
    state = flatten(training_state(20))
    with thread(tmp_path) as (commits, next_event):
        first = formation(1, None)
        commits.follow(first)
        early, late = save(tmp_path, state, 20, 1, world_size=WORKERS)[:2], []
        commits.reported(Generation(1), Step(20), Rank(0), early[0].to_json())
        commits.follow(replace(formation(2, ref(20)), memory=first.members))
        commits.reported(Generation(1), Step(10), Rank(0), early[0].to_json())  # not what it starts from: too late
        for rank, shard in enumerate(early[1:], start=1):
            late.append(shard)
            commits.reported(Generation(1), Step(20), Rank(rank), shard.to_json())
        event = next_event()
        assert isinstance(event, CheckpointCommitted) and event.checkpoint == ref(20), event
    assert late and left(tmp_path) == [(20, 1)] and unfinished(tmp_path) == []
