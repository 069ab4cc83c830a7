"""Slurm's commands: what the leader may ask of its own job, and what `hpcft doctor` reads.

Theory of operation. Each call runs one command, without a shell, and is over within its limit: a command that hangs
(a slurmctld that is down answers nothing for 8 s and longer) is killed. Whatever fails is a SlurmError with the
command's own words; SlurmUnreachableError is the kind that a later try may cure. What a command prints is read by
pure functions, tested on output of Slurm 22.05. Times are asked for in seconds since the epoch (SLURM_TIME_FORMAT),
so that neither time zone nor site format matters.

Manners: only the leader calls, and no call that changes anything is repeated by this module. A question is: Slurm ends
a step by signalling every process in it, and so also the very command that asks it why.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hpcft.errors import UnusableError
from hpcft.events import Termination

LIMIT_SECONDS = 10.0

_UNREACHABLE = (
    "unable to contact slurm controller",
    "unexpected message received",  # scontrol requeue, when nobody listens at the controller's port
    "socket timed out",
    "connection refused",
    "connection timed out",
    "zero bytes were transmitted",
    "backup controller",
)
_REAP_SECONDS = 2.0
_AFTER_SIGNALS_SECONDS = (0.1, 0.2, 0.4, 0.8)
"""Slurm signals a step more than once, within a moment."""

_FREE_TEXT = ("JobName", "Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment", "AdminComment", "SystemComment")
_FIELD = re.compile(r"(?:^|(?<=\s))([A-Z][\w/:]*)=(\S*)")
_SETTING = re.compile(r"([A-Za-z]\w*)\s*= ?(.*)")


class SlurmError(UnusableError):
    """A Slurm command failed; the message has its own words."""


class SlurmUnreachableError(SlurmError):
    """slurmctld did not answer: it may later."""


class CommandKilledError(SlurmUnreachableError):
    """The command was ended by a signal; it may have done its work before."""


async def why_terminated(job: str, own_restart_count: int, *, limit: float = LIMIT_SECONDS) -> Termination:
    """Why Slurm sent SIGTERM to this start of the job; see `classify`.

    Raises:
        SlurmError: Slurm does not know, or does not answer.
    """
    return classify(await show_job(job, limit=limit), own_restart_count)


async def end_time(job: str, *, limit: float = LIMIT_SECONDS) -> float | None:
    """When the time limit ends the job, in seconds since the epoch; None if it has no limit.

    Raises:
        SlurmError: Slurm does not know the job, or does not answer.
    """
    return read_end_time(await show_job(job, limit=limit))


async def requeue(job: str, *, limit: float = LIMIT_SECONDS) -> None:
    """Give the job back to the queue (`<array>_<task>` in an array). Slurm then ends it as SLURM.md says.

    Raises:
        SlurmError: Slurm refused (a batch job needs `--requeue`), or did not answer.
    """
    await _run("scontrol", "requeue", job, limit=limit)


async def submit(
    arguments: Sequence[str], *, directory: Path, environ: Mapping[str, str], limit: float = 6 * LIMIT_SECONDS
) -> str:
    """sbatch with these arguments, from `directory`; returns the new job's id.

    From inside a job, pass `outside_environment(os.environ)`.

    Raises:
        SlurmError: Slurm refused, or did not answer (the job may have been submitted all the same).
    """
    printed = await _run("sbatch", "--parsable", *arguments, limit=limit, directory=directory, environ=environ)
    return printed.strip().partition(";")[0]


async def show_config(limit: float = LIMIT_SECONDS) -> dict[str, str]:
    """The cluster's settings as slurmctld has them (`KillWait`: `30 sec`).

    Raises:
        SlurmError: Slurm did not answer.
    """
    return parse_config(await _ask("scontrol", "show", "config", limit=limit))


async def show_job(job: str, *, limit: float = LIMIT_SECONDS) -> dict[str, str]:
    """All that Slurm tells of a job, times in seconds since the epoch.

    Raises:
        SlurmError: Slurm does not know the job, or does not answer.
    """
    found = find_job(await _ask("scontrol", "show", "job", job, limit=limit), job)
    if found is None:
        raise SlurmError(f"scontrol show job {job} does not show that job", "is it long over? see `sacct -j`")
    return found


def classify(job: Mapping[str, str], own_restart_count: int) -> Termination:
    """What a job's record means to a start of it that got SIGTERM.

    On 22.05 scancel, requeue and time limit all show COMPLETING, so the state alone says little:
    - the count of restarts has gone up: requeued (also when a preemption did it, which leaves no other trace);
    - PreemptTime is there: preempted, or about to be (the job is still RUNNING in a partition's GraceTime);
    - the reason or the state names the time limit;
    - else somebody cancelled it. That includes `scancel --signal=TERM`, after which the job stays RUNNING.
    """
    if int(job.get("Restarts", "0")) > own_restart_count:
        return Termination.REQUEUED
    state = job.get("JobState", "")
    if state == "PREEMPTED" or job.get("PreemptTime", "None") not in ("None", "Unknown", "0"):
        return Termination.PREEMPTED
    if state == "TIMEOUT" or job.get("Reason") == "TimeLimit":
        return Termination.TIME_LIMIT
    return Termination.CANCELLED


def read_end_time(job: Mapping[str, str]) -> float | None:
    """EndTime of a record printed with SLURM_TIME_FORMAT=%s."""
    shown = job.get("EndTime", "")
    return float(shown) if shown.isdecimal() and job.get("TimeLimit") != "UNLIMITED" else None


def parse_jobs(text: str) -> Iterator[dict[str, str]]:
    """The records of `scontrol show job`, by field name.

    Not of its `-o` form: only in this one a job's name, which may look like other fields, is the last on its line.
    """
    for block in re.split(r"\n\s*\n", text):
        job: dict[str, str] = {}
        for line in block.splitlines():
            free = re.search(rf"(?:^|\s)({'|'.join(_FREE_TEXT)})=(.*)", line)
            for name, value in _FIELD.findall(line[: free.start()] if free else line):
                job.setdefault(name, value)
            if free:
                job.setdefault(free[1], free[2].strip())
        if job:
            yield job


def find_job(text: str, job: str) -> dict[str, str] | None:
    """The record of one job: asked for an array's id, Slurm shows all its tasks."""
    for record in parse_jobs(text):
        if job in (record.get("JobId"), f"{record.get('ArrayJobId')}_{record.get('ArrayTaskId')}"):
            return record
    return None


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`, by name."""
    return {found[1]: found[2].strip() for line in text.splitlines() if (found := _SETTING.match(line))}


def seconds_of(setting: str) -> float:
    """The number of a setting such as `30 sec`.

    Raises:
        ValueError: it begins with none.
    """
    found = re.match(r"\d+", setting)
    if found is None:
        raise ValueError(f"{setting!r} begins with no number")
    return float(found[0])


def outside_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what describes the job it comes from, for sbatch: a new job would take a SLURM_RESTART_COUNT
    of the old one for its own, because Slurm sets none on a first start."""
    keep = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in environ.items() if not name.startswith("SLURM") or name in keep}


async def _ask(*command: str, limit: float) -> str:
    """`_run` for a command that changes nothing."""
    for pause in _AFTER_SIGNALS_SECONDS:
        with suppress(CommandKilledError):
            return await _run(*command, limit=limit)
        await asyncio.sleep(pause)
    return await _run(*command, limit=limit)


async def _run(
    *command: str,
    limit: float,
    directory: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """The command's standard output."""
    shown = " ".join(command)
    environment = {**(os.environ if environ is None else environ), "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C.UTF-8"}
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=directory,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is not meant for it
        )
    except OSError as error:
        raise SlurmError(
            f"cannot run {command[0]}: {error}",
            "Slurm's commands must be on PATH on the compute nodes too; into a container, bind-mount them",
        ) from error
    try:
        async with asyncio.timeout(limit):
            out, err = await process.communicate()
    except TimeoutError:
        raise SlurmUnreachableError(
            f"`{shown}` gave no answer within {limit:g} s", "is slurmctld up? `scontrol ping` says so"
        ) from None
    finally:
        await _end(process)
    if process.returncode:
        words = err.decode(errors="replace").strip() or f"it ended with {process.returncode}"
        if process.returncode < 0:
            raise CommandKilledError(f"`{shown}` was ended by {signal.Signals(-process.returncode).name}")
        kind = SlurmUnreachableError if any(each in words.lower() for each in _UNREACHABLE) else SlurmError
        raise kind(f"`{shown}` failed: {words}", "`hpcft doctor` checks what hpcft needs of Slurm")
    return out.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        with suppress(TimeoutError):  # a process that hangs in the kernel is left behind
            await asyncio.wait_for(asyncio.shield(process.wait()), _REAP_SECONDS)
