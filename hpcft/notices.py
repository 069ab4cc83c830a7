"""Notice that this start has to end: what Slurm's signals mean, and the time limit where no signal came.

SIGUSR1 is the warning ahead of the limit (`sbatch --signal`), SIGTERM the end, for whatever reason; Slurm is asked once
which. The warning can be lost: where the job was submitted without it, or where it came before any agent could hear
it. So the leader looks at the limit itself as well, later than the warning would have come.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from hpcft.errors import HpcftError
from hpcft.events import Termination, TerminationAsked

log = logging.getLogger("hpcft.notices")

SAVING_SHARE = 0.6
"""Of KillWait, for the last checkpoint; the rest is for its commit, the verdict and the agents' end."""
ENDING_SECONDS = 10.0
"""Before the time limit everything of ours is over by this much."""
UNWARNED_SHARE = 0.5
"""Of the lead that was asked for is left when the leader acts on the limit without having been warned."""

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
        end_lead: float,
        feed: Callable[[TerminationAsked], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        self._control = control
        self._end_lead = end_lead
        self._feed = feed
        self._spawn = spawn
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
            try:
                left = await self._control.seconds_left()
            except HpcftError:
                left = None
            seconds = self._end_lead - (time.monotonic() - came) if left is None else left
            self._feed(TerminationAsked(Termination.TIME_LIMIT, max(1.0, seconds - ENDING_SECONDS)))
            return
        saving = await self._kill_wait * SAVING_SHARE
        why = await self._control.why_terminated()
        self._feed(TerminationAsked(why, max(0.5, came + saving - time.monotonic())))
