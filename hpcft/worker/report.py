"""What a worker tells its agent about the exception that ends it: one packet, while the traceback goes to stderr.

The agent decides from it whether this is the user's bug (same exception, same place, same step again), the failure of
something around the program (`fault`), or the echo of another rank's death (`collective`), so the packet names the
user's own line and not the library's.
"""

from __future__ import annotations

import os
import select
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path

import orjson

from hpcft.surroundings import chain, fault, text_of

_MESSAGE_LIMIT = 4_000
_TRACEBACK_LIMIT = 24_000
_SEND_SECONDS = 1.0
_MARK = "__hpcft_reported__"

_COLLECTIVE_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
_COLLECTIVE_PHRASES = (
    "gloo/transport",
    "third_party/gloo",
    "Connection closed by peer",
    "Application timeout caused pair closure",
    "NCCL error",
    "NCCL communicator",
    "Watchdog caught collective operation timeout",
)


def report_exception(control: int, error: BaseException, step: int | None) -> bool:
    """Send `error` over the control channel, a SOCK_SEQPACKET descriptor, once per exception.

    Never raises and never blocks for long: the process is about to end, and its traceback is on stderr anyway.
    Returns whether the agent has it (now or before).
    """
    if getattr(error, _MARK, False):
        return True
    packet = orjson.dumps(
        {
            "kind": "exception",
            "type": _name_of(type(error)),
            "message": _clean(text_of(error), _MESSAGE_LIMIT),
            "step": step,
            "where": where(error),
            "collective": is_collective(error),
            "fault": fault(error),
            "traceback": _clean("".join(traceback.format_exception(error)), _TRACEBACK_LIMIT),
        }
    )
    poller = select.poll()
    try:
        poller.register(control, select.POLLOUT)
        if not poller.poll(_SEND_SECONDS * 1000):
            return False
        os.write(control, packet)
    except OSError:
        return False
    with suppress(AttributeError):  # an exception class with __slots__: it may be reported twice
        setattr(error, _MARK, True)
    return True


def is_collective(error: BaseException) -> bool:
    """Whether the exception, or one that it was raised from, comes out of a collective or the store.

    Such an error usually follows another rank's failure, and then does not count as the user's.
    """
    for link in chain(error):
        if any(kind.__name__ in _COLLECTIVE_TYPES for kind in type(link).__mro__):
            return True
        if isinstance(link, RuntimeError) and any(phrase in text_of(link) for phrase in _COLLECTIVE_PHRASES):
            return True
    return False


def where(error: BaseException) -> str:
    """`file:line` of the innermost frame that is the user's own code; else of the innermost one of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 0}"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if _is_users(frame[0])]
    name, line = (own or frames or [("?", 0)])[-1]
    return f"{name}:{line}"


def _is_users(filename: str) -> bool:
    return not filename.startswith("<") and not str(Path(filename).absolute()).startswith(_LIBRARIES)


_LIBRARIES = (
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    f"{Path(__file__).absolute().parent.parent}{os.sep}",
)


def _name_of(kind: type[BaseException]) -> str:
    return kind.__name__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__name__}"


def _clean(text: str, limit: int) -> str:
    """The end of `text` (the beginning of a message matters less than where it broke), valid as UTF-8."""
    if len(text) > limit:
        text = f"[{len(text) - limit} characters left out] …" + text[-limit:]
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
