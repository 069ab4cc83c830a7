"""Run as a script: saves, commits and retires, with a fault at every durable system call, one after another.

For each call number a child process (forked, so that it costs milliseconds) goes through the whole life of a
checkpoint on top of an intact older one: carriers write what lies in arenas, the leader commits and retires. At that
call it dies, or gets an I/O error, or is stopped until a later leader has done all of it. The parent then does what a
successor would do, and checks what must hold. Prints one JSON object; any violated promise is a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from checkpoint_samples import (
    NONCE,
    Copy,
    committed,
    copied,
    facts,
    latest_flaw,
    same_tensors,
    save,
    sweep,
    training_state,
)
from system_calls import interrupted

from hpcft.checkpoint.commit import CommitError, commit
from hpcft.checkpoint.layout import checkpoint_name, parse_name
from hpcft.checkpoint.load import load
from hpcft.checkpoint.read import entries, verify
from hpcft.checkpoint.retention import discard, emptying, retire, stale
from hpcft.checkpoint.tree import FlatState, flatten
from hpcft.checkpoint.write import SaveError
from hpcft.ids import Generation, Step, Term

KILLED, FAILED = 99, 98

FIRST, SECOND, THIRD = (checkpoint_name(Step(step), Generation(1)) for step in (1, 2, 3))
SUCCESSORS = checkpoint_name(Step(2), Generation(2))

Act = Callable[[str], None]


def die(name: str) -> None:
    os._exit(KILLED)


def fail(name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def carry(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy.carry()


def live(root: Path, copies: Sequence[Copy]) -> None:
    """From what lies in memory to a committed checkpoint, and the retirement of the one before."""
    try:
        commit(root, [copy.carry() for copy in copies], facts(FIRST))
    except (SaveError, CommitError) as error:
        assert os.strerror(errno.EIO) in error.message, error.message
        give_up(root, SECOND)
        return
    sweep(root, retire(entries(root), 1, None, frozenset()))


def give_up(root: Path, name: str) -> None:
    """What the leader does about a save of which a part has failed."""
    discard(root, name, NONCE)
    for _ in emptying(root):
        pass


def child(number: int, act: Act, do: Callable[[], None]) -> int:
    """Exit status of a process in which the `number`-th call was replaced by `act`; 0: there was no such call."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        with interrupted(number, act) as seen:
            try:
                do()
            except OSError as error:  # of retention: the leader's thread says so, and goes on
                assert error.errno == errno.EIO
        status = FAILED if len(seen) >= number else 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


class Checks:
    """States are made once: a thousand checks have three of them."""

    def __init__(self, base: Path) -> None:
        self._states: dict[int, FlatState] = {}
        self.template = base / "template"
        self.template.mkdir()
        committed(self.template, 1)

    def state(self, step: int) -> FlatState:
        if step not in self._states:
            self._states[step] = flatten(training_state(step))
        return self._states[step]

    def root(self, base: Path, number: int) -> Path:
        """A directory with one committed checkpoint."""
        return shutil.copytree(self.template, base / f"at-{number}")

    def newest(self, root: Path, context: str) -> str:
        """Whatever has happened: what is offered is whole, and the newest of it is bit for bit what was saved."""
        offered = entries(root)
        assert offered, f"{context}: nothing is left"
        for entry in offered:
            assert verify(entry.directory) == [], context
        newest = offered[-1]
        assert same_tensors(load(newest.directory), self.state(newest.step)), f"{context}: other bits"
        flaw = latest_flaw(root)
        assert not flaw or "is not there" in flaw, f"{context}: {flaw}"
        return newest.name

    def next_generation(self, root: Path, context: str) -> None:
        """It cleans up, and saves the same step anew."""
        parent = entries(root)[-1].name
        sweep(root, stale(root, Generation(2)))
        assert_clean(root, context)
        commit(root, save(root, self.state(2), 2, generation=2, world_size=3), facts(parent))
        again = entries(root)[-1]
        assert again.name == SUCCESSORS, context
        assert verify(again.directory) == [], context
        assert latest_flaw(root) == "", context

    def next_save(self, root: Path, context: str) -> None:
        """In the same generation, as soon as the fault is gone."""
        assert not any(path.name.startswith(".tmp-") for path in root.iterdir()), context
        commit(root, save(root, self.state(3), 3, world_size=1), facts(FIRST))
        assert self.newest(root, context) == THIRD, context


def assert_clean(root: Path, context: str) -> None:
    left = {path.name for path in root.iterdir()} - {"LATEST", ".trash"}
    assert all(parse_name(name) for name in left), f"{context}: {left}"
    assert not any((root / ".trash").iterdir()) if (root / ".trash").exists() else True, context


def every_call(base: Path, checks: Checks, act: Act, expected: int) -> dict[str, int]:
    """All processes die at each call, or it fails."""
    found: dict[str, int] = {}
    with copied(base, 2, ledger=Path(__file__)) as copies:
        for number in range(1, 1000):
            context = f"{act.__name__} at call {number}"
            root = checks.root(base, number)
            here = [replace(copy, job={**copy.job, "root": str(root)}) for copy in copies]
            status = child(number, act, partial(live, root, here))
            if status == 0:
                break
            assert status == expected, f"{context}: status {status}"
            newest = checks.newest(root, context)
            found[newest] = found.get(newest, 0) + 1
            if status == FAILED:
                checks.next_save(root, context)
            checks.next_generation(root, context)
    return found


def every_call_of_carriers(base: Path, checks: Checks) -> int:
    """A carrier dies at each call; agents and leader do not."""
    with copied(base, 2, ledger=Path(__file__)) as copies:
        for number in range(1, 1000):
            context = f"carrier killed at call {number}"
            root = checks.root(base, number)
            here = [replace(copy, job={**copy.job, "root": str(root)}) for copy in copies]
            status = child(number, die, partial(carry, here))
            if status == 0:
                return number - 1
            assert status == KILLED, f"{context}: status {status}"
            give_up(root, SECOND)
            assert checks.newest(root, context) == FIRST, context
            checks.next_save(root, context)
            checks.next_generation(root, context)
    raise AssertionError("a save has no end")


def late_leader(base: Path, checks: Checks) -> dict[str, int]:
    """The leader is stopped at each call of its commit, and wakes when its successor has committed the same step."""
    found = {"committed": 0, "refused": 0}
    for number in range(1, 1000):
        context = f"stopped at call {number} of its commit"
        root = checks.root(base, number)
        reports = save(root, checks.state(2), 2, world_size=1)

        def succeed(name: str, root: Path = root) -> None:
            sweep(root, stale(root, Generation(2)))
            done = save(root, checks.state(2), 2, generation=2, world_size=1)
            commit(root, done, replace(facts(FIRST), term=Term(2)))

        with interrupted(number, succeed) as seen:
            try:
                commit(root, reports, facts(FIRST))
                found["committed"] += 1
            except CommitError:
                found["refused"] += 1
        if len(seen) < number:
            return found
        assert checks.newest(root, context) == SUCCESSORS, context
        sweep(root, stale(root, Generation(3)))
        assert_clean(root, context)
    raise AssertionError("a commit has no end")


def retries(base: Path, checks: Checks) -> int:
    """The same commit, again, after an error at each of its calls: it picks up, whatever had been done."""
    number = 0
    while True:
        number += 1
        root = base / f"again-{number}"
        root.mkdir()
        state = checks.state(2)
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
    checks = Checks(base)
    for name in ("killed", "failed", "carrier", "late", "retried"):
        (base / name).mkdir()
    found = {
        "killed": every_call(base / "killed", checks, die, KILLED),
        "failed": every_call(base / "failed", checks, fail, FAILED),
        "carrier": every_call_of_carriers(base / "carrier", checks),
        "late": late_leader(base / "late", checks),
        "retries": retries(base / "retried", checks),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
