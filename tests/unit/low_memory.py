"""Run as a script, as root, with a directory: a node that saves in a memory cgroup that is too small. Prints JSON.

In a process of its own, which a limit of the kernel's may kill: memory that a test has touched before counts for the
cgroup in which that was.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from saving_node import SavingNode, saving_node
from torch import nn

from hpcft import status
from hpcft.checkpoint.read import entries, verify
from hpcft.copies import MARGIN_BYTES
from hpcft.errors import UsageError
from hpcft.membership import Timing
from hpcft.memory import headroom
from hpcft.policy import Rules
from hpcft.transitions import apply
from hpcft.world import World
from tests.unit.worlds import training

MIB = 1 << 20
SHARE = 16 * MIB
"""Little beside the margin, in which the test itself lives: it keeps, reads and compares states."""


@contextmanager
def cgroup() -> Iterator[Path]:
    """A memory cgroup below that of this process, which is in it as long as the block runs."""
    shown = Path("/proc/self/cgroup").read_text().splitlines()
    (path,) = (line.split(":")[2] for line in shown if "memory" in line.split(":")[1].split(","))
    above = Path("/sys/fs/cgroup/memory", path.lstrip("/"))
    made = above / f"hpcft-test-{os.getpid()}"
    made.mkdir()
    inner = made / "step"
    inner.mkdir()  # the limit is not that of the innermost one
    (inner / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield made
    finally:
        (above / "cgroup.procs").write_text(str(os.getpid()))
        inner.rmdir()
        made.rmdir()


def leave(made: Path, room: int) -> None:
    """Set the limit so that there are `room` bytes for copies."""
    gc.collect()
    limit = made / "memory.limit_in_bytes"
    limit.write_text("-1")
    used = int((made / "memory.usage_in_bytes").read_text())
    lines = (made / "memory.stat").read_text().splitlines()
    (cached,) = (int(line.split()[1]) for line in lines if line.startswith("total_inactive_file "))
    limit.write_text(str(used - cached + MARGIN_BYTES + room))
    assert headroom().where == f"cgroup {str(made).removeprefix('/sys/fs/cgroup/memory')}", headroom()


def warnings(node: SavingNode) -> list[str]:
    """As `hpcft status` has them."""
    world: World = apply(training("a"), node.report(), 2.0)
    found = status.snapshot(world, Rules(Timing(1.0, 3.0, 5.0), minimum_nodes=1), 2.0)["warnings"]
    assert isinstance(found, list)
    return found


async def fallbacks(directory: Path, made: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, room in (("fewer", SHARE + SHARE // 2), ("none", SHARE // 2)):
        async with saving_node(directory / name, memory=None) as node:
            node.begin(model=nn.ParameterDict({"w": nn.Parameter(torch.randn(SHARE // 4))}))
            leave(made, room)
            await node.prepare()
            slots = len(node.snapshots._shares[0].slots)
            said = warnings(node)
            for step in (1, 2):
                await node.committed(step, await node.save(step, wait=True))
            assert all(verify(entry.directory) == [] for entry in entries(node.root))
            found[name] = {"slots": slots, "warnings": said}
    async with saving_node(directory / "stop", memory=None, needs_copies=True) as node:
        node.begin(model=nn.ParameterDict({"w": nn.Parameter(torch.randn(SHARE // 4))}))
        leave(made, SHARE // 2)
        try:
            await node.prepare()
        except UsageError as error:
            found["stop"] = {"message": error.message, "hint": error.hint}
    return found


def main() -> None:
    torch.set_num_threads(1)
    with cgroup() as made:
        found = asyncio.run(fallbacks(Path(sys.argv[1]), made))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
