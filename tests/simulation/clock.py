"""Simulated time: one queue of things to come."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Call = Callable[[], None]


class Clock:
    """True time, which nobody in the simulation can read."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Call]] = []
        self._order = itertools.count()

    def after(self, seconds: float, call: Call) -> None:
        heapq.heappush(self._queue, (self.now + max(0.0, seconds), next(self._order), call))

    def run_until(self, end: float, done: Callable[[], bool] = lambda: False) -> None:
        while self._queue and self._queue[0][0] <= end and not done():
            self.now, _, call = heapq.heappop(self._queue)
            call()
        if not done():
            self.now = end
