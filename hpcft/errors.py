"""What can go wrong for a user, and the exit code that says so.

Every error that reaches a user is an `HpcftError`: one message with what happened and why, and a hint that
names the command or the setting that helps. The command line prints both and exits with the error's code.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Documented in docs/exit-codes.md; a number never changes its meaning."""

    OK = 0
    """Done; for a run: it finished."""
    INTERNAL = 1
    """A defect of hpcft itself; the traceback is worth a bug report."""
    USAGE = 2
    """Bad command line or configuration."""
    USER_CODE = 10
    """The training code fails in a way that a retry does not cure."""
    GAVE_UP = 11
    """A budget is spent, or no progress was made in several generations."""
    CANCELLED = 12
    """Stopped by an operator or by scancel."""
    BELOW_MINIMUM = 13
    """The allocation cannot hold `nodes.min` nodes."""
    UNUSABLE = 14
    """The surroundings are not usable: run directory, port, secret, Slurm command."""
    NOT_FOUND = 15
    """No such run, checkpoint, node or rank."""
    DAMAGED = 16
    """A checkpoint failed its verification."""
    DIFFERENT = 17
    """Two checkpoints that were compared differ."""
    REQUEUED = 75
    """The run goes on in another start (EX_TEMPFAIL): not a failure."""


class HpcftError(Exception):
    """Base of all errors meant for a user: `message` says what and why, `hint` what to do next."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(HpcftError):
    exit_code = ExitCode.USAGE


class BelowMinimumError(HpcftError):
    exit_code = ExitCode.BELOW_MINIMUM


class UnusableError(HpcftError):
    exit_code = ExitCode.UNUSABLE


class NotFoundError(HpcftError):
    exit_code = ExitCode.NOT_FOUND


class DamagedError(HpcftError):
    exit_code = ExitCode.DAMAGED
