"""How a start of a run ended, as the batch script learns it.

`hpcft wait` ends on the verdict in the run directory, not on srun: after the loss of a node srun goes on waiting for
many seconds, in production for minutes, and a job is over when its run is.

It looks for days, and its end is the end of the job. So a file system that fails for a while (ESTALE, EIO) ends
nothing: what went wrong is said once, and the next look may be better. Only the end of srun ends the wait.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import asdict
from types import FrameType

import orjson

from hpcft import durable
from hpcft.errors import ExitCode, UnusableError
from hpcft.events import Outcome, Verdict
from hpcft.ids import Step
from hpcft.rundir import RunDirectory

_LOOK_SECONDS = 0.25
_STEP_END_SECONDS = 3.0
_LATE_SECONDS = 3.0
"""An agent's own code stands for a verdict, unless one still comes through a slow file system."""
_REFUSALS = frozenset(ExitCode) - {ExitCode.OK, ExitCode.INTERNAL, ExitCode.REQUEUED}
_AFTER_SRUN_SECONDS = 30.0
"""The agents have ended: a verdict that has not come by now, not even through a slow NFS cache, will not come."""


def read(run: RunDirectory, start: str) -> Verdict | None:
    """The verdict of one start, once it was given.

    Raises:
        UnusableError: the file is there and cannot be read.
    """
    path = run.verdict(start)
    try:
        raw = orjson.loads(path.read_bytes())
        return Verdict(Outcome(raw["outcome"]), int(raw["exit_code"]), str(raw["reason"]))
    except (FileNotFoundError, NotADirectoryError):  # the agents say what is wrong with the run directory
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"the verdict {path} cannot be read: {error}") from error


def write(run: RunDirectory, start: str, verdict: Verdict, step: Step) -> None:
    """Make it durable, before anybody acts on it.

    Raises:
        OSError: it could not be written.
    """
    body = orjson.dumps({**asdict(verdict), "allocation": start, "step": step})
    durable.replace(run.verdict(start), body)
    if verdict.outcome is Outcome.FINISHED:
        durable.replace(run.finished, body)


def wait(run: RunDirectory, start: str, srun: int | None) -> Verdict:
    """Wait for the verdict of this start. `srun` is the pid of the step's srun, a child of this process.

    A verdict that cannot be read is looked for again; stderr says so once for each kind of trouble.

    SIGTERM, which Slurm sends to the batch script too, changes nothing: the agents got it as well, and a verdict
    follows before SIGKILL does.

    Raises:
        UnusableError: the step ended and left no verdict.
    """
    signal.signal(signal.SIGTERM, _go_on)
    signal.signal(signal.SIGUSR1, _go_on)
    step_ended: float | None = None
    status = 0
    look = _PatientLook(run, start)
    while True:
        verdict = look.verdict()
        if verdict is not None:
            if srun is not None and step_ended is None:
                _let_end(srun)
            return verdict
        if srun is not None and step_ended is None:
            pid, status = os.waitpid(srun, os.WNOHANG)
            if pid:
                step_ended = time.monotonic()
        code = os.waitstatus_to_exitcode(status)
        if step_ended is not None and code == 0 and look.finished():
            return Verdict(Outcome.FINISHED, int(ExitCode.OK), "the run has finished already")
        if step_ended is not None and code in _REFUSALS and time.monotonic() > step_ended + _LATE_SECONDS:
            return Verdict(Outcome.FAILED, code, "the agents could not take part; their messages say why")
        if step_ended is not None and time.monotonic() > step_ended + _AFTER_SRUN_SECONDS:
            raise UnusableError(
                f"srun ended with {code}, and no agent gave a verdict{look.trouble}",
                f"the agents' messages are in the job's output and in {run.path}/logs",
            )
        time.sleep(_LOOK_SECONDS)


class _PatientLook:
    """Looks into a run directory that may be out of order for a while."""

    def __init__(self, run: RunDirectory, start: str) -> None:
        self._run = run
        self._start = start
        self._told: set[str] = set()
        self.trouble = ""
        """Why the last look saw nothing, for a message's end; empty when it was a good look."""

    def verdict(self) -> Verdict | None:
        try:
            found = read(self._run, self._start)
        except UnusableError as error:
            self._tell(error.message)
            return None
        self.trouble = ""
        return found

    def finished(self) -> bool:
        try:
            self._run.finished.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._tell(f"{self._run.finished} cannot be looked at: {error}")
            return False
        return True

    def _tell(self, what: str) -> None:
        self.trouble = f" ({what})"
        if what not in self._told:
            self._told.add(what)
            print(f"hpcft wait: {what}; looking again until the step ends", file=sys.stderr, flush=True)


def _let_end(srun: int) -> None:
    """The agents end right after the verdict, and srun with them; not so when a node is lost, so not for long."""
    until = time.monotonic() + _STEP_END_SECONDS
    while time.monotonic() < until and os.waitpid(srun, os.WNOHANG) == (0, 0):
        time.sleep(_LOOK_SECONDS)


def _go_on(number: int, frame: FrameType | None) -> None:
    del number, frame
