"""Processes of this machine, where Python's standard library stops: parent-death signals, subreapers, descent.

Two kernel facilities carry the promise that nothing of ours outlives its keeper:

- PR_SET_PDEATHSIG: the kernel kills a child when the *thread* that forked it ends. It covers one level only, is
  lost when the parent has died before the call (hence the check of the parent afterwards), and must not be used
  for children of a thread that ends before its process does.
- PR_SET_CHILD_SUBREAPER: orphans below us become our children, whatever session they made for themselves. So a
  subreaper that kills its descendants until `wait` says ECHILD has proof that none is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGCONT,
)
"""What Slurm or an operator says to every process of a job, and is meant for its agent."""

CARRIER_NAME = "hpcft-carrier"
"""What carriers call themselves."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent: int, death_signal: int = signal.SIGKILL) -> None:
    """Ask for `death_signal` when the forking thread of `parent` ends; when it has ended already, die now.

    Call it in the child. The request survives `exec` of a binary that is not set-uid, and is not inherited by fork.
    """
    _prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:
        os.kill(os.getpid(), death_signal)


def become_subreaper() -> None:
    """Orphaned descendants become children of this process from now on."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children(pid: int) -> list[int]:
    """Children of all threads of `pid`; empty when it is gone."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                found.extend(map(int, (task / "children").read_bytes().split()))
    if not found and not _LISTS_CHILDREN:
        found.extend(child for child, parent in _parents() if parent == pid)
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            fields = _stat(int(entry.name))
            if fields:
                yield int(entry.name), int(fields[1])


_LISTS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()
"""False on a kernel without CONFIG_PROC_CHILDREN: there all of /proc is looked through instead."""


def descendants(pid: int, without: Iterable[int] = ()) -> list[int]:
    """All processes below `pid`, parents first, leaving out the trees of `without`."""
    left_out = set(without)
    found: list[int] = []
    todo = [pid]
    while todo:
        for child in children(todo.pop()):
            if child not in left_out:
                left_out.add(child)
                found.append(child)
                todo.append(child)
    return found


def _stat(pid: int | str) -> list[bytes]:
    """Fields of /proc/PID/stat from the third one (state) on; empty when the process (or PID/task/TID) is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return text[text.rindex(b")") + 2 :].split()


def state_of(pid: int) -> str:
    """The letter of /proc/PID/stat: R, S, D, T, Z …; empty when the process is gone."""
    fields = _stat(pid)
    return fields[0].decode() if fields else ""


def lives(pid: int) -> bool:
    """Whether any thread of it is left. A killed process whose main thread has gone while another one hangs in the
    kernel has the state of a zombie."""
    try:
        tasks = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False
    return any(fields[0] not in (b"Z", b"X") for task in tasks if (fields := _stat(f"{pid}/task/{task}")))


def arguments_of(pid: int) -> list[bytes]:
    """Its command line; empty when it is gone, or is about to go: it may still hang in the kernel then."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def name_of(pid: int) -> str:
    """What it has called itself (see `take_name`), or the name of its program; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").removesuffix("\n")
    except OSError:
        return ""


def take_name(name: str) -> None:
    """Have this process shown under a name of at most 15 bytes, which stays until it is gone."""
    Path("/proc/self/comm").write_text(name)


def began_at(pid: int) -> float:
    """When the process began, in seconds of CLOCK_BOOTTIME, to a hundredth.

    Raises:
        ProcessLookupError: it is gone.
    """
    fields = _stat(pid)
    if not fields:
        raise ProcessLookupError(pid)
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def session_of(pid: int) -> int:
    """The session of a process, 0 when it is gone."""
    fields = _stat(pid)
    return int(fields[3]) if fields else 0


def send(pid: int, number: int) -> bool:
    """Signal one process; False when it does not exist."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def end_descendants(seconds: float, without: Iterable[int] = ()) -> list[int]:
    """SIGKILL and reap everything below this subreaper, again and again until nothing is left or time is up.

    Returns what would not die (uninterruptible sleep: D state), so that the caller can name it. Trees of `without`
    are left alone. A new process cannot slip through: whatever a dying process forked becomes our child.
    """
    kept = set(without)
    deadline = time.monotonic() + seconds
    while True:
        alone = _reap(kept)
        left = [pid for pid in descendants(os.getpid(), kept) if lives(pid)]
        if alone and not left:
            return []
        for pid in left:
            send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.002)


def _reap(kept: set[int]) -> bool:
    """Collect all dead children outside `kept`; True when there are no living ones outside it either."""
    try:
        if not kept:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            return False
        others = [pid for pid in children(os.getpid()) if pid not in kept]
        return sum(os.waitpid(pid, os.WNOHANG)[0] == 0 for pid in others) == 0
    except ChildProcessError:
        return not kept


def describe_status(status: int) -> str:
    """A wait status in words: `exit 1`, `SIGKILL`, `SIGSEGV (core dumped)`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"{name} (core dumped)" if os.WCOREDUMP(status) else name
    return f"exit {os.waitstatus_to_exitcode(status)}"
