"""The first lines that run in dist/hpcft, before anything is unpacked (it becomes the archive's `__main__`).

The binary is dropped onto a shared file system and started on every node. Each node unpacks it once, to a directory
of its own user on a local disk: SHIV_ROOT, else TMPDIR or /tmp, which must be local. There it stays, for other starts.
"""

import fcntl
import os
import platform
import stat
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

BUILT_FOR = ("{python}", "{machine}")


UNUSABLE = 14
"""As in hpcft.errors.ExitCode, which cannot be imported yet."""


def refuse(why: str, hint: str) -> NoReturn:
    sys.stderr.write("error: " + why + "\nhint: " + hint + "\n")
    sys.exit(UNUSABLE)


def node_local_root() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp", f"hpcft-{os.getuid()}")


def prepare(root: Path) -> None:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        refuse(f"cannot unpack to {root}: {error.strerror}", "set SHIV_ROOT to a directory on a local disk")
    # Whoever owns the directory decides what runs: in /tmp somebody else could have made it first.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        refuse(f"{root} belongs to somebody else, or others can write it", "set SHIV_ROOT to a directory of your own")
    # A shared lock on a directory tells systemd-tmpfiles that what lies in it is in use, however old it is. Held until
    # this process ends, also when it becomes another program (on a node, the keeper), and by what that forks.
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.set_inheritable(lock, True)


def main() -> None:
    here = (sysconfig.get_python_version(), platform.machine())
    if here != BUILT_FOR:
        refuse(
            f"this binary is for Python {BUILT_FOR[0]} on {BUILT_FOR[1]}; "
            f"{sys.executable} is Python {here[0]} on {here[1]}",
            f"start it with the right one: python{BUILT_FOR[0]} {sys.argv[0]}",
        )
    root = Path(os.environ.setdefault("SHIV_ROOT", str(node_local_root())))
    prepare(root)
    import _bootstrap

    _bootstrap.bootstrap()


main()
