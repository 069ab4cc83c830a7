"""A rank of the checkpoint benchmark: holds a state of a given size, saves and loads it, and writes down the times.

What it is to do is in `run.config`; each of the works below reports lines of figures (see `checkpoint.py`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from limits import WAYS, Copy, Took, forget, read_raw, write_raw
from node import report_path
from systems import HPCFT, PEERS, System, Unavailable
from torch import nn

import hpcft
from hpcft.process import descendants, die_with_parent

_STEPS_ALONE = 20
_PAUSE = 0.02
"""Between two looks at the memory that is used."""


class State(nn.Module):
    """`size` bytes in `count` tensors of one size."""

    def __init__(self, size: int, count: int, device: torch.device) -> None:
        super().__init__()
        length = size // 4 // count
        pattern = torch.rand(length)  # zeros might be nothing to a disk
        tensors = [pattern.add(number).to(device) for number in range(count)]
        self.tensors = nn.ParameterList([nn.Parameter(each) for each in tensors])


class Rank:
    def __init__(self, run: hpcft.Run) -> None:
        self.run = run
        self.plan: Mapping[str, Any] = run.config
        self.place = Path(self.plan["report"])
        self._report = report_path(self.place, run.generation, run.rank).open("ab", buffering=0)
        self.size: int = self.plan["size"]
        torch.set_num_threads(self.plan["threads"])
        self.model = State(self.size, self.plan["tensors"], run.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def say(self, **figures: Any) -> None:
        self._report.write(orjson.dumps(figures) + b"\n")

    def system(self) -> System:
        name = self.plan["system"]
        if name in HPCFT:
            return HPCFT[name](self.run, self.model, self.optimizer)
        return PEERS[name](self.place, self.model)

    def together(self) -> None:
        if self.run.world_size > 1:
            dist.barrier()

    # --- works

    def save(self, system: System) -> None:
        """How long training stands still, and how long until the state is durable; beside raw copies and files."""
        share = self.size // self.run.world_size
        own = list(self.model.tensors)
        copy = Copy(own[self.run.rank :: self.run.world_size], share)
        alone = Copy(own, share) if self.run.rank == 0 and self.run.world_size > 1 else None
        ways = _Ways()
        for number in range(self.plan["warm_up"] + self.plan["repeats"]):
            figures: dict[str, Any] = {"warm": number >= self.plan["warm_up"]}
            self.together()
            own_share = copy.run()
            figures |= {"memcpy": own_share.clock, "memcpy_all": own_share.clock, "memcpy_cpu": own_share.cpu}
            self.together()
            if alone is not None:
                figures["memcpy"] = alone.run().clock
            self.together()
            began = Took.now()
            system.idle()
            idle = Took.now() - began
            self.together()
            began = Took.now()
            pending = system.save()
            returned = Took.now()
            blocked = returned - began - idle
            pending.wait()
            behind = Took.now() - returned
            figures |= {"blocked": blocked.clock, "cpu": blocked.cpu, "behind": behind.clock}
            self.together()
            if self.run.rank == 0:
                system.clear()
                if self.plan["raw"]:
                    figures["raw"] = ways.measure(figures["warm"], partial(self._write_raw, copy.arena.view))
            self.say(**figures)
            self.together()

    def _write_raw(self, image: memoryview, way: tuple[bool, int]) -> float:
        path = self.place / "raw"
        try:
            return write_raw(path, image, self.size, way)
        finally:
            path.unlink()

    def train(self, system: System) -> None:
        """How long steps take alone, and while a save goes on in the background."""
        square = torch.rand(384, 384)

        def step() -> None:
            for _ in range(8):
                torch.mm(square, square)

        for number in range(self.plan["warm_up"] + self.plan["repeats"]):
            began = time.perf_counter()
            for _ in range(_STEPS_ALONE):
                step()
            alone = (time.perf_counter() - began) / _STEPS_ALONE
            system.idle()
            pending = system.save()
            steps = 0
            began = time.perf_counter()
            while not pending.done():
                step()
                steps += 1
            beside = time.perf_counter() - began
            pending.wait()
            system.clear()
            figures = {"warm": number >= self.plan["warm_up"], "alone": alone, "steps": steps}
            self.say(**figures, beside=beside / steps if steps else None)

    def memory(self, system: System) -> None:
        """By how much the memory of all processes grows, at its most, over some saves."""
        root = os.getppid()
        before = _used(root)
        with _watched(root) as most:
            for _ in range(self.plan["warm_up"] + self.plan["repeats"]):
                system.idle()
                system.save().wait()
                system.clear()
                time.sleep(2 * _PAUSE)
        self.say(extra=most[0] - before)

    def load(self, system: System) -> None:
        """How long it takes to get back what was saved, from page cache and disk; beside raw copies and reads."""
        copy = Copy(list(self.model.tensors), self.size)
        ways = _Ways()
        raw = self.place / "raw"
        write_raw(raw, copy.arena.view, self.size, (False, 1))
        system.idle()
        system.save().wait()
        system.clear()
        for number in range(self.plan["warm_up"] + self.plan["repeats"]):
            figures: dict[str, Any] = {"warm": number >= self.plan["warm_up"], "memcpy": copy.run_digested()}
            if self.plan["cold"]:
                forget(system.saved())
                began = time.perf_counter()
                system.load()
                figures["cold_load"] = time.perf_counter() - began
                figures["raw"] = ways.measure(figures["warm"], lambda way: read_raw(raw, copy.arena.view, way))
            else:
                system.load()
            began = time.perf_counter()
            system.load()
            figures["warm_load"] = time.perf_counter() - began
            self.say(**figures)

    def leave(self, system: System) -> None:
        """Save, and die."""
        system.idle()
        system.save().wait()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    def come_back(self, took: Took) -> None:
        copy = Copy(list(self.model.tensors), self.size)
        copy.run()
        limit = min(copy.run() for _ in range(3))
        self.say(warm=True, restore=took.clock, memcpy=limit.clock)


class _Ways:
    """The raw ways to do something: all of them as long as it is warmed up, then the fastest."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[bool, int], float] = {}

    def measure(self, warm: bool, work: Any) -> float | None:
        ways = WAYS
        if warm and self._seconds:
            ways = (min(self._seconds, key=self._seconds.__getitem__),)
        for way in ways:
            try:
                self._seconds[way] = work(way)
            except OSError:  # not every file system goes around the page cache
                self._seconds[way] = float("inf")
        return min(self._seconds[way] for way in ways)


def _used(root: int) -> int:
    """Bytes that a process and all below it hold, what they share counted once, files not counted."""
    total = 0
    for pid in (root, *descendants(root)):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024
    return total


@contextmanager
def _watched(root: int) -> Iterator[list[int]]:
    most = [_used(root)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_PAUSE):
            most[0] = max(most[0], _used(root))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def train(run: hpcft.Run) -> None:
    rank = Rank(run)
    work, name = rank.plan["work"], rank.plan["system"]
    try:
        if work == "come_back" and name not in HPCFT:
            system = rank.system()
            began = Took.now()
            system.load()
            rank.come_back(Took.now() - began)
        else:
            began = Took.now()
            run.restore(model=rank.model, optimizer=rank.optimizer)
            took = Took.now() - began
            if work == "come_back":
                rank.come_back(took)
            else:
                system = rank.system()
                getattr(rank, work)(system)
                system.close()
    except Unavailable as error:
        rank.say(failed=str(error))
    except Exception as error:  # a peer's: its row says so
        if name in HPCFT:
            raise
        rank.say(failed=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:160]}")
    os._exit(0)  # no last save


if __name__ == "__main__":  # some peers start processes that import this file
    die_with_parent(os.getppid())
    hpcft.main(train)
