"""From what was measured to how often to save. Pure; the formulas are `cadence`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hpcft.bench.plan import Mode
from hpcft.cadence import best_interval, expected_loss

NOISY = 0.2
"""Where training without checkpoints differs by more from run to run, what saves cost is not known well enough."""
_CURVE_POINTS = 41
_CURVE_SPAN = 32.0
"""The curve goes from the best interval divided by this to the best one times this."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one trial has shown. Seconds; None: there was none, or it is not known."""

    mode: Mode
    every: int
    """Steps from save to save; 0: none."""
    steps: int
    """That were looked at,"""
    seconds: float
    """and for how long."""
    blocked: tuple[float, ...] = ()
    """For how long each save stopped training."""
    lags: tuple[float, ...] = ()
    """From the beginning of a save until it was durable."""
    sizes: tuple[int, ...] = ()
    """Bytes of each."""
    left_out: int = 0
    """Saves that were due while earlier ones were still being written."""
    failed: int = 0
    recovery: float | None = None
    """From the moment the death of the worker was known to the first step afterwards."""
    steps_lost: int | None = None
    """That had to be repeated."""

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps

    @property
    def saves(self) -> int:
        return len(self.blocked)

    @property
    def rate(self) -> float | None:
        """Bytes per second from the beginning of a save until it was durable; the median."""
        rates = [size / lag for size, lag in zip(self.sizes, self.lags, strict=True) if lag > 0]
        return median(rates) if rates else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed (nearest rank): of few, the largest."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Training that saves nothing: seconds for a step, of all trials that did not."""

    step: float
    """The median."""
    spread: float
    """How far apart the slowest and the fastest are, as a share of the median: smaller differences say nothing."""
    trials: int

    @property
    def noisy(self) -> bool:
        """Whether nothing should be decided by what was measured beside it."""
        return self.spread > NOISY


def baseline(trials: Sequence[Figures]) -> Baseline:
    """Of the trials that saved nothing, of which there is at least one. The first one, which is shorter than the others
    and only sets the pace, counts as long as there are not two others."""
    steps = [each.step_seconds for each in trials if each.mode is Mode.NONE]
    steps = steps[1:] if len(steps) > 2 else steps
    middle = median(steps)
    return Baseline(middle, (max(steps) - min(steps)) / middle, len(steps))


def overhead(trial: Figures, base: Baseline) -> float:
    """How much longer a step took than without checkpoints, as a share; negative where the machine was faster."""
    return trial.step_seconds / base.step - 1


@dataclass(frozen=True, slots=True)
class Costs:
    """What a save costs in one mode. Seconds."""

    mode: Mode
    blocked: float
    """For which training stood still, by the ranks' own clocks: the median of all trials."""
    slowdown: float
    """By how much a save made training longer, whatever the reason: also what the writing takes from it."""
    lag: float
    """Until it is durable; 0 for copies in memory."""
    recovery: float
    """After a worker's death; 0 where none was seen."""

    @property
    def cost(self) -> float:
        """What is reckoned with: the larger one, for the slowdown is known no better than the machine is quiet."""
        return max(self.blocked, self.slowdown)


def costs(mode: Mode, trials: Sequence[Figures], base: Baseline) -> Costs | None:
    """None: no trial of this mode has saved anything.

    The slowdown is the slope of extra time over number of saves, by least squares through the origin: no saves cost
    nothing, and trials with many saves say most.
    """
    mine = [each for each in trials if each.mode is mode and each.saves]
    if not mine:
        return None
    blocked = [seconds for each in mine for seconds in each.blocked]
    lags = [seconds for each in mine for seconds in each.lags]
    recoveries = [each.recovery for each in mine if each.recovery is not None]
    extra = [(each.seconds - each.steps * base.step, each.saves) for each in mine]
    slope = sum(seconds * saves for seconds, saves in extra) / sum(saves**2 for _, saves in extra)
    return Costs(
        mode,
        median(blocked),
        max(0.0, slope),
        median(lags) if lags else 0.0,
        median(recoveries) if recoveries else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Advice:
    """How often to save in one mode, and what comes of it."""

    mode: Mode
    interval: float
    """Seconds from save to save."""
    steps: int
    """Between the two: the save itself is part of the interval."""
    goodput: float
    """Share of the time that is expected to go into steps that are kept."""
    saving: float
    repeating: float
    recovering: float
    """Where the rest is expected to go."""
    bound_by_lag: bool
    """Whether a shorter interval would be better, but the save before would still be being written."""
    curve: tuple[tuple[float, float], ...]
    """Goodput by interval."""


def advice(found: Costs, mtbf: float, step: float) -> Advice:
    """For failures `mtbf` seconds apart on average, and steps of `step` seconds without checkpoints."""
    best = max(best_interval(found.cost, mtbf), step + found.cost)
    interval = max(best, found.lag)
    steps = max(1, round((interval - found.cost) / step))
    saving, repeating = expected_loss(interval, found.cost, found.lag, 1 / mtbf)
    factors = [_CURVE_SPAN ** (2 * point / (_CURVE_POINTS - 1) - 1) for point in range(_CURVE_POINTS)]
    lengths = [best * factor for factor in factors if best * factor >= max(found.lag, step + found.cost)]
    return Advice(
        found.mode,
        interval,
        steps,
        goodput(interval, found, mtbf),
        saving,
        repeating,
        found.recovery / mtbf,
        interval > best,
        tuple((length, goodput(length, found, mtbf)) for length in lengths),
    )


def goodput(interval: float, found: Costs, mtbf: float) -> float:
    """Expected share of the time that goes into steps that are kept."""
    loss = expected_loss(interval, found.cost, found.lag, 1 / mtbf)
    return max(0.0, 1.0 - loss.saving - loss.repeating - found.recovery / mtbf)
