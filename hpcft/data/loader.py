"""`Data`: the batches of a run, whatever its world, and the position that makes a checkpoint resume exactly there.

Theory of operation
-------------------
The position is what completed steps have consumed. What was fetched ahead of it is of no account: whoever iterates
starts at the position, and after a restart other ranks, in another number, fetch the same samples again. So a step
has to be the one at the position, with all its passes: a batch that is left out would count as used, and one that
comes twice would be behind the checkpoint of its second step.

A `_Plan` turns a position into the row of requests that this rank will make (`batches`, `order`), and notes what each
was for. torch's `DataLoader` works them off in order, in this process or in others with prefetch (`fetch`);
persistent ones outlive a rollback and a new generation, since all they ever get is (epoch, numbers of samples).
There is one row at a time: an iteration that finds another's in the loader, say that of an evaluation in its body,
has its own made anew from where it is. Iterating leaves the random state of the training process alone.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hpcft.data import order
from hpcft.data.batches import GlobalBatch, MicroBatch, Position, advance, global_batch, micro_batches, steps_per_epoch
from hpcft.data.fetch import Failure, Fetching, LoaderContext, MapDataset, Request, as_it_is, enter_loader
from hpcft.data.ledger import LedgerWriter
from hpcft.data.order import Ids
from hpcft.errors import UsageError

_ANNOUNCED = 8
"""Requests of which a data set that fetches ahead is told before they are made."""


@dataclass(frozen=True, slots=True)
class Portion:
    """What the batch just yielded stands for: one pass of one step, on this rank."""

    micro: MicroBatch
    ids: Ids
    """Numbers of the samples in it, in order; of a stand-in too."""

    @property
    def weight(self) -> float:
        """Factor of the loss, a mean over the samples, before `backward`; see `batches`. 0 for a stand-in."""
        return self.micro.weight

    @property
    def last(self) -> bool:
        """Whether the optimizer steps after it."""
        return self.micro.last

    @property
    def epoch(self) -> int:
        return self.micro.batch.epoch


class Data:
    """Batches of a map-style dataset, as `collate_fn` returns them: `for batch in data`.

    `batch_size` counts samples over all ranks, and stays the same in every world; `micro_batch` limits how many of
    them go through a model at once on one rank, so that a step may take several passes. Each epoch ends with a
    smaller batch where `batch_size` does not divide it. Iteration goes from epoch to epoch, `epochs` of them in the
    run, or for ever.

    `workers` processes load in the background, each up to `prefetch` batches ahead; 0: in the training process. What
    is None comes from the run that the data is bound to.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        batch_size: int,
        micro_batch: int | None = None,
        shuffle: bool = True,
        epochs: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        workers: int | None = None,
        prefetch: int | None = None,
        seed: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """UsageError: no batches can be made of this."""
        self._plan = _Plan(_length(dataset), batch_size, micro_batch, shuffle, epochs)
        self._fingerprint: str | None = getattr(dataset, "fingerprint", None)
        self._plan.expect = getattr(dataset, "expect", None)
        self._fetching = Fetching(dataset, collate_fn or default_collate)
        self._own = (workers, prefetch, seed)
        self._workers = workers or 0
        self._prefetch = prefetch or 2
        self._plan.seed = seed or 0
        self._seed_known = seed is not None
        self._restored_seed: int | None = None
        self._pin_memory = pin_memory
        self._loader: DataLoader[Any] | None = None
        self._stop_loading: weakref.finalize[[], Data] | None = None
        self._position = Position()
        self._revision = 0
        self._iteration = 0
        self._ledger: LedgerWriter | None = None
        self._ended: list[Portion] = []
        self.current: Portion | None = None
        """What the batch that was yielded last stands for."""

    # --- the run's side

    def bind(
        self,
        seed: int,
        rank: int,
        world_size: int,
        ledger: LedgerWriter | None = None,
        *,
        workers: int | None = None,
        prefetch: int | None = None,
    ) -> None:
        """Makes this the data of one rank, in one generation. The position stays.

        UsageError: the state loaded before is of another seed.
        """
        own_workers, own_prefetch, own_seed = self._own
        plan = self._plan
        plan.seed = seed if own_seed is None else own_seed
        plan.rank, plan.world_size = rank, world_size
        self._seed_known = True
        self._check_seed()
        loading = self._workers, self._prefetch
        if own_workers is None and workers is not None:
            self._workers = workers
        if own_prefetch is None and prefetch is not None:
            self._prefetch = max(1, prefetch)
        if loading != (self._workers, self._prefetch):
            self.close()
        self._ledger = ledger
        if ledger is not None:
            ledger.begin(samples=plan.samples, seed=plan.seed, shuffle=plan.shuffle)
        self._move(self._position)

    def end_pass(self) -> Portion:
        """The batch yielded last is used: a pass of the step at the position. After the last one comes the optimizer.

        UsageError: there was no batch, it has been used already, or one before it has not.
        """
        portion = self.current
        if portion is None:
            raise UsageError(
                "run.update was called without a batch of the run's data",
                "iterate over the hpcft.data.Data that was given to run.restore",
            )
        micro, position = portion.micro, self._position
        here = micro.batch.epoch, micro.batch.start, micro.index
        due = position.epoch, position.offset, len(self._ended)
        if here < due:
            raise UsageError(
                f"run.update was called again for {_place(*here)}, which would count twice",
                "call it once for each batch, at the end of the step; let other optimizers step by themselves before "
                "(`optimizer.step()`)",
            )
        if here > due:
            raise UsageError(
                f"run.update was called for {_place(*here)}, and not for {_place(*due)}, which would count as used",
                "call it for every batch: give hpcft.data.Data a `micro_batch` to accumulate gradients, weight the "
                "loss by zero to leave a batch out, and evaluate on this data right after run.update only",
            )
        self._ended.append(portion)
        return portion

    def complete_step(self, step: int) -> None:
        """The optimizer has done step number `step` on the passes that have ended: moves the position behind them.

        UsageError: there are passes to come.
        """
        passes = self._ended
        if not passes or not passes[-1].last:
            raise UsageError(
                f"step {step} was completed after {len(passes)} of its passes",
                "let the optimizer step where data.end_pass().last is true",
            )
        batch = passes[-1].micro.batch
        self._position = advance(batch, self._plan.samples)
        if self._ledger is not None:
            used = [portion.ids for portion in passes if not portion.micro.stand_in]
            self._ledger.record(step, batch, np.concatenate([np.zeros(0, np.int64), *used]))
        passes.clear()

    def state_dict(self) -> dict[str, int | bool | str]:
        """The position, and what it depends on. As of the last completed step, whatever has been fetched since."""
        plan = self._plan
        state: dict[str, int | bool | str] = {
            "epoch": self._position.epoch,
            "offset": self._position.offset,
            "samples": plan.samples,
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "shuffle": plan.shuffle,
        }
        if self._fingerprint is not None:
            state["fingerprint"] = self._fingerprint
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the position of `state`; an iteration that is under way goes on from there.

        UsageError: the position is one in other data, in another order, or in other batches.
        """
        plan = self._plan
        for key, now in (
            ("samples", plan.samples),
            ("batch_size", plan.batch_size),
            ("shuffle", plan.shuffle),
        ):
            if state[key] != now:
                raise UsageError(
                    f"the state to restore was made with {key} = {state[key]}, and the data now has {now}",
                    "each sample once per epoch holds only for the same data in the same batches: "
                    "put it back, or start a new run",
                )
        if None not in (self._fingerprint, then := state.get("fingerprint")) and self._fingerprint != then:
            raise UsageError(
                "the state to restore was made with other data: objects have changed, come or gone since",
                "each sample once per epoch holds only for the same data: put it back, or start a new run",
            )
        position = Position(int(state["epoch"]), int(state["offset"]))
        global_batch(position, plan.samples, plan.batch_size)
        self._restored_seed = int(state["seed"])
        self._check_seed()
        self._move(position)

    def close(self) -> None:
        """Ends the processes that load. Iterating starts them anew."""
        self._loader = None
        if self._stop_loading is not None:
            atexit.unregister(self._stop_loading)
            self._stop_loading()
            self._stop_loading = None

    def _check_seed(self) -> None:
        # Data that is restored before it is bound does not know its seed yet.
        if self._seed_known and self._restored_seed not in (None, self._plan.seed):
            raise UsageError(
                f"the state to restore was made with seed = {self._restored_seed}, and the data now has "
                f"{self._plan.seed}",
                "the seed decides the order of the samples: put it back, or start a new run",
            )

    def _move(self, position: Position) -> None:
        self._position = position
        self._revision += 1
        self._ended.clear()
        self.current = None

    # --- the user's side

    @property
    def position(self) -> Position:
        """What completed steps have consumed."""
        return self._position

    @property
    def epoch(self) -> int:
        """Of the batch yielded last; before the first one, of the position."""
        return self._position.epoch if self.current is None else self.current.epoch

    @property
    def samples(self) -> int:
        return self._plan.samples

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self._plan.samples, self._plan.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """From the position on. SampleError: the data set's code failed."""
        start, index = self._position, len(self._ended)  # also in the middle of a step
        while True:
            self._iteration += 1
            revision, iteration = self._revision, self._iteration
            self._plan.start, self._plan.index = start, index
            for loaded in self._batches():
                portion = self._plan.ahead.popleft()
                if isinstance(loaded, Failure):
                    error = loaded.error()
                    error.add_note(loaded.trace)
                    raise error
                self.current = portion
                yield loaded
                if self._revision != revision:
                    start, index = self._position, 0
                    break
                if self._iteration != iteration:
                    start, index = self._plan.after(portion.micro)
                    break
            else:
                return

    def _batches(self) -> Iterator[Any]:
        forked = self._workers > 0
        if self._loader is not None:
            return iter(self._loader)
        self._loader = DataLoader(
            self._fetching,
            batch_size=None,
            sampler=self._plan,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if forked else None,
            persistent_workers=forked,
            multiprocessing_context=LoaderContext() if forked else None,
            worker_init_fn=partial(enter_loader, os.getpid()),
            collate_fn=as_it_is,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else every iteration draws from the default one
        )
        batches = iter(self._loader)
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            # An iteration that somebody still holds would keep the processes, and at exit multiprocessing would
            # kill them, which torch takes for a failure. Hooks run from the youngest: this one before those.
            self._stop_loading = weakref.finalize(self, batches._shutdown_workers)
            atexit.register(self._stop_loading)
        return batches


class _Plan:
    """The requests of a rank from `start` on, the step there from pass `index` on.

    While one is worked off, `ahead` has what it and later ones are for.
    """

    def __init__(
        self, samples: int, batch_size: int, micro_batch: int | None, shuffle: bool, epochs: int | None
    ) -> None:
        for name, value in (("batch_size", batch_size), ("micro_batch", micro_batch), ("epochs", epochs)):
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value} is not possible", "it counts from 1")
        self.samples = samples
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.shuffle = shuffle
        self.epochs = epochs
        self.seed = 0
        self.rank = 0
        self.world_size = 1
        self.start = Position()
        self.index = 0
        self.ahead: deque[Portion] = deque()
        self.expect: Callable[[tuple[int, ...]], None] | None = None
        """Told which samples are next, a few requests ahead."""

    def __iter__(self) -> Iterator[Request]:
        self.ahead.clear()
        rows = self._rows()
        if self.expect is None:
            for portion, request in rows:
                self.ahead.append(portion)
                yield request
            return
        announced: deque[tuple[Portion, Request]] = deque()
        more = True
        while more or announced:
            while more and len(announced) <= _ANNOUNCED:
                following = next(rows, None)
                if following is None:
                    more = False
                else:
                    self.expect(following[1].ids)
                    announced.append(following)
            if announced:
                portion, request = announced.popleft()
                self.ahead.append(portion)
                yield request

    def _rows(self) -> Iterator[tuple[Portion, Request]]:
        position, index = self.start, self.index
        while self.epochs is None or position.epoch < self.epochs:
            batch = global_batch(position, self.samples, self.batch_size)
            for micro in micro_batches(batch, self.rank, self.world_size, self.micro_batch)[index:]:
                ids = self._ids(batch, micro)
                yield Portion(micro, ids), Request(batch.epoch, tuple(ids.tolist()), self.seed)
            position, index = advance(batch, self.samples), 0

    def after(self, done: MicroBatch) -> tuple[Position, int]:
        """`start` and `index` of what comes after this pass."""
        if done.last:
            return advance(done.batch, self.samples), 0
        return Position(done.batch.epoch, done.batch.start), done.index + 1

    def _ids(self, batch: GlobalBatch, micro: MicroBatch) -> Ids:
        if self.shuffle:
            return order.ids(self.seed, batch.epoch, self.samples, micro.start, micro.stop)
        return np.arange(micro.start, micro.stop, dtype=np.int64)


def _place(epoch: int, start: int, index: int) -> str:
    more = f" (pass {index + 1})" if index else ""
    return f"the batch that starts at {start} of epoch {epoch}{more}"


def _length(dataset: MapDataset) -> int:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{type(dataset).__name__} is not a map-style dataset: it lacks __getitem__ or __len__",
            "an order that survives failures needs samples with numbers; streams have none",
        )
    if (samples := len(dataset)) < 1:
        raise UsageError(f"the data set ({type(dataset).__name__}) is empty", "check where it looks for its files")
    return samples
