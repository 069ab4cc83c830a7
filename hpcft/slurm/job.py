"""What the leader asks of Slurm about its own job."""

from __future__ import annotations

import asyncio
import logging
import time

from hpcft.errors import HpcftError
from hpcft.events import Termination
from hpcft.slurm import control
from hpcft.slurm.environment import Allocation

log = logging.getLogger("hpcft.slurm.job")

KILL_WAIT_SECONDS = 30.0
"""Slurm's default."""

_PATIENCE_SECONDS = 600.0
"""How long a requeue is tried while slurmctld does not answer: it may be restarting."""
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0


class SlurmJob:
    """This job, as its owner may steer it from any of its nodes."""

    def __init__(self, allocation: Allocation, command_timeout: float) -> None:
        self._allocation = allocation
        self._timeout = command_timeout

    async def requeue(self) -> None:
        """Give the job back to the queue.

        Raises:
            HpcftError: Slurm refused, or did not answer for ten minutes.
        """
        pause, until = _FIRST_PAUSE_SECONDS, time.monotonic() + _PATIENCE_SECONDS
        unanswered = False
        while True:
            try:
                await control.requeue(self._allocation.requeue_target, limit=self._timeout)
                return
            except control.SlurmUnreachableError as error:
                if time.monotonic() > until:
                    raise
                log.warning("the requeue waits for Slurm: %s", error.message)
                unanswered = True
                if isinstance(error, control.CommandKilledError) and await self._is_cancelled():
                    raise control.SlurmError(
                        "the job was cancelled while it was to be requeued", "submit it again, if that was not meant"
                    ) from error
            except control.SlurmError:
                # an earlier try may have been heard, and only its answer lost
                if unanswered and await self.why_terminated() is Termination.REQUEUED:
                    return
                raise
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 2)

    async def _is_cancelled(self) -> bool:
        """What ended our command may have been meant for the whole job: then it must not come back."""
        try:
            job = await control.show_job(self._allocation.job_id, limit=self._timeout)
        except HpcftError:
            return False
        ending = job.get("JobState") not in ("RUNNING", "PENDING")
        return ending and control.classify(job, self._allocation.restart_count) is Termination.CANCELLED

    async def why_terminated(self) -> Termination:
        """One query; when Slurm does not answer, the answer that loses nothing: the run goes on elsewhere."""
        try:
            return await control.why_terminated(
                self._allocation.job_id, self._allocation.restart_count, limit=self._timeout
            )
        except HpcftError as error:
            log.warning("Slurm does not say why it ends the job: %s", error.message)
            return Termination.PREEMPTED

    async def kill_wait(self) -> float:
        """Seconds between SIGTERM and SIGKILL on this cluster; Slurm's default if it does not say."""
        try:
            return control.seconds_of((await control.show_config(limit=self._timeout))["KillWait"])
        except (HpcftError, KeyError, ValueError) as error:
            log.warning("KillWait is unknown, %g s are assumed: %s", KILL_WAIT_SECONDS, error)
            return KILL_WAIT_SECONDS

    async def seconds_left(self) -> float | None:
        """Until the time limit as it is now; None: the job has none.

        Raises:
            HpcftError: Slurm does not answer.
        """
        end = await control.end_time(self._allocation.job_id, limit=self._timeout)
        return None if end is None else end - time.time()
