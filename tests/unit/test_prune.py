"""`hpcft ckpt prune`: what an operator may delete, also while the run trains."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from checkpoint_samples import NONCE, RUN, facts, listing, pin, save, training_state
from checkpoint_samples import committed as commit_sample

from hpcft import prune, terms
from hpcft.checkpoint import marks, read
from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.readers import reading
from hpcft.checkpoint.retention import put_into_trash
from hpcft.checkpoint.tree import flatten
from hpcft.errors import DamagedError
from hpcft.events import (
    CheckpointCommitted,
    CheckpointRef,
    CheckpointsFound,
    Commit,
    Decided,
    Event,
    Formation,
    Member,
    Propose,
    TermBegan,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.journal import Journal, replay
from hpcft.prune import Plan, Rules
from hpcft.rundir import RunDirectory

A = NodeId("a")


def ref(step: int, generation: int = 1) -> CheckpointRef:
    return CheckpointRef(Step(step), Generation(generation))


def name(step: int, generation: int = 1) -> str:
    return checkpoint_name(Step(step), Generation(generation))


def formed(generation: int, restore: CheckpointRef | None) -> list[Event]:
    member = Member(A, Incarnation("a1"), "10.0.0.1", 1, Rank(0))
    formation = Formation(Term(1), Generation(generation), (member,), restore, NONCE)
    return [
        Decided((Propose(formation),), f"generation {generation}"),
        Decided((Commit(Generation(generation)),), "starts"),
    ]


async def journal_of(run: RunDirectory, events: Sequence[Event]) -> None:
    began = TermBegan(RunId(RUN), Term(1), A, Incarnation("a1"), "7.0", (A,), takeover=False)
    journal = Journal(run.journal, Term(1), Generation(0), Incarnation("a1"), replay(run.journal))
    for at, event in enumerate([began, *events]):
        journal.append(event, float(at))
    await journal.sync()
    journal.close()


def say_status(run: RunDirectory, state: str, verdict: object = None) -> None:
    run.status.write_bytes(orjson.dumps({"state": state, "verdict": verdict, "generation": 0, "checkpoints": []}))


@pytest.fixture
async def run(tmp_path: Path) -> RunDirectory:
    """Steps 10 to 40 in generation 1; from 20 it went on in generation 2, to 30, 40 and 50."""
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    run.identity.write_bytes(orjson.dumps({"id": RUN, "name": "run"}))
    events: list[Event] = formed(1, None)
    for step in (10, 20, 30, 40):
        commit_sample(run.checkpoints, step, 1, world_size=1)
        events.append(CheckpointCommitted(ref(step), 0.1, 1))
    events += [CheckpointsFound((ref(10), ref(20)), "--from 20 of job 8"), *formed(2, ref(20))]
    for step in (30, 40, 50):
        commit_sample(run.checkpoints, step, 2, world_size=1)
        events.append(CheckpointCommitted(ref(step, 2), 0.1, 1))
    await journal_of(run, events)
    say_status(run, "finished", {"outcome": "finished"})
    return run


def retired(plan: Plan) -> list[str]:
    return [each.name for each in plan.retired]


def done(run: RunDirectory, rules: Rules) -> Plan:
    return prune.carry_out(run, prune.plan(run, rules), rules)


async def test_the_newest_of_the_lineage_and_the_milestones_stay(run: RunDirectory) -> None:
    rules = Rules(2, 20, trash=False)
    plan = prune.plan(run, rules)
    assert retired(plan) == [name(10), name(30), name(40), name(30, 2)], "20 is a milestone, 40 is one of both branches"
    assert plan.bytes > 0 and plan.protected == {} and not plan.live
    found = prune.carry_out(run, plan, rules)
    assert (found.retired, found.bytes) == (plan.retired, plan.bytes)
    assert [each.name for each in read.entries(run.checkpoints)] == [name(20), name(40, 2), name(50, 2)]
    assert listing(run.checkpoints / ".trash") == []
    assert prune.plan(run, rules).empty and done(run, rules).retired == ()
    assert prune.plan(run, rules).text() == "there is nothing to delete"


async def test_a_branch_that_was_left_stays_until_another_has_taken_its_place(run: RunDirectory) -> None:
    assert retired(prune.plan(run, Rules(4, None, trash=False))) == [name(10)]
    assert retired(prune.plan(run, Rules(3, None, trash=False))) == [name(10), name(20), name(30), name(40)]


async def test_what_is_pinned_read_or_restored_from_stays_and_says_why(run: RunDirectory) -> None:
    marks.pin(next(each for each in read.entries(run.checkpoints) if each.name == name(10)))
    say_status(run, "training")
    with reading(run.checkpoints / name(30)):
        plan = prune.plan(run, Rules(1, None, trash=False))
        assert plan.live
        assert plan.protected == {
            name(10): "it is pinned",
            name(20): "the present generation was restored from it",
            name(30): "it is being read",
        }
        assert retired(plan) == [name(40), name(30, 2), name(40, 2)]
        assert f"{name(10)}: stays, it is pinned" in plan.text()
        assert retired(prune.carry_out(run, plan, Rules(1, None, trash=False))) == retired(plan)
    assert retired(prune.plan(run, Rules(1, None, trash=False))) == [name(30)]


async def test_what_changes_between_the_question_and_the_answer_counts(run: RunDirectory) -> None:
    rules = Rules(1, None, trash=False)
    plan = prune.plan(run, rules)
    kept = next(each for each in plan.retired if each.name == name(30, 2))
    marks.pin(kept)
    put_into_trash(run.checkpoints, [name(20)])  # as the leader does
    with reading(run.checkpoints / name(40, 2)):
        found = prune.carry_out(run, plan, rules)
    assert retired(found) == [name(10), name(30), name(40)]
    assert [each.name for each in read.entries(run.checkpoints)] == [name(30, 2), name(40, 2), name(50, 2)]


async def test_when_the_newest_turns_out_damaged_the_one_before_stays(run: RunDirectory) -> None:
    """The leader sets it aside while the operator is thinking."""
    rules = Rules(1, None, trash=False)
    plan = prune.plan(run, rules)
    assert name(40, 2) in retired(plan)
    read.quarantine(run.checkpoints / name(50, 2), "a flipped bit")
    assert name(40, 2) not in retired(prune.carry_out(run, plan, rules))
    assert [each.name for each in read.entries(run.checkpoints)] == [name(40, 2)]


@pytest.mark.parametrize("file", ["manifest.json", "shard-00000-of-00001.safetensors", "state.json"])
async def test_damaged_ones_take_no_place_of_a_sound_one(run: RunDirectory, file: str) -> None:
    for damaged in (name(40, 2), name(50, 2)):
        os.truncate(run.checkpoints / damaged / file, 100)
    (run.checkpoints / name(10) / file).unlink()
    plan = prune.plan(run, Rules(1, None, trash=False))
    assert retired(plan) == [name(10), name(20), name(30), name(40)], "30 of the second branch is the newest sound one"
    assert plan.damaged.keys() == plan.as_dict()["damaged"].keys() == {name(40, 2), name(50, 2)}
    assert f"{name(50, 2)}: damaged, does not count: {file}" in plan.text()
    assert done(run, Rules(1, None, trash=False)).retired == plan.retired
    assert read.losses(run.checkpoints / name(30, 2)) == []


async def test_where_none_is_sound_nothing_goes(run: RunDirectory) -> None:
    for each in read.entries(run.checkpoints):
        (each.directory / "state.json").unlink()
    with pytest.raises(DamagedError, match="none is sound"):
        prune.plan(run, Rules(1, None, trash=False))


async def test_what_the_journal_does_not_know_yet_stays(run: RunDirectory) -> None:
    say_status(run, "training")
    commit_sample(run.checkpoints, 60, 2, world_size=1)
    commit_sample(run.checkpoints, 5, 3, world_size=1)
    plan = prune.plan(run, Rules(1, None, trash=False))
    assert not {name(60, 2), name(5, 3)} & set(retired(plan))


async def test_leftovers_of_failed_saves_and_the_trash(run: RunDirectory) -> None:
    state = flatten(training_state(1))
    for generation in (1, 2):
        save(run.checkpoints, state, 99, generation, world_size=1)
    (run.checkpoints / ".LATEST.0123456789ab.aside").touch()
    put_into_trash(run.checkpoints, [name(10)])
    rules = Rules(None, None, trash=True)
    say_status(run, "training")
    live = (f".tmp-{name(99, 1)}-{NONCE}", f".trash/{name(10)}")
    assert prune.plan(run, rules).leftovers == live, "generation 2 is at work"
    long_ago = time.time() - 1000
    os.utime(run.status, (long_ago, long_ago))
    terms.claim(run.terms, terms.TermRecord(Term(1), A, Incarnation("a1"), "h", 1, "7.0"))
    assert prune.plan(run, rules).leftovers == live, "its leader is silent, and may come back"
    terms.renew(run.terms, Term(1), terms.TermLease(5, released=True))
    plan = prune.plan(run, rules)
    assert set(plan.leftovers) == {*live, f".tmp-{name(99, 2)}-{NONCE}", ".LATEST.0123456789ab.aside"}
    assert plan.retired == () and plan.bytes > 0
    found = prune.carry_out(run, plan, rules)
    assert (found.leftovers, found.bytes) == (plan.leftovers, plan.bytes)
    assert listing(run.checkpoints / ".trash") == []
    assert not [entry for entry in listing(run.checkpoints) if entry.startswith(".tmp") or entry.endswith(".aside")]
    assert len(read.entries(run.checkpoints)) == 6


async def test_what_was_set_aside_as_damaged_goes_when_it_is_said(run: RunDirectory) -> None:
    for step in (10, 20):
        read.quarantine(run.checkpoints / name(step), "a bit was flipped")
    aside = (name(10), f"{name(10)}.reason.json", name(20), f"{name(20)}.reason.json")
    pin(run.checkpoints, name(10))
    assert prune.plan(run, Rules(None, None, trash=True)).leftovers == ()
    rules = Rules(None, None, trash=False, quarantined=True)
    plan = prune.plan(run, rules)
    assert plan.leftovers == tuple(f".quarantine/{each}" for each in aside) and plan.bytes > 0
    first = next(iter((run.checkpoints / ".quarantine" / name(20)).iterdir()))
    first.unlink()  # an interrupted one leaves half of it
    assert prune.carry_out(run, plan, rules).leftovers == plan.leftovers
    assert listing(run.checkpoints / ".quarantine") == []
    assert len(read.entries(run.checkpoints)) == 5, "and nothing else has gone, or come back"


async def test_an_interrupted_one_is_gone_on_with_and_nothing_else_goes(run: RunDirectory) -> None:
    rules = Rules(4, None, trash=False)
    first = prune.plan(run, rules)
    with pytest.raises(KeyboardInterrupt):
        prune.carry_out(run, first, rules, interrupt)
    plan = prune.plan(run, rules)
    (left,) = plan.leftovers
    assert left.startswith(f".trash/{name(10)}.") and plan.retired == () and not plan.empty
    put_into_trash(run.checkpoints, [name(30)])  # as the leader does
    told: list[tuple[int, int]] = []
    found = prune.carry_out(run, plan, rules, lambda *each: told.append(each))
    assert found.leftovers == plan.leftovers and found.bytes == plan.bytes
    assert told[-1] == (plan.bytes, plan.bytes) and 0 < plan.bytes < first.bytes
    assert listing(run.checkpoints / ".trash") == [name(30)], "of which nobody was asked"


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


async def test_without_a_journal_that_says_what_counts_nothing_goes(run: RunDirectory) -> None:
    await journal_of_another(run)
    with pytest.raises(DamagedError, match="knows none of them"):
        prune.plan(run, Rules(1, None, trash=False))


async def test_without_a_journal_nothing_goes(run: RunDirectory) -> None:
    for path in run.journal.iterdir():
        path.unlink()
    with pytest.raises(DamagedError, match="knows none of them"):
        prune.plan(run, Rules(1, None, trash=False))
    run.journal.rmdir()
    with pytest.raises(DamagedError, match="knows none of them"):
        prune.plan(run, Rules(1, None, trash=False))


async def journal_of_another(run: RunDirectory) -> None:
    for path in run.journal.iterdir():
        path.unlink()
    await journal_of(run, [*formed(9, None)])
    for entry in read.entries(run.checkpoints):  # of earlier terms: not of this journal
        manifest = entry.directory / "manifest.json"
        body: Any = manifest.read_bytes()
        manifest.write_bytes(body[:-5])


async def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "fresh")
    run.prepare()
    assert prune.plan(run, Rules(1, None, trash=True)).empty


async def test_the_best_and_the_newest_that_was_read_back_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    run.identity.write_bytes(orjson.dumps({"id": RUN, "name": "run"}))
    run.config.write_bytes(orjson.dumps({"checkpoint": {"keep_best": 1, "best_metric": "loss", "best_mode": "min"}}))
    losses = {10: 0.5, 20: 0.1, 30: 0.9, 40: 0.8, 50: 0.7}
    events = formed(1, None)
    for step, loss in losses.items():
        reports = save(run.checkpoints, flatten(training_state(step)), step, 1, world_size=1, metrics={"loss": loss})
        commit(run.checkpoints, reports, facts())
        events.append(CheckpointCommitted(ref(step), 0.1, 1))
    await journal_of(run, events)
    say_status(run, "finished", {"outcome": "finished"})
    for step in (10, 40):
        marks.mark_verified(run.checkpoints, name(step))
    plan = prune.plan(run, Rules(1, None, trash=False))
    assert retired(plan) == [name(10), name(30)]
    assert plan.protected == {
        name(20): "it is one of checkpoint.keep_best",
        name(40): "it is the newest that was read back",
    }
