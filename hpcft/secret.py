"""The run's secret: who may speak for a run.

Anyone who can read the file `secret` in the run directory may command the run and report for its nodes, nobody
else: streams, lifelines and heartbeats all prove knowledge of it. It is 32 random bytes, written as hex, once per
run.

The file appears whole or not at all, and by link(2), which refuses an existing name (`durable.create`): of several
agents that start at once exactly one secret wins and all others read that one. It is refused when the group or
others could read it, or when somebody else owns it: a secret that leaked, or that another user chose, protects
nothing.

The secret itself never leaves the process. Each use derives a key of its own from it, so that what is signed for
one purpose cannot be shown for another.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import stat
from pathlib import Path

from hpcft import durable
from hpcft.errors import UnusableError

LENGTH = 32
"""Bytes of a secret; the file holds twice as many hex digits and a newline."""


def create(path: Path) -> bytes:
    """Make the secret file unless it exists already, and return the secret that it holds.

    Raises:
        UnusableError: the directory cannot be written, or the existing file is not to be trusted (see `load`).
    """
    try:
        with contextlib.suppress(FileExistsError):
            if path.is_symlink() or path.exists():  # looked for first: a run goes on when its disk is full
                return load(path)
            durable.create(path, os.urandom(LENGTH).hex().encode() + b"\n", mode=0o600)
    except OSError as error:
        raise UnusableError(
            f"cannot write the run's secret {path}: {error.strerror}",
            "check that the run directory exists, is yours, and lies on a file system with hard links",
        ) from error
    return load(path)


def load(path: Path) -> bytes:
    """Read the secret of a run.

    Raises:
        UnusableError: no such file, not owned by this user, readable by group or others, or not a secret at all.
    """
    try:
        # A symbolic link could lead to a file that somebody else replaces after the checks below.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnusableError(
            f"cannot read the run's secret {path}: {error.strerror}",
            "use the account that started the run; the run directory must be the one that the run uses",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableError(f"the run's secret {path} is not a regular file", f"remove it: rm {path}")
        if status.st_uid != os.geteuid():
            raise UnusableError(
                f"the run's secret {path} belongs to user {status.st_uid}, not to user {os.geteuid()}",
                f"use that user's account, or give the file back: chown {os.geteuid()} {path}",
            )
        if status.st_mode & 0o077:
            raise UnusableError(
                f"the run's secret {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o})",
                f"chmod 600 {path}",
            )
        text = file.read(4096)
    digits = text.removesuffix(b"\n")
    try:
        secret = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) != LENGTH or len(digits) != 2 * LENGTH:
        raise UnusableError(
            f"the run's secret {path} does not hold {2 * LENGTH} hex digits",
            f"stop the run, remove the file (rm {path}) and start again: a new secret is made",
        )
    return secret


def derive(secret: bytes, purpose: str) -> bytes:
    """The key for one purpose, 32 bytes (the expand step of HKDF with SHA-256, RFC 5869; one block suffices)."""
    return hmac.digest(secret, b"hpcft " + purpose.encode() + b"\x01", hashlib.sha256)


def tag(key: bytes, *parts: bytes | str | int) -> bytes:
    """HMAC-SHA256 over the parts, 32 bytes. Kind and length of each part are covered, so that none can be shifted
    into its neighbour: `("ab", "c")`, `("a", "bc")` and `(b"ab", b"c")` have different tags."""
    message = bytearray()
    for part in parts:
        match part:
            case bytes():
                kind, encoded = b"b", part
            case str():
                kind, encoded = b"s", part.encode()
            case int():
                kind, encoded = b"i", b"%d" % part
        message += kind + len(encoded).to_bytes(8, "big") + encoded
    return hmac.digest(key, message, hashlib.sha256)
