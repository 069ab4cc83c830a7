"""One trial: a real run with one way of saving, and what its journal says of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft import journal, operators, status
from hpcft.bench.plan import Mode, Trial
from hpcft.bench.predict import Figures
from hpcft.bench.site import Site, Trained
from hpcft.errors import HpcftError, UnusableError
from hpcft.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointSkipped,
    CopiesMeasured,
    Event,
    Progressed,
    WorkerFailed,
)
from hpcft.ids import Generation
from hpcft.rundir import RunDirectory

LOOK_SECONDS = 0.05
SILENCE_SECONDS = 600.0
"""A trial that has completed no step for so long is given up."""
_END_SECONDS = 120.0
_LAST_LINES = 12
_WARM_STEP = 2
"""In the first step much is made that is made once; in the second, memory for copies."""


@dataclass(frozen=True, slots=True)
class Course:
    """How a trial goes: the configuration, and when it has trained enough."""

    config: Path
    sets: tuple[str, ...]
    """Before those of the trial itself."""
    enough: Callable[[int, float], bool]
    """Of completed steps, and seconds since training began."""
    look: Callable[[Mapping[str, Any]], None] = lambda seen: None
    """Is told each status that is seen."""


def settings(trial: Trial, root: Path) -> tuple[str, ...]:
    """What a trial overrides of any configuration."""
    every = f"{trial.every} steps" if trial.every else "off"
    mine = {
        "run.root": str(root),
        "run.name": trial.name,
        "checkpoint.mode": "async" if trial.mode in (Mode.ASYNC, Mode.MEMORY) else "sync",
        "checkpoint.every": "off" if trial.mode is Mode.MEMORY else every,
        "checkpoint.snapshot_every": every if trial.mode is Mode.MEMORY else "off",
        "checkpoint.keep": 2,
        "checkpoint.keep_every": 0,
        "checkpoint.keep_best": 0,
        "mirror.url": "",
        "slurm.requeue": "false",
        "recovery.infrastructure_failures": 20,
        "drill.kill_rank": -1,
    }
    return tuple(f"{key}={value}" for key, value in mine.items())


def measure(trial: Trial, course: Course, site: Site, root: Path) -> tuple[Figures, RunDirectory]:
    """Run the trial; its run directory stays.

    Raises:
        UnusableError: it did not train; the message has its last lines.
    """
    run = RunDirectory(root / trial.name)
    root.mkdir(parents=True, exist_ok=True)
    log = root / f"{trial.name}.log"
    sets = (*course.sets, *settings(trial, root))
    with site.started(course.config, sets, log) as trained:
        watch = _Watch(trial, run, trained, log, course.look)
        watch.until(lambda seen: watch.trains(seen, course.enough))
        if trial.kill and trained.ended() is None:
            victim = _victim(watch.until(_has_pids))
            site.strike(victim["node"], victim["pid"])
            watch.until(lambda seen: any(each["downtime_seconds"] is not None for each in seen["incidents"]))
        watch.end()
    return figures(trial, run.journal), run


def _has_pids(seen: Mapping[str, Any]) -> bool:
    return bool(seen["workers"]) and all(each["pid"] is not None for each in seen["workers"])


def _victim(seen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last rank: where there are several nodes, it is not on the first."""
    victim: Mapping[str, Any] = seen["workers"][-1]
    return victim


class _Watch:
    """A run seen from outside, as `hpcft status` sees it."""

    def __init__(
        self,
        trial: Trial,
        run: RunDirectory,
        trained: Trained,
        log: Path,
        look: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._trial = trial
        self._run = run
        self._trained = trained
        self._log = log
        self._look = look
        self._began: float | None = None

    def trains(self, seen: Mapping[str, Any], enough: Callable[[int, float], bool]) -> bool:
        if seen["state"] != "training" or not seen["step"]:
            return False
        if self._began is None:
            self._began = time.monotonic()
        return enough(seen["step"], time.monotonic() - self._began)

    def until(self, reached: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """The status in which it is so, or the last one, if the program has come to its end before.

        Raises:
            UnusableError: it ended otherwise, or makes no progress.
        """
        progress: tuple[object, ...] = ()
        moved_at = time.monotonic()
        while True:
            ended = self._trained.ended()
            if self._run.status.exists():
                seen = status.read(self._run)
                self._look(seen)
                if reached(seen) or (ended == 0 and seen["state"] == "finished"):
                    return seen
                if (now := (seen["state"], seen["step"], seen["generation"])) != progress:
                    progress, moved_at = now, time.monotonic()
            if ended is not None:
                raise UnusableError(
                    f"the trial {self._trial.name} ended with {ended} before it was measured; its last lines:\n"
                    f"{self._last_lines()}",
                    f"all of it is in {self._log} and {self._run.path}",
                )
            if time.monotonic() > moved_at + SILENCE_SECONDS:
                raise UnusableError(
                    f"the trial {self._trial.name} makes no progress; its last lines:\n{self._last_lines()}",
                    f"all of it is in {self._log} and {self._run.path}",
                )
            time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        """Have it make its last checkpoint and end. Whatever is left after that is killed by the site."""
        until = time.monotonic() + _END_SECONDS
        if self._trained.ended() is None:
            with contextlib.suppress(HpcftError):  # it has just ended by itself
                operators.stop(self._run)
        while self._trained.ended() is None and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(lines) or "(none)"


@dataclass(slots=True)
class _History:
    """What the first generation did, until its worker was killed."""

    generation: Generation | None = None
    over: bool = False
    progress: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By node."""
    commits: list[CheckpointCommitted] = field(default_factory=list)
    copies: list[tuple[int, float]] = field(default_factory=list)
    """That were not written: step, and for how long it stopped training."""
    left_out: int = 0
    failed: int = 0

    def see(self, at: float, event: Event) -> None:
        match event:
            case Progressed(node, generation, step) if not self.over:
                self.generation = self.generation or generation
                if generation == self.generation and step >= _WARM_STEP:
                    self.progress.setdefault(node, []).append((at, step))
            case WorkerFailed():
                self.over = True
            case CheckpointCommitted() if event.checkpoint.generation == self.generation and not self.over:
                self.commits.append(event)
            case CopiesMeasured() if event.generation == self.generation and not self.over:
                self.copies += event.copies
            case CheckpointSkipped() if event.generation == self.generation:
                self.left_out += 1
            case CheckpointFailed() if event.generation == self.generation:
                self.failed += 1


def figures(trial: Trial, directory: Path) -> Figures:
    """What the journal in `directory` says of the trial.

    Steps are looked at from the second one to the last that was completed before the worker was killed (or the run was
    ended); saves, of those that came of the cadence; copies that are not written, of those that all nodes have made.

    Raises:
        UnusableError: there are not two steps to look at.
        DamagedError, OSError: the journal cannot be read.
    """
    history = _History()
    world = journal.replay(directory, history.see).world
    seen = min(history.progress.values(), key=lambda each: each[-1][1], default=[])
    if len(seen) < 2 or seen[-1][1] <= seen[0][1]:
        raise UnusableError(
            f"the trial {trial.name} has completed too few steps to be measured", "let it train more steps: --steps N"
        )
    (began, first), (until, last) = seen[0], seen[-1]
    due = [each for each in history.commits if trial.every and each.checkpoint.step <= last]
    copies = [(step, blocked) for step, blocked in history.copies if step <= last]
    copying = trial.mode is Mode.MEMORY
    closed = next((each for each in world.incidents if each.downtime is not None), None)
    return Figures(
        mode=trial.mode,
        every=trial.every,
        steps=last - first,
        seconds=until - began,
        blocked=tuple(blocked for _, blocked in copies) if copying else tuple(each.blocked for each in due),
        lags=tuple(each.lag for each in due),
        sizes=tuple(each.size for each in due),
        left_out=_not_made(copies, trial.every) if copying else history.left_out,
        failed=history.failed,
        recovery=None if closed is None else closed.downtime,
        steps_lost=None if closed is None else closed.steps_lost,
    )


def _not_made(copies: list[tuple[int, float]], every: int) -> int:
    """Copies that were due up to the last one that was made, and are not there: an earlier one was in the way."""
    steps = {step for step, _ in copies}
    return max(steps) // every - min(steps) // every + 1 - len(steps) if steps else 0


@dataclass(frozen=True, slots=True)
class LastSave:
    """The checkpoint with which a trial ended."""

    size: int
    blocked: float
    epoch_steps: int | None
    """Steps of an epoch, if the program uses hpcft's data."""


def last_save(run: RunDirectory) -> LastSave:
    """Raises UnusableError if there is none."""
    from hpcft.checkpoint import read

    history: list[CheckpointCommitted] = []

    def see(at: float, event: Event) -> None:
        if isinstance(event, CheckpointCommitted):
            history.append(event)

    journal.replay(run.journal, see)
    entries = read.entries(run.checkpoints)
    if not history or not entries:
        raise UnusableError(
            "the first trial has ended without a checkpoint, so that nothing can be said of saving",
            f"`hpcft status {run.path}` says why",
        )
    manifest, _ = read.read_manifest(entries[-1].directory)
    epoch = None
    if manifest.position is not None:
        epoch = -(-int(manifest.position["samples"]) // int(manifest.position["batch_size"]))
    return LastSave(history[-1].size, history[-1].blocked, epoch)
