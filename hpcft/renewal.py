"""A leader's claim on its term, shown in the run directory again and again.

On a thread of its own: a file system that hangs stops only this, and `membership.may_lead` says for how long a leader
may go on without. Blocking is all that this thread does; the loop hears of each completed renewal, with the time at
which its write began.
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
        self._done = False
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
        self.close()
        try:
            terms.renew(self._directory, self._term, TermLease(self._count + 1_000_000, released=True))
        except OSError as error:
            log.warning("the term could not be released: %s", error)

    def _renew(self) -> None:
        while not self._done:
            began = time.monotonic()
            self._count += 1
            try:
                terms.renew(self._directory, self._term, TermLease(self._count))
            except Deposed as deposed:
                self._loop.call_soon_threadsafe(self._deposed, str(deposed))
                return
            except OSError as error:
                log.warning("the term could not be renewed: %s", error)
            else:
                if not self._done:
                    self._loop.call_soon_threadsafe(self._renewed, began)
            self._wake.wait(self._interval)
            self._wake.clear()
