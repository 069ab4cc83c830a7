"""What a process that trains alone tells the person who started it: it has no agent who would."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hpcft.page import Slot
from hpcft.units import counted, human_duration

LINE_SECONDS = 5.0


@contextmanager
def narrated(slot: Slot) -> Iterator[None]:
    """Within, a line on stderr now and then says how training goes, and the last one what has become of it."""
    began = time.monotonic()
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(slot, over), name="hpcft-alone", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
    if slot.step:
        took = human_duration(time.monotonic() - began)
        _say(f"{counted(slot.step, 'step')} in {took}{_loss(slot)}; trained alone: nothing was saved")
        _say("`hpcft run CONFIG` makes checkpoints and goes on after failures")


def _tell(slot: Slot, over: threading.Event) -> None:
    before = slot.step
    while not over.wait(LINE_SECONDS):
        step = slot.step
        if step:
            _say(f"step {step}{_loss(slot)}, {(step - before) / LINE_SECONDS:.1f} steps/s")
        before = step


def _loss(slot: Slot) -> str:
    loss = slot.read().loss
    return "" if loss is None else f", loss {loss:.4f}"


def _say(line: str) -> None:
    # no buffer, no lock: a loader's worker may be forked at this moment, and would inherit those of sys.stderr
    with suppress(OSError):  # nobody may be reading any more
        os.write(2, f"hpcft: {line}\n".encode())
