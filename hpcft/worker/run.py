"""What user code sees of a run: `hpcft.main(train)` and the `Run` that `train` is given.

    def train(run: hpcft.Run) -> None:
        model, optimizer, data = run.once(build)
        run.restore(model=model, optimizer=optimizer, data=data)
        replica = run.ddp(model)
        for batch in data:
            loss = ...
            run.backward(loss)
            run.update(optimizer, loss=loss)

Theory of operation
-------------------
`update` is where a step ends, and everything that concerns steps happens there, in this order: the batch is the one
at the data position, or refused; the node's lease is checked (past it, this process ends without another step);
parameters change; the data position moves; the step is published in the shared page; a checkpoint is made if it is
due; the random state of the next step is set. All ranks pass through it with the same step numbers, so they agree on
what is due by the number of the step alone. What they ask one another (whether all have room for a copy) they ask at
such steps, and no rank leaves that out because it has an order.

A checkpoint is due every so many steps, or at the step that the leader names in its order, which reaches the ranks at
different times. For whom that step is over already, the order does not exist. So a rank that is to stop does not end
by itself after its last save: it waits at that step. It ends when it is told that all ranks have saved; or it is told
another step, since one had read the order too late, and goes on to that. The late one cannot have got far: its next
step needs those who wait.

`main` is the one way out. After an error the process group is broken, and whatever waits for it might wait for ever:
the exception is printed, reported, and the process ends without running anything else.
"""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpcft.checkpoint.files import Peers
from hpcft.checkpoint.layout import CheckpointDamagedError, parse_name
from hpcft.checkpoint.manifest import Metric
from hpcft.checkpoint.read import UnreadableError
from hpcft.data.batches import MicroBatch
from hpcft.data.ledger import LedgerWriter, ledger_path
from hpcft.data.loader import Data
from hpcft.errors import NotFoundError, UsageError
from hpcft.ids import Generation, Rank, Step
from hpcft.page import LET_GO, Order, Phase
from hpcft.worker import group
from hpcft.worker.alone import narrated
from hpcft.worker.link import Link
from hpcft.worker.randomness import Randomness
from hpcft.worker.recalling import Forgotten, recall
from hpcft.worker.replicas import Replica
from hpcft.worker.restoring import put_back, put_in
from hpcft.worker.saving import Saving, named
from hpcft.worker.spec import (
    STATUS_DAMAGED,
    STATUS_FAILED,
    STATUS_FORGOTTEN,
    STATUS_STOPPED,
    STATUS_UNREADABLE,
    WorkerSpec,
    take_spec,
)

_T = TypeVar("_T")

_NEVER = 2**62
"""A step that no run reaches."""

_LOSS_SECONDS = 1.0
"""Between two readings of a loss on a GPU: each waits for the device."""

_HOLD_SECONDS = 0.01
"""Between two looks for the leader's word, by a rank that has saved last."""

_METRICS = 64
"""They travel in a message of limited size, with names no longer than so many characters."""

_PHASES = {"eval": Phase.EVAL, "compile": Phase.COMPILE, "checkpoint": Phase.CHECKPOINT}


class Stopped(BaseException):
    """The checkpoint that was asked for is made, and the run is to stop. Not an Exception: nobody should catch it."""


class Unusable(BaseException):
    """The checkpoint to start from is damaged or gone; its cause says what is wrong. Nobody should catch it either."""


class Unreadable(BaseException):
    """This node could not read the checkpoint to start from; its cause says why. Nobody should catch it either."""


class Run:
    """A worker's view of the run it takes part in."""

    def __init__(self, spec: WorkerSpec, link: Link, device: torch.device, built: dict[Hashable, Any]) -> None:
        self._spec = spec
        self._link = link
        self._device = device
        self._built = built
        self._asked: Counter[Hashable] = Counter()
        self._slot = link.slot
        self._page = link.page
        self._saving = Saving(spec, link, device)
        self._randomness = Randomness(spec.seed, spec.rank, device)
        self._data: Data | None = None
        self._step = 0
        self._training = False
        self._stopped = False
        self._restored = False
        self._phase = Phase.START
        self._order_word = 0
        self._order: Order | None = None
        self._due = _NEVER
        self._look_at = _NEVER
        """From this step on, it is looked whether there is memory for copies."""
        self._asked_for_memory = False
        self._loss = _Loss()
        self._samples = 0
        self._tokens = 0
        self._randomness.seed_build(0)

    # --- where this is

    @property
    def step(self) -> int:
        """Completed steps of the run, all generations together."""
        return self._step

    @property
    def rank(self) -> Rank:
        return self._spec.rank

    @property
    def world_size(self) -> int:
        return self._spec.world_size

    @property
    def local_rank(self) -> int:
        return self._spec.local_rank

    @property
    def device(self) -> torch.device:
        """This rank's GPU, already the current one; the CPU where it has none."""
        return self._device

    @property
    def generation(self) -> Generation:
        """0 without an agent."""
        return self._spec.generation

    @property
    def seed(self) -> int:
        return self._spec.seed

    @property
    def config(self) -> Mapping[str, Any]:
        """The `[train]` table of the configuration; empty without an agent."""
        return self._spec.train

    # --- building and restoring

    def once(self, build: Callable[[], _T]) -> _T:
        """What `build` returns, built once per process, however often the training function is entered.

        Recognised by its code: a lambda or an inner function is the same one again. Within one entry every call has
        an object of its own, and the n-th call with the same code finds what the n-th one of an earlier entry built:
        what a builder closes over has to be the same again. Random numbers in it are the same on all ranks and in
        every life.
        """
        code: Hashable = getattr(build, "__code__", build)
        key = code, self._asked[code]
        if key not in self._built:
            # Each from its own stream: two models of one shape are to differ.
            self._randomness.seed_build(1 + len(self._built))
            self._built[key] = build()
        self._asked[code] += 1
        found: _T = self._built[key]
        return found

    def ddp(self, module: nn.Module, **arguments: Any) -> Replica:
        """The module as one of `world_size` replicas; the arguments are those of DistributedDataParallel.

        Gradients are averaged in the same order in every generation (see `replicas`). Parameters and buffers are
        rank 0's. To be called on all ranks.
        """
        if self._device.type == "cuda":
            arguments.setdefault("device_ids", [self._device.index])
        return Replica(module, self._current_pass, **arguments)

    def restore(self, **objects: Any) -> int:
        """Put the state of the run into these objects, if it has one; from now on it consists of them.

        Models, optimizers, schedulers, data: anything with `state_dict` and `load_state_dict`, the same under the
        same names for the whole run. To be called once, on all ranks, before the first step. Returns the number of
        completed steps, 0 at the very beginning.

        A state is that of the run, not of a rank. Parameters and optimizer state have to be the same on all ranks, or
        sharded (`fully_shard`, before the optimizer is made): then each rank saves its own part and gets it back.
        Everything else (buffers, schedulers, objects of your own) is saved as rank 0 has it, and is rank 0's on every
        rank afterwards. A random generator that differs by rank is none of it: make it anew in each step, from
        `(run.seed, run.step, run.rank)`.

        On a GPU parameters and optimizer state may still be being copied after `update`, until an optimizer's next step
        begins. What else changes them in place (clipping weights, say) belongs into `register_step_post_hook` of the
        optimizer. Elsewhere it spoils the save, which is given up when the change is seen; through `.data` it is not.

        UsageError: an object without a state. RestoreError: the checkpoint holds other objects. StateError: a state
        that cannot be saved.
        """
        if self._restored or self._step:
            raise UsageError("run.restore was called twice, or after a step", "give it all objects in one call")
        self._restored = True
        self._enter(Phase.RESTORE)
        found = named(objects)
        data = [each for each in found.values() if isinstance(each, Data)]
        if len(data) > 1:
            raise UsageError("run.restore was given more than one hpcft.data.Data", "a run trains on one of them")
        restore = self._spec.restore
        if restore is not None:
            try:
                if restore.memory:
                    self._step = put_in(
                        recall(self._link, restore, self._spec.rank, self._spec.local_world_size), found
                    )
                else:
                    self._step = put_back(
                        restore.directory,
                        found,
                        self._spec.run,
                        Peers(self._spec.local_rank, self._spec.local_world_size),
                    )
            except (CheckpointDamagedError, NotFoundError) as error:
                raise Unusable(error.message) from error
            except UnreadableError as error:
                raise Unreadable(error.message) from error
            self._saving.last = Step(self._step)
            self._slot.set_step(self._step)
        ledger = self._bind(data[0]) if data else None
        self._saving.remember(found, self._data, ledger)
        self._begin_training()
        return self._step

    def _bind(self, data: Data) -> LedgerWriter | None:
        spec = self._spec
        ledger = None
        if spec.ledger and spec.run_directory is not None:
            origin = None if spec.restore is None else parse_name(spec.restore.directory.name)
            ledger = LedgerWriter(
                ledger_path(spec.run_directory / "ledger", spec.generation, spec.rank),
                generation=spec.generation,
                rank=spec.rank,
                world_size=spec.world_size,
                restored_step=self._step,
                restored_generation=None if origin is None else origin[1],
            )
        data.bind(spec.seed, spec.rank, spec.world_size, ledger, workers=spec.loader_workers, prefetch=spec.prefetch)
        self._data = data
        return ledger

    def _begin_training(self) -> None:
        if self._stopped:
            raise Stopped  # somebody has caught the first one
        self._training = True
        self._randomness.seed(self._step)
        self._plan_save()
        self._look_at = self._step + 1
        self._enter(Phase.TRAIN)
        self._link.say_ready()

    # --- the step

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, weighted so that ranks and passes add up to the mean over the global batch.

        `loss` is a mean over the samples of the batch that the data yielded last. All ranks have the same number of
        samples in most steps, and then nothing is weighted.
        """
        data = self._data
        if data is not None and (current := data.current) is not None:
            weight = current.weight
            if weight != 1.0:
                loss = loss * weight
        loss.backward()  # type: ignore[no-untyped-call]

    def update(
        self,
        optimizer: Optimizer,
        *,
        loss: Tensor | float | None = None,
        tokens: int = 0,
        scheduler: Any = None,
        scaler: Any = None,
        clip_norm: float | None = None,
    ) -> bool:
        """End of a step, in place of `optimizer.step()` and `optimizer.zero_grad()`. False: there are passes to come.

        `loss` and `tokens` (of this rank, in this pass) are shown to people. `scheduler` and `scaler` are stepped
        with the optimizer; `clip_norm` limits the norm of all its gradients. After the last step that was asked
        for, this does not return.

        To be called once for every batch of the run's data, as the last thing in it: a checkpoint made here goes on
        with the next batch. Other optimizers step by themselves before (`optimizer.step()`). To leave a batch out,
        weight its loss by zero.

        UsageError, and no step: this batch has been here already, or one before it has not.
        """
        if not self._training:
            self._begin_training()
        data = self._data
        if data is not None:
            micro = data.end_pass().micro
            if micro.weight:
                self._samples += micro.stop - micro.start
                self._tokens += tokens
                if loss is not None:
                    self._loss.add(loss, micro.weight)
            if not micro.last:
                return False
        else:
            self._tokens = tokens
            if loss is not None:
                self._loss.add(loss, 1.0)

        self._link.check_lease()
        slot = self._slot
        slot.begin_update()
        if scaler is None:
            if clip_norm is not None:
                _clip(optimizer, clip_norm)
            optimizer.step()
        else:
            if clip_norm is not None:
                scaler.unscale_(optimizer)
                _clip(optimizer, clip_norm)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if scheduler is not None:
            scheduler.step()
        self._step = step = self._step + 1
        if data is not None:
            data.complete_step(step)
        slot.end_update(step, self._loss.take(), self._samples, self._tokens)
        self._samples = self._tokens = 0

        if self._page.order_word != self._order_word:
            self._see_order()
        if step >= self._look_at:
            self._look_for_memory(step)
        if step >= self._due:
            self._save_due()
        self._randomness.seed(step)
        return True

    def report(self, **metrics: Tensor | float) -> None:
        """Say how good the training is, `run.report(val_loss=1.23)`: finite numbers, under names of your own.

        Each goes into the next checkpoint's manifest, with the step after which it was reported; of several under one
        name the last. `checkpoint.keep_best` keeps checkpoints by them. Rank 0's count; all ranks may call it. A number
        on a GPU is waited for.

        UsageError: something that is not one finite number, or more than 64 names of 64 characters: then nothing of
        this call counts.
        """
        found = {name: Metric(_number(name, value), Step(self._step)) for name, value in metrics.items()}
        known = self._saving.metrics | found
        if len(known) > _METRICS or any(len(name) > _METRICS for name in found):
            raise UsageError(
                f"run.report takes {_METRICS} names of up to {_METRICS} characters between two checkpoints",
                "report what you choose checkpoints by; what else there is belongs into a log of your own",
            )
        self._saving.metrics = known

    def done(self, steps: int) -> bool:
        """Whether the run has completed so many steps."""
        return self._step >= steps

    # --- phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names time that is not training: "eval", "compile", or a word of your own.

        Whatever random numbers are drawn in it, the next step gets its own.
        """
        before = self._phase
        self._enter(_PHASES.get(name, Phase.OTHER))
        try:
            yield
        finally:
            self._enter(before)
            self._randomness.seed(self._step)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._slot.set_phase(phase)

    # --- checkpoints

    def _see_order(self) -> None:
        self._order_word = word = self._page.order_word
        if word == LET_GO.word:
            return
        order = Order.from_word(word)
        self._order = order if order is not None and order.save_at_step >= self._step else None
        self._plan_save()

    def _plan_save(self) -> None:
        """Find the next step, this one included, at which something is due."""
        self._due = min(*self._due_by_number(), _NEVER if self._order is None else self._order.save_at_step)

    def _due_by_number(self) -> tuple[int, int]:
        """The next step, this one included, with a save, and with a copy, whatever is ordered: on all ranks alike."""
        saving, spec = self._saving, self._spec
        return (
            _next(self._step, spec.save_every, (saving.last, saving.left_out)),
            _next(self._step, spec.copy_every, (saving.last, saving.left_out, saving.last_copy)),
        )

    def _look_for_memory(self, step: int) -> None:
        """After the first step of this generation the optimizers have their state, so that it is known how much."""
        if not self._asked_for_memory:
            self._asked_for_memory = True
            self._saving.prepare()
        self._look_at = _NEVER if self._saving.prepared() else step + 1

    def _save_due(self) -> None:
        step, saving = Step(self._step), self._saving
        order = self._order if self._order is not None and self._order.save_at_step == step else None
        ordered = order is not None and not order.in_memory
        save, copy = self._due_by_number()
        if step in (save, copy):
            # A rank that is late has not seen the order, and is here all the same: what ranks agree on depends on
            # nothing but the number of the step.
            saving.due(step, durable=step == save, ordered=ordered)
        elif ordered:
            saving.save(step)
        else:
            saving.copy(step)
        if order is not None:
            if order.stop_after_save:
                self._hold()
            else:
                self._order = None
        self._enter(self._phase)
        self._plan_save()

    def _hold(self) -> None:
        """Stay at this step until the leader says that all have saved it; returns if it names another one instead."""
        self._slot.set_phase(Phase.CHECKPOINT)
        while (word := self._page.order_word) == self._order_word and word != LET_GO.word:
            self._link.check_lease()
            time.sleep(_HOLD_SECONDS)
        if word == LET_GO.word:
            self._saving.finish()
            self._stopped, self._training = True, False
            raise Stopped
        self._see_order()

    # --- the end

    def _finish(self) -> None:
        """The training function has returned."""
        if not self._training:
            self._begin_training()
        restore = self._spec.restore
        if restore is not None and restore.memory and restore.step == self._step:
            self._saving.last = None  # where it came from may never have become durable
        self._saving.save(Step(self._step))
        self._saving.finish()  # with this process, a copy that its device still makes would be lost
        self._enter(Phase.DONE)
        self._link.say_returned(Step(self._step))

    def _current_pass(self) -> MicroBatch | None:
        current = None if self._data is None else self._data.current
        return None if current is None else current.micro


def _next(step: int, every: int | None, done: Container[Step | None]) -> int:
    """The first multiple of `every` from `step` on, without 0 and those that are done; none is further than one on."""
    if not every:
        return _NEVER
    multiple = -(-step // every) * every
    return multiple + every if not multiple or multiple in done else multiple


class _Loss:
    """The mean loss of a step's passes, by their weights, as far as it can be had without waiting for a device."""

    __slots__ = ("_read_at", "_sum", "_taken", "_weight")

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0
        self._taken = math.nan
        self._read_at = -math.inf

    def add(self, loss: Tensor | float, weight: float) -> None:
        if isinstance(loss, Tensor):
            if not loss.is_cpu:
                # Reading waits for the device, so it is done now and then, and shown until the next time.
                now = time.monotonic()
                if now - self._read_at < _LOSS_SECONDS:
                    return
                self._read_at = now
            loss = loss.item()
        self._sum += weight * loss
        self._weight += weight

    def take(self) -> float:
        """The mean since the last call, or what it was then if nothing was added; NaN before anything was."""
        if self._weight:
            self._taken = self._sum / self._weight
            self._sum = self._weight = 0.0
        return self._taken


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"run.report({name}=…): {value!r:.80} is not a finite number", "report one, or leave it out")
    return number


def _clip(optimizer: Optimizer, norm: float) -> None:
    parameters = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)


_entered = False


def main(train: Callable[[Run], object]) -> None:
    """Train: join the run that this process was started for, call `train(run)`, save, and report.

    Without an agent (plain `python train.py`) it trains alone, as rank 0 of 1, without checkpoints, and says on stderr
    how that goes.
    """
    global _entered
    if _entered:  # before a specification is looked for: the first call has taken it
        raise UsageError("hpcft.main was called twice", "a run has one training function, called once per process")
    spec = take_spec(os.environ)
    if not spec.alone:
        _entered = True
        _train_for_agent(train, spec)
        return
    link = Link(spec)
    run = Run(spec, link, group.choose_device(spec), {})
    group.form(spec, run.device)
    try:
        with narrated(link.slot):
            _call(train, run)
    finally:
        group.leave()


def _train_for_agent(train: Callable[[Run], object], spec: WorkerSpec) -> None:
    link = Link(spec)
    link.slot.set_phase(Phase.START)
    try:
        run = Run(spec, link, group.choose_device(spec), {})
        group.form(spec, run.device)
        _call(train, run)
    except Stopped:
        _leave_or_exit(STATUS_STOPPED)
        raise SystemExit(STATUS_STOPPED) from None
    except Unusable as error:
        assert spec.restore is not None
        print(f"hpcft: {error.__cause__}", file=sys.stderr)
        link.say_damaged(str(spec.restore.directory), str(error))
        _exit(STATUS_DAMAGED)
    except Unreadable as error:
        print(f"hpcft: {error.__cause__}", file=sys.stderr)
        link.say_unreadable(str(error))
        _exit(STATUS_UNREADABLE)
    except Forgotten as error:
        print(f"hpcft: {error}", file=sys.stderr)
        link.say_forgotten(str(error))
        _exit(STATUS_FORGOTTEN)
    except BaseException as error:
        _fail(link, error)
    _leave_or_exit(0)


def _call(train: Callable[[Run], object], run: Run) -> None:
    try:
        train(run)
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    run._finish()


def _leave_or_exit(status: int) -> None:
    if not group.leave():
        _exit(status)


def _fail(link: Link, error: BaseException) -> NoReturn:
    """Print and report the exception, and end without waiting for anybody."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)
    link.say_exception(error.with_traceback(trace), Step(link.slot.step))
    _exit(STATUS_FAILED)


def _exit(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
