"""Where samples are loaded: in the training process, or in processes forked from it.

Theory of operation
-------------------
A `Request` names samples; `Fetching` asks the data set for each and collates them. Before each, the random state of
`random`, `numpy.random` and torch's default generator is seeded as a function of (seed, epoch, sample): augmentation
depends on neither the process that loads a sample, nor the world, nor the past. The training process gets its own
random state back. Generators that a data set keeps for itself are beyond this; it may derive them from
`numpy.random` when a sample is loaded.

A failure of the data set's code is named by its sample. From a loader process it comes as a value, `Failure`, and is
raised in the training process.

Loader processes die with the training process (PDEATHSIG), and only by its doing: a batch system sends its warnings
(TERM, USR1) to every process of a step, and the loss of a loader would end a worker that is about to save. They are
forked, so that data sets need no pickling and share what they have read.
"""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import context, popen_fork
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from hpcft.data import order
from hpcft.errors import ExitCode, HpcftError
from hpcft.process import die_with_parent
from hpcft.surroundings import fault

_NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class SampleError(HpcftError):
    """The data set's code failed on one sample; the traceback is the cause, or, from another process, a note."""

    exit_code = ExitCode.USER_CODE

    def __init__(self, message: str, hint: str = "", sample: int = -1, epoch: int = -1, fault: str = "") -> None:
        super().__init__(message, hint)
        self.sample = sample
        self.epoch = epoch
        self.fault = fault
        """What around the program has failed, if that was it (see `surroundings`)."""


class MapDataset(Protocol):
    """Samples by number, such as any map-style dataset of torch."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Request:
    epoch: int
    ids: tuple[int, ...]
    seed: int


class Fetching(Dataset[Any]):
    """What runs where samples are loaded: seeds, asks the data set for each sample, and collates them."""

    def __init__(self, dataset: MapDataset, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, request: Request) -> Any:
        if get_worker_info() is not None:
            return self._load(request)
        with _randomness_kept():
            return self._load(request)

    def _load(self, request: Request) -> Any:
        loaded = []
        number = -1
        try:
            for number in request.ids:
                _seed(order.sample_seed(request.seed, request.epoch, number))
                loaded.append(self._dataset[number])
            number = -1
            return self._collate(loaded)
        except Exception as error:  # whatever it is: it is raised again in the training process, named
            failure = Failure.of(error, number, request)
            if get_worker_info() is None:
                raise failure.error() from error
            return failure


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way from a loader process."""

    message: str
    hint: str
    sample: int
    epoch: int
    trace: str
    fault: str

    @classmethod
    def of(cls, error: Exception, number: int, request: Request) -> Failure:
        what = f"sample {number} of epoch {request.epoch} cannot be loaded"
        if number < 0:
            shown = ", ".join(map(str, request.ids[:8])) + (", …" if len(request.ids) > 8 else "")
            what = f"the batch of samples {shown} of epoch {request.epoch} cannot be collated"
        at = traceback.extract_tb(error.__traceback__)[-1]
        why, hint = f"{type(error).__name__}: {error}", "the data set's own code failed; its traceback is in the log"
        if isinstance(error, HpcftError):
            why, hint = error.message, error.hint
        trace = "".join(traceback.format_exception(error))
        return cls(f"{what}: {why} ({at.filename}:{at.lineno})", hint, number, request.epoch, trace, fault(error))

    def error(self) -> SampleError:
        return SampleError(self.message, self.hint, self.sample, self.epoch, self.fault)


def as_it_is(loaded: Any) -> Any:
    return loaded


def _seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value & 0xFFFF_FFFF)  # of more bits it takes five times as long
    torch.default_generator.manual_seed(value)


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Puts the process's random state back. Devices' generators are not touched by `_seed`."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def enter_loader(parent: int, _number: int) -> None:
    """Runs first in every loader process."""
    die_with_parent(parent)
    for notice in _NOTICES:
        signal.signal(notice, _unheeded)  # not SIG_IGN: programs started by a data set would inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTICES)


def _unheeded(_number: int, _frame: object) -> None:
    pass


class _LoaderPopen(popen_fork.Popen):
    def _launch(self, process_obj: Any) -> None:
        """Forks. What arrives before the new process has come to `enter_loader` waits until it has."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICES)
        try:
            super()._launch(process_obj)  # type: ignore[misc]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        self.kill()  # loader processes do not heed TERM


class _LoaderProcess(context.ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _LoaderPopen:
        return _LoaderPopen(process_obj)


class LoaderContext(context.ForkContext):
    Process = _LoaderProcess
