"""Saving and loading a state: hpcft, its peers, and what the machine can do at best, in one run.

    python benchmarks/checkpoint.py [CASE ...] [--sizes 1GiB,4GiB] [--repeats 5] [--json FILE]

A CASE is the beginning of a case's name: blocking, write, slowdown, load, restore, memory, or `blocking-4GiB`; without
one, all. `limit` is measured in the same processes, interleaved with what it stands beside:

blocking   how long training stands still for a save: memcpy of a rank's share into shared memory that is there
           (of N ranks: the Nth part of what one rank alone takes for all)
write      from there until the checkpoint is durable: raw write + fsync of as many bytes, best of one or two writers,
           through the page cache or around it
slowdown   a step while that goes on: a step alone
load       from files into the model: memcpy + digest (warm); raw read, best as with write (cold)
restore    from memory, or files, into a new process after a worker's death: memcpy
memory     what all processes take in addition: the state, as often as there are copies of it

Each system has processes of its own. Ratios are to the limit; of rates (write, load) more is better. Blocking also
by CPU time of the rank's thread, which depends less on who else uses the machine.
Peers: pip install -c constraints.txt -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from node import HERE, Node, SessionFailed
from systems import HPCFT
from table import Row, row, show

from hpcft import process
from hpcft.units import human_size, parse_size

PROGRAM = HERE / "programs" / "state.py"
TENSORS = 64
SMALL_TENSORS = 10_000
SESSION_SECONDS = 900.0

SAVERS = ("hpcft", "torch.save", "DCP", "DCP async", "DCP async, process", "torchsnapshot async", "torch_checkpointing")
IN_BACKGROUND = ("hpcft", "DCP async", "DCP async, process", "torchsnapshot async", "torch_checkpointing")
LOADERS = (
    *("hpcft", "hpcft, tensors", "torch.save", "torch.load mmap", "safetensors", "DCP"),
    *("torchsnapshot async", "torch_checkpointing"),
)
RETURNERS = ("hpcft", "hpcft, from disk", "torch.save", "DCP", "safetensors")


@dataclass(frozen=True, slots=True)
class Session:
    """Processes that one system has for itself, and the cases that they measure."""

    work: str
    system: str
    size: int
    ranks: int = 1
    tensors: int = TENSORS

    @property
    def cases(self) -> tuple[str, ...]:
        of = human_size(self.size).replace(" ", "")
        match self.work:
            case "save":
                many = f"-{self.tensors}t" if self.tensors != TENSORS else ""
                return tuple(f"{case}-{of}-{self.ranks}r{many}" for case in ("blocking", "write"))
            case "train":
                return (f"slowdown-{of}",)
            case "load":
                return (f"load-warm-{of}", f"load-cold-{of}")
            case "memory":
                return (f"memory-{of}",)
            case other:
                return (f"{other}-{of}",)

    @property
    def needed(self) -> int:
        """Bytes of memory, roughly: states, what limits are copied into, and what is copied for the save."""
        copies = 2 if self.system.startswith("hpcft") else self.ranks
        return self.size * (self.ranks + copies + 1) + (400 << 20) * self.ranks


@dataclass(frozen=True, slots=True)
class Options:
    wanted: tuple[str, ...]
    repeats: int
    warm_up: int
    threads: int
    directory: Path
    gpus: tuple[str, ...]

    def wants(self, case: str) -> bool:
        return not self.wanted or any(case.startswith(each) for each in self.wanted)


def sessions(sizes: Sequence[int], ranks: Sequence[int], chosen: Sequence[str], small: int) -> Iterator[Session]:
    def of(systems: Sequence[str]) -> Iterator[str]:
        return (each for each in systems if any(each.startswith(beginning) for beginning in chosen))

    for size in sizes:
        for count in ranks:
            yield from (Session("save", system, size, count) for system in of(SAVERS))
        if small and size == sizes[0]:
            yield from (Session("save", system, size, 1, small) for system in of(SAVERS))
        yield from (Session("train", system, size) for system in of(IN_BACKGROUND))
        yield from (Session("load", system, size) for system in of(LOADERS))
        yield from (Session("restore", system, size) for system in of(RETURNERS))
        yield from (Session("memory", system, size) for system in of(SAVERS))


async def measure_all(chosen: Iterable[Session], options: Options) -> list[Row]:
    rows: list[Row] = []
    for session in chosen:
        for found in await measure(session, options):
            rows.append(found)
            print(f"load {os.getloadavg()[0]:.1f}: {found}", flush=True)
    await asyncio.sleep(0.2)  # for the ends of the last carriers to be heard
    return rows


async def measure(session: Session, options: Options) -> list[Row]:
    """The rows of the session's cases that are wanted."""
    cases = [case for case in session.cases if options.wants(case)]
    if not cases:
        return []
    available = psutil.virtual_memory().available
    if session.needed > 0.95 * available:
        why = f"not measured: needs {human_size(session.needed)} of memory, {human_size(available)} are free"
        return [row(case, session.system, [], "", note=why) for case in cases]
    if options.gpus and session.ranks > len(options.gpus):
        return [row(case, session.system, [], "", note=f"not measured: {len(options.gpus)} GPUs") for case in cases]
    with tempfile.TemporaryDirectory(prefix="hpcft-bench-", dir=options.directory) as place:
        node = Node(Path(place), session.ranks, options.gpus)
        try:
            lines = await _lines(node, session, options, cases)
        except SessionFailed as error:
            return [row(case, session.system, [], "", note=f"failed: {error}") for case in cases]
        finally:
            node.close()
    if reasons := [line["failed"] for each in lines for line in each if "failed" in line]:
        return [row(case, session.system, [], "", note=reasons[0]) for case in cases]
    return [each for each in _rows(session, lines) if each.case in cases]


async def _lines(node: Node, session: Session, options: Options, cases: Sequence[str]) -> list[list[dict[str, Any]]]:
    system = session.system.partition(", from")[0]
    plan = {
        "work": session.work,
        "system": system,
        "size": session.size,
        "tensors": session.tensors,
        "threads": options.threads,
        "repeats": options.repeats,
        "warm_up": options.warm_up,
        "raw": any(case.startswith("write") for case in cases),
        "cold": any(case.startswith("load-cold") for case in cases),
    }
    every = 2 if system in HPCFT else None
    if session.work != "restore":
        return await node.train(PROGRAM, plan, every=every, limit=SESSION_SECONDS)
    found = await node.train(PROGRAM, {**plan, "work": "leave"}, every=every, limit=SESSION_SECONDS)
    for _ in range(options.repeats):
        memory = None if every is None else session.system == "hpcft"
        lives = await node.train(
            PROGRAM, {**plan, "work": "come_back"}, every=every, limit=SESSION_SECONDS, memory=memory
        )
        found[0] += lives[0]
    return found


def _rows(session: Session, lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
    size, system = session.size, session.system
    gigabytes = size / 1e9
    measured = [[line for line in each if line.get("warm")] for each in lines]
    first = measured[0]

    def slowest(key: str) -> list[float]:
        """Of all ranks, in each round."""
        return [max(rank[key] for rank in round_) for round_ in zip(*measured, strict=True)]

    def middle(key: str) -> float:
        return statistics.median(line[key] for line in first)

    match session.work:
        case "save":
            blocking, write = session.cases
            note = f"{middle('cpu') / middle('memcpy_cpu'):.3g} x by CPU time"
            if session.ranks > 1:
                note += f"; all ranks copying at once: {statistics.median(slowest('memcpy_all')):.3g} s"
            rows = [row(blocking, system, slowest("blocked"), "s", limit=middle("memcpy") / session.ranks, note=note)]
            # what has made training wait until it was durable has written meanwhile
            seconds = [line["behind"] if line["behind"] > 0.001 else line["blocked"] for line in first]
            if "raw" in first[0]:
                rates = [gigabytes / each for each in seconds]
                rows.append(row(write, system, rates, "GB/s", limit=gigabytes / middle("raw")))
            return rows
        case "train":
            beside = [line["beside"] * 1e3 for line in first if line["beside"]]
            alone = middle("alone") * 1e3
            note = f"{min(line['steps'] for line in first)} steps or more in each save"
            return [row(session.cases[0], system, beside, "ms", limit=alone, note=note)]
        case "load":
            warm, cold = session.cases
            rates = [gigabytes / line["warm_load"] for line in first]
            rows = [row(warm, system, rates, "GB/s", limit=gigabytes / middle("memcpy"))]
            if "raw" in first[0]:
                rates = [gigabytes / line["cold_load"] for line in first]
                rows.append(row(cold, system, rates, "GB/s", limit=gigabytes / middle("raw")))
            return rows
        case "restore":
            times = [line["restore"] for line in first]
            return [row(session.cases[0], system, times, "s", limit=middle("memcpy"))]
        case _:
            copies = 2 if system in HPCFT else 1
            extra = [each["extra"] / 2**20 for each in lines[0]]
            note = f"limit: {copies} x the state"
            return [row(session.cases[0], system, extra, "MiB", limit=copies * size / 2**20, note=note)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--sizes", default="1GiB,4GiB", help="of the state")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of DDP ranks to save with")
    parser.add_argument(
        "--small-tensors", type=int, default=SMALL_TENSORS, metavar="N", help="in the case of many; 0: none"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before, two for hpcft to try both ways to write")
    parser.add_argument("--quick", action="store_true", help="one repeat, the first size")
    parser.add_argument("--systems", default="", help="how their names begin, such as hpcft,torch; without it all")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each rank")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    sizes = [parse_size(each) for each in given.sizes.split(",")]
    gpus: tuple[str, ...] = ()
    if given.device == "cuda":
        if not torch.cuda.is_available():
            print("there is no GPU that torch can use", file=sys.stderr)
            return 1
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count())))
    repeats = 1 if given.quick else given.repeats
    options = Options(tuple(given.cases), repeats, given.warm_up, given.threads, given.directory, gpus)
    process.become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left behind
    ranks = [*map(int, given.ranks.split(","))]
    chosen = sessions(sizes[: 1 if given.quick else None], ranks, given.systems.split(","), given.small_tensors)
    rows = asyncio.run(measure_all(chosen, options))
    process.end_descendants(10.0)
    show(sorted(rows, key=lambda each: each.case), given.json)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
