"""What a new leader starts from: the journal's lineage, what is on disk beyond it, and `--from`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_samples import facts, save, training_state

from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.tree import flatten
from hpcft.errors import DamagedError, NotFoundError
from hpcft.events import (
    CheckpointCommitted,
    CheckpointDamaged,
    CheckpointRef,
    CheckpointsFound,
    Commit,
    Decided,
    Event,
    Formation,
    Member,
    Propose,
    TermBegan,
    WorkersReady,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.journal import Journal, replay
from hpcft.node import read_history
from hpcft.rundir import RunDirectory
from hpcft.slurm.environment import Allocation

A = NodeId("a")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    return run


def ref(step: int, generation: int) -> CheckpointRef:
    return CheckpointRef(Step(step), Generation(generation))


def on_disk(
    run: RunDirectory,
    step: int,
    generation: int,
    term: int,
    parent: CheckpointRef | None = None,
    of: RunId | None = None,
) -> None:
    name = checkpoint_name(parent.step, parent.generation) if parent is not None else None
    reports = save(run.checkpoints, flatten(training_state(step)), step, generation, 1)
    commit(run.checkpoints, reports, replace(facts(name, of or run.run_id()), term=Term(term)))


def ran(generation: int, *steps: int) -> tuple[Event, ...]:
    formation = Formation(
        Term(1),
        Generation(generation),
        (Member(A, Incarnation("a1"), "10.0.0.1", 1, Rank(0)),),
        None,
        "00000000",
    )
    return (
        Decided((Propose(formation),), "it begins"),
        Decided((Commit(Generation(generation)),), "it starts"),
        *(CheckpointCommitted(ref(step, generation), 0.1, 1) for step in steps),
    )


async def journaled(run: RunDirectory, term: int, *events: Event) -> None:
    after = replay(run.journal)
    journal = Journal(run.journal, Term(term), after.world.generation, Incarnation(f"a{term}"), after)
    began = TermBegan(RunId("r"), Term(term), A, Incarnation(f"a{term}"), f"7.{term}", (A,), takeover=False)
    for event in (began, *events):
        journal.append(event, float(term))
    await journal.sync()
    journal.close()


def start(job: str = "7", restarts: int = 0) -> Allocation:
    return Allocation("local", job, restarts, "a", ("a",), "127.0.0.1")


def all_found(
    run: RunDirectory, job: str = "7", restarts: int = 0, from_step: int | None = None
) -> tuple[CheckpointsFound, ...]:
    step = Step(from_step) if from_step is not None else None
    return read_history(run, run.run_id(), start(job, restarts), step)[1]


def found(run: RunDirectory, job: str = "7", restarts: int = 0, from_step: int | None = None) -> CheckpointsFound:
    """The last word on it."""
    return all_found(run, job, restarts, from_step)[-1]


def steps(checkpoints: Sequence[CheckpointRef]) -> list[tuple[int, int]]:
    return [(each.step, each.generation) for each in checkpoints]


async def test_commits_that_the_journal_missed_count_by_term_and_parent(run: RunDirectory) -> None:
    on_disk(run, 10, 1, 1)
    on_disk(run, 20, 1, 1, ref(10, 1))
    await journaled(run, 1, *ran(1, 10, 20))
    # the disk was full: two generations went on unheard of; the second one from 20 again
    on_disk(run, 30, 2, 1, ref(20, 1))
    on_disk(run, 25, 3, 1, ref(20, 1))
    on_disk(run, 35, 3, 1, ref(25, 3))
    assert steps(found(run).checkpoints) == [(10, 1), (20, 1), (25, 3), (35, 3)]


async def test_a_deposed_leaders_commit_is_no_progress(run: RunDirectory) -> None:
    on_disk(run, 10, 1, 1)
    await journaled(run, 1, *ran(1, 10))
    await journaled(run, 2, CheckpointsFound((ref(10, 1),)))
    on_disk(run, 20, 1, 1, ref(10, 1))
    assert steps(found(run).checkpoints) == [(10, 1)]


@pytest.mark.parametrize("journaled_steps", [(20,), ()])
async def test_of_two_leaders_of_one_step_the_later_one_counts(
    run: RunDirectory, journaled_steps: tuple[int, ...]
) -> None:
    """The earlier one was stopped in its commit; also where the later one could not write down its own."""
    on_disk(run, 10, 1, 1)
    await journaled(run, 1, *ran(1, 10))
    on_disk(run, 20, 2, 2, ref(10, 1))
    await journaled(run, 2, CheckpointsFound((ref(10, 1),)), *ran(2, *journaled_steps))
    on_disk(run, 20, 1, 1, ref(10, 1))
    on_disk(run, 30, 1, 1, ref(20, 1))
    assert steps(found(run).checkpoints) == [(10, 1), (20, 2)]


async def test_another_runs_checkpoint_is_passed_over_with_a_word(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    on_disk(run, 10, 1, 1)
    await journaled(run, 1, *ran(1, 10))
    on_disk(run, 20, 1, 1, ref(10, 1))
    on_disk(run, 30, 1, 1, ref(20, 1), of=RunId("another"))
    assert steps(found(run).checkpoints) == [(10, 1), (20, 1)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("step-00000030-g0001 is passed over: ")
    assert f"it belongs to run another, not to {run.run_id()}" in said


async def test_the_ancestor_may_be_retired(run: RunDirectory) -> None:
    on_disk(run, 10, 1, 1)
    on_disk(run, 40, 2, 1, ref(30, 2))
    await journaled(run, 1, *ran(1, 10, 20))
    on_disk(run, 50, 2, 1, ref(40, 2))
    assert steps(found(run).checkpoints) == [(10, 1), (40, 2), (50, 2)]


async def test_what_is_not_known_is_not_thrown_away(run: RunDirectory) -> None:
    on_disk(run, 10, 1, 1)
    await journaled(run, 1)
    await journaled(run, 2, *ran(1))
    with pytest.raises(DamagedError, match="1 checkpoints") as raised:
        found(run)
    assert "--from" in raised.value.hint
    assert steps(found(run, from_step=10).checkpoints) == [(10, 1)]


async def finished_run(run: RunDirectory) -> None:
    parent = None
    for step in (10, 20, 30):
        on_disk(run, step, 1, 1, parent)
        parent = ref(step, 1)
    await journaled(run, 1, *ran(1, 10, 20, 30))
    run.finished.write_bytes(b"{}")


async def test_a_branch_is_applied_once_for_each_job(run: RunDirectory) -> None:
    await finished_run(run)
    first = found(run, "8", 1, 20)  # its first start never led
    assert steps(first.checkpoints) == [(10, 1), (20, 1)]
    assert first.branch
    assert not run.finished.exists()
    assert (run.path / "finished-1.json").exists()
    assert run.branch("8").exists()
    # this leader was gone before it could say so
    assert found(run, "8", 2, 20) == first
    await journaled(run, 2, first, *ran(2, 25))
    on_disk(run, 25, 2, 2, ref(20, 1))
    again = found(run, "8", 3, 20)
    assert (steps(again.checkpoints), again.branch) == ([(10, 1), (20, 1), (25, 2)], "")
    # without --from it goes on from there, too
    assert found(run, "9") == again
    # and another job may branch once more
    assert steps(found(run, "10", 0, 10).checkpoints) == [(10, 1)]


async def test_a_branch_needs_its_checkpoint_only_until_it_is_applied(run: RunDirectory) -> None:
    await finished_run(run)
    with pytest.raises(NotFoundError, match="step 15"):
        found(run, "8", 0, 15)
    assert run.finished.exists()
    await journaled(run, 2, found(run, "8", 0, 20), *ran(2, 25))
    on_disk(run, 25, 2, 2, ref(20, 1))
    (run.checkpoints / checkpoint_name(Step(20), Generation(1))).rename(run.path / "retired")
    assert steps(found(run, "8", 1, 20).checkpoints) == [(10, 1), (25, 2)]


async def test_a_branch_on_which_nothing_was_trained_has_changed_nothing(run: RunDirectory) -> None:
    """What it was to start from is damaged, or the program cannot use it, or the operator has thought better of it."""
    await finished_run(run)
    before = found(run, "9")
    branch = found(run, "8", 0, 20)
    await journaled(run, 2, branch, *ran(2))
    assert found(run, "9") == before
    assert found(run, "8", 1, 20) == branch, "the job that asks for it still gets it"
    damaged = CheckpointDamaged(ref(20, 1), "a bit was flipped")
    await journaled(run, 3, branch, *ran(7), damaged)
    (run.checkpoints / checkpoint_name(Step(20), Generation(1))).rename(run.path / "set aside")
    assert steps(found(run, "9").checkpoints) == [(10, 1), (30, 1)]
    with pytest.raises(NotFoundError, match="step 20"):
        found(run, "8", 2, 20)


async def test_what_the_journal_missed_is_not_lost_by_a_branch_that_came_to_nothing(run: RunDirectory) -> None:
    await finished_run(run)
    on_disk(run, 40, 1, 1, ref(30, 1))
    await journaled(run, 2, *all_found(run, "8", 0, 20), *ran(2))
    assert steps(found(run, "9").checkpoints) == [(10, 1), (20, 1), (30, 1), (40, 1)]


async def test_checkpoints_that_are_not_mounted_count_again_when_they_are(run: RunDirectory) -> None:
    await finished_run(run)
    before = found(run)
    aside = run.checkpoints.rename(run.path / "aside")
    run.checkpoints.mkdir()
    await journaled(run, 2, *all_found(run))
    assert found(run).checkpoints == ()
    run.checkpoints.rmdir()
    aside.rename(run.checkpoints)
    assert found(run) == before


async def test_a_branch_counts_from_the_moment_that_training_begins(run: RunDirectory) -> None:
    await finished_run(run)
    await journaled(run, 2, found(run, "8", 0, 20), *ran(2), WorkersReady(A, Generation(2), True, 100))
    assert steps(found(run, "9").checkpoints) == [(10, 1), (20, 1)]
    again = found(run, "8", 1, 20)
    assert (steps(again.checkpoints), again.branch) == ([(10, 1), (20, 1)], "")


async def test_a_branch_that_the_journal_lost_goes_on_from_its_commits(run: RunDirectory) -> None:
    await finished_run(run)
    found(run, "8", 0, 20)
    on_disk(run, 25, 2, 2, ref(20, 1))
    assert steps(found(run, "8", 1, 20).checkpoints) == [(10, 1), (20, 1), (25, 2)]
