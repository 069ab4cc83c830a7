"""The processes that move bytes for an agent, as it sees them."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.carriers import Carrier, JobFailed, is_carrier
from hpcft.process import FORWARDED, arguments_of, state_of

RESERVE = {"do": "reserve", "size": 8192, "count": 1}


def pid_of(carrier: Carrier) -> int:
    process = carrier._process
    assert process is not None
    return process.pid


def descriptors_of(carrier: Carrier) -> int:
    return len(list(Path(f"/proc/{pid_of(carrier)}/fd").iterdir()))


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


async def test_one_is_known_for_what_it_is_as_long_as_it_is_there() -> None:
    carrier = Carrier()
    assert await carrier.carry({"do": "digest"}) == ({"digests": []}, [])
    pid = pid_of(carrier)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while state_of(pid) != "Z":  # nobody reaps it yet  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert arguments_of(pid) == [] and is_carrier(pid)
    carrier.leave_behind()


async def test_one_that_says_nothing_is_given_up_and_replaced() -> None:
    carrier = Carrier()
    assert await carrier.carry({"do": "digest"}) == ({"digests": []}, [])
    silent = pid_of(carrier)
    os.kill(silent, signal.SIGSTOP)
    with pytest.raises(JobFailed, match=r"no progress in 0\.1 s"):
        await carrier.carry({"do": "digest"}, patience=0.1)
    assert await carrier.carry({"do": "digest"}, patience=60) == ({"digests": []}, [])
    assert pid_of(carrier) != silent
    carrier.leave_behind()


async def test_how_much_has_been_made_is_told_on_the_way() -> None:
    carrier = Carrier()
    told: list[int] = []
    _, fds = await carrier.carry({"do": "reserve", "size": 65 << 20, "count": 2}, told=told.append)
    assert told == [64 << 20, 65 << 20, 129 << 20, 130 << 20]
    for fd in fds:
        os.close(fd)
    carrier.leave_behind()


async def test_arenas_for_which_there_was_only_half_the_memory_are_given_back() -> None:
    carrier = Carrier()
    assert await carrier.carry({"do": "digest"}) == ({"digests": []}, [])
    before = descriptors_of(carrier)
    limit = (before + 2, before + 2)  # for one more than it has by then; a mapping has one of its own
    resource.prlimit(pid_of(carrier), resource.RLIMIT_NOFILE, limit)
    with pytest.raises(JobFailed, match="Too many open files"):
        await carrier.carry({"do": "reserve", "size": 8192, "count": 9})
    assert descriptors_of(carrier) == before
    carrier.leave_behind()


@pytest.mark.parametrize(("arguments", "is_one"), [(["-m", "hpcft.carrier"], True), (["hpcft.carrier"], False)])
def test_one_that_has_only_begun_is_known_by_its_arguments(arguments: list[str], is_one: bool) -> None:
    command = [sys.executable, "-c", "print(flush=True); input()", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        found = is_carrier(process.pid)
        process.kill()
    assert found == is_one


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
