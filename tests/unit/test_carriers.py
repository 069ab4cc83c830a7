"""The processes that move bytes for an agent, as it sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hpcft.carriers import Carrier, JobFailed
from hpcft.process import FORWARDED

RESERVE = {"do": "reserve", "size": 8192, "count": 1}


def pid_of(carrier: Carrier) -> int:
    process = carrier._process
    assert process is not None
    return process.pid


async def test_what_slurm_says_to_all_processes_of_a_job_ends_no_carrier() -> None:
    carrier = Carrier()
    await carrier.warm()
    at_once = pid_of(carrier)  # it has hardly begun, and is signalled all the same
    for number in FORWARDED:
        os.kill(at_once, number)
    _, (fd,) = await carrier.carry(RESERVE)
    assert os.fstat(fd).st_size == 8192
    os.close(fd)
    assert pid_of(carrier) == at_once
    carrier.leave_behind()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(FORWARDED) == set(), "the agent hears them as before"


async def test_one_that_was_left_behind_is_replaced_and_leaves_no_zombie() -> None:
    carrier = Carrier()
    await carrier.warm()
    process = carrier._process
    assert isinstance(process, subprocess.Popen)
    carrier.leave_behind()
    assert process.wait(10) == -signal.SIGKILL
    _, (fd,) = await carrier.carry(RESERVE)
    os.close(fd)
    assert pid_of(carrier) != process.pid
    carrier.leave_behind()


async def test_a_job_that_is_none_says_so() -> None:
    carrier = Carrier()
    with pytest.raises(JobFailed, match="a carrier knows no 'dance'"):
        await carrier.carry({"do": "dance"})
    carrier.leave_behind()


def test_it_needs_neither_torch_nor_numpy() -> None:
    """There may be two for every GPU."""
    program = "import sys, hpcft.carrier; print(*{'torch', 'numpy', 'pydantic', 'asyncio'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
