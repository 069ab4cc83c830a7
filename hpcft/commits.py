"""From the ranks' reports to a committed checkpoint: the leader's part of the commit protocol.

Every rank writes its files and reports; when all ranks of the generation have reported the same step, one thread
writes the manifest and renames (`checkpoint.commit`). A save that can no longer become a checkpoint is given up with
a reason, once; training never waits for any of this.

The last checkpoint of a start has seconds, so nothing that takes long happens on that thread. It decides what goes,
and puts it into the trash: so what is deleted, and what is written, has one order. The trash is emptied, slowly, on a
second thread, which touches nothing else. A third one reads what a rank found damaged, and a fourth, where that is
asked for, what has just been committed: only the newest, so that a slow reading falls behind nobody's saves.

Retention follows when the world has taken the checkpoint into its lineage: what is committed for a generation that is
over by then (the thread was late) must not cost one that counts.

One node's word condemns no checkpoint: only what this node cannot verify either is set aside.
"""

from __future__ import annotations

import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft import durable
from hpcft.checkpoint import commit, marks, read, retention
from hpcft.checkpoint.layout import CheckpointDamagedError, CheckpointEntry, Damage, checkpoint_name, staging_name
from hpcft.checkpoint.manifest import ShardReport
from hpcft.errors import HpcftError, NotFoundError
from hpcft.events import (
    CheckpointCommitted,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointKept,
    CheckpointRef,
    CheckpointSkipped,
    CheckpointsRetired,
    CheckpointVerified,
    Event,
    Formation,
)
from hpcft.ids import Generation, Rank, RunId, Step

log = logging.getLogger("hpcft.commits")

REMEMBERED = 100
"""So many of a generation's latest saves are remembered, for what is said of them late, or again."""


@dataclass(frozen=True, slots=True)
class Retention:
    keep: int
    """The newest ones."""
    keep_every: int
    """And those of every so many steps; 0: none."""
    keep_best: int = 0
    """And so many with the best value of a metric that the program reports,"""
    best_metric: str | None = None
    best_mode: str = "min"
    """the lowest, or the highest ("max")."""


@dataclass(slots=True)
class _Timing:
    """Of one save, as the ranks have told it."""

    began: float = math.inf
    """When the first of them began, on this process's clock."""
    blocked: float = 0.0

    def told(self, timing: Mapping[str, Any], now: float) -> None:
        blocked, took = (_seconds(timing.get(key)) for key in ("blocked", "took"))
        self.blocked = max(self.blocked, blocked)
        self.began = min(self.began, now - max(blocked, took))


def _seconds(value: object) -> float:
    known = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if known else 0.0  # type: ignore[arg-type]


@dataclass(slots=True)
class _Saves:
    """What is known of a generation's saves."""

    formation: Formation
    reports: dict[Step, dict[Rank, ShardReport]] = field(default_factory=dict)
    timings: dict[Step, _Timing] = field(default_factory=dict)
    settled: set[Step] = field(default_factory=set)
    """Those of which the last word has been spoken: what is said of them again changes nothing."""
    superseded: set[Step] = field(default_factory=set)
    skipped: Step | None = None
    """The last one that all ranks have left out."""
    dropped: set[Step] = field(default_factory=set)
    """Given up: what a rank that was late still writes of them goes, too."""
    attempts: dict[Step, tuple[str, ...]] = field(default_factory=dict)
    """Of those that are written once more, from memory: the nonces of the attempts after the first."""
    forgotten: Step = Step(-1)
    """Of this step and those before it only one thing is known: that they are settled."""

    def is_settled(self, step: Step) -> bool:
        return step <= self.forgotten or step in self.settled

    def is_dropped(self, step: Step) -> bool:
        """What is forgotten may have been: what is still written of it is of no use in any case."""
        return step <= self.forgotten or step in self.dropped

    def settle(self, step: Step) -> None:
        self.settled.add(step)
        while len(self.settled) > REMEMBERED:
            oldest = min(self.settled)
            self.settled.discard(oldest)
            self.dropped.discard(oldest)
            self.attempts.pop(oldest, None)
            self.forgotten = max(self.forgotten, oldest)
        self.superseded = {each for each in self.superseded if each > self.forgotten}

    def nonce(self, step: Step) -> str:
        return self.nonces(step)[-1]

    def nonces(self, step: Step) -> tuple[str, ...]:
        """Of all attempts so far."""
        return self.formation.nonce, *self.attempts.get(step, ())

    def name(self, step: Step) -> str:
        return checkpoint_name(step, self.formation.generation)


class Commits:
    """Gathers the current generation's reports and commits them on a thread of its own.

    The methods belong to the event loop; `deliver` is called on a thread, with the event that came of a save.
    """

    def __init__(
        self,
        root: Path,
        run: RunId,
        retained: Retention,
        deliver: Callable[[Event], None],
        held: Callable[[], AbstractSet[str]] = frozenset,
        *,
        verify: bool = False,
    ) -> None:
        """`held`: names of checkpoints that must not be retired yet, somebody reads them. Called on a thread."""
        self._root = root
        self._run = run
        self._retained = retained
        self._deliver = deliver
        self._held = held
        self._saves: _Saves | None = None
        self._origin: _Saves | None = None
        """Of the generation whose copies in memory the running one has started from: that state may become durable
        even now."""
        self._parent: str | None = None  # the committing thread's: the newest checkpoint of the lineage
        self._values: dict[str, float | None] = {}  # the committing thread's: each checkpoint's metric, if it has it
        self._valueless = False
        self._sizes: dict[str, Mapping[str, int]] = {}  # the committing thread's: each checkpoint's files
        self._flawed: frozenset[str] = frozenset()  # the committing thread's: those with files that are not all there
        self._gone: set[str] = set()  # the committing thread's: those of the lineage that are said to have been deleted
        self._to_verify: CheckpointRef | None = None
        self._verified: CheckpointRef | None = None  # being read at present
        self._closed = threading.Event()
        self._committing = _Thread("hpcft-commit", root)
        self._emptying = _Thread("hpcft-trash", root)
        self._examining = _Thread("hpcft-examine", root)
        self._verifying = _Thread("hpcft-verify", root) if verify else None

    def follow(self, formation: Formation) -> None:
        """From now on only this generation's saves count; what earlier ones left unfinished is cleaned up."""
        origin = formation.restore.generation if formation.restore is not None and formation.memory else None
        known = (self._saves, self._origin)
        self._origin = next((each for each in known if each and each.formation.generation == origin), None)
        self._saves = _Saves(formation)
        saves = self._origin
        self._committing.put(lambda: self._turn_to(formation, saves))

    def has_failed(self, snapshot: CheckpointRef) -> bool:
        """Whether the writing of this state, which is in memory, was given up."""
        saves = self._of(snapshot.generation, snapshot.step)
        return saves is not None and snapshot.step in saves.dropped

    def attempt(self, snapshot: CheckpointRef, *, anew: bool) -> str | None:
        """The nonce under which a state in memory is to be written: that of the attempt under way, if there is one and
        it is not to begin `anew`. None: all ranks have written it, and that has not failed."""
        saves, step = self._of(snapshot.generation, snapshot.step), snapshot.step
        if saves is None:
            return secrets.token_hex(4)
        if step in saves.settled and step not in saves.dropped:
            return None
        if anew and step not in saves.dropped:
            self._drop(saves, step)
        if step in saves.dropped:
            saves.attempts[step] = (*saves.attempts.get(step, ()), secrets.token_hex(4))
            saves.settled.discard(step)
            saves.dropped.discard(step)
        return saves.nonce(step)

    def _of(self, generation: Generation, step: Step) -> _Saves | None:
        """Where a word about this save belongs; None: it comes too late."""
        saves, origin = self._saves, self._origin
        if saves is None or saves.formation.generation == generation:
            return saves
        restore = saves.formation.restore
        if origin is not None and restore is not None and (restore.generation, restore.step) == (generation, step):
            return origin
        return None

    def reported(
        self,
        generation: Generation,
        step: Step,
        rank: Rank,
        report: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Rank `rank` has made its files of `step` durable. It may say so again, when a connection was lost.

        `timing`: `took` seconds after it began to save, for `blocked` of which it did not train; as far as it knows.
        """
        saves = self._of(generation, step)
        if saves is None:
            return
        if step in saves.settled and step not in saves.dropped:
            return
        parsed = ShardReport.parse(report)
        if parsed.nonce != saves.nonce(step):
            self._committing.put(lambda: self._discard(saves.name(step), parsed.nonce))
            return  # of an attempt that was given up
        if saves.is_dropped(step):
            self._drop(saves, step)
            return
        world_size = saves.formation.world_size
        reports = saves.reports.setdefault(step, {})
        reports[rank] = parsed
        saves.timings.setdefault(step, _Timing()).told(timing or {}, time.monotonic())
        if len(reports) < world_size:
            return
        del saves.reports[step]
        took = saves.timings.pop(step)
        saves.settle(step)
        for older in [each for each in saves.reports if each < step]:
            if older in saves.superseded:
                self._drop(saves, older)
                continue
            missing = sorted(set(range(world_size)) - saves.reports[older].keys())
            self._give_up(saves, older, f"ranks {missing} have not saved step {older}")
        if self._origin is not None and saves is self._saves:
            origin, restore = self._origin, saves.formation.restore
            self._origin = None  # what has come of its state is durable now
            if restore is not None and not origin.is_settled(restore.step):
                self._drop(origin, restore.step)
        self._committing.put(lambda: self._commit(saves, step, tuple(reports.values()), took))

    def failed(self, generation: Generation, step: Step, rank: Rank, reason: str, nonce: str = "") -> None:
        """Rank `rank` could not write its files of `step`, in the attempt of this nonce, else in the first."""
        saves = self._of(generation, step)
        if saves is not None and (nonce or saves.formation.nonce) == saves.nonce(step):
            if saves.is_dropped(step):
                self._drop(saves, step)  # what it wrote before it failed
            self._give_up(saves, step, f"rank {rank}: {reason}")

    def skipped(self, generation: Generation, step: Step, rank: Rank, reason: str) -> None:
        """The save of `step` was left out, as all ranks have agreed and each of them says."""
        saves = self._saves
        if saves is not None and saves.formation.generation == generation and saves.skipped != step:
            saves.skipped = step
            self._deliver(CheckpointSkipped(step, generation, reason))

    def supersede(self, step: Step) -> None:
        """A later step was ordered as well. Some rank may have passed this one: then it is no failure that it is not
        complete when the later one is."""
        if self._saves is not None:
            self._saves.superseded.add(step)

    def settled(self, step: Step) -> bool:
        """Whether all ranks have reported this save, or one that it has failed."""
        return self._saves is not None and self._saves.is_settled(step)

    def retain(self, lineage: tuple[CheckpointRef, ...]) -> None:
        """The world's lineage has grown: what it no longer needs may go."""
        if self._verifying is not None and lineage:
            self._to_verify = lineage[-1]
            self._verifying.put(self._verify)
        if (saves := self._saves) is not None:
            self._committing.put(lambda: self._retain(saves.formation, lineage))

    def quarantine(self, checkpoint: CheckpointRef, suspicion: str) -> None:
        """Look at a checkpoint that a rank found damaged, and set it aside if it is.

        What comes of it is CheckpointDamaged or CheckpointKept.
        """
        self._examining.put(lambda: self._look_at(checkpoint, suspicion))

    def close(self, seconds: float = 5.0) -> None:
        """Finish what is to be committed, and then as much as `seconds` are left for.

        What is left in the trash is the next leader's; a hanging file system is left behind.
        """
        until = time.monotonic() + seconds
        self._committing.end(until)
        self._examining.end(time.monotonic())
        if self._verifying is not None:
            self._to_verify = None
            self._verifying.end(time.monotonic())
        self._emptying.end(until)
        self._closed.set()

    def _give_up(self, saves: _Saves, step: Step, reason: str) -> None:
        if not saves.is_settled(step):
            self._drop(saves, step)
            self._deliver(CheckpointFailed(step, saves.formation.generation, reason))

    def _drop(self, saves: _Saves, step: Step) -> None:
        saves.dropped.add(step)
        saves.settle(step)
        saves.reports.pop(step, None)
        saves.timings.pop(step, None)
        nonce = saves.nonce(step)
        self._committing.put(lambda: self._discard(saves.name(step), nonce))

    # --- on the committing thread ---

    def _turn_to(self, formation: Formation, origin: _Saves | None) -> None:
        restore = formation.restore
        if not formation.memory:  # else it follows what was committed before the copy, or the copy itself
            self._parent = _name(restore) if restore is not None else None
        stale = retention.stale(self._root, formation.generation)
        spared = None
        if origin is not None and restore is not None:  # asked now: an attempt may have begun since
            spared = staging_name(origin.name(restore.step), origin.nonce(restore.step))
        self._put_into_trash(tuple(name for name in stale if name != spared))
        self._values_of(read.entries(self._root))  # now, while nothing waits to be committed

    def _discard(self, name: str, nonce: str) -> None:
        retention.discard(self._root, name, nonce)
        self._emptying.put(self._empty_trash)

    def _put_into_trash(self, names: tuple[str, ...]) -> None:
        retention.put_into_trash(self._root, names)
        self._emptying.put(self._empty_trash)

    def _commit(self, saves: _Saves, step: Step, reports: tuple[ShardReport, ...], timing: _Timing) -> None:
        began, formation = time.monotonic(), saves.formation
        facts = commit.Facts(run=self._run, term=formation.term, parent=self._parent, created=time.time())
        try:
            done = commit.commit(self._root, reports, facts)
        except HpcftError as error:
            saves.dropped.add(step)  # before anybody hears of it
            self._discard(reports[0].name, reports[0].nonce)
            self._deliver(CheckpointFailed(step, formation.generation, error.message))
            return
        for nonce in saves.nonces(step)[:-1]:  # what was still being written of them when they were given up
            self._discard(done.name, nonce)
        if done.latest_failure:
            log.warning("LATEST was not rewritten: %s", done.latest_failure)
        self._parent = done.name
        metric = done.metrics.get(self._retained.best_metric or "")
        self._values[done.name] = None if metric is None else metric.value
        checkpoint, now = CheckpointRef(step, formation.generation), time.monotonic()
        measured = (timing.blocked, now - timing.began) if timing.blocked else (0.0, 0.0)
        self._deliver(CheckpointCommitted(checkpoint, now - began, done.size, *measured))

    def _retain(self, formation: Formation, lineage: tuple[CheckpointRef, ...]) -> None:
        entries = read.entries(self._root)
        live = frozenset(map(_name, lineage))
        mine = [each for each in entries if each.name in live]
        saves = self._saves
        used = [each.restore for each in (formation, saves.formation if saves else None) if each is not None]
        used += [self._to_verify, self._verified]
        protected = marks.pinned(self._root) | self._held() | {_name(each) for each in used if each is not None}
        damaged = self._damaged(mine)
        sound = [each for each in mine if each.name not in damaged]
        protected |= retention.newest(sound, marks.verified(self._root)) | self._best(mine, damaged)
        damaged |= self._flawed
        keep, keep_every = self._retained.keep, self._retained.keep_every or None
        retired = (
            *retention.retire(mine, keep, keep_every, protected, damaged),
            *retention.retire_abandoned(entries, live, formation.generation, keep, keep_every, protected, damaged),
        )
        gone = [CheckpointRef(each.step, each.generation) for each in entries if each.name in retired]
        gone += self._deleted(lineage, {each.name for each in entries} | self._gone)
        self._gone = (self._gone & live) | set(map(_name, gone))
        if gone:
            self._deliver(CheckpointsRetired(tuple(gone)))
        if retired:
            self._put_into_trash(retired)

    def _deleted(self, lineage: tuple[CheckpointRef, ...], known: AbstractSet[str]) -> list[CheckpointRef]:
        """By an operator. A listing that another node's changes have not reached yet proves nothing."""
        missing = [each for each in lineage if _name(each) not in known]
        return [each for each in missing if not (self._root / _name(each)).exists()]

    def _damaged(self, entries: Sequence[CheckpointEntry]) -> frozenset[str]:
        """Of the newest, those that do not count: they take no sound one's place. It is looked at no more of them than
        are needed to find as many sound ones as are kept: there may be hundreds, of hundreds of files."""
        names = {each.name for each in entries}
        self._sizes = {name: sizes for name, sizes in self._sizes.items() if name in names}
        again, self._flawed = self._flawed & names, frozenset()
        sound = 0
        for entry in reversed(entries):
            if sound < self._retained.keep or entry.name in again:
                sound += not self._is_damaged(entry, again)
        return self._flawed

    def _is_damaged(self, entry: CheckpointEntry, known: AbstractSet[str] = frozenset()) -> bool:
        """Whether a file is missing or has another size, or that cannot be said. A manifest is read once: what is
        committed does not change."""
        try:
            if entry.name not in self._sizes:
                self._sizes[entry.name] = read.sizes(entry.directory, self._run)
            damages = read.compare_sizes(entry.directory, self._sizes[entry.name])
            reason = _first(damages) if damages else ""
        except (OSError, HpcftError) as error:
            reason = str(error)
        if reason and entry.name not in known:
            log.warning("%s counts as none of those that are kept: %s", entry.name, reason)
        self._flawed |= {entry.name} if reason else set()
        return bool(reason)

    def _best(self, entries: Sequence[CheckpointEntry], damaged: frozenset[str]) -> frozenset[str]:
        """With those of which it cannot be said at present; a damaged one takes no sound one's place."""
        values, unknown = self._values_of(entries)
        if self._retained.keep_best and len(entries) > self._retained.keep and not values and not self._valueless:
            self._valueless = True
            log.warning(
                "checkpoint.keep_best keeps none: no checkpoint has %s; the program has to say it, run.report(%s=…)",
                *2 * (self._retained.best_metric,),
            )
        while True:
            sound = [each for each in entries if each.name not in damaged]
            best = retention.best(sound, values, self._retained.keep_best, self._retained.best_mode)
            found = {each.name for each in sound if each.name in best and self._is_damaged(each)}
            if not found:
                return unknown | best
            damaged |= found

    def _values_of(self, entries: Sequence[CheckpointEntry]) -> tuple[dict[str, float], frozenset[str]]:
        """The metric of each that has it, by name; and the names of those that could not be read."""
        if not self._retained.keep_best:
            return {}, frozenset()
        unknown = set()
        for entry in entries:
            if entry.name in self._values:
                continue
            try:
                manifest, _ = read.read_manifest(entry.directory)
            except (NotFoundError, CheckpointDamagedError):
                continue
            except (OSError, HpcftError) as error:
                unknown.add(entry.name)
                log.warning("whether %s is among the best cannot be said: %s", entry.name, error)
                continue
            metric = manifest.metrics.get(self._retained.best_metric or "")
            self._values[entry.name] = None if metric is None else metric.value
        known = {entry.name: self._values.get(entry.name) for entry in entries}
        return {name: value for name, value in known.items() if value is not None}, frozenset(unknown)

    # --- on the others ---

    def _empty_trash(self) -> None:
        for _ in retention.emptying(self._root):
            if self._closed.wait(1 / retention.PER_SECOND):
                return

    def _look_at(self, checkpoint: CheckpointRef, suspicion: str) -> None:
        found = self._examine(checkpoint, suspicion)
        if not self._closed.is_set():  # nobody has waited for it
            self._deliver(found)

    def _verify(self) -> None:
        """The newest one that nobody has read back yet. One that is wanted or being read is not retired."""
        self._verified, self._to_verify = self._to_verify, None
        checkpoint = self._verified
        if checkpoint is None:
            return  # a later one was committed while an earlier one was read, and that has been done
        name = _name(checkpoint)
        directory = self._root / name
        try:
            durable.forget_cached(directory)
            damages = read.losses(directory, self._run)
            if not damages:
                marks.mark_verified(self._root, name)
        except NotFoundError:
            return  # retired by another leader, or set aside
        except (OSError, HpcftError) as error:
            log.warning("%s could not be read back: %s", name, error)
            return
        finally:
            self._verified = None
        if not self._closed.is_set():
            self._deliver(CheckpointVerified(checkpoint, _first(damages)))

    def _examine(self, checkpoint: CheckpointRef, suspicion: str) -> CheckpointDamaged | CheckpointKept:
        directory = self._root / _name(checkpoint)
        try:
            damages = read.losses(directory, self._run)
        except NotFoundError:
            return CheckpointDamaged(checkpoint, f"{suspicion}; for the leader it is not there either")
        except (OSError, HpcftError) as error:
            said = error.message if isinstance(error, HpcftError) else error.strerror or str(error)
            return CheckpointKept(checkpoint, f"the leader cannot tell: {said}")
        if not damages:
            return CheckpointKept(checkpoint, "the leader has read all of it and finds it sound")
        detail = _first(damages)
        try:
            if read.quarantine(directory, detail) is not None:
                log.warning("%s is in quarantine: %s", directory.name, detail)
        except (OSError, HpcftError) as error:
            log.warning("%s is damaged and could not be set aside: %s", directory.name, error)
        return CheckpointDamaged(checkpoint, detail)


def _first(damages: Sequence[Damage]) -> str:
    more = f"; {len(damages) - 1} more" if len(damages) > 1 else ""
    return f"{damages[0]}{more}" if damages else ""


def _name(checkpoint: CheckpointRef) -> str:
    return checkpoint_name(checkpoint.step, checkpoint.generation)


class _Thread:
    """Does one job after the other."""

    def __init__(self, name: str, root: Path) -> None:
        self._root = root
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def end(self, until: float) -> None:
        """After what is queued; not waited for beyond `until` (monotonic)."""
        self._jobs.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except (OSError, HpcftError) as error:
                # cleaning up or setting aside; the next generation tries again
                log.warning("in %s: %s", self._root, error)
