"""A small training whose details come from the `[train]` table. Used by tests/e2e/test_worker_side.py.

`kind = "replay"`: everything that makes replaying hard: BatchNorm, dropout, several buckets, augmentation by numpy
while loading and by torch in the loop, samples of uneven slices. `kind = "plain"`: float64 and nothing random, so
that worlds of any size can be compared.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hpcft
from hpcft.data import Data

torch.set_num_threads(1)

WIDTH = 96


class Noisy:
    """Samples that look different every time they are loaded, unless somebody sees to it."""

    def __init__(self, count: int, noise: float) -> None:
        rng = np.random.default_rng(5)
        self.x = rng.normal(size=(count, WIDTH))
        self.y = rng.normal(size=(count, 4))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        if self.noise:
            x = x + self.noise * np.random.normal(size=WIDTH)
        return torch.from_numpy(x), torch.from_numpy(self.y[index])


class Centred(nn.Module):
    """Moves its input by a running mean: a buffer that training depends on, unlike BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def build_replay() -> nn.Module:
    parts: list[nn.Module] = [Centred()]
    for _ in range(5):
        parts += [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 4))


def build_plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).double()


def train(run: hpcft.Run) -> None:
    config: dict[str, Any] = {"kind": "replay", "steps": 20, "samples": 110, "batch": 22, **run.config}
    plain = config["kind"] == "plain"
    dtype = torch.float64 if plain else torch.float32
    model = run.once(build_plain if plain else build_replay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    data = Data(
        Noisy(config["samples"], 0.0 if plain else 0.3),
        batch_size=config["batch"],
        micro_batch=config.get("micro"),
    )
    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, data=data)
    replica = run.ddp(model, bucket_cap_mb=0.04, **config.get("ddp", {}))
    if plain:
        replica.eval()  # nothing in it that knows the difference
    optimizer.register_step_pre_hook(lambda *_: meet(run, config, f"update {run.step + 1}"))
    meet(run, config, "restored")
    for x, y in data:
        if run.done(config["steps"]):
            break
        x, y = x.to(dtype), y.to(dtype)
        if not plain:
            x = x + 0.1 * torch.randn_like(x)
        loss = nn.functional.mse_loss(replica(x), y)
        run.backward(loss)
        if run.update(optimizer, loss=loss, tokens=len(x), scheduler=scheduler):
            meet(run, config, run.step)
            if run.step % 5 == 0 and not plain:
                with run.phase("eval"), torch.no_grad():
                    replica.eval()
                    torch.rand(run.step)
                    replica(x)
                    replica.train()
    if run.rank == 0 and "out" in config:
        np.savez(config["out"], **{name: value.numpy() for name, value in model.state_dict().items()})


def meet(run: hpcft.Run, config: dict[str, Any], moment: str | int) -> None:
    """Do what the test wants done at this moment: `at = [[moment, rank or null, what], …]`."""
    for when, rank, what in config.get("at", ()):
        if when != moment or rank not in (None, run.rank):
            continue
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "raise":
            raise ArithmeticError(f"wrong at step {run.step}")
        elif what == "exit":
            raise SystemExit(3)
        elif what.startswith("limit "):  # no file may become larger: what a full disk is to a process
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(what[6:]), resource.RLIM_INFINITY))
        elif what == "sleep":
            time.sleep(600)
        elif what.startswith("wait "):
            deadline = time.monotonic() + 60
            while not Path(what[5:]).exists():
                assert time.monotonic() < deadline
                time.sleep(0.005)
        elif what.startswith("swallow "):
            with contextlib.suppress(Exception):
                meet(run, {"at": [[moment, rank, what[8:]]]}, moment)


if __name__ == "__main__":
    hpcft.main(train)
