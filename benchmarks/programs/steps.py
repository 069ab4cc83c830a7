"""The training loop of all systems in the recovery benchmark: 20 ms steps, a checkpoint every 10 of them.

Every completed step appends one line `monotonic seconds, step, life, rank` to the file of its process, so that the time
from a kill to the first step afterwards is measured in the same way for all, and from outside.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

STEP_SECONDS = 0.02
SAVE_EVERY = 10
WIDTH = 256


class Timeline:
    """One file for each process: appending is a single system call, and survives SIGKILL."""

    def __init__(self, directory: str, life: int, rank: int) -> None:
        self._life, self._rank = life, rank
        path = Path(directory) / f"{life:04}-{rank:04}-{os.getpid()}.steps"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def completed(self, step: int) -> None:
        os.write(self._fd, f"{time.monotonic()} {step} {self._life} {self._rank}\n".encode())


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return model, torch.optim.AdamW(model.parameters())


def think(began: float) -> None:
    """Fill up the step to its length, as a GPU would: without using a core."""
    time.sleep(max(0.0, STEP_SECONDS - (time.monotonic() - began)))
