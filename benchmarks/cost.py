"""What hpcft costs while nothing fails: `run.update` in a step, and the node's processes at rest."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
from jobs import Timeline, hpcft_job, place_for, started
from table import Row, row

_PROGRAM = """
import statistics, sys, time
import torch, hpcft

def train(run):
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.ones(1, 4)

    def plain():
        optimizer.step(); optimizer.zero_grad(set_to_none=True)

    def ours():
        run.update(optimizer)

    times = {plain: [], ours: []}
    for _ in range(20):
        for way in (plain, ours):
            spent = 0
            for _ in range(500):
                model(x).sum().backward()
                began = time.perf_counter_ns()
                way()
                spent += time.perf_counter_ns() - began
            times[way].append(spent / 500 / 1000)
    print(statistics.median(times[plain]), statistics.median(times[ours]))

hpcft.main(train)
"""


def update_cost() -> tuple[float, float]:
    """Microseconds of a plain optimizer step with zero_grad, and of `run.update`, which does both."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)
    plain, ours = map(float, done.stdout.split())
    return plain, ours


def measure(trials: int) -> list[Row]:
    pairs = [update_cost() for _ in range(trials)]
    plain = [each[0] for each in pairs]
    over = [each[1] - each[0] for each in pairs]
    rows = [
        row("update-plain-step", "torch", plain, "us"),
        row("update-overhead", "hpcft", over, "us", note="run.update beyond optimizer.step and zero_grad; alone"),
    ]
    return rows + at_rest()


def at_rest() -> list[Row]:
    """CPU and memory of keeper, agent and pool on one node while two workers make 20 ms steps."""
    with place_for("rest") as place:
        timeline = Timeline(place)
        with started(*hpcft_job(place, 1, 2), place / "log") as pids:
            if not timeline.await_steps(100, 120.0):
                return []
            parts = {_part(each): each for each in psutil.Process(pids[0]).children(recursive=True) if _part(each)}
            before = {name: sum(each.cpu_times()[:2]) for name, each in parts.items()}
            began = time.monotonic()
            time.sleep(20.0)
            elapsed = time.monotonic() - began
            rows = []
            for name, each in sorted(parts.items()):
                used = sum(each.cpu_times()[:2]) - before[name]
                rows.append(row(f"rest-cpu-{name}", "hpcft", [100 * used / elapsed], "%", note="of one core"))
                memory = each.memory_full_info()
                rows.append(
                    row(
                        f"rest-memory-{name}",
                        "hpcft",
                        [memory.pss / 2**20],
                        "MiB",
                        note=f"PSS; RSS {memory.rss / 2**20:.0f}",
                    )
                )
            return rows


def _part(each: psutil.Process) -> str:
    try:
        line = each.cmdline()
        parent = each.parent()
    except psutil.Error:
        return ""
    if "hpcft.keeper" in line:
        return "keeper"
    if "hpcft.node" in line:
        return "agent"
    if "hpcft.pool" in line:
        return "pool" if parent is not None and "hpcft.keeper" in parent.cmdline() else ""
    return ""
