"""First process (pid 1) of the head and of every node of a test cluster: `python -I init.py SPEC [OWNER_PIDFD]`.

It builds the machine from inside its fresh namespaces as the JSON file SPEC says (host name, mounts), says
`isolated` and waits for a line; then it runs commands, starts the daemons, says `ready`, and from there on only
reaps: an orphan that stayed a zombie would look like a process that hpcft left behind.

Being pid 1 it takes every process of its pid namespace with it when it ends, nested namespaces included, and with
the last process go the mounts, the network and everything else. On the head it ends when the test process does
(OWNER_PIDFD), so nothing outlives a test run, whatever ended it. Standard library only, no import of hpcft.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

MS_BIND, MS_REC = 0x1000, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    # mount(8) would resolve /proc/self/fd/N to a path, and that path may be covered by then.
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
        error = ctypes.get_errno()
        raise OSError(error, f"mount {source} on {target}: {os.strerror(error)}")


def bind(source: int, target: Path) -> None:
    mount(f"/proc/self/fd/{source}", str(target), "none", MS_BIND | MS_REC)


def build(spec: dict[str, Any]) -> None:
    socket.sethostname(spec["hostname"])
    # Everything that is to be seen is held open before anything is covered.
    wanted = {*spec["keep"], *filter(None, spec["covers"].values()), *spec["binds"]}
    held = {path: os.open(path, os.O_PATH) for path in wanted}
    for target, source in spec["covers"].items():
        if source:
            bind(held[source], Path(target))
        else:
            mount("tmpfs", target, "tmpfs", 0, "mode=755")
    for path in spec["keep"]:
        Path(path).mkdir(parents=True, exist_ok=True)
        bind(held[path], Path(path))
    for source, target in spec["binds"].items():
        bind(held[source], Path(target))
    for fd in held.values():
        os.close(fd)
    for target, options in spec["tmpfs"].items():
        mount("tmpfs", target, "tmpfs", 0, options)
    os.write(1, b"isolated\n")
    os.read(0, 16)  # the cable is being plugged in
    for command in spec["commands"]:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    owner = int(sys.argv[2]) if len(sys.argv) > 2 else None
    os.umask(0o022)
    build(spec)
    for command in spec["daemons"]:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(woken.fileno(), select.POLLIN)
    if owner is not None:
        poll.register(owner, select.POLLIN)
    os.write(1, b"ready\n")
    while True:
        reap()
        for fd, _ in poll.poll():
            if fd == owner:
                os._exit(0)
            woken.recv(4096)


if __name__ == "__main__":
    main()
