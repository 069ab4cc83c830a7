"""Files and directories for others, outside of a run directory: there complete, or not at all.

What is written goes aside first, beside its target: `.<name>.<random>.aside`. It is synced, and only then given its
name. Whoever writes holds a lock (flock) on it, so that the next writer of the same target can tell what a killed one
has left, and removes it. On a file system without locks such a leftover stays; it is safe to delete.

A target that exists is never touched, unless it may be replaced, and is what this program wrote there before: then a
file is renamed over, and two directories change places in one step (renameat2), so that there is always one of them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from hpcft import durable
from hpcft.errors import UnusableError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def written_aside(target: Path, *, directory: bool, replace: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty file, or directory, to be filled by the block; it becomes `target` when the block is done.

    The files in a directory are synced by who writes them. `is_ours` says of a file whether it may be replaced, or be
    in a directory that is: nothing else is ever deleted. Whatever ends the block early leaves nothing behind.

    Raises:
        UsageError: there is something at `target` that may not be replaced, or no directory to put it into.
    """
    _refuse(target, directory, replace, is_ours)
    _remove_leftovers(target)
    aside, lock = _claim(target, directory)
    try:
        yield aside
        if directory:
            durable.sync_directory(aside)
        else:
            os.fsync(lock)
        _give_name(aside, target, directory, replace)
        durable.sync_directory(target.parent)
    finally:
        # Its second name, or what it has replaced; or, when something went wrong, itself.
        _remove(aside)
        os.close(lock)


def _refuse(target: Path, directory: bool, replace: bool, is_ours: Callable[[Path], bool]) -> None:
    if target.name in ("", ".."):
        raise UsageError(f"{target} is no name that an export could get", "name a file or directory that is to be made")
    if not target.parent.is_dir():
        raise UsageError(f"{target} cannot be written: there is no directory {target.parent}", "make it first")
    if not os.path.lexists(target):
        return
    if not replace:
        raise _exists(target)
    if directory and not (target.is_dir() and not target.is_symlink()):
        raise UsageError(f"{target} is no directory, so it is not replaced by one", "give another name")
    if not directory and target.is_dir():
        raise UsageError(f"{target} is a directory, so it is not replaced by a file", "give another name")
    if directory:
        foreign = sorted(path.name for path in target.iterdir() if not (path.is_file() and is_ours(path)))
        if foreign:
            raise UsageError(
                f"{target} holds {foreign[0]!r}, which is no part of an export, so it is not replaced",
                "give another name, or remove it yourself",
            )
    elif not (target.is_file() and is_ours(target)):
        raise UsageError(
            f"{target} is no earlier export, so it is not replaced", "give another name, or remove it yourself"
        )


def _exists(target: Path) -> UsageError:
    return UsageError(f"{target} exists already", "give another name, or --force, which replaces it")


def _claim(target: Path, directory: bool) -> tuple[Path, int]:
    """Makes it and locks it; who looks for leftovers may come between the two."""
    while True:
        aside = target.with_name(f".{target.name}.{token_hex(6)}.aside")
        if directory:
            aside.mkdir()
            fd = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return aside, fd
        os.close(fd)


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.iterdir():
        if not (durable.is_aside(path.name) and path.name.startswith(f".{target.name}.")):
            continue
        with suppress(OSError):  # another's, or there are no locks: it stays
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(fd)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                child.unlink()
            path.rmdir()
        else:
            path.unlink()


def _give_name(aside: Path, target: Path, directory: bool, replace: bool) -> None:
    try:
        if replace and os.path.lexists(target):
            _exchange(aside, target) if directory else aside.rename(target)
        elif directory:
            aside.rename(target)  # which refuses one that is not empty
        else:
            os.link(aside, target)
    except FileExistsError:
        # An NFS client that repeats a request whose answer was lost is told that its own name exists.
        if directory or aside.stat().st_nlink != 2:
            raise _exists(target) from None
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise _exists(target) from error
        if directory or error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        if os.path.lexists(target):  # a file system without links: as good as it gets there
            raise _exists(target) from error
        aside.rename(target)


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(libc, "renameat2", None)
    if exchange is not None:
        names = os.fsencode(one), os.fsencode(other)
        if exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    raise UnusableError(
        f"{other} is not replaced: its file system cannot exchange two directories in one step",
        "remove it first, or give another name",
    )
