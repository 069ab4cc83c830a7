"""From a failure to the first completed step afterwards: hpcft and torchrun, the same loop, the same machine.

    python benchmarks/recovery.py [--quick] [--json FILE] [--only worker-kill|node-kill|cost]

worker-kill: SIGKILL to one worker, five times in one run. node-kill: SIGKILL to everything on a node that does not
lead, keeper included, in five runs. torchrun is measured with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which it
seldom recovers with 4 workers: `torchrun-shared-store` counts how often. `torchrun-tuned` has last_call_timeout=1.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

import cost
from jobs import Timeline, hpcft_job, place_for, started, torchrun_job, workers_below
from table import Row, row, show

from hpcft import process

WARM_STEPS = 25
"""Completed steps between two failures: past a checkpoint, and past everything lazy."""


def worker_kills(system: str, nodes: int, workers: int, trials: int) -> tuple[list[float], int]:
    """Seconds for each recovery, and how many kills were tried."""
    with place_for(system) as place:
        if system == "hpcft":
            job = hpcft_job(place, nodes, workers)
        else:
            shared = system == "torchrun-shared-store"
            job = torchrun_job(place, nodes, workers, shared_store=shared, elastic=str(nodes), last_call=None)
        timeline, found = Timeline(place), []
        with started(*job, place / "log") as pids:
            for trial in range(trials):
                if not timeline.await_steps(WARM_STEPS, 120.0):
                    return found, trial if trial else trials
                victim = workers_below(pids)[-1]
                at = time.monotonic()
                process.send(victim, signal.SIGKILL)
                seconds = timeline.first_after(at, 60.0)
                if seconds is None:
                    return found, trial + 1
                found.append(seconds)
    return found, trials


def node_kill(system: str) -> float | None:
    """Three nodes of one worker; everything on the last one is killed."""
    with place_for(system) as place:
        if system == "hpcft":
            job = hpcft_job(place, 3, 1)
        else:
            last_call = 1 if system == "torchrun-tuned" else None
            job = torchrun_job(place, 3, 1, shared_store=False, elastic="2:3", last_call=last_call)
        timeline = Timeline(place)
        with started(*job, place / "log") as pids:
            if not timeline.await_steps(WARM_STEPS, 180.0):
                return None
            roots = process.children(pids[0]) if system == "hpcft" else pids
            # neither the leader's node (hpcft: the first) nor the host of the rendezvous (torchrun: the first)
            victims = [roots[-1], *process.descendants(roots[-1])]
            at = time.monotonic()
            for pid in victims:
                process.send(pid, signal.SIGKILL)
            return timeline.first_after(at, 120.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one trial instead of five")
    parser.add_argument("--only", choices=("worker-kill", "node-kill", "cost"))
    options = parser.parse_args()
    process.become_subreaper()
    trials = 1 if options.quick else 5
    rows: list[Row] = []
    if options.only in (None, "worker-kill"):
        for nodes, workers in ((1, 4), (2, 2)):
            case = f"worker-kill-{nodes}x{workers}"
            for system in ("hpcft", "torchrun", "torchrun-shared-store"):
                found, tried = worker_kills(system, nodes, workers, trials)
                rows.append(row(case, system, found, "s", note=f"{len(found)} of {tried} recovered"))
                print(rows[-1], flush=True)
    if options.only in (None, "node-kill"):
        for system in ("hpcft", "torchrun-tuned", "torchrun"):
            times = [node_kill(system) for _ in range(trials)]
            found = [each for each in times if each is not None]
            rows.append(row("node-kill-3x1", system, found, "s", note=f"{len(found)} of {trials} recovered"))
            print(rows[-1], flush=True)
    if options.only in (None, "cost"):
        rows += cost.measure(trials)
    show(rows, options.json)


if __name__ == "__main__":
    main()
