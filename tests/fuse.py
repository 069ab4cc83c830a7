"""A directory of this machine through `tests/cluster/sharedfs.py`, which hangs, fails and recovers by signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpcft import process

_SERVER = Path(__file__).resolve().parent / "cluster" / "sharedfs.py"

HANG, GO_ON = signal.SIGSTOP, signal.SIGCONT
"""Callers can be killed meanwhile."""
NO_ANSWER, GOOD = signal.SIGHUP, signal.SIGUSR2
"""Callers cannot."""
BROKEN, QUOTA, UNSYNCED, DENIED = signal.SIGUSR1, signal.SIGRTMIN, signal.SIGRTMIN + 1, signal.SIGRTMIN + 2

MISSING = "" if os.geteuid() == 0 and Path("/dev/fuse").exists() else "needs root and /dev/fuse"
"""Why there is no such file system here."""


@dataclass(frozen=True)
class Server:
    pid: int

    def now(self, mood: int) -> None:
        """What its callers meet from here on."""
        process.send(self.pid, mood)
        if mood == HANG:
            while process.state_of(self.pid) != "T":
                time.sleep(0.001)
        elif mood != GO_ON:
            time.sleep(0.02)  # handlers run between two calls of the server


@contextmanager
def served(source: Path, target: Path) -> Iterator[Server]:
    """The files of `source` seen at `target`, as long as the block runs."""
    source.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    way = source.with_name(f"{source.name}-way")  # in its command line a run's directory would make it one of the run's
    way.symlink_to(target)
    subprocess.run([sys.executable, "-I", str(_SERVER), str(source), str(way)], check=True)
    way.unlink()
    server = server_of(source)
    try:
        yield server
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)
        process.send(server.pid, signal.SIGKILL)  # whoever still waits for it gets an error


def server_of(source: Path) -> Server:
    """Who serves these files."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(_SERVER).encode() in words and str(source).encode() in words:
                return Server(int(entry.name))
    raise AssertionError(f"nobody serves {source}")
