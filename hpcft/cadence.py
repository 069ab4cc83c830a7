"""When to make a checkpoint. Pure: what was measured comes in, a step goes out.

`Saving` is the leader's side of an ordered save. The order reaches the ranks at different times, and some perhaps not,
while their connection is broken. For whom the step is over when it reads the order, it does not exist; whoever is to
stop there saves and then waits at that step (`worker.run`). So the leader goes on telling until it is settled: the same
step, where nobody has missed it; a later one, where somebody has; and at last that all may go.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, NamedTuple

from hpcft.ids import Generation, Step
from hpcft.units import Cadence, EverySeconds
from hpcft.world import Phase, World

SAVE_LEAD_SECONDS = 0.6
"""An ordered save lies this far ahead, so that as a rule every rank has read the order before it comes."""
REPEAT_SECONDS = 2.0
"""An order is told again after this long: a connection may just have been broken, or a rank may have been late."""
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

    Who is to stop there saves, and then waits. Else nobody gets beyond the next step before all have saved, or taken
    the copy that will be written: each step ends with a collective.
    """
    if not stop:
        return world.step > step
    return any(
        worker.step >= step and worker.phase not in ("checkpoint", "done")
        for node in world.reports
        for worker in node.workers
    )


class Order(NamedTuple):
    """What all ranks are told: to save at a step, and perhaps to stop there."""

    step: Step
    stop: bool


LET_GO: Final = Order(Step(0), stop=True)
"""To those who have saved and wait at that step: all have, so end. Who does not wait takes no notice."""


@dataclass(frozen=True, slots=True)
class Saving:
    """The standing order of a generation, if there is one, and since when it stands."""

    order: Order | None = None
    told_at: float = 0.0
    """Run clock; before the first order, of the generation's beginning."""
    let_go: bool = False
    """The last save is settled, and its ranks are told to end."""

    def ordered(self, world: World, pace: Pace, now: float, *, stop: bool) -> Saving:
        """All ranks are to save together as soon as that can be."""
        return Saving(Order(meeting_step(world, pace, now, SAVE_LEAD_SECONDS), stop), now)

    def next(
        self, world: World, pace: Pace, now: float, every: Cadence, settled: Callable[[Step], bool]
    ) -> tuple[Saving, Order | None]:
        """After a look at the world: what stands from now on, and what is to be told.

        `settled` says of a step whether all ranks have reported its save, or one that it failed.
        """
        if world.formation is None or world.training_since is None:
            return self, None
        waited = now > self.told_at + REPEAT_SECONDS
        if self.order is None:
            if world.phase is Phase.RUNNING and due(every, world, now, self.told_at):
                return self._told(self.ordered(world, pace, now, stop=False))
            return self, None
        step, stop = self.order
        newest = world.restore.step if world.restore is not None else -1
        refused = world.save_failed[0] if world.save_failed is not None else -1
        if not stop:
            if newest >= step or refused >= step:
                return replace(self, order=None), None  # the cadence has its next turn
            if waited and missed(world, step, stop=False) and not (settled(step) or world.taken(step)):
                return self._told(self.ordered(world, pace, now, stop=False))
            return self, None
        late = missed(world, step, stop=True)
        # nobody passes the last one, so a later one is not it
        if self.let_go or (step in (newest, refused) and not late):
            told = replace(self, let_go=True, told_at=now)
            return (told, LET_GO) if waited or not self.let_go else (self, None)
        if waited:
            return self._told(self.ordered(world, pace, now, stop=True) if late else replace(self, told_at=now))
        return self, None

    @staticmethod
    def _told(saving: Saving) -> tuple[Saving, Order | None]:
        return saving, saving.order
