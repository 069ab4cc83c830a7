"""Which exceptions are the doing of what surrounds a program: a file system, the network, a GPU that is broken.

A data set on a file system that has lost its server ends every rank that reads it with an exception of the training
code, at the same step, again and again. That is no bug of the program: elsewhere, or a little later, it goes on. So
an exception is asked for its error number, and for the few texts of CUDA that only broken hardware leads to. Whatever
may be the program's own doing (a file that is not there, a permission, a full disk, an assertion on a GPU, an
"unspecified launch failure") is left to it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from hpcft.errors import HpcftError

_NUMBERS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.ECONNRESET,
        errno.ENODEV,
    }
)

_HARDWARE = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "CUDA-capable device(s) is/are busy or unavailable",
)

_RELAYED = re.compile(r"^[\w.]*(?:Error|Exception): \[Errno (\d+)\]", re.MULTILINE)
"""torch raises the exceptions of its loader processes anew: of their error numbers only the text is left."""


def fault(error: BaseException) -> str:
    """What around the program has failed, for people to read: "EIO". Empty: nothing that is known of.

    Also where the program has raised an exception of its own from it.
    """
    for link in chain(error):
        if found := _fault_of(link):
            return found
    return ""


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it was raised from, or while handling which."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # a user's __str__ may fail: the report must still go out
        return f"<its text is not available: {type(broken).__name__} in __str__>"


def _fault_of(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return errno.errorcode[error.errno]
    if isinstance(error, HpcftError) and (relayed := str(getattr(error, "fault", ""))):
        return relayed  # a sample's, from a loader process
    text = text_of(error)
    if isinstance(error, RuntimeError) and (found := next((each for each in _HARDWARE if each in text), "")):
        return found
    if text.startswith("Caught ") and "Original Traceback" in text:
        numbers = {int(number) for number in _RELAYED.findall(text)}
        return next((errno.errorcode[number] for number in sorted(numbers & _NUMBERS)), "")
    return ""
