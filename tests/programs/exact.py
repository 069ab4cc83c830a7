"""A training whose last bits tell: everything that breaks when a replayed step is not the same step.

BatchNorm (buffers), dropout (random state), numpy augmentation in the data (random state of loaders), momentum, a
scheduler, several DDP buckets (order of sums), epochs that the batch does not divide (uneven slices). Once all steps
are done, rank 0 writes the SHA-256 of the final state to the file `out`. See `Settings` for the `[train]` table.
"""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import hpcft
from hpcft.data import Data

FEATURES, CLASSES = 24, 10


@dataclass(frozen=True)
class Settings:
    out: str = ""
    """File for the digest; none without."""
    steps: int = 40
    samples: int = 250
    batch_size: int = 32
    micro_batch: int = 0
    """0: one pass per step."""
    width: int = 384
    pause: float = 0.0
    """Seconds to sleep in each step, so that it can be hit by something."""
    brake: str = ""
    """The pause is made only while this file exists, if one is named."""
    look_at: str = ""
    """A file that is read in each step, for what it lies on may hang."""


class Noisy:
    """Points around ten centres; each sample is moved by `numpy.random` whenever it is loaded."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.centres = np.random.default_rng(1).standard_normal((CLASSES, FEATURES))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % CLASSES
        point = self.centres[label] + np.random.standard_normal(FEATURES)
        return torch.from_numpy(point.astype(np.float32)), label


def build(settings: Settings) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, Data]:
    width = settings.width
    model = nn.Sequential(
        *(nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    data = Data(Noisy(settings.samples), batch_size=settings.batch_size, micro_batch=settings.micro_batch or None)
    return model, optimizer, scheduler, data


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.cpu().numpy().tobytes())
    for parameter in model.parameters():
        total.update(optimizer.state[parameter]["momentum_buffer"].cpu().numpy().tobytes())
    return total.hexdigest()


def train(run: hpcft.Run) -> None:
    settings = Settings(**run.config)
    model, optimizer, scheduler, data = run.once(lambda: build(settings))
    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, data=data)
    replica = run.ddp(model, bucket_cap_mb=0.25)
    model.train()

    if not run.done(settings.steps):
        looked_at = Path(settings.look_at) if settings.look_at else None
        for points, labels in data:
            if looked_at is not None:
                looked_at.read_bytes()
            loss = functional.cross_entropy(replica(points), labels)
            run.backward(loss)
            completed = run.update(optimizer, loss=loss, scheduler=scheduler, tokens=len(labels))
            if completed and settings.pause and (not settings.brake or Path(settings.brake).exists()):
                time.sleep(settings.pause)
            if run.done(settings.steps):
                break

    if run.rank == 0 and settings.out:
        out = Path(settings.out)
        aside = out.with_name(f".{out.name}.{os.getpid()}")
        aside.write_text(digest(model, optimizer) + "\n")
        aside.rename(out)


if __name__ == "__main__":
    hpcft.main(train)
