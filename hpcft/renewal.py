"""A leader's claim on its term, shown in the run directory again and again.

On a thread of its own: a file system that hangs stops only this, and `membership.may_lead` says for how long a leader
may go on without. Blocking is all that this thread does; the loop hears of each completed renewal, with the time at
which its write began.

Nothing may be written after the release, for the next leader would take it for a sign of life and wait. So writes
take turns, and a renewal that was under way too long to be waited for releases the term itself when it is through.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpcft import terms
from hpcft.ids import Term
from hpcft.terms import Deposed, TermLease

log = logging.getLogger("hpcft.renewal")

RELEASE_SECONDS = 5.0
"""How long the release waits for a renewal that is under way: the file system may hang."""


class Renewal:
    """Renews every `interval` seconds. The callbacks are called in the loop that runs at construction."""

    def __init__(
        self,
        directory: Path,
        term: Term,
        interval: float,
        renewed: Callable[[float], None],
        deposed: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._term = term
        self._interval = interval
        self._renewed = renewed
        self._deposed = deposed
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Event()
        self._writing = threading.Lock()
        self._done = False
        self._released = False
        self._count = 0

    def start(self) -> None:
        threading.Thread(target=self._renew, name="hpcft-term", daemon=True).start()

    def hurry(self) -> None:
        """Renew now."""
        self._wake.set()

    def close(self) -> None:
        """Renew no more; does not wait for a write that hangs."""
        self._done = True
        self._wake.set()

    def release(self) -> None:
        """Let go of the term: the next leader need not wait. Blocks on the file system."""
        self._released = True
        self.close()
        if not self._writing.acquire(timeout=RELEASE_SECONDS):
            log.warning("the term is not released yet: a renewal has hung for %g s", RELEASE_SECONDS)
            return
        try:
            self._write_release()
        finally:
            self._writing.release()

    def _write_release(self) -> None:
        try:
            terms.renew(self._directory, self._term, TermLease(self._count + 1_000_000, released=True))
        except OSError as error:
            log.warning("the term could not be released: %s", error)

    def _renew(self) -> None:
        while not self._done:
            began = time.monotonic()
            with self._writing:
                if self._done:
                    return
                renewed = self._renew_once()
                if self._released:
                    self._write_release()
            if isinstance(renewed, Deposed):
                self._loop.call_soon_threadsafe(self._deposed, str(renewed))
                return
            if renewed is None and not self._done:
                self._loop.call_soon_threadsafe(self._renewed, began)
            self._wake.wait(self._interval)
            self._wake.clear()

    def _renew_once(self) -> OSError | None:
        self._count += 1
        try:
            terms.renew(self._directory, self._term, TermLease(self._count))
        except Deposed as deposed:
            return deposed
        except OSError as error:
            log.warning("the term could not be renewed: %s", error)
            return error
        return None
