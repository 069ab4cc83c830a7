"""`hpcft.main` and `Run` in a process that trains alone, and what `update` does at the end of a step."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import hpcft
from hpcft.data import Data
from hpcft.data.batches import Position
from hpcft.errors import UsageError
from hpcft.page import LET_GO, Order, Phase
from hpcft.worker import run as entry
from hpcft.worker.spec import SPEC_VARIABLE

torch.set_num_threads(1)

PROGRAMS = Path(__file__).parents[1] / "programs"


class Numbers:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), 1.0], dtype=torch.float64)


def linear() -> nn.Linear:
    return nn.Linear(2, 1).double()


def sgd(model: nn.Module, rate: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)


def test_plain_python_trains_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != SPEC_VARIABLE}
    environment["OMP_NUM_THREADS"] = "1"  # on a busy machine threads wait for one another
    ended = subprocess.run(
        [sys.executable, str(PROGRAMS / "exact.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    *running, end, advice = ended.stderr.splitlines()
    assert re.fullmatch(r"hpcft: 40 steps in [\d.]+m?s, loss \d\.\d{4}; trained alone: nothing was saved", end)
    assert "hpcft run CONFIG" in advice
    assert all(re.fullmatch(r"hpcft: step \d+, loss \d\.\d{4}, [\d.]+ steps/s", line) for line in running)


def test_how_training_alone_goes_is_said_while_it_goes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcft.worker.alone.LINE_SECONDS", 0.01)
    said = ""

    def train(run: hpcft.Run) -> None:
        nonlocal said
        model = linear()
        run.restore(model=model)
        optimizer = sgd(model)
        until = time.monotonic() + 60
        while "hpcft: step " not in said and time.monotonic() < until:
            run.backward(model(torch.ones(1, 2).double()).sum())
            run.update(optimizer, loss=2.5)
            said += capfd.readouterr().err

    hpcft.main(train)
    assert re.search(r"^hpcft: step \d+, loss 2\.5000, [\d.]+ steps/s$", said, re.MULTILINE)


def test_alone_it_is_rank_0_of_1_and_collectives_work() -> None:
    seen = []

    def train(run: hpcft.Run) -> None:
        seen.append((run.rank, run.world_size, run.local_rank, run.generation, run.step, dict(run.config)))
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.sum() == 3
        assert run.restore(model=linear()) == 0

    hpcft.main(train)
    assert seen == [(0, 1, 0, 0, 0, {})]
    assert not dist.is_initialized()
    hpcft.main(train)  # alone, as often as somebody likes


def test_an_error_alone_is_an_ordinary_one() -> None:
    def train(run: hpcft.Run) -> None:
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        hpcft.main(train)
    assert not dist.is_initialized()


def test_a_group_of_the_users_own_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="process group exists already"):
            hpcft.main(lambda run: None)
    finally:
        dist.destroy_process_group()


def alone(train: Callable[[hpcft.Run], object]) -> None:
    hpcft.main(train)


def test_passes_of_a_step_add_up_to_one() -> None:
    """A step in passes changes parameters as one in a single pass, also where they are uneven."""
    results = []
    for micro in (None, 4, 3, 1):
        stepped: list[int] = []

        def train(run: hpcft.Run, micro: int | None = micro, stepped: list[int] = stepped) -> None:
            model = run.once(linear)
            optimizer = sgd(model)
            data = Data(Numbers(25), batch_size=10, micro_batch=micro, epochs=2)
            run.restore(model=model, optimizer=optimizer, data=data)
            replica = run.ddp(model)
            for x in data:
                loss = (replica(x) - 1).square().mean()
                run.backward(loss)
                before = run.step
                if run.update(optimizer, loss=loss, tokens=len(x), clip_norm=50.0):
                    stepped.append(run.step)
                    assert all(parameter.grad is None for parameter in model.parameters())
                    reading = run._slot.read()
                    batch = 5 if run.step % 3 == 0 else 10
                    assert (reading.step, reading.samples, reading.tokens) == (run.step, batch, batch)
                assert run.step - before == data.current.last
            results.append((reading.loss, *(p.detach().clone() for p in model.parameters())))

        alone(train)
        assert stepped == [1, 2, 3, 4, 5, 6]
    for loss, *parameters in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        for one, other in zip(parameters, results[0][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_second_update_on_a_batch_is_refused_before_it_changes_anything() -> None:
    def train(run: hpcft.Run) -> None:
        critic, model = linear(), linear()
        optimizers = [sgd(critic), sgd(model)]
        data = Data(Numbers(8), batch_size=4)
        run.restore(critic=critic, model=model, data=data)
        for x in data:
            run.backward((model(x) - critic(x)).square().mean())
            if run.step == 1:
                break
            optimizers[0].step()
            run.update(optimizers[1])
        run.update(optimizers[0])
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(UsageError, match="again for the batch that starts at 4 of epoch 0") as refused:
            run.update(optimizers[1])
        assert "let other optimizers step by themselves" in str(refused.value.hint)
        assert all(map(torch.equal, before, model.parameters()))
        assert run.step == 2 and data.position == Position(1, 0)

    alone(train)


@pytest.mark.parametrize("accumulate", [False, True])
def test_an_update_after_batches_without_one_is_refused_before_it_changes_anything(accumulate: bool) -> None:
    def train(run: hpcft.Run) -> None:
        model = linear()
        data = Data(Numbers(20), batch_size=4)
        run.restore(model=model, data=data)
        before = [parameter.clone() for parameter in model.parameters()]
        for number, x in enumerate(data):
            if accumulate:
                run.backward(model(x).square().mean())
            if number % 2:
                run.backward(model(x).square().mean())
                with pytest.raises(UsageError, match="and not for the batch that starts at 0 of epoch 0,") as error:
                    run.update(sgd(model))
                break
        assert "weight the loss by zero" in str(error.value.hint)
        assert all(map(torch.equal, before, model.parameters()))
        assert run.step == 0 and data.position == Position(0, 0)

    alone(train)


def test_a_step_is_what_update_ends_where_there_is_no_data() -> None:
    def train(run: hpcft.Run) -> None:
        model = linear()
        run.restore(model=model)
        for _ in Data(Numbers(4), batch_size=2, epochs=1):  # not the run's
            for _ in range(2):
                run.update(sgd(model))
        assert run.step == 4

    alone(train)


def test_an_even_share_is_not_weighted() -> None:
    def train(run: hpcft.Run) -> None:
        model = linear()
        data = Data(Numbers(20), batch_size=10, epochs=1)
        run.restore(model=model, data=data)
        for x in data:
            assert data.current.weight == 1.0
            loss = (model(x) - 1).square().mean()
            run.backward(loss)
            ours = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            (model(x) - 1).square().mean().backward()
            assert all(torch.equal(a, p.grad) for a, p in zip(ours, model.parameters(), strict=True))
            run.update(sgd(model))

    alone(train)


def test_scheduler_and_scaler_step_with_the_optimizer() -> None:
    def train(run: hpcft.Run) -> None:
        model = nn.Linear(2, 1)
        optimizer = sgd(model, 1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        run.restore(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
        weight = model.weight.detach().clone()
        for step in (1, 2, 3):
            loss = model(torch.ones(1, 2)).sum()
            if step == 3:
                loss = loss * torch.inf  # the scaler leaves this step out
            run.backward(scaler.scale(loss))
            assert run.update(optimizer, scheduler=scheduler, scaler=scaler, clip_norm=1.0)
            if step == 1:
                # The gradient is (1, 1) for the weight and 1 for the bias: its norm is the square root of 3.
                torch.testing.assert_close(model.weight, weight - 3**-0.5)
        assert scheduler.get_last_lr() == [0.125]
        assert scaler.get_scale() == 8.0
        assert torch.isfinite(model.weight).all()
        assert run.step == 3

    alone(train)


def test_each_step_has_its_own_random_numbers_whatever_the_others_used() -> None:
    def drawn(waste: bool) -> list[tuple[float, float, float]]:
        found: list[tuple[float, float, float]] = []

        def train(run: hpcft.Run) -> None:
            model = run.once(linear)
            if waste:
                torch.rand(5), random.random()
            run.restore(model=model)
            while not run.done(4):
                found.append((float(torch.rand(())), float(np.random.rand()), random.random()))
                if waste:
                    torch.rand(run.step), np.random.rand(3), random.gauss(0, 1)
                run.update(sgd(model))
                if waste:
                    with run.phase("sampling"):
                        torch.rand(3), np.random.rand(3), random.random()

        alone(train)
        return found

    assert drawn(waste=True) == drawn(waste=False)
    assert len(set(drawn(waste=False))) == 4


def test_what_is_built_once_is_built_once_and_alike() -> None:
    built: list[nn.Module] = []

    def train(run: hpcft.Run) -> None:
        def build() -> nn.Module:
            built.append(linear())
            return built[-1]

        first = run.once(build)
        other = run.once(lambda: linear())
        assert not torch.equal(other.weight, first.weight)  # two models of one shape are to differ

    alone(train)
    alone(train)
    assert len(built) == 2
    assert torch.equal(built[0].weight, built[1].weight)

    kept: dict[object, object] = {}
    built.clear()
    spec = entry.WorkerSpec()
    for _ in range(2):  # a second generation in the same process
        train(entry.Run(spec, entry.Link(spec), torch.device("cpu"), kept))
    assert len(built) == 1


def test_each_call_with_the_same_code_has_an_object_of_its_own() -> None:
    entered: list[tuple[nn.Module, ...]] = []

    def train(run: hpcft.Run) -> None:
        def make(width: int) -> nn.Linear:
            return run.once(lambda: nn.Linear(4, width))

        entered.append((make(4), make(8), run.once(linear), make(8), run.once(linear)))

    kept: dict[Hashable, object] = {}
    spec = entry.WorkerSpec()
    for _ in range(2):  # generations in the same process
        train(entry.Run(spec, entry.Link(spec), torch.device("cpu"), kept))
    first, second = entered
    assert [tuple(each.weight.shape) for each in first] == [(4, 4), (8, 4), (1, 2), (8, 4), (1, 2)]
    assert not torch.equal(first[1].weight, first[3].weight)
    assert all(one is other for one, other in zip(first, second, strict=True))
    train(entry.Run(spec, entry.Link(spec), torch.device("cpu"), {}))  # another life
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(first, entered[2], strict=True))


def test_phases_are_named_and_left() -> None:
    def train(run: hpcft.Run) -> None:
        phases = [run._slot.read().phase]
        run.restore(model=linear())
        phases.append(run._slot.read().phase)
        with run.phase("eval"):
            phases.append(run._slot.read().phase)
            with run.phase("drawing"):
                phases.append(run._slot.read().phase)
            phases.append(run._slot.read().phase)
        with pytest.raises(KeyError), run.phase("compile"):
            phases.append(run._slot.read().phase)
            raise KeyError
        phases.append(run._slot.read().phase)
        assert phases == [
            Phase.EMPTY, Phase.TRAIN, Phase.EVAL, Phase.OTHER, Phase.EVAL, Phase.COMPILE, Phase.TRAIN
        ]  # fmt: skip

    alone(train)


def test_a_stop_is_not_swallowed() -> None:
    def train(run: hpcft.Run) -> None:
        model = linear()
        run.restore(model=model)
        run._page.order_word = Order(2, stop_after_save=True).word
        optimizer = sgd(model)
        run.update(optimizer)
        run._page.order_word = LET_GO.word  # for another rank the last save has failed already
        for _ in range(3):
            with pytest.raises(entry.Stopped):
                run.update(optimizer)
        assert run.step == 2

    with pytest.raises(entry.Stopped):  # here: at the end of the program
        alone(train)


def test_who_has_saved_last_waits_for_the_others() -> None:
    def train(run: hpcft.Run) -> None:
        model = linear()
        run.restore(model=model)
        optimizer = sgd(model)
        run._page.order_word = Order(2, stop_after_save=True).word
        run.update(optimizer)
        steps = []

        def lead() -> None:
            for step, word in ((2, Order(4, stop_after_save=True).word), (4, LET_GO.word)):
                while (reading := run._slot.read()).step < step or reading.phase is not Phase.CHECKPOINT:
                    time.sleep(0.001)
                time.sleep(0.05)
                steps.append(run.step)
                run._page.order_word = word

        leader = threading.Thread(target=lead)
        leader.start()
        run.update(optimizer)
        assert run._slot.read().phase is Phase.TRAIN, "a rank had missed step 2: it goes on"
        run.update(optimizer)
        try:
            run.update(optimizer)
        finally:
            leader.join(30)
            assert steps == [2, 4]

    with pytest.raises(entry.Stopped):
        alone(train)


def test_orders_that_are_withdrawn_or_late_are_not_carried_out() -> None:
    def train(run: hpcft.Run) -> None:
        model = linear()
        run.restore(model=model)
        optimizer = sgd(model)
        stop = [Order(step, stop_after_save=True).word for step in (9, 1)]
        for word in (stop[0], 0, stop[1], 0, LET_GO.word):
            run._page.order_word = word
            run.update(optimizer)
        while not run.done(12):
            run.update(optimizer)

    alone(train)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"run": linear()}, "run.restore.run=.*cannot be used"),
        ({"a.b": linear()}, "cannot be used"),
        ({"model": 3}, "an? int has no state_dict"),
        ({"a": Data(Numbers(4), batch_size=2), "b": Data(Numbers(4), batch_size=2)}, "more than one"),
    ],
)
def test_what_cannot_be_restored_is_refused(objects: dict[str, object], message: str) -> None:
    def train(run: hpcft.Run) -> None:
        run.restore(**objects)

    with pytest.raises(UsageError, match=message):
        alone(train)


def test_restore_comes_once_and_first() -> None:
    def twice(run: hpcft.Run) -> None:
        run.restore(model=linear())
        run.restore(model=linear())

    def late(run: hpcft.Run) -> None:
        model = linear()
        run.update(sgd(model))
        run.restore(model=model)

    for train in (twice, late):
        with pytest.raises(UsageError, match="called twice, or after a step"):
            alone(train)
