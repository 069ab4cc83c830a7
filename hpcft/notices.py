"""Notice that this start has to end: what Slurm's signals mean, and the time limit where no signal came.

SIGUSR1 is the warning ahead of the limit (`sbatch --signal`), SIGTERM the end, for whatever reason; Slurm is asked once
which. The warning can be lost: where the job was submitted without it, or where it came before any agent could hear
it. So the leader looks at the limit itself as well, later than the warning would have come.

With `slurm.end_lead = "auto"` the warning is only news that there is a limit: the leader knows what saves and steps
have taken, and begins the last one when the time that is left is what it may need (`cadence.last_save`). It looks at
that again and again, for a slow save may move it, and asks Slurm once more before it acts: the limit may have moved.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from hpcft.cadence import END_LEAD_SECONDS, LastSave
from hpcft.errors import HpcftError
from hpcft.events import Termination, TerminationAsked
from hpcft.units import human_duration

log = logging.getLogger("hpcft.notices")

SAVING_SHARE = 0.6
"""Of KillWait, for the last checkpoint; the rest is for its commit, the verdict and the agents' end."""
ENDING_SECONDS = 10.0
"""Before the time limit everything of ours is over by this much."""
UNWARNED_SHARE = 0.5
"""Of the lead that was asked for is left when the leader acts on the limit without having been warned."""

WARNED_SECONDS = 300.0
"""A warning with more than this left, or without a limit, is somebody's wish that the run leaves now."""
LOOK_SECONDS = 5.0
"""Between two looks at what the last save may take."""
ASK_AGAIN_SECONDS = 30.0
"""After no answer. Where slurmctld does not answer it does not end a job either."""


class JobControl(Protocol):
    """What a leader asks of the resource manager: Slurm, or the local launcher."""

    async def requeue(self) -> None:
        """Raises HpcftError when refused."""

    async def why_terminated(self) -> Termination: ...

    async def seconds_left(self) -> float | None:
        """Until the time limit as it is now; None: there is none. Raises HpcftError when nobody says."""

    async def kill_wait(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""


class Notices:
    """For one term. Whatever is to end the start is fed as `TerminationAsked`."""

    def __init__(
        self,
        control: JobControl,
        end_lead: float | None,
        feed: Callable[[TerminationAsked], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        last_save: Callable[[], LastSave | None] = lambda: None,
    ) -> None:
        """`end_lead`, in seconds; None: what `last_save` says, and END_LEAD_SECONDS as long as it says nothing."""
        self._control = control
        self._end_lead = end_lead
        self._feed = feed
        self._spawn = spawn
        self._last_save = last_save
        self._near = False
        self._signals: set[str] = set()
        self._kill_wait: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    @property
    def known_kill_wait(self) -> float | None:
        """Seconds; None before Slurm has said it."""
        return self._kill_wait.result() if self._kill_wait.done() else None

    async def kill_wait(self) -> float:
        """As soon as Slurm has said it."""
        return await asyncio.shield(self._kill_wait)

    async def watch(self) -> None:
        """Runs until the limit is near. What signals mean is not said before it has begun."""
        self._kill_wait.set_result(await self._control.kill_wait())
        if self._end_lead is None:
            await self._wait_for_the_limit(None)
            return
        latest = self._end_lead * UNWARNED_SHARE
        left: float | None = None
        pause: float | None = 0.0
        while pause is not None:
            await asyncio.sleep(pause)
            try:
                left = await self._control.seconds_left()  # it may be moved; Slurm's warning moves with it
            except HpcftError as error:
                log.info("the time limit is asked for again in %g s: %s", ASK_AGAIN_SECONDS, error.message)
                pause = ASK_AGAIN_SECONDS
                continue
            pause = left - latest if left is not None and left > latest else None
        if left is not None and "USR1" not in self._signals:
            self._signals.add("USR1")
            self._feed(TerminationAsked(Termination.TIME_LIMIT, max(1.0, left - ENDING_SECONDS)))

    def signalled(self, name: str, age: float) -> None:
        """Slurm signals all agents at once; the first report of each signal, USR1 or TERM, is acted upon."""
        if name not in self._signals:
            self._signals.add(name)
            self._spawn(self._ask_why(name, time.monotonic() - age), f"signal-{name}")

    async def _ask_why(self, name: str, came: float) -> None:
        if name == "USR1":
            near = self._end_lead is None
            try:
                left = await self._control.seconds_left()
                near = near and left is not None and left <= WARNED_SECONDS
            except HpcftError:
                left = None
            lead = END_LEAD_SECONDS if self._end_lead is None else self._end_lead
            seconds = lead - (time.monotonic() - came) if left is None else left
            if near:
                await self._wait_for_the_limit(time.monotonic() + seconds)
                return
            self._feed(TerminationAsked(Termination.TIME_LIMIT, max(1.0, seconds - ENDING_SECONDS)))
            return
        saving = await self._kill_wait * SAVING_SHARE
        why = await self._control.why_terminated()
        self._feed(TerminationAsked(why, max(0.5, came + saving - time.monotonic())))

    # --- the limit, by what was measured ---

    async def _wait_for_the_limit(self, limit: float | None) -> None:
        """Until the last save has to begin, and feed that. `limit` is when the job ends, as far as it is known
        (monotonic); Slurm says it else, and is asked again before anything follows from it."""
        warned = limit is not None
        if limit is not None:
            await self._come_near(limit)
        while True:
            try:
                left = await self._control.seconds_left()
            except HpcftError as error:
                near = limit is not None and limit - time.monotonic() <= self._lead()[0]
                if near and warned:
                    break
                pause = LOOK_SECONDS if near else ASK_AGAIN_SECONDS
                log.info("the time limit is asked for again in %g s: %s", pause, error.message)
                await asyncio.sleep(pause)
                continue
            if left is None:
                return
            limit = time.monotonic() + left
            if left <= self._lead()[0]:
                break
            await self._come_near(limit)
        assert limit is not None
        if not self._near:
            self._near = True
            left = limit - time.monotonic()
            self._feed(TerminationAsked(Termination.TIME_LIMIT, max(1.0, left - ENDING_SECONDS), self._lead()[1]))

    async def _come_near(self, limit: float) -> None:
        while True:
            wait = limit - time.monotonic() - self._lead()[0]
            if wait <= 0:
                return
            await asyncio.sleep(min(wait, LOOK_SECONDS))

    def _lead(self) -> tuple[float, str]:
        """How many seconds before the limit the last save has to begin, and why."""
        reckoned = self._last_save()
        if reckoned is None:
            lead = human_duration(END_LEAD_SECONDS)
            return END_LEAD_SECONDS, f"it begins {lead} before the limit, for too little is known of saves and steps"
        return reckoned.seconds + ENDING_SECONDS, reckoned.why
