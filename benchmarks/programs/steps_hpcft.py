"""The loop of `steps`, with hpcft."""

from __future__ import annotations

import time

import torch
from steps import WIDTH, Timeline, build, think

import hpcft


def train(run: hpcft.Run) -> None:
    model, optimizer = run.once(build)
    run.restore(model=model, optimizer=optimizer)
    replica = run.ddp(model)
    timeline = Timeline(run.config["timeline"], run.generation, run.rank)
    while not run.done(run.config["steps"]):
        began = time.monotonic()
        loss = replica(torch.randn(8, WIDTH)).square().mean()
        run.backward(loss)
        think(began)
        run.update(optimizer, loss=loss)
        timeline.completed(run.step)


hpcft.main(train)
