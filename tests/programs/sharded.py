"""A training of a sharded model (FSDP2) that writes down what it does, to the last bit.

The file `out` gets a line of JSON for each step (generation, step, loss in hexadecimal), and one with the SHA-256 of
the whole state, gathered from all ranks, wherever a generation begins and where the training ends. In generation
`kill[0]`, after step `kill[1]`, rank `kill[2]` kills itself.
"""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

import hpcft
from hpcft.data import Data

FEATURES = 13


def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, Data]:
    model = nn.Sequential(
        *(nn.Linear(FEATURES, 31), nn.Tanh(), nn.Dropout(0.1), nn.Linear(31, 17)),
        *(nn.LayerNorm(17), nn.Tanh(), nn.Linear(17, 1)),
    )
    for layer in (model[0], model[3]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randn(96, FEATURES)
    data = Data(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=24)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), data


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of the whole state; to be called on all ranks."""
    total = hashlib.sha256()

    def add(name: str, value: Tensor) -> None:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        total.update(name.encode() + whole.numpy().tobytes())

    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            add(name, value)
        for number, values in optimizer.state_dict()["state"].items():
            for key, value in sorted(values.items()):
                add(f"{number}.{key}", value)
    return total.hexdigest()


def train(run: hpcft.Run) -> None:
    torch.set_num_threads(1)
    steps, out, kill = run.config["steps"], Path(run.config["out"]), run.config.get("kill", [0, 0, 0])

    def write(**line: Any) -> None:
        if run.rank == 0:
            with out.open("a") as file:
                file.write(json.dumps({"generation": run.generation, "step": run.step, **line}) + "\n")

    model, optimizer, scheduler, data = run.once(build)
    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, data=data)
    write(world=run.world_size, digest=digest(model, optimizer))
    if not run.done(steps):
        for x, y in data:
            loss = nn.functional.mse_loss(model(x), y)
            run.backward(loss)
            run.update(optimizer, loss=loss, scheduler=scheduler, clip_norm=1.0)
            write(loss=loss.item().hex())
            if [run.generation, run.step, run.rank] == list(kill):
                os.kill(os.getpid(), signal.SIGKILL)
            if run.done(steps):
                break
    write(world=run.world_size, digest=digest(model, optimizer))


if __name__ == "__main__":
    hpcft.main(train)
