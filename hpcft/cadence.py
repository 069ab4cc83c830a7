"""When to make a checkpoint. Pure: what was measured comes in, a step goes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from hpcft.ids import Generation, Step
from hpcft.units import Cadence, EverySeconds
from hpcft.world import World

LATEST_STEPS = 15
"""So many times are kept of the latest steps."""


def due(every: Cadence, world: World, now: float, last_save: float) -> bool:
    """Whether a save that goes by the clock is due; `last_save` is the run clock at the last order."""
    return isinstance(every, EverySeconds) and now - last_save >= every.seconds


def step_seconds(world: World, now: float) -> float | None:
    """Mean seconds per step of the running generation, checkpoints included: what is left to train takes as long."""
    done = world.step - world.base_step
    if world.training_since is None or done <= 0:
        return None
    return (now - world.training_since) / done


@dataclass(frozen=True, slots=True)
class Pace:
    """How long each of the latest steps took, as the leader has seen them come."""

    generation: Generation = Generation(0)
    step: Step = Step(0)
    since: float | None = None
    """When `step` was completed; None before that is known."""
    recent: tuple[float, ...] = ()
    """Seconds for a step, the latest last. Of fast steps many come at a time: then it is their mean."""

    @property
    def seconds(self) -> float | None:
        """For a usual step: the few during which a checkpoint was written say nothing of the others."""
        return median(self.recent) if self.recent else None

    def seen(self, world: World, now: float) -> Pace:
        """After a look at the world."""
        if self.generation != world.generation or self.since is None or world.step < self.step:
            return Pace(world.generation, world.step, now if world.step > world.base_step else world.training_since)
        if world.step == self.step:
            return self
        took = (now - self.since) / (world.step - self.step)
        return Pace(self.generation, world.step, now, (*self.recent, took)[-LATEST_STEPS:])


def meeting_step(world: World, pace: Pace, now: float, lead: float) -> Step:
    """The step at which all ranks are to save together: the next one that ends `lead` seconds from now or later.

    The lead is for the order's way to all ranks, and for what the leader does not know yet: its picture is a report
    old, and a rank can be a step ahead of another (each step ends with a collective), or a few, where a program runs
    ahead of its GPU. Who reads the order too late costs a repetition of it, nothing else (see `worker.run`).
    """
    reached = max((worker.step for node in world.reports for worker in node.workers), default=world.step)
    reached = max(world.step, reached)
    pace = pace.seen(world, now)
    if pace.seconds is None or pace.since is None:
        return Step(reached + 2)
    seconds = max(pace.seconds, 1e-4)
    left = max(0.0, seconds - (now - pace.since))  # of the step in progress
    return Step(reached + 1 + max(0, math.ceil((lead - left) / seconds)))


def missed(world: World, step: Step, *, stop: bool) -> bool:
    """Whether some rank has gone on from `step` without having saved it; asked as long as not all have reported that.

    Who is to stop there writes its checkpoint, and then waits. Else nobody gets beyond the next step before all have
    saved: each step ends with a collective.
    """
    if not stop:
        return world.step > step
    return any(
        worker.step >= step and worker.phase not in ("checkpoint", "done")
        for node in world.reports
        for worker in node.workers
    )
