"""The account of a run's samples: what its ledger says each epoch has used once, more than once, and never.

Theory of operation
-------------------
Which records count follows from how the state came about, not from the largest numbers. The newest generation
counts from the step that it was restored at; up to there its ancestor counts, the generation that made the state it
was restored from (where that is not recorded: the next older one); and so on back to step 0. Every other record is
*superseded*: its step was undone by a rollback, and its samples were consumed again or will be.

Of the steps that count, every epoch is summed up over the whole data set. In the epoch in progress a sample is
*pending* while its place in the epoch's order has not been reached, and after that as much missed as in any other.
What does not add up is named: ranks missing in a step, batches that leave out or repeat places, a generation that
left no ledger. The last step may be *open*, recorded by some ranks and not yet by others; it is left out.

A record that ends early adds up as well. So it is held against what the run says of itself: whatever led to its newest
checkpoint, or to its end, has to be recorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from hpcft.data import order
from hpcft.data.ledger import Header, LedgerFile, Record, ledger_path, read_file, read_headers
from hpcft.data.order import Ids
from hpcft.errors import NotFoundError, UnusableError
from hpcft.rundir import RunDirectory

_EXAMPLES = 8
_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class EpochReport:
    epoch: int
    samples: int
    once: int
    more_than_once: int
    never: int
    """The epoch has passed their place without them."""
    pending: int
    """Their place has not been reached yet."""
    in_progress: bool
    repeated_ids: tuple[int, ...] = ()
    """The first few."""
    missing_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationReport:
    generation: int
    world_size: int
    restored_step: int
    restored_generation: int | None
    steps: int
    """Steps of this generation that count."""
    superseded: int
    """Steps recorded by it that were undone by a rollback."""


@dataclass(frozen=True, slots=True)
class LedgerReport:
    samples: int
    seed: int
    last_step: int
    superseded: int
    open_step: int | None
    """The step that some ranks have recorded and others have not yet."""
    epochs: tuple[EpochReport, ...]
    generations: tuple[GenerationReport, ...]
    problems: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Every sample whose place was reached has been used once, and all records add up."""
        return not self.problems and all(not e.more_than_once and not e.never for e in self.epochs)


@dataclass(slots=True)
class _Tally:
    """What the steps that count add up to."""

    problems: list[str]
    ids: defaultdict[int, list[Ids]] = field(default_factory=lambda: defaultdict(list))
    reached: dict[int, int] = field(default_factory=dict)
    at: tuple[int, int] = (0, 0)
    last_step: int = 0

    def add(self, step: int, records: list[Record], samples: int) -> None:
        batch = records[0].batch
        if (batch.epoch, batch.start) != self.at:
            self.problems.append(
                f"step {step} starts at place {batch.start} of epoch {batch.epoch}, where the steps before it "
                f"(up to {self.last_step}) lead to place {self.at[1]} of epoch {self.at[0]}"
            )
        for record in records:
            self.ids[batch.epoch].append(record.ids)
        self.reached[batch.epoch] = max(self.reached.get(batch.epoch, 0), batch.stop)
        self.at = (batch.epoch, batch.stop) if batch.stop < samples else (batch.epoch + 1, 0)
        self.last_step = step


def report(run_directory: Path) -> LedgerReport:
    """The account of a run's samples, of what its ledger says at this moment.

    NotFoundError: the run has no ledger. UnusableError: its files cannot be read, or are of different data.
    """
    run = RunDirectory(run_directory)
    directory = run.ledger
    problems: list[str] = []
    completed = list(_completed(run, problems))  # looked at first: what is recorded meanwhile is only more
    generations = read_headers(directory)
    if not generations:
        raise NotFoundError(f"{run_directory} has no ledger", "a run records one where [data] ledger = true")
    first = next(iter(generations[min(generations)].values()))
    problems += _inconsistencies(generations, first)
    ranges = dict(_lineage(generations, problems))
    newest = max(generations)
    owed = _owed(completed, ranges, newest, problems)

    tally = _Tally(problems)
    open_step: int | None = None
    accounts = []
    for generation in sorted(generations):
        headers = generations[generation]
        example = next(iter(headers.values()))
        files = {rank: read_file(ledger_path(directory, generation, rank), headers[rank]) for rank in sorted(headers)}
        settled = max(_settled(files), owed) if generation == newest else None
        if settled is not None:  # a rank that seems to lag was perhaps only read earlier than others
            for rank, file in files.items():
                if file.last < settled:
                    files[rank] = read_file(ledger_path(directory, generation, rank), headers[rank])

        after, until = ranges.get(generation, (0, 0))
        steps: defaultdict[int, list[Record]] = defaultdict(list)
        for file in files.values():
            for record in file.records:
                if after < record.step <= until:
                    steps[record.step].append(record)
        undone = max(file.written - sum(after < r.step <= until for r in file.records) for file in files.values())
        for step in sorted(steps):
            if settled is not None and step > settled and len(steps[step]) < example.world_size:
                open_step = step
                break
            problems.extend(_defects(step, steps[step], example))
            tally.add(step, steps[step], first.samples)
        counted = len(steps) if open_step is None else sum(step < open_step for step in steps)
        accounts.append(GenerationReport(generation, *example.origin, steps=counted, superseded=undone))
    if tally.last_step < owed:
        problems.append(
            f"the record ends at step {tally.last_step}, and the run has gone on at least to step {owed}: "
            "`hpcft logs` may say why (the ledger is incomplete)"
        )
    return LedgerReport(
        samples=first.samples,
        seed=first.seed,
        last_step=tally.last_step,
        superseded=sum(account.superseded for account in accounts),
        open_step=open_step,
        epochs=tuple(_epoch(epoch, tally, first) for epoch in range(max(tally.ids, default=-1) + 1)),
        generations=tuple(accounts),
        problems=_shortened(problems),
    )


def _completed(run: RunDirectory, problems: list[str]) -> Iterator[tuple[int | None, int]]:
    """Steps that nothing undoes any more, each with the generation that completed it; None: the last one."""
    if (status := _said(run.status, problems)) is not None:
        yield from ((each["generation"], each["step"]) for each in status.get("checkpoints", [])[-1:])
    if (finished := _said(run.finished, problems)) is not None:
        yield None, finished["step"]


def _said(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"how far the run has come is not known: {path} cannot be read ({error})")
        return None
    return found


def _owed(
    completed: Iterable[tuple[int | None, int]],
    ranges: Mapping[int, tuple[int, float]],
    newest: int,
    problems: list[str],
) -> int:
    """The step up to which there has to be a record: what the newest generation went on from, or more."""
    owed = ranges[newest][0]
    for generation, step in completed:
        if generation is not None and generation > newest:
            if step:
                problems.append(f"generation {generation} trained steps up to {step} and left no ledger")
        elif (counts := ranges.get(newest if generation is None else generation)) is not None:
            owed = max(owed, int(min(step, counts[1])))
    return owed


def _settled(files: Mapping[int, LedgerFile]) -> int:
    """The last step that every rank has recorded if nothing is amiss: none gets ahead by more than one step."""
    steps = {record.step for file in files.values() for record in file.records[-2:]}
    return sorted(steps)[-2] if len(steps) > 1 else 0


def _lineage(
    generations: Mapping[int, Mapping[int, Header]], problems: list[str]
) -> Iterator[tuple[int, tuple[int, float]]]:
    """The generations whose steps led to the present state, from the newest: steps after x, up to y count."""
    until = float("inf")
    generation: int | None = max(generations)
    while generation is not None:
        older = [other for other in generations if other < generation]
        if generation in generations:
            header = next(iter(generations[generation].values()))
            yield generation, (header.restored_step, until)
            until = min(until, header.restored_step)
            parent = header.restored_generation
        else:
            problems.append(f"generation {generation} trained steps up to {until:.0f} and left no ledger")
            parent = None
        if until == 0:
            return
        generation = parent if parent is not None and parent < generation else max(older, default=None)


def _defects(step: int, records: list[Record], header: Header) -> Iterator[str]:
    ranks = {record.rank for record in records}
    if missing := [str(rank) for rank in range(header.world_size) if rank not in ranks]:
        yield f"step {step} of generation {header.generation} has no record of rank {', '.join(missing)}"
    batches = {record.batch for record in records}
    if len(batches) > 1:
        yield f"the ranks of generation {header.generation} had different batches in step {step}"
    count = sum(len(record.ids) for record in records)
    if not missing and len(batches) == 1 and count != records[0].batch.size:
        yield f"step {step} of generation {header.generation} used {count} samples of {records[0].batch.size}"


def _inconsistencies(generations: Mapping[int, Mapping[int, Header]], first: Header) -> list[str]:
    problems = []
    for generation, headers in generations.items():
        for header in headers.values():
            if header.order != first.order:
                raise UnusableError(
                    f"the ledger mixes data sets: generation {first.generation} has {first.samples} samples, seed "
                    f"{first.seed}, shuffle {first.shuffle}; rank {header.rank} of generation {generation} has "
                    f"{header.samples}, {header.seed}, {header.shuffle}"
                )
        if len({header.origin for header in headers.values()}) > 1:
            problems.append(
                f"the ranks of generation {generation} disagree on their world or what it was restored from"
            )
    return problems


def _epoch(epoch: int, tally: _Tally, header: Header) -> EpochReport:
    n = header.samples
    used = np.zeros(n, dtype=np.int64)
    for ids in _gathered(tally.ids.get(epoch, ()), max(n, 1_000_000)):
        used += np.bincount(ids, minlength=n)[:n]
    reached = tally.reached.get(epoch, 0)
    in_progress = epoch == max(tally.ids) and reached < n
    passed = np.ones(n, dtype=np.bool_)
    if in_progress:
        later = np.arange(reached, n, dtype=np.int64)
        passed[order.ids_at(header.seed, epoch, n, later) if header.shuffle else later] = False
    repeated = np.flatnonzero(used > 1)
    missing = np.flatnonzero((used == 0) & passed)
    return EpochReport(
        epoch=epoch,
        samples=n,
        once=int(np.count_nonzero(used == 1)),
        more_than_once=len(repeated),
        never=len(missing),
        pending=int(np.count_nonzero((used == 0) & ~passed)),
        in_progress=in_progress,
        repeated_ids=tuple(repeated[:_EXAMPLES].tolist()),
        missing_ids=tuple(missing[:_EXAMPLES].tolist()),
    )


def _gathered(parts: Iterable[Ids], limit: int) -> Iterator[Ids]:
    """Concatenated to pieces of about `limit`: a count over the epoch is paid per piece, not per step."""
    piece: list[Ids] = []
    size = 0
    for part in parts:
        piece.append(part)
        size += len(part)
        if size >= limit:
            yield np.concatenate(piece).astype(np.int64)
            piece, size = [], 0
    if piece:
        yield np.concatenate(piece).astype(np.int64)


def _shortened(problems: list[str]) -> tuple[str, ...]:
    more = len(problems) - _PROBLEMS
    return (*problems[:_PROBLEMS], f"and {more} more") if more > 0 else tuple(problems)
