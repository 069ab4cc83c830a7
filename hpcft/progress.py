"""What changed between two looks at a run, as lines for a person who watches it start to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from hpcft.status import goodput
from hpcft.units import counted, human_duration

_LINE_SECONDS = 2.0
_STATE_SECONDS = 10.0
"""Where there is nothing to say but that time goes by."""


class Reporter:
    """Turns successive snapshots of `status.json` into lines; says nothing twice.

    Without `counts_steps` it is a plain command's run, of whose steps nothing is known.
    """

    def __init__(self, say: Callable[[str], None], *, counts_steps: bool = True) -> None:
        self._say = say
        self._counts_steps = counts_steps
        self._state = ""
        self._generation = 0
        self._checkpoints: set[tuple[int, int]] = set()
        self._incidents: set[tuple[int, bool]] = set()
        self._line_at = 0.0
        self._first = True

    def see(self, status: Mapping[str, Any]) -> None:
        """Report what is new in this snapshot."""
        if self._first:
            # history of earlier starts is not news
            self._first = False
            self._checkpoints = {_checkpoint(each) for each in status["checkpoints"]}
            closed = [each for each in status["incidents"] if each["downtime_seconds"] is not None]
            self._incidents = {(each["number"], over) for each in closed for over in (False, True)}
        self._see_new_incidents(status)  # before the generation that comes of them
        if status["generation"] != self._generation and status["world_size"]:
            self._generation = status["generation"]
            members = sum(bool(node["ranks"]) for node in status["nodes"])
            self._say(
                f"generation {self._generation}  {counted(status['world_size'], 'rank')} on "
                f"{counted(members, 'node')}{self._beginning(status)}"
            )
        self._see_ends_of_incidents(status)
        for each in status["checkpoints"]:
            if _checkpoint(each) not in self._checkpoints:
                self._checkpoints.add(_checkpoint(each))
                self._say(f"checkpoint  step {each['step']} is durable")
        changed = status["state"] != self._state
        self._state = status["state"]
        if status["verdict"] is not None:
            if changed:
                self._say(_summary(status, self._counts_steps))
                self._say_last_words(status)
        elif self._counts_steps:
            if self._state == "training" and not changed and self._is_due(_LINE_SECONDS):
                self._say(_line(status))
        elif self._is_due(0.0 if changed else _STATE_SECONDS):
            self._say(f"{self._state}  {human_duration(status['elapsed_seconds'])}")

    def _is_due(self, seconds: float) -> bool:
        """Whether the last line that came by time is so long ago; then the next one comes now."""
        now = time.monotonic()
        if now < self._line_at + seconds:
            return False
        self._line_at = now
        return True

    def _say_last_words(self, status: Mapping[str, Any]) -> None:
        """Of the worker for which the run was given up: the reason is there, more often than not."""
        if status["state"] != "failed" or not status["incidents"]:
            return
        last = status["incidents"][-1]
        if last["last_output"]:
            self._say(f"last output of {last['culprit'].partition(':')[0]}:")
            for line in last["last_output"]:
                self._say(f"    {line}")

    def _beginning(self, status: Mapping[str, Any]) -> str:
        if not self._counts_steps:
            return ""
        restored = status["restored"]
        if restored is None:
            return ", from the beginning"
        if restored.get("memory"):  # an earlier version's file does not say it
            return f", from the copy of step {restored['step']} in memory"
        return f", from the checkpoint of step {restored['step']}"

    def _see_new_incidents(self, status: Mapping[str, Any]) -> None:
        for incident in status["incidents"]:
            number = incident["number"]
            if (number, False) not in self._incidents:
                self._incidents.add((number, False))
                self._say(f"incident #{number}  {incident['cause']}: {incident['culprit']}")

    def _see_ends_of_incidents(self, status: Mapping[str, Any]) -> None:
        for incident in status["incidents"]:
            number, over = incident["number"], incident["downtime_seconds"] is not None
            if over and (number, True) not in self._incidents:
                self._incidents.add((number, True))
                lost = incident["steps_lost"]
                repeated = "" if not lost else f", {counted(lost, 'step')} {'is' if lost == 1 else 'are'} repeated"
                down = incident["downtime_seconds"]
                recovered = f"recovered in {down:.2f} s{repeated}: " if down else ""
                self._say(f"incident #{number}  {recovered}{incident['reason']}")


def _checkpoint(each: Mapping[str, Any]) -> tuple[int, int]:
    return each["step"], each["generation"]


def _line(status: Mapping[str, Any]) -> str:
    parts = [f"step {status['step']}" + (f"/{status['total_steps']}" if status["total_steps"] else "")]
    if status["loss"] is not None:
        parts.append(f"loss {status['loss']:.3f}")
    if status["steps_per_second"]:
        parts.append(f"{status['steps_per_second']:.1f} steps/s")
    if status["tokens_per_second"]:
        parts.append(f"{status['tokens_per_second']:,.0f} tokens/s")
    if status["eta_seconds"] is not None:
        parts.append(f"ETA {human_duration(status['eta_seconds'])}")
    return "  ".join(parts)


def _summary(status: Mapping[str, Any], counts_steps: bool) -> str:
    verdict, elapsed = status["verdict"], human_duration(status["elapsed_seconds"])
    took = f"in {elapsed}"
    if counts_steps:
        loss = "" if status["loss"] is None else f"final loss {status['loss']:.4f}, "
        took = f"{loss}goodput {goodput(status)}"
    outcome = "" if verdict["reason"].startswith(verdict["outcome"]) else f"{verdict['outcome']}  "
    return f"{outcome}{verdict['reason']}, {took}, {counted(len(status['incidents']), 'incident')}"
