"""Which trials are made, how long each trains, and how long all of it will take. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

STATE_BYTES = 12
"""For each parameter: float32 and AdamW's two moments."""

MOST_PARAMETERS = 1e15

EVERY = {False: (1, 5, 10, 50), True: (1, 5, 10)}
"""How often, where it is not said: in steps, and in epochs."""

CALIBRATION_SECONDS = 5.0
CALIBRATION_STEPS = 12
"""Of the first trial, which shows how long a step takes."""
TRIAL_SECONDS = 8.0
"""A trial trains at least so long: what disturbs it for a moment should not decide."""
LONGEST_SECONDS = 120.0
"""And at most so long, unless it is told how many steps."""
SAVES = 2
"""A trial has time for so many saves, if that is not longer."""
RECOVERY_SECONDS = 2.0
ENDING_SECONDS = 3.0

_PARAMETERS = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kKMBG]?)")
_THOUSANDS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


class Mode(StrEnum):
    NONE = "none"
    """Saves nothing while it trains: what the others are compared with."""
    SYNC = "sync"
    ASYNC = "async"
    MEMORY = "memory"
    """Copies are made and kept in memory, and nothing is written."""


SAVING = (Mode.SYNC, Mode.ASYNC, Mode.MEMORY)


@dataclass(frozen=True, slots=True)
class Trial:
    name: str
    """Of its run."""
    mode: Mode
    every: int = 0
    """Steps from save to save; 0: none."""
    kill: bool = True
    """Whether a worker is killed at the end."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What the first trial has shown, in seconds."""

    step: float
    """Without checkpoints."""
    startup: float
    """Until training began."""
    save: float
    """For which training stood still at a synchronous save."""


def parse_parameters(text: str) -> int:
    """A number of parameters from "125M", "1.5B", "800k" or "2000000". Raises ValueError with a sentence."""
    found = _PARAMETERS.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a number of parameters; write 125M or 1.5B, say")
    number = float(found[1]) * _THOUSANDS[found[2]]
    if not number < MOST_PARAMETERS:
        raise ValueError("there is no machine for a model of so many parameters; write 125M or 1.5B, say")
    return round(number)


def parse_every(text: str) -> tuple[int, ...]:
    """Whole numbers from "1,5,10,50", in rising order. Raises ValueError with a sentence for the user."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 10 and int(word) for word in words):
        raise ValueError(f"{text!r} does not say how often; write whole numbers from 1 on, such as 1,5,10,50")
    return tuple(sorted({int(word) for word in words}))


def calibration() -> Trial:
    return Trial("none-1", Mode.NONE, kill=False)


def trials(modes: Sequence[Mode], every: Sequence[int], steps: int) -> tuple[Trial, ...]:
    """After the calibration. One that saves nothing comes before and after each mode: so a machine that becomes slower
    is seen.

    Cadences that no trial of `steps` steps would come to are left out.
    """
    return tuple(_trials(modes, [each for each in every if each <= steps]))


def _trials(modes: Sequence[Mode], every: Sequence[int]) -> Iterator[Trial]:
    yield Trial("none-2", Mode.NONE)
    for number, mode in enumerate(modes, start=3):
        for each in every:
            yield Trial(f"{mode}-{each}", mode, each)
        yield Trial(f"none-{number}", Mode.NONE)


def steps_of(pace: Pace, every: Sequence[int], total: int | None) -> int:
    """How many steps each trial trains; `total` is how many the program has, if that is known."""
    wanted = max(math.ceil(TRIAL_SECONDS / pace.step), SAVES * max(every), CALIBRATION_STEPS)
    steps = min(wanted, max(CALIBRATION_STEPS, int(LONGEST_SECONDS / pace.step)))
    return steps if total is None else min(steps, max(1, total - 1))


def seconds_of(trial: Trial, pace: Pace, steps: int) -> float:
    """About how long the trial will take, start and end included."""
    saves = steps // trial.every if trial.every else 0
    saving = saves * pace.save if trial.mode is Mode.SYNC else 0.0
    recovery = RECOVERY_SECONDS + pace.step if trial.kill else 0.0
    return pace.startup + steps * pace.step + saving + recovery + ENDING_SECONDS
