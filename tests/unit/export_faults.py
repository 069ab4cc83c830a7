"""Run as a script: exports a checkpoint, and dies at each durable system call, one after another.

Each time the target must be what it was, or complete; and the next export must find its way and leave nothing else.
Prints one JSON object: for each format how often the target was old, absent, or new. A broken promise is a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from checkpoint_samples import contents, facts, listing, save
from system_calls import interrupted

from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.export import Format, export
from hpcft.checkpoint.tree import flatten

KILLED = 99
FORMATS = {
    "torch": (Format.TORCH, None),
    "safetensors": (Format.SAFETENSORS, None),
    "sharded": (Format.SAFETENSORS, 8_000),
    "dcp": (Format.DCP, None),
}


OLD, NEW = ("model",), ("model", "extra")
"""So that two exports can be told apart by their sizes."""


def write(checkpoint: Path, target: Path, kind: str, force: bool, only: tuple[str, ...] = NEW) -> None:
    to, limit = FORMATS[kind]
    export(checkpoint, target, to, only=only, max_shard_bytes=limit, force=force)


def killed_at(number: int, checkpoint: Path, target: Path, kind: str, force: bool) -> bool:
    """False: the export was over before that call."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, KILLED), f"call {number}: status {status}"
        return status == KILLED
    try:
        with interrupted(number, lambda name: os._exit(KILLED)):
            write(checkpoint, target, kind, force)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def shape(target: Path) -> object:
    """What an export is made of, as far as two exports of one state are the same."""
    if not target.exists():
        return None
    if target.is_dir():
        return {name: len(data) for name, data in contents(target).items() if name != ".metadata"} | {
            "complete": (target / ".metadata").exists()
        }
    return target.stat().st_size


def every_call(base: Path, checkpoint: Path, kind: str, force: bool) -> dict[str, int]:
    """`force`: over an earlier export."""
    found = {"before": 0, "after": 0}
    reference = base / "reference"
    write(checkpoint, reference, kind, False)
    complete = shape(reference)
    number = 0
    while True:
        number += 1
        place = base / f"at-{number}"
        place.mkdir()
        target = place / "target"
        if force:
            write(checkpoint, target, kind, False, OLD)
        before = shape(target)
        assert before != complete
        if not killed_at(number, checkpoint, target, kind, force):
            return found
        after = shape(target)
        assert after in (before, complete), f"{kind}, call {number}: {after}"
        found["after" if after == complete else "before"] += 1
        write(checkpoint, target, kind, True)
        assert shape(target) == complete, f"{kind}, call {number}"
        assert listing(place) == ["target"], f"{kind}, call {number}: {listing(place)}"


def main() -> None:
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    (base / "run").mkdir()
    state = {"model": {"w": torch.randn(40, 50), "b": torch.randn(50)}, "extra": {"x": torch.ones(3), "n": 1}}
    checkpoint = commit(base / "run", save(base / "run", flatten(state), 1, world_size=2), facts()).directory
    result = {}
    for kind, force in [*((kind, False) for kind in FORMATS), ("torch", True), ("sharded", True)]:
        place = base / f"{kind}-{force}"
        place.mkdir()
        result[place.name] = every_call(place, checkpoint, kind, force)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
