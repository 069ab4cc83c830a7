"""When to make a checkpoint. Pure: what was measured comes in, a step goes out."""

from __future__ import annotations

import math

from hpcft.ids import Step
from hpcft.units import Cadence, EverySeconds
from hpcft.world import World


def due(every: Cadence, world: World, now: float, last_save: float) -> bool:
    """Whether a save that goes by the clock is due; `last_save` is the run clock at the last order."""
    return isinstance(every, EverySeconds) and now - last_save >= every.seconds


def step_seconds(world: World, now: float) -> float | None:
    """Mean seconds per step of the running generation."""
    done = world.step - world.base_step
    if world.training_since is None or done <= 0:
        return None
    return (now - world.training_since) / done


def meeting_step(world: World, now: float, lead: float) -> Step:
    """The step at which all ranks can save together, `lead` seconds from now.

    Ranks are never more than one step apart (each step ends with a collective), and the leader's picture is a
    report old; so a step far enough ahead has been read by every rank before it comes.
    """
    seconds = step_seconds(world, now)
    ahead = 2 if seconds is None else math.ceil(lead / max(seconds, 1e-4)) + 2
    return Step(world.step + ahead)
