"""What becomes of Slurm's signals, and of a time limit of which no signal told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcft.cadence import LastSave
from hpcft.errors import ExitCode, HpcftError
from hpcft.events import Termination, TerminationAsked
from hpcft.notices import LOOK_SECONDS, Notices

END_LEAD = 100.0
SILENCE = HpcftError("slurmctld does not answer", "")


class Job:
    """A job with `left` seconds, as Slurm would say it one time after the other; an error is no answer."""

    def __init__(self, *left: float | HpcftError | None, kill_wait: float = 30.0) -> None:
        self.left = list(left)
        self._kill_wait = kill_wait

    async def requeue(self) -> None:
        raise AssertionError

    async def why_terminated(self) -> Termination:
        return Termination.CANCELLED

    async def seconds_left(self) -> float | None:
        left = self.left.pop(0)
        if isinstance(left, HpcftError):
            raise left
        return left

    async def kill_wait(self) -> float:
        return self._kill_wait


class Scene:
    def __init__(self, job: Job) -> None:
        self.asked: list[TerminationAsked] = []
        self.slept: list[float] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.notices = Notices(job, END_LEAD, self.asked.append, self._spawn)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))

    async def settle(self) -> list[tuple[Termination, float]]:
        await asyncio.gather(*self.tasks)
        return [(each.why, each.seconds_left) for each in self.asked]


@pytest.fixture
def timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.notices.time.monotonic", lambda: 1000.0)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    with monkeypatch.context() as patch:
        patch.setattr("hpcft.notices.asyncio.sleep", sleep)
        yield found


async def test_a_limit_without_a_warning_is_acted_upon_when_half_of_the_lead_is_left(slept: list[float]) -> None:
    scene = Scene(Job(3600.0, 49.0))
    await scene.notices.watch()
    assert slept == [0.0, 3550.0]
    assert await scene.settle() == [(Termination.TIME_LIMIT, 39.0)]
    scene.notices.signalled("USR1", 0.0)
    assert len(await scene.settle()) == 1, "the warning comes after all"


async def test_a_limit_that_was_moved_is_waited_for(slept: list[float]) -> None:
    scene = Scene(Job(600.0, 3600.0, 50.0))
    await scene.notices.watch()
    assert slept == [0.0, 550.0, 3550.0]
    assert len(await scene.settle()) == 1


async def test_a_warning_that_was_heard_is_enough(slept: list[float]) -> None:
    scene = Scene(Job(600.0, 95.0, 40.0))
    scene.notices.signalled("USR1", 1.0)
    watching = asyncio.create_task(scene.notices.watch())
    assert await scene.settle() == [(Termination.TIME_LIMIT, 590.0)]
    await watching
    assert len(scene.asked) == 1


async def test_no_limit_is_never_reached(slept: list[float]) -> None:
    scene = Scene(Job(None))
    await scene.notices.watch()
    assert (slept, scene.asked) == ([0.0], [])


async def test_without_an_answer_the_limit_is_asked_for_again(slept: list[float]) -> None:
    """Also when it seemed near: it may have been moved, and who does not answer ends no job."""
    scene = Scene(Job(SILENCE, 600.0, SILENCE, 3600.0, 50.0))
    await scene.notices.watch()
    assert slept == [0.0, 30.0, 550.0, 30.0, 3550.0]
    assert len(await scene.settle()) == 1


@pytest.mark.usefixtures("timeless")
async def test_a_warning_without_slurms_answer_leaves_what_was_asked_for() -> None:
    scene = Scene(Job(SILENCE))
    scene.notices.signalled("USR1", 20.0)
    ((why, left),) = await scene.settle()
    assert why is Termination.TIME_LIMIT
    assert left == END_LEAD - 20.0 - 10.0


@pytest.mark.usefixtures("timeless")
async def test_sigterm_leaves_a_share_of_kill_wait_and_is_acted_upon_once() -> None:
    scene = Scene(Job(None, kill_wait=100.0))
    assert scene.notices.known_kill_wait is None
    await scene.notices.watch()
    assert scene.notices.known_kill_wait == 100.0
    scene.notices.signalled("TERM", 10.0)
    scene.notices.signalled("TERM", 0.0)
    ((why, left),) = await scene.settle()
    assert why is Termination.CANCELLED
    assert left == 50.0


class Clock:
    """Of a process that does nothing but sleep."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Ending(Job):
    """A job whose limit comes at a time, and may move; `answers` says whether Slurm does."""

    def __init__(self, clock: Clock, end: float | None) -> None:
        super().__init__()
        self.clock, self.end = clock, end
        self.answers: Callable[[], bool] = lambda: True
        self.asked_for = 0

    async def seconds_left(self) -> float | None:
        self.asked_for += 1
        if not self.answers():
            raise SILENCE
        return None if self.end is None else self.end - self.clock.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("hpcft.notices.asyncio.sleep", clock.sleep)
        patch.setattr("hpcft.notices.time", SimpleNamespace(monotonic=lambda: clock.now))
        yield clock


class Measured(Scene):
    """`slurm.end_lead = "auto"`; `at` is when it was asked for."""

    def __init__(self, job: Ending, last_save: Callable[[], LastSave | None]) -> None:
        super().__init__(job)
        self.at: list[float] = []
        self.notices = Notices(job, None, self._ask, self._spawn, last_save)
        self._clock = job.clock

    def _ask(self, asked: TerminationAsked) -> None:
        self.asked.append(asked)
        self.at.append(self._clock.now)


def quick() -> LastSave:
    return LastSave(15.0, "it may take 15s")


async def test_with_measured_saves_the_last_one_begins_when_it_has_to(clock: Clock) -> None:
    job = Ending(clock, 4600.0)
    scene = Measured(job, quick)
    await scene.notices.watch()
    assert scene.at == [4575.0]
    assert scene.asked == [TerminationAsked(Termination.TIME_LIMIT, 15.0, "it may take 15s")]
    assert job.asked_for == 2, "at the beginning, and before anything follows from it"


async def test_slurms_warning_waits_for_the_measured_moment_and_is_acted_upon_once(clock: Clock) -> None:
    scene = Measured(Ending(clock, 1150.0), quick)
    scene.notices.signalled("USR1", 0.0)
    await scene.settle()
    await scene.notices.watch()
    assert scene.at == [1125.0]


async def test_without_measurements_it_is_two_minutes(clock: Clock) -> None:
    scene = Measured(Ending(clock, 4600.0), lambda: None)
    await scene.notices.watch()
    assert scene.at == [4480.0]
    assert scene.asked[0].seconds_left == 110.0
    assert scene.asked[0].detail == "it begins 2m 00s before the limit, for too little is known of saves and steps"


async def test_saves_that_get_slower_move_the_moment(clock: Clock) -> None:
    slow = LastSave(300.0, "it may take 5m 00s")
    scene = Measured(Ending(clock, 4600.0), lambda: slow if clock.now > 4000.0 else quick())
    await scene.notices.watch()
    assert 4290.0 <= scene.at[0] <= 4290.0 + LOOK_SECONDS
    assert scene.asked[0].detail == "it may take 5m 00s"


async def test_a_limit_that_is_moved_moves_the_moment(clock: Clock) -> None:
    job = Ending(clock, 2000.0)

    def last_save() -> LastSave:
        if clock.now > 1900.0:
            job.end = 9000.0
        return quick()

    scene = Measured(job, last_save)
    await scene.notices.watch()
    assert scene.at == [8975.0]


async def test_where_slurm_falls_silent_after_its_warning_the_run_leaves_in_time(clock: Clock) -> None:
    job = Ending(clock, 1150.0)
    job.answers = lambda: clock.now < 1100.0
    scene = Measured(job, quick)
    scene.notices.signalled("USR1", 0.0)
    await scene.settle()
    assert scene.at == [1125.0]
    silent = Ending(clock, 5000.0)
    silent.answers = lambda: False
    scene, warned = Measured(silent, quick), clock.now
    scene.notices.signalled("USR1", 20.0)
    await scene.settle()
    assert scene.at == [warned + 100.0 - 25.0], "a warning comes two minutes before the limit"


async def test_without_an_answer_or_a_warning_the_measured_moment_is_waited_for(clock: Clock) -> None:
    job = Ending(clock, 9000.0)
    job.answers = lambda: 1100.0 < clock.now < 2000.0 or clock.now > 8990.0
    scene = Measured(job, quick)
    await scene.notices.watch()
    assert 8990.0 <= scene.at[0] <= 8990.0 + LOOK_SECONDS, "who does not answer ends no job"


@pytest.mark.parametrize("end", [None, 5000.0])
async def test_a_warning_that_is_not_of_a_near_limit_is_a_wish(clock: Clock, end: float | None) -> None:
    scene = Measured(Ending(clock, end), quick)
    scene.notices.signalled("USR1", 0.0)
    await scene.settle()
    assert scene.at == [1000.0]


def pending(pid: int) -> set[int]:
    """Signals that a process has been sent, and holds back."""
    shown = Path(f"/proc/{pid}/status").read_text()
    bits = int(shown.partition("ShdPnd:")[2].split()[0], 16)
    return {number for number in range(1, 65) if bits >> (number - 1) & 1}


def test_a_signal_that_comes_while_an_agent_starts_does_not_end_it(tmp_path: Path) -> None:
    """Slurm's warning can come with the start, if the limit is short: an ordinary process would die of it."""
    config = tmp_path / "config.toml"
    os.mkfifo(config)  # whoever reads it waits
    agent = subprocess.Popen([sys.executable, "-m", "hpcft", "agent", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        with config.open("w") as file:  # it is reading now
            for number in (signal.SIGUSR1, signal.SIGTERM):
                agent.send_signal(number)
            for _ in range(6000):
                if agent.poll() is not None or {signal.SIGUSR1, signal.SIGTERM} <= pending(agent.pid):
                    break
                time.sleep(0.01)
            assert agent.poll() is None, "it is dead of them"
            file.write("[nonsense]\n")
        _, said = agent.communicate(timeout=60)
        assert agent.returncode == ExitCode.USAGE, said
    finally:
        agent.kill()
