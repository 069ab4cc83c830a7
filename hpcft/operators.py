"""Operators' commands: to the leader over its stream, or through the run directory.

A login node often cannot reach the compute nodes. Then the command becomes a file in `spool/`, which the leader reads
every few seconds. Both ways are open to the run's owner alone: the stream asks for the secret (mode 0600), and nobody
else can write into the spool. Should somebody be able to (an ACL, say), a file that is not the owner's is no command.
"""

from __future__ import annotations

import asyncio
import errno
import getpass
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from hpcft import durable, stream, terms
from hpcft import secret as run_secret
from hpcft.errors import NotFoundError
from hpcft.events import Outcome
from hpcft.rundir import RunDirectory, is_live
from hpcft.terms import TermRecord
from hpcft.world import job_of

log = logging.getLogger("hpcft.operators")

_DIAL_SECONDS = 3.0


def stop(run: RunDirectory) -> str:
    """Ask the run's leader to make a last checkpoint and end; returns what was done, also if it has ended by itself.

    Raises:
        NotFoundError: no leader is there, yet the run may go on: it waits for a requeue, or was killed.
        UnusableError: the secret or the spool cannot be used.
    """
    if not is_live(run):
        return _ended(run)
    command = {"do": "stop", "by": f"{getpass.getuser()}@{socket.gethostname()}", **_addressee(run)}
    try:
        asyncio.run(_send(run, command))
    except stream.StreamClosed as closed:
        durable.replace(run.spool / f"{secrets.token_hex(8)}.json", orjson.dumps(command))
        return (
            f"the leader cannot be reached from here ({closed.reason}); the command lies in {run.spool}, "
            "which the leader reads every few seconds"
        )
    return f"{run.name} makes a last checkpoint and ends; hpcft status {run.name} --watch shows it"


def _addressee(run: RunDirectory) -> dict[str, Any]:
    """Who is meant, should the command have to wait in the spool: no later job."""
    holder = terms.newest(run.terms)
    return {} if holder is None else {"job": job_of(holder.allocation), "term": holder.term}


def _ended(run: RunDirectory) -> str:
    try:
        found = orjson.loads(run.status.read_bytes())
        verdict, job = found["verdict"], found["allocation"].partition(".")[0]
    except (OSError, ValueError, KeyError):
        verdict, job = None, ""
    if verdict is None:
        raise NotFoundError(f"{run.name} does not run at the moment", f"hpcft status {run.name} tells what is known")
    if verdict["outcome"] == Outcome.REQUEUED.value:
        raise NotFoundError(f"{run.name} does not run at the moment: it is requeued", f"scancel {job} ends the job")
    return f"{run.name} has ended already: {verdict['outcome']}, {verdict['reason']}"


async def _send(run: RunDirectory, command: dict[str, Any]) -> dict[str, Any]:
    holder = terms.newest(run.terms)
    if holder is None:
        raise stream.StreamClosed("the run has no leader yet", stream.Ending.UNREACHABLE)
    secret = run_secret.load(run.secret)
    connected = await stream.dial((holder.host, holder.port), secret, {"purpose": "operator"}, _DIAL_SECONDS)
    try:
        connected.send(command)
        async with asyncio.timeout(_DIAL_SECONDS):
            return await connected.receive()
    except TimeoutError as error:
        raise stream.StreamClosed("the leader does not answer", stream.Ending.STALLED) from error
    finally:
        connected.close()
        await connected.wait_closed()


def spooled(spool: Path, mine: TermRecord) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The commands in the spool for the leader of this term, each with its file, which goes when it has been obeyed.

    What is for an earlier job, which nobody was there to obey, is removed, and so is whatever is no command. Blocks on
    the file system; the leader's thread.
    """
    for path in sorted(spool.glob("*.json")):
        try:
            command, flaw = _read(path)
            if not flaw and command.get("term", 0) > mine.term:
                continue  # this leader has slept: it is for its successor
            if not flaw and command.get("job", job_of(mine.allocation)) != job_of(mine.allocation):
                flaw = f"it is for job {command['job']}, which is over"
            if not flaw:
                yield path, command
                continue
            path.unlink()
            log.warning("the command %s is removed: %s", path, flaw)
        except OSError as error:
            log.warning("the command %s cannot be read: %s", path, error)


def obeyed(path: Path) -> None:
    """The command that lay there needs not be read again; all commands may be obeyed twice."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the command %s cannot be removed: %s", path, error)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """What the file says, and what is wrong with it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return {}, "it is a symbolic link"
        raise
    with os.fdopen(descriptor, "rb") as file:
        owner = os.fstat(descriptor).st_uid
        if owner != os.geteuid():
            return {}, f"it belongs to user {owner}"
        try:
            command = orjson.loads(file.read())
        except ValueError as error:
            return {}, str(error)
    return (command, "") if isinstance(command, dict) else ({}, "it is no JSON object")
