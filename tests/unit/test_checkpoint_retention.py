from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_samples import NONCE, committed, listing, pin, save, sweep, training_state
from hypothesis import given
from hypothesis import strategies as st

from hpcft.checkpoint import marks, retention
from hpcft.checkpoint.layout import MARKS, CheckpointEntry, checkpoint_name, staging_name
from hpcft.checkpoint.marks import mark_verified, pinned, verified
from hpcft.checkpoint.read import entries, verify
from hpcft.checkpoint.retention import best, discard, emptying, in_trash, newest, put_into_trash, retire, stale
from hpcft.checkpoint.tree import flatten
from hpcft.errors import NotFoundError
from hpcft.ids import Generation, Step
from tests.search import sampled


def entry(step: int, generation: int = 1) -> CheckpointEntry:
    name = checkpoint_name(Step(step), Generation(generation))
    return CheckpointEntry(Step(step), Generation(generation), Path("/run/checkpoints") / name)


def names(*steps: int) -> tuple[str, ...]:
    return tuple(entry(step).name for step in steps)


def test_keeps_the_last_and_the_milestones_and_the_protected() -> None:
    held = [entry(step) for step in (100, 200, 300, 400, 500)]
    assert retire(held, 2, None, frozenset()) == names(100, 200, 300)
    assert retire(held[::-1], 2, None, frozenset()) == names(100, 200, 300)
    assert retire(held, 1, 200, frozenset()) == names(100, 300)
    assert retire(held, 1, None, frozenset(names(100))) == names(200, 300, 400)
    assert retire(held, 9, None, frozenset()) == ()
    assert retire(held, 0, None, frozenset()) == names(100, 200, 300, 400)
    assert retire([], 1, 10, frozenset()) == ()
    assert retire(held, 2, None, frozenset(), frozenset(names(200, 400, 500))) == (), "100 and 300 are kept"
    assert retire(held, 1, None, frozenset(), frozenset(names(200, 400, 500))) == names(100, 200)
    assert retire(held, 1, 200, frozenset(), frozenset(names(200))) == names(100, 300), "nothing sound has its place"
    assert retire([*held, entry(200, 2)], 1, 200, frozenset(), frozenset({entry(200, 2).name})) == names(100, 300)
    assert retire(held, 1, None, frozenset(), frozenset(names(100, 200, 300, 400, 500))) == ()


def test_the_live_branch_does_not_lose_its_place_to_an_abandoned_one() -> None:
    held = [entry(900, 1), entry(1000, 1), entry(500, 1), entry(600, 2)]
    assert retire(held, 2, None, frozenset()) == (entry(500, 1).name, entry(900, 1).name)
    both = [entry(500, 1), entry(1000, 1), entry(1000, 2), entry(1100, 2)]
    assert retire(both, 1, 1000, frozenset()) == (entry(500, 1).name, entry(1000, 1).name)


@sampled(200)
@given(
    st.lists(st.builds(entry, st.integers(0, 40), st.integers(1, 4)), unique=True),
    st.integers(0, 5),
    st.none() | st.integers(1, 10),
    st.data(),
)
def test_never_everything_and_never_the_newest(
    held: list[CheckpointEntry], keep: int, keep_every: int | None, data: st.DataObject
) -> None:
    protected = frozenset(e.name for e in held if data.draw(st.booleans()))
    gone = retire(held, keep, keep_every, protected)
    left = {e.name for e in held} - set(gone)
    assert set(gone) <= {e.name for e in held}
    assert protected <= left
    assert len(left) >= min(max(keep, 1), len(held))
    if held:
        assert max(held, key=lambda e: (e.generation, e.step)).name in left
    # Doing it again takes nothing more.
    assert retire([e for e in held if e.name in left], keep, keep_every, protected) == ()


HELD = st.lists(st.builds(entry, st.integers(0, 40), st.integers(1, 4)), unique=True)


@sampled(200)
@given(
    HELD,
    st.integers(0, 5),
    st.none() | st.integers(1, 10),
    st.integers(0, 4),
    st.sampled_from(["min", "max"]),
    st.data(),
)
def test_pinned_verified_and_best_ones_stay_with_the_last(
    held: list[CheckpointEntry], keep: int, keep_every: int | None, count: int, mode: str, data: st.DataObject
) -> None:
    """As the leader puts them together (commits.Commits)."""
    some = st.sets(st.sampled_from([e.name for e in held])) if held else st.just(set())
    pins, read_back = data.draw(some), data.draw(some)
    values = {name: data.draw(st.sampled_from([0.5, 1.0, 2.0])) for name in data.draw(some)}
    chosen, sound = best(held, values, count, mode), newest(held, read_back)
    gone = set(retire(held, keep, keep_every, pins | chosen | sound))
    left = [e for e in held if e.name not in gone]
    assert bool(left) == bool(held)
    assert not gone & pins
    assert len(left) >= min(max(keep, 1), len(held))
    last = sorted(held, key=lambda e: (e.generation, e.step))[-max(keep, 1) :]
    assert not gone & {e.name for e in last}
    assert len(chosen) == min(count, len(values))
    worst = [values[name] for name in chosen] or [0.0]
    for name, value in values.items():
        if name in gone and chosen:
            assert value >= max(worst) if mode == "min" else value <= min(worst)
    assert bool(sound) == bool(read_back)
    for e in held:
        if e.name in read_back and e.name in gone:
            assert any((e.generation, e.step) < (o.generation, o.step) and o.name in sound for o in left)


def test_the_best_are_those_of_the_metric_and_the_newer_of_equal_ones() -> None:
    held = [entry(step) for step in (100, 200, 300, 400)]
    first, second, third, last = names(100, 200, 300, 400)
    values = {first: 0.5, second: 0.3, third: 0.5}
    assert best(held, values, 1, "min") == {second}
    assert best(held, values, 2, "min") == {second, third}
    assert best(held, values, 1, "max") == {third}
    assert best(held, values, 9, "max") == {first, second, third}, "who has no value does not compete"
    assert best(held, values, 0, "min") == frozenset()
    assert best(held, {"step-00000900-g0001": 0.1}, 1, "min") == frozenset()
    assert newest(held, {second, third, "step-00000900-g0001"}) == {third}
    assert newest(held, frozenset()) == frozenset()
    assert last not in best(held, values, 3, "min")


def test_what_was_verified_is_marked_until_it_goes(tmp_path: Path) -> None:
    one = committed(tmp_path, 1)
    assert verified(tmp_path) == frozenset()
    for _ in range(2):
        mark_verified(tmp_path, one.name)
    pin(tmp_path, one.name)
    assert verified(tmp_path) == pinned(tmp_path) == {one.name}
    sweep(tmp_path, [one.name])
    assert verified(tmp_path) == {one.name}, "a pinned one stays"
    (tmp_path / MARKS / f"{one.name}.pinned").unlink()
    sweep(tmp_path, [one.name])
    assert listing(tmp_path / MARKS) == []


def test_what_goes_is_deleted_file_by_file_with_what_an_earlier_one_left(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        committed(tmp_path, step)
    trash = tmp_path / ".trash"
    trash.mkdir()
    (trash / "step-00000000-g0001").mkdir()
    (trash / "step-00000000-g0001" / "left.safetensors").touch()
    (trash / "step-00000001-g0001").mkdir()
    assert sweep(tmp_path, names(1, 2, 77)) == 11, "a turn for every file"
    assert [e.step for e in entries(tmp_path)] == [3]
    assert list(trash.iterdir()) == []
    with pytest.raises(ValueError):
        sweep(tmp_path, ["LATEST"])
    with pytest.raises(ValueError):
        sweep(tmp_path, ["../other"])


def test_links_are_unlinked_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    one = committed(tmp_path, 1)
    (one.directory / "link").symlink_to(precious)
    sweep(tmp_path, [one.name])
    assert listing(precious) == ["thesis"]


def test_leftovers_of_earlier_generations_go_and_the_live_one_stays(tmp_path: Path) -> None:
    state = flatten(training_state(1))
    save(tmp_path, state, 5, generation=1)
    save(tmp_path, state, 6, generation=2)
    (tmp_path / ".LATEST.0123456789ab.aside").touch()
    kept = committed(tmp_path, 4, generation=1)
    found = stale(tmp_path, Generation(2))
    assert found == (".LATEST.0123456789ab.aside", staging_name(entry(5, 1).name, NONCE))
    sweep(tmp_path, found)
    live = staging_name(entry(6, 2).name, NONCE)
    assert {p.name for p in tmp_path.iterdir()} == {kept.name, live, "LATEST", ".trash"}
    discard(tmp_path, entry(6, 2).name, NONCE)
    discard(tmp_path, entry(6, 2).name, NONCE)
    assert not (tmp_path / live).exists()
    assert stale(tmp_path / "not yet", Generation(9)) == ()


def test_pinned_ones_stay_until_the_mark_goes_and_marks_go_with_their_checkpoint(tmp_path: Path) -> None:
    one = committed(tmp_path, 1)
    committed(tmp_path, 2)
    assert pinned(tmp_path) == frozenset()
    pin(tmp_path, one.name)
    (tmp_path / MARKS / f"{one.name}.another").touch()
    (tmp_path / MARKS / "notes.pinned").touch()
    assert pinned(tmp_path) == {one.name}
    assert retire(entries(tmp_path), 1, None, pinned(tmp_path)) == ()
    (tmp_path / MARKS / f"{one.name}.pinned").unlink()
    assert retire(entries(tmp_path), 1, None, pinned(tmp_path)) == (one.name,)
    # Whoever retires has looked at the marks before this one was made: it comes back.
    pin(tmp_path, one.name)
    sweep(tmp_path, [one.name])
    assert verify(one.directory) == []
    unpinned = CheckpointEntry(Step(1), Generation(1), one.directory)
    assert (marks.unpin(unpinned), marks.unpin(unpinned)) == (True, False)
    sweep(tmp_path, [one.name])
    assert listing(tmp_path / MARKS) == ["notes.pinned"]


def test_a_pinned_one_comes_back_whose_retirement_was_killed_halfway(tmp_path: Path) -> None:
    one, broken = committed(tmp_path, 1), committed(tmp_path, 2)
    binned = put_into_trash(tmp_path, [one.name, broken.name, "step-00000009-g0001"])
    assert binned == {one.name, broken.name}
    (tmp_path / ".trash" / broken.name / "state.json").unlink()
    for each in (one, broken):
        pin(tmp_path, each.name)
    assert in_trash(tmp_path) == []
    assert list(emptying(tmp_path)) == [], "half of one is neither deleted nor offered"
    assert [each.name for each in entries(tmp_path)] == [one.name] and verify(one.directory) == []
    (tmp_path / MARKS / f"{broken.name}.pinned").unlink()
    assert list(emptying(tmp_path, frozenset({one.name}))) == [] and in_trash(tmp_path) == [broken.name]
    assert sum(emptying(tmp_path)) > 0 and in_trash(tmp_path) == []


def test_one_that_is_pinned_when_its_first_files_are_deleted_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread empties the trash between the rename into it and the look at the marks."""
    done = committed(tmp_path, 1)
    (one,) = entries(tmp_path)
    trash = emptying(tmp_path)

    def meanwhile(root: Path) -> frozenset[str]:
        monkeypatch.setattr(retention, "pinned", pinned)
        assert next(trash) > 0
        pin(root, done.name)
        return pinned(root)

    monkeypatch.setattr(retention, "pinned", meanwhile)
    put_into_trash(tmp_path, [done.name])
    assert entries(tmp_path) == []
    with pytest.raises(NotFoundError, match="has just been retired"):
        marks.pin(one)
    assert pinned(tmp_path) == frozenset()
    assert sum(trash) > 0 and listing(tmp_path / ".trash") == []


def test_one_that_was_put_back_is_not_deleted_by_who_was_about_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = committed(tmp_path, 1)
    put_into_trash(tmp_path, [done.name])

    def late(root: Path) -> frozenset[str]:
        """The marks are made, and the checkpoint is put back, when they have been looked at."""
        monkeypatch.setattr(retention, "pinned", pinned)
        pin(root, done.name)
        assert list(emptying(root)) == []
        return frozenset()

    monkeypatch.setattr(retention, "pinned", late)
    assert list(emptying(tmp_path)) == []
    assert verify(done.directory) == []


def test_a_deletion_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    done = committed(tmp_path, 1)
    put_into_trash(tmp_path, [done.name])
    assert next(emptying(tmp_path)) > 0
    (left,) = in_trash(tmp_path)
    assert sum(emptying(tmp_path, frozenset({left}))) > 0
    assert listing(tmp_path / ".trash") == []


def test_pinning_is_durable_and_may_be_repeated_and_finds_out_what_is_gone(tmp_path: Path) -> None:
    committed(tmp_path, 1)
    (one,) = entries(tmp_path)
    assert (marks.pin(one), marks.pin(one)) == (True, False)
    assert pinned(tmp_path) == {one.name}
    marks.unpin(one)
    sweep(tmp_path, [one.name])
    with pytest.raises(NotFoundError, match="has just been retired"):
        marks.pin(one)
    assert pinned(tmp_path) == frozenset()
