"""All trials, one after the other, and what they have shown so far."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcft import process
from hpcft.bench import plan
from hpcft.bench.measure import Course, last_save, measure
from hpcft.bench.plan import Mode, Pace, Trial
from hpcft.bench.predict import Figures
from hpcft.bench.site import Site
from hpcft.errors import UnusableError, UsageError
from hpcft.rundir import RunDirectory
from hpcft.units import counted, human_duration, human_size

SIZED = "hpcft.examples.sized"
"""The module that trains a model of a given size."""
_ROOM = 4
"""Checkpoints of a trial that may lie in its directory at the same time: two kept, one written, one deleted."""
_KILL_SECONDS = 15.0
_RAW_LARGEST = 2 << 30
"""Bytes of a file with which the raw limit is measured, at most."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be found out."""

    config: Path
    sets: tuple[str, ...]
    model: str
    """For people: what is trained."""
    modes: tuple[Mode, ...]
    every: tuple[int, ...]
    """In units."""
    epochs: bool
    """Whether the unit is an epoch; else it is a step."""
    steps: int | None
    """That each trial trains; None: as many as it takes."""
    mtbf: float
    """Seconds between failures, on average."""
    mtbf_source: str
    """For people: how that is known."""
    keep: bool = False
    """Whether the trials' checkpoints are left where they are."""


@dataclass(slots=True)
class Results:
    """As far as it has come."""

    question: Question
    site: str
    machine: str
    began: float
    """Seconds since the epoch."""
    load: tuple[float, ...]
    """Of the machine: before, and after each trial."""
    steps: int | None = None
    """That each trial trains."""
    startup: float | None = None
    """Seconds until a run trains."""
    epoch_steps: int | None = None
    size: int | None = None
    """Bytes of a checkpoint."""
    ranks: int | None = None
    raw: tuple[float, ...] = ()
    """Bytes per second that this directory takes: before the trials, and after them."""
    trials: tuple[Figures, ...] = ()
    not_reached: tuple[int, ...] = ()
    """Of the cadences, in units, those that no trial came to."""
    notes: tuple[str, ...] = ()
    """For people: what could not be measured, or not be cleared away."""
    complete: bool = False

    def unit_of(self, trial: Figures) -> int:
        """Its cadence in units."""
        return trial.every // (self.epoch_steps or 1) if self.question.epochs else trial.every

    @property
    def raw_rate(self) -> float | None:
        return max(self.raw) if self.raw else None


class Meter:
    """What is told how far it is; this one says nothing."""

    def begin(self, seconds: float) -> None:
        """All trials together will take about so long."""

    def see(self, label: str, done: float) -> None:
        """What is being done, and for how many of those seconds it has been done."""

    def say(self, line: str) -> None:
        """A line for people."""


class Campaign:
    """Makes the trials below `directory`; `results` is good at any time."""

    def __init__(self, question: Question, site: Site, directory: Path, meter: Meter) -> None:
        self._question = question
        self._site = site
        self._root = directory / "trials"
        self._meter = meter
        self._runs: list[RunDirectory] = []
        self._ranks = 1
        self._hosts = 1
        self._startup = 0.0
        self._total: int | None = None
        self.results = Results(question, site.describe(), machine(), time.time(), (os.getloadavg()[0],))

    def run(self) -> None:
        """Make all trials. Their checkpoints are gone afterwards, also when this is interrupted.

        Raises:
            UnusableError: a trial did not train; there is no room, or no right to write.
            UsageError: an epoch is to be known, and is not.
        """
        try:
            pace = self._calibrate()
            self._go_through(self._planned(pace), pace)
            self._measure_raw()
            self.results.complete = True
        finally:
            self._clear()

    def _calibrate(self) -> Pace:
        question, results = self._question, self.results
        self._meter.say("first, a run without checkpoints shows how long a step takes")

        def enough(step: int, seconds: float) -> bool:
            if question.steps is not None:
                return step >= question.steps
            return step >= plan.CALIBRATION_STEPS and seconds >= plan.CALIBRATION_SECONDS

        course = Course(question.config, question.sets, enough, self._see)
        first, run = measure(self._known(plan.calibration()), course, self._site, self._root)
        self._add(first)
        save = last_save(run)
        results.size, results.ranks, results.startup = save.size, self._ranks, self._startup
        if question.epochs:
            if save.epoch_steps is None:
                raise UsageError(
                    "how many steps an epoch has is not known: the program does not use hpcft.data",
                    "give the cadences in steps: --unit step",
                )
            results.epoch_steps = save.epoch_steps
        self._discard(run)
        check_room(self._root, save.size)
        self._measure_raw()
        return Pace(first.step_seconds, self._startup, save.blocked)

    def _planned(self, pace: Pace) -> tuple[Trial, ...]:
        question, results = self._question, self.results
        unit = results.epoch_steps or 1
        every = [each * unit for each in question.every]
        results.steps = steps = question.steps or plan.steps_of(pace, every, self._total)
        results.not_reached = tuple(each for each in question.every if each * unit > steps)
        trials = plan.trials(question.modes, every, steps)
        seconds = sum(plan.seconds_of(each, pace, steps) for each in trials)
        self._meter.say(
            f"a step takes {human_duration(pace.step)}, a checkpoint has {human_size(results.size or 0)}: "
            f"{counted(len(trials), 'run')} of {steps} steps follow, which take about {human_duration(seconds)}"
        )
        self._meter.begin(seconds)
        return trials

    def _go_through(self, trials: Sequence[Trial], pace: Pace) -> None:
        steps = self.results.steps
        assert steps is not None
        done = 0.0
        for number, trial in enumerate(trials, start=1):
            expected = plan.seconds_of(trial, pace, steps)
            began, label = time.monotonic(), f"{number}/{len(trials)} {trial.name}"

            def see(seen: Mapping[str, Any]) -> None:
                self._meter.see(label, done + min(time.monotonic() - began, expected))  # noqa: B023

            self._meter.see(label, done)
            course = Course(self._question.config, self._question.sets, lambda step, seconds: step >= steps, see)
            found, run = measure(self._known(trial), course, self._site, self._root)
            self._add(found)
            self._discard(run)
            done += expected
            self._meter.see(label, done)

    def _known(self, trial: Trial) -> Trial:
        self._runs.append(RunDirectory(self._root / trial.name))
        return trial

    def _see(self, seen: Mapping[str, Any]) -> None:
        """Of the first trial: what all have in common."""
        self._ranks = max(self._ranks, seen["world_size"])
        self._hosts = max(self._hosts, len({each["node"] for each in seen["workers"]}))
        self._total = seen["total_steps"]
        if seen["state"] == "training" and not self._startup:
            self._startup = time.time() - self.results.began

    def _add(self, found: Figures) -> None:
        self.results.trials += (found,)
        self.results.load += (os.getloadavg()[0],)

    def _measure_raw(self) -> None:
        size = self.results.size
        assert size is not None
        share = max(1, min(size // self._ranks, _RAW_LARGEST))
        try:
            self.results.raw += (self._site.raw_rate(self._root, max(1, self._ranks // self._hosts), share),)
        except UnusableError as error:  # what has been measured, or can still be, is worth the same
            self.results.notes += (f"the raw limit is not known: {error.message}",)

    def _discard(self, run: RunDirectory) -> None:
        if self._question.keep or not run.checkpoints.exists():
            return
        try:
            shutil.rmtree(run.checkpoints)
        except OSError as error:
            self.results.notes += (f"{run.checkpoints} could not be removed: {error.strerror or error}",)

    def _clear(self) -> None:
        process.end_descendants(_KILL_SECONDS)  # an interrupt may have come while a trial was being ended
        for run in self._runs:
            self._discard(run)


def check_room(directory: Path, size: int) -> None:
    """Raises UnusableError if checkpoints of so many bytes have no room below the directory, which exists."""
    free = shutil.disk_usage(directory).free
    if free < _ROOM * size:
        raise UnusableError(
            f"{directory} has {human_size(free)} of free space, and the trials need up to {human_size(_ROOM * size)}",
            "--root names another directory; fewer --params need less",
        )


def write_job(path: Path, parameters: int, train: Mapping[str, object]) -> None:
    """The configuration of a run that trains a model of so many parameters on made-up data."""
    keys = {"parameters": parameters, **train}
    lines = ["[run]", 'name = "bench"', "", "[job]", f'module = "{SIZED}"', "", "[train]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path.write_text("\n".join(lines) + "\n")


def machine() -> str:
    """What this process runs on, for people."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{counted(os.cpu_count() or 1, 'core')}, {human_size(memory)}, {system}, torch {metadata.version('torch')}"
