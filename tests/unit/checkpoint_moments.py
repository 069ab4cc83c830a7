"""Run as a script, with a directory, a number and a seed: so many times a node that saves as fast as it can is hit.

The node is an agent that leads, its worker and its carrier, in processes of their own. At a random moment one of them
gets SIGKILL, or all of them. What is committed then must be whole, bit for bit what the worker saved, and not older
than what was committed before the hit; the next generation goes on from it. Prints one JSON object; any violated
promise is a traceback.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from checkpoint_samples import same_tensors
from saving_node import RUN, SavingNode, carriers_of, spec_of
from torch import nn

from hpcft import process
from hpcft.checkpoint.layout import CheckpointEntry, parse_name, parse_staging
from hpcft.checkpoint.load import load
from hpcft.checkpoint.read import entries, verify
from hpcft.checkpoint.tree import flatten
from hpcft.commits import Retention
from hpcft.events import CheckpointCommitted, CheckpointRef
from hpcft.ids import Step
from hpcft.page import NodePage
from hpcft.worker.link import Link
from hpcft.worker.saving import Saving, named

VICTIMS = ("carrier", "worker", "agent", "everything")
KEEP = 3


def state(step: int) -> nn.Module:
    """Some 400 KiB, other bits in each step."""
    torch.manual_seed(step)
    return nn.Linear(300, 340)


def work(directory: Path, generation: int, page: NodePage, channel: socket.socket, step: int) -> None:
    """The worker: trains without end, and saves each step."""
    spec = spec_of(directory, generation, 0, 1, page.fd, channel.fileno())
    saving = Saving(spec, Link(spec), torch.device("cpu"))
    model = state(step)
    saving.remember(named({"model": model}), None, None)
    saving.prepare()
    while True:
        step += 1
        model.load_state_dict(state(step).state_dict())
        saving.save(Step(step))


async def lead(directory: Path, generation: int, page: NodePage, channel: socket.socket) -> None:
    """Agent and leader of a generation."""
    node = SavingNode(directory, directory / "checkpoints", page=page, retained=Retention(KEEP, 0))
    node.generation = generation - 1
    lineage = [CheckpointRef(each.step, each.generation) for each in entries(node.root)]
    node.begin_with(channel)
    while True:
        event = await node.outcome()
        if isinstance(event, CheckpointCommitted):
            lineage.append(event.checkpoint)
            node.retain(tuple(lineage))


def node_of(directory: Path, generation: int, step: int) -> int:
    """Starts a node; the pid of its agent, whose children are the worker and the carrier."""
    pid = os.fork()
    if pid:
        return pid
    try:
        page = NodePage.create(1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        if os.fork() == 0:
            ours.close()
            work(directory, generation, page, theirs, step)
        theirs.close()
        asyncio.run(lead(directory, generation, page, ours))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def newest(root: Path) -> CheckpointEntry | None:
    return entries(root)[-1] if entries(root) else None


def order(entry: CheckpointEntry | None) -> tuple[int, int]:
    return (0, 0) if entry is None else (entry.generation, entry.step)


def until_committed(root: Path, since: tuple[int, int], agent: int) -> None:
    deadline = time.monotonic() + 60
    while order(newest(root)) <= since:
        assert time.monotonic() < deadline and process.lives(agent), "nothing is committed"
        time.sleep(0.002)


def hit(agent: int, victim: str) -> None:
    below = process.children(agent)
    carriers = carriers_of(agent)
    workers = [pid for pid in below if pid not in carriers]
    for pid in {"carrier": carriers, "worker": workers, "agent": [agent], "everything": [agent, *below]}[victim]:
        process.send(pid, signal.SIGKILL)


def end() -> None:
    left = process.end_descendants(60)
    assert not left, left


def check(root: Path, generation: int, since: tuple[int, int], context: str) -> CheckpointEntry:
    offered = entries(root)
    for entry in offered:
        assert verify(entry.directory, RUN) == [], f"{context}: {entry.name}"
    last = offered[-1]
    assert order(last) >= since, f"{context}: {since} was committed, and {last.name} is the newest"
    found = load(last.directory, run=RUN)
    expected = flatten({"model": state(last.step).state_dict()})
    kept = {name: tensor for name, tensor in found.tensors.items() if name.startswith("model.")}
    assert same_tensors(type(found)(kept, None), expected), f"{context}: other bits in {last.name}"
    for path in root.iterdir():
        if staging := parse_staging(path.name):
            parsed = parse_name(staging[0])
            assert parsed is not None and parsed[1] == generation, f"{context}: {path.name} was not swept"
    return last


def main() -> None:
    torch.set_num_threads(1)
    directory, moments, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    root = directory / "checkpoints"
    root.mkdir()
    process.become_subreaper()
    dice = random.Random(seed)
    hits: Counter[str] = Counter()
    last: CheckpointEntry | None = None
    for moment in range(1, moments + 1):
        victim = dice.choice(VICTIMS)
        context = f"moment {moment} of seed {seed}: {victim}"
        agent = node_of(directory, moment, 0 if last is None else last.step)
        try:
            until_committed(root, order(last), agent)
            time.sleep(dice.uniform(0.0, 0.08))
            before = order(newest(root))
            hit(agent, victim)
            hits[victim] += 1
            if victim == "carrier":
                until_committed(root, before, agent)
            elif victim == "worker":
                time.sleep(dice.uniform(0.0, 0.03))
        finally:
            end()
        last = check(root, moment, before, context)
    left = len(entries(root))
    assert left < 10 * KEEP, f"{left} checkpoints are left: retention is behind"
    print(json.dumps({"hits": hits, "generations": moments, "last step": 0 if last is None else last.step}))


if __name__ == "__main__":
    main()
