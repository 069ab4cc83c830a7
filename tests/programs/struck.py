"""exact.py, hit by something at known moments: `strikes = ["GENERATION STEP RANK WHAT", ...]` in the `[train]` table.

A strike comes after the step, and after the checkpoint that is due at it; with " saving" behind it, while the state is
being taken (which also happens once at the start, with the state that was restored: there it hits the restoring).
Strikes name their generation, so none comes twice.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from typing import Any

import exact

import hpcft


def strike(what: str, step: int) -> None:
    print(f"strike: {what} at step {step}", flush=True)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "segfault":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)
    elif what == "raise":
        raise ArithmeticError(f"wrong at step {step}")
    elif what == "exit":
        sys.exit(3)
    elif what == "hold":
        time.sleep(600)
    else:
        raise ValueError(what)


class Tripwire:
    """A state that notices when it is taken."""

    def __init__(self, run: "StruckRun") -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        self.run.meet(" saving")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class StruckRun:
    def __init__(self, run: hpcft.Run) -> None:
        self.run = run
        self.config = dict(run.config)
        self.strikes = [each.split(maxsplit=3) for each in self.config.pop("strikes", [])]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)

    def restore(self, **objects: Any) -> int:
        return self.run.restore(**objects, tripwire=Tripwire(self))

    def update(self, *arguments: Any, **more: Any) -> bool:
        completed = self.run.update(*arguments, **more)
        if completed:
            self.meet("")
        return completed

    def meet(self, when: str) -> None:
        run = self.run
        here = [str(run.generation), str(run.step), str(run.rank)]
        for *moment, what in self.strikes:
            if moment == here and what.endswith(" saving") == (when == " saving"):
                strike(what.removesuffix(" saving"), run.step)


if __name__ == "__main__":
    hpcft.main(lambda run: exact.train(StruckRun(run)))  # type: ignore[arg-type]
