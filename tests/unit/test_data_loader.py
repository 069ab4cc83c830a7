"""Data: the same samples in every world, exact resumption, and loader processes that neither leak nor linger."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hpcft.data import Data, order
from hpcft.data.account import report
from hpcft.data.batches import Position
from hpcft.data.fetch import SampleError
from hpcft.data.ledger import LedgerWriter, ledger_path
from hpcft.errors import UsageError
from hpcft.surroundings import fault

torch.set_num_threads(1)

# torch's advice to have no more loader processes than cores, which these tests do not mean to follow
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers:
    """Samples that say who they are, with some augmentation."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "id": index,
            "python": random.random(),
            "numpy": np.random.standard_normal(3),
            "torch": torch.rand(2),
        }


class Broken(Numbers):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 13:
            raise KeyError("no such column")
        return super().__getitem__(index)


@pytest.fixture
def closing() -> Iterator[Callable[[Data], Data]]:
    made: list[Data] = []

    def keep(data: Data) -> Data:
        made.append(data)
        return data

    yield keep
    for data in made:
        data.close()


def complete(data: Data, step: int) -> None:
    """A step of one pass."""
    data.end_pass()
    data.complete_step(step)


def ids_of_steps(data: Data, steps: int, first_step: int = 1) -> list[list[int]]:
    """Trains `steps` steps; the ids of each, without stand-ins."""
    done: list[list[int]] = []
    if steps == 0:
        return done
    step: list[int] = []
    for batch in data:
        assert data.current is not None
        assert batch["id"].tolist() == data.current.ids.tolist()
        if data.current.weight:
            step += batch["id"].tolist()
        if data.end_pass().last:
            data.complete_step(first_step + len(done))
            done.append(step)
            step = []
            if len(done) == steps:
                break
    return done


def test_epochs_go_by_and_each_sample_is_in_each_once() -> None:
    data = Data(Numbers(10), batch_size=4, epochs=2, seed=5)
    epochs = []
    for step, batch in enumerate(data, 1):
        epochs.append((data.epoch, batch["id"].tolist()))
        complete(data, step)
    assert [len(ids) for _, ids in epochs] == [4, 4, 2] * 2
    for epoch in (0, 1):
        ids = [i for e, batch in epochs if e == epoch for i in batch]
        assert ids == order.ids(5, epoch, 10, 0, 10).tolist()
    assert data.position == Position(2, 0) and data.steps_per_epoch == 3
    assert list(data) == []


def test_without_shuffle_the_order_is_that_of_the_data_set() -> None:
    data = Data(Numbers(5), batch_size=2, shuffle=False, epochs=1)
    assert [batch["id"].tolist() for batch in data] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_completed_steps_not_fetched_ones(workers: int, closing: Callable[[Data], Data]) -> None:
    data = closing(Data(Numbers(100), batch_size=5, workers=workers, prefetch=4, seed=1))
    seen = []
    for batch in data:
        seen.append(batch["id"].tolist())
        if len(seen) == 4:
            break  # the fourth batch was seen, and its step not completed
        complete(data, len(seen))
    assert data.state_dict()["offset"] == 15
    again = ids_of_steps(data, 1, first_step=4)
    assert again == [seen[3]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_world_resumes_exactly_with_any_number_of_loaders(workers: int, closing: Callable[[Data], Data]) -> None:
    """Three worlds one after the other, each from the state of the one before, in mid-epoch and across its end."""
    state: dict[str, Any] | None = None
    seen: list[int] = []
    for world, steps, loaders in ((4, 2, 0), (3, 3, workers), (5, 2, 1)):
        ranks = []
        for rank in range(world):
            data = closing(Data(Numbers(50), batch_size=11, micro_batch=2, workers=loaders))
            data.bind(7, rank, world)
            if state is not None:
                data.load_state_dict(state)
            ranks.append((ids_of_steps(data, steps), data.state_dict()))
            data.close()
        state = ranks[0][1]
        assert all(each == state for _, each in ranks)
        for step in range(steps):
            seen += [i for ids, _ in ranks for i in ids[step]]
    expected = [*order.ids(7, 0, 50, 0, 50).tolist(), *order.ids(7, 1, 50, 0, 22).tolist()]
    assert seen == expected


def test_augmentation_depends_on_the_sample_alone(closing: Callable[[Data], Data]) -> None:
    def samples(world: int, workers: int) -> dict[int, tuple[Any, ...]]:
        found = {}
        for rank in range(world):
            data = closing(Data(Numbers(12), batch_size=6, workers=workers, epochs=1))
            data.bind(3, rank, world)
            for batch in data:
                for row, number in enumerate(batch["id"].tolist()):
                    found[number] = tuple(np.asarray(batch[key][row]).tobytes() for key in ("python", "numpy", "torch"))
            data.close()
        return found

    alone = samples(1, 0)
    assert len(alone) == 12 and len(set(alone.values())) == 12
    assert samples(1, 2) == alone
    assert samples(4, 0) == alone
    data = Data(Numbers(12), batch_size=12, epochs=2, seed=3)
    first, second = (dict(zip(b["id"].tolist(), b["python"].tolist(), strict=True)) for b in data)
    assert all(first[number] != second[number] for number in range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_process_keeps_its_random_state(workers: int, closing: Callable[[Data], Data]) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def start() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    start()
    expected = [draws() for _ in range(3)]
    start()
    data = closing(Data(Numbers(20), batch_size=5, epochs=1, workers=workers))
    got = [draws() for _, _ in zip(range(3), data, strict=False)]
    assert got == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_position_takes_effect_with_the_next_batch(workers: int, closing: Callable[[Data], Data]) -> None:
    """As after a rollback: the iteration goes on, with what belongs to the restored position."""
    data = closing(Data(Numbers(60), batch_size=4, workers=workers, prefetch=4, seed=2))
    expected = order.ids(2, 0, 60, 0, 60).reshape(-1, 4).tolist()
    saved = None
    seen = []
    for step, batch in enumerate(data, 1):
        seen.append(batch["id"].tolist())
        complete(data, step)
        if step == 2:
            saved = data.state_dict()
        if step == 5:
            assert saved is not None
            data.load_state_dict(saved)
        if step == 8:
            break
    assert seen == [*expected[:5], *expected[2:5]]


def test_a_new_world_keeps_the_loader_processes(closing: Callable[[Data], Data]) -> None:
    data = closing(Data(Numbers(60), batch_size=6, workers=2))
    data.bind(1, 3, 4)
    ids_of_steps(data, 2)
    loaders = {child.pid for child in psutil.Process().children()}
    data.bind(1, 0, 2)
    expected = order.ids(1, 0, 60, 12, 15).tolist()
    assert ids_of_steps(data, 1) == [expected]
    assert {child.pid for child in psutil.Process().children()} >= loaders and len(loaders) >= 2


def test_a_rank_without_samples_runs_a_stand_in_that_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    for rank in range(3):
        data = Data(Numbers(7), batch_size=5, epochs=1)
        data.bind(0, rank, 3, _writer(tmp_path, 1, rank, 3))
        weights = []
        for step, _ in enumerate(data, 1):
            assert data.current is not None
            weights.append(data.current.weight)
            complete(data, step)
        assert weights == [pytest.approx([6 / 5, 6 / 5, 3 / 5][rank]), [1.5, 1.5, 0.0][rank]]
    account = report(tmp_path)
    assert account.exact and account.epochs[0].once == 7 and not account.epochs[0].in_progress


def _writer(run: Path, generation: int, rank: int, world: int, restored: int = 0) -> LedgerWriter:
    return LedgerWriter(
        ledger_path(run / "ledger", generation, rank),
        generation=generation,
        rank=rank,
        world_size=world,
        restored_step=restored,
    )


def test_the_ledger_of_a_run_with_a_rollback_is_exact(tmp_path: Path) -> None:
    """Two passes a step, steps lost by a failure, another world, an epoch that ends in between."""
    (tmp_path / "ledger").mkdir()
    states = []
    for rank in range(4):
        data = Data(Numbers(30), batch_size=8, micro_batch=1)
        data.bind(9, rank, 4, _writer(tmp_path, 1, rank, 4))
        ids_of_steps(data, 2)
        states.append(data.state_dict())
        ids_of_steps(data, 3 if rank < 2 else 2, first_step=3)  # two ranks do not get that far
    for rank in range(3):
        data = Data(Numbers(30), batch_size=8, micro_batch=2)
        data.bind(9, rank, 3, _writer(tmp_path, 2, rank, 3, restored=2))
        data.load_state_dict(states[rank])
        ids_of_steps(data, 4, first_step=3)
    account = report(tmp_path)
    assert account.exact, account
    assert [(e.once, e.pending, e.in_progress) for e in account.epochs] == [(30, 0, False), (16, 14, True)]
    assert account.superseded == 3 and account.last_step == 6


def test_state_of_other_data_is_refused() -> None:
    state = Data(Numbers(30), batch_size=8, seed=4).state_dict()
    for other, name in (
        (Data(Numbers(31), batch_size=8, seed=4), "samples"),
        (Data(Numbers(30), batch_size=4, seed=4), "batch_size"),
        (Data(Numbers(30), batch_size=8, seed=4, shuffle=False), "shuffle"),
        (Data(Numbers(30), batch_size=8, seed=5), "seed"),
    ):
        with pytest.raises(UsageError, match=f"was made with {name} ="):
            other.load_state_dict(state)


def test_the_seed_is_checked_also_when_it_is_known_later() -> None:
    state = Data(Numbers(30), batch_size=8, seed=4).state_dict()
    data = Data(Numbers(30), batch_size=8)
    data.load_state_dict(state)
    with pytest.raises(UsageError, match="was made with seed = 4, and the data now has 5"):
        data.bind(5, 0, 1)
    data.bind(4, 0, 1)


def test_a_step_is_completed_once_and_only_after_its_last_pass() -> None:
    data = Data(Numbers(30), batch_size=8, micro_batch=4)
    with pytest.raises(UsageError, match="without a batch"):
        data.end_pass()
    batches = iter(data)
    next(batches)
    assert not data.end_pass().last
    with pytest.raises(UsageError, match="step 1 was completed after 1 of its passes"):
        data.complete_step(1)
    with pytest.raises(UsageError, match="again for the batch that starts at 0 of epoch 0, which would count twice"):
        data.end_pass()
    next(batches)
    assert data.end_pass().last
    data.complete_step(1)
    with pytest.raises(UsageError, match=r"again for the batch that starts at 0 of epoch 0 \(pass 2\)") as refused:
        data.end_pass()
    assert refused.value.hint is not None and "`optimizer.step()`" in refused.value.hint
    with pytest.raises(UsageError, match="step 2 was completed after 0"):
        data.complete_step(2)
    assert data.position == Position(0, 8)
    assert not (next(batches), data.end_pass())[1].last


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        (0, "for the batch that starts at 0 of epoch 0 (pass 2), and not for the batch that starts at 0 of epoch 0, "),
        (1, "at 4 of epoch 0, and not for the batch that starts at 0 of epoch 0 (pass 2), which would count as used"),
        (4, "at 8 of epoch 0 (pass 2), and not for the batch that starts at 8 of epoch 0, "),
        (5, "at 0 of epoch 1, and not for the batch that starts at 8 of epoch 0 (pass 2), "),
    ],
)
def test_a_pass_that_is_left_out_does_not_count_as_used(skipped: int, message: str) -> None:
    """Also where it is a stand-in, as the second rank's last pass of an epoch."""
    for rank in range(2):
        data = Data(Numbers(11), batch_size=4, micro_batch=1)
        data.bind(0, rank, 2)
        steps = 0
        with pytest.raises(UsageError) as refused:
            for number, _ in enumerate(data):
                if number == skipped:
                    continue
                before = data.position
                if data.end_pass().last:
                    steps += 1
                    data.complete_step(steps)
        assert message in refused.value.message
        assert refused.value.hint is not None and "`micro_batch`" in refused.value.hint
        assert data.position == before and steps == skipped // 2


def test_a_loop_that_ends_in_the_middle_of_a_step_is_gone_on_with(closing: Callable[[Data], Data]) -> None:
    expected = ids_of_steps(Data(Numbers(12), batch_size=4, seed=0), 6)
    data = closing(Data(Numbers(12), batch_size=4, micro_batch=2, epochs=2))
    data.bind(0, 0, 1)
    steps: list[list[int]] = [[]]
    while len(steps) <= 6:
        for batch in itertools.islice(data, 3):
            steps[-1] += batch["id"].tolist()
            if data.end_pass().last:
                data.complete_step(len(steps))
                steps.append([])
    assert steps[:6] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_on_the_same_data_leaves_training_where_it_is(
    workers: int, closing: Callable[[Data], Data], tmp_path: Path
) -> None:
    (tmp_path / "ledger").mkdir()
    expected = ids_of_steps(Data(Numbers(11), batch_size=4, seed=0), 8)
    data = closing(Data(Numbers(11), batch_size=4, micro_batch=2, epochs=3, workers=workers))
    data.bind(0, 0, 1, _writer(tmp_path, 1, 0, 1))
    steps: list[list[int]] = [[]]
    for batch in data:
        steps[-1] += batch["id"].tolist()
        if data.end_pass().last:
            data.complete_step(len(steps))
            steps.append([])
        for number, evaluated in enumerate(data):  # also in the middle of a step
            assert number or evaluated["id"][0] == expected[len(steps) - 1][len(steps[-1])]
            if number == len(steps):
                break
        if len(steps) == 8:
            break
    assert steps == [*expected[:7], []]
    assert report(tmp_path).exact


@pytest.mark.parametrize("workers", [0, 2])
def test_iterations_within_one_another_each_go_on_where_they_are(workers: int, closing: Callable[[Data], Data]) -> None:
    data = closing(Data(Numbers(4), batch_size=2, shuffle=False, epochs=1, workers=workers))
    pairs = [(one["id"][0].item(), other["id"][0].item()) for one in data for other in data]
    assert pairs == [(0, 0), (0, 2), (2, 0), (2, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_loaded_is_named(workers: int, closing: Callable[[Data], Data]) -> None:
    data = closing(Data(Broken(20), batch_size=4, shuffle=False, workers=workers))
    with pytest.raises(SampleError, match=r"sample 13 of epoch 0 cannot be loaded: KeyError: 'no such column'") as e:
        for _ in data:
            pass
    assert (e.value.sample, e.value.epoch) == (13, 0)
    assert __file__ in e.value.message
    if workers:
        assert "in __getitem__" in "".join(e.value.__notes__)
    else:
        assert isinstance(e.value.__cause__, KeyError)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_system_that_fails_is_not_taken_for_the_data_set(workers: int, closing: Callable[[Data], Data]) -> None:
    class Remote(Numbers):
        def __getitem__(self, index: int) -> Any:
            try:
                raise OSError(errno.ESTALE, "Stale file handle", "/data/part-0")
            except OSError as error:
                raise ValueError("cannot decode") from error

    data = closing(Data(Remote(20), batch_size=4, shuffle=False, workers=workers))
    with pytest.raises(SampleError, match="cannot be loaded: ValueError: cannot decode") as e:
        next(iter(data))
    assert fault(e.value) == "ESTALE"


def test_a_batch_that_cannot_be_collated_is_named() -> None:
    class Ragged(Numbers):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index)

    with pytest.raises(SampleError, match="batch of samples 0, 1 of epoch 0 cannot be collated"):
        next(iter(Data(Ragged(4), batch_size=2, shuffle=False)))


def test_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(UsageError, match="not a map-style dataset"):
        Data(iter([1, 2]), batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is empty"):
        Data(Numbers(0), batch_size=1)
    with pytest.raises(UsageError, match="batch_size = 0"):
        Data(Numbers(3), batch_size=0)


def _until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


LOADING_PROGRAM = """
import sys, torch
from hpcft.data import Data
data = Data(range(1_000_000), batch_size=2, workers=2)
batches = iter(data)
next(batches)
print("loading", flush=True)
for line in sys.stdin:
    next(batches)
    print("more", flush=True)
"""


@pytest.fixture
def loading() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    program = subprocess.Popen(
        [sys.executable, "-c", LOADING_PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert program.stdin is not None and program.stdout is not None
    loaders: list[psutil.Process] = []
    try:
        assert program.stdout.readline() == "loading\n"
        loaders = psutil.Process(program.pid).children(recursive=True)
        assert len(loaders) == 2
        yield program, loaders
    finally:
        for loader in loaders:
            if loader.is_running():
                loader.kill()
        program.kill()
        program.wait()
        program.stdin.close()
        program.stdout.close()


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.local
def test_loader_processes_die_with_a_killed_training_process(
    loading: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    program, loaders = loading
    program.kill()
    program.wait()
    _until(lambda: all(map(_gone, loaders)), "loader processes outlived their training process")


@pytest.mark.local
def test_loader_processes_do_not_heed_warnings_and_end_with_the_program(
    loading: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    program, loaders = loading
    assert program.stdin is not None and program.stdout is not None
    for notice in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        for loader in loaders:
            os.kill(loader.pid, notice)
    for _ in range(10):
        program.stdin.write("\n")
        program.stdin.flush()
        if (line := program.stdout.readline()) != "more\n":
            pytest.fail(line + program.stdout.read())
    assert not any(map(_gone, loaders))
    program.stdin.close()
    assert program.wait(30) == 0
    assert program.stdout.read() == ""
    _until(lambda: all(map(_gone, loaders)), "loader processes outlived their training process")


def test_closing_ends_the_loader_processes_and_iterating_starts_new_ones() -> None:
    before = {child.pid for child in psutil.Process().children()}
    data = Data(Numbers(40), batch_size=4, workers=2, seed=1)
    first = ids_of_steps(data, 2)
    data.close()
    _until(lambda: {child.pid for child in psutil.Process().children()} <= before, "loader processes stay")
    second = ids_of_steps(data, 2)
    data.close()
    assert Counter(i for ids in first + second for i in ids).most_common(1)[0][1] == 1
