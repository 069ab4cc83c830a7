"""What changed between two looks at a run, as lines for a person who watches it start to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from hpcft.units import human_duration

_LINE_SECONDS = 2.0


class Reporter:
    """Turns successive snapshots of `status.json` into lines; says nothing twice."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
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
        if status["generation"] != self._generation and status["world_size"]:
            self._generation = status["generation"]
            members = sum(bool(node["ranks"]) for node in status["nodes"])
            self._say(f"generation {self._generation}  {status['world_size']} ranks on {members} nodes")
        self._see_incidents(status)
        for each in status["checkpoints"]:
            if _checkpoint(each) not in self._checkpoints:
                self._checkpoints.add(_checkpoint(each))
                self._say(f"checkpoint  step {each['step']} is durable")
        if status["state"] != self._state:
            self._state = status["state"]
            if status["verdict"] is not None:
                self._say(_summary(status))
                self._say_last_words(status)
        elif status["state"] == "training" and time.monotonic() > self._line_at + _LINE_SECONDS:
            self._line_at = time.monotonic()
            self._say(_line(status))

    def _say_last_words(self, status: Mapping[str, Any]) -> None:
        """Of the worker for which the run was given up: the reason is there, more often than not."""
        if status["state"] != "failed" or not status["incidents"]:
            return
        last = status["incidents"][-1]
        if last["last_output"]:
            self._say(f"last output of {last['culprit'].partition(':')[0]}:")
            for line in last["last_output"]:
                self._say(f"    {line}")

    def _see_incidents(self, status: Mapping[str, Any]) -> None:
        for incident in status["incidents"]:
            number, over = incident["number"], incident["downtime_seconds"] is not None
            if (number, False) not in self._incidents:
                self._incidents.add((number, False))
                self._say(f"incident #{number}  {incident['cause']}: {incident['culprit']}")
            if over and (number, True) not in self._incidents:
                self._incidents.add((number, True))
                lost = incident["steps_lost"]
                repeated = "" if not lost else f", {lost} steps are repeated"
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


def _summary(status: Mapping[str, Any]) -> str:
    verdict = status["verdict"]
    goodput = "unknown" if status["goodput"] is None else f"{status['goodput']:.1%}"
    loss = "" if status["loss"] is None else f", final loss {status['loss']:.4f}"
    return (
        f"{verdict['outcome']}  {verdict['reason']}{loss}, goodput {goodput} of "
        f"{human_duration(status['elapsed_seconds'])}, {len(status['incidents'])} incidents"
    )
