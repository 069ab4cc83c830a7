"""Run as a script: saves, commits and retires, with a fault at every durable system call, one after another.

For each call number, a child process (forked, so that it costs milliseconds) goes through the whole life of a
checkpoint on top of an intact older one, and dies, or gets an I/O error, at that call. The parent then does what a
successor would do, and checks what must hold. Prints one JSON object; any violated promise is a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint_samples import NONCE, committed, facts, latest_flaw, same_tensors, save, sweep, training_state
from system_calls import interrupted

from hpcft.checkpoint.commit import CommitError, commit
from hpcft.checkpoint.layout import parse_name
from hpcft.checkpoint.load import load
from hpcft.checkpoint.read import entries, verify
from hpcft.checkpoint.retention import retire, stale
from hpcft.checkpoint.tree import flatten
from hpcft.checkpoint.write import SaveError
from hpcft.ids import Generation

KILLED, FAILED = 99, 98


def live(root: Path, failures: list[str]) -> None:
    state = flatten(training_state(2))
    try:
        done = commit(root, save(root, state, 2, world_size=2), facts("step-00000001-g0001"))
        if done.latest_failure:
            failures.append(done.latest_failure)
        sweep(root, retire(entries(root), 1, None, frozenset()))
    except (SaveError, CommitError, OSError) as error:
        failures.append(str(error))


def child(root: Path, number: int, act: Callable[[str], None]) -> int:
    """Exit status of a process in which the `number`-th call was replaced by `act`; 0: there was no such call."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        failures: list[str] = []
        with interrupted(number, act) as seen:
            live(root, failures)
        status = FAILED if len(seen) >= number else 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def check(root: Path, context: str) -> str:
    """What must hold whenever and however the writer ended; returns the name of the newest checkpoint."""
    offered = entries(root)
    assert offered, f"{context}: nothing is left"
    for entry in offered:
        assert verify(entry.directory) == [], context
    newest = offered[-1]
    flat = load(newest.directory)
    assert same_tensors(flat, flatten(training_state(newest.step))), f"{context}: other bits"
    flaw = latest_flaw(root)
    assert not flaw or "is not there" in flaw, f"{context}: {flaw}"
    # The next generation cleans up, and saves the same step anew.
    sweep(root, stale(root, Generation(2)))
    left = {path.name for path in root.iterdir()} - {"LATEST", ".trash"}
    assert all(parse_name(name) for name in left), f"{context}: {left}"
    assert not any((root / ".trash").iterdir()) if (root / ".trash").exists() else True, context
    state = flatten(training_state(2))
    commit(root, save(root, state, 2, generation=2, world_size=3), facts(newest.name))
    again = entries(root)[-1]
    assert again.name == "step-00000002-g0002", context
    assert verify(again.directory) == [], context
    assert latest_flaw(root) == "", context
    return newest.name


def every_call(base: Path, act: Callable[[str], None], expected: int) -> dict[str, int]:
    found: dict[str, int] = {}
    number = 0
    while True:
        number += 1
        root = base / f"at-{number}"
        root.mkdir()
        committed(root, 1)
        status = child(root, number, act)
        if status == 0:
            break
        assert status == expected, f"call {number}: status {status}"
        newest = check(root, f"call {number}")
        found[newest] = found.get(newest, 0) + 1
    return found


def retries(base: Path) -> int:
    """The same commit, again, after an error at each of its calls: it picks up, whatever had been done."""

    def fail(name: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    number = 0
    while True:
        number += 1
        root = base / f"again-{number}"
        root.mkdir()
        state = flatten(training_state(2))
        reports = save(root, state, 2, world_size=2)
        with interrupted(number, fail) as seen:
            try:
                commit(root, reports, facts())
            except CommitError as error:
                assert "Input/output error" in error.message, error.message
        done = commit(root, reports, facts(created=5.0))
        assert verify(done.directory) == []
        assert same_tensors(load(done.directory), state)
        assert latest_flaw(root) == ""
        assert not any(path.name.startswith(f".tmp-{done.name}-{NONCE}") for path in root.iterdir())
        if len(seen) < number:
            return number - 1


def main() -> None:
    torch.set_num_threads(1)
    base = Path(sys.argv[1])

    def die(name: str) -> None:
        os._exit(KILLED)

    def fail(name: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("killed", "failed"):
        (base / name).mkdir()
    killed = every_call(base / "killed", die, KILLED)
    failed = every_call(base / "failed", fail, FAILED)
    print(json.dumps({"killed": killed, "failed": failed, "retries": retries(base)}))


if __name__ == "__main__":
    main()
