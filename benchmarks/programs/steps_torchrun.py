"""The loop of `steps`, as a script for torchrun: it saves with torch.save and loads at its start."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from steps import SAVE_EVERY, WIDTH, Timeline, build, think
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    timeline_directory, steps = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    model, optimizer = build()
    path = Path(timeline_directory) / "checkpoint.pt"
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    replica = DistributedDataParallel(model)
    timeline = Timeline(timeline_directory, int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank())
    while step < steps:
        began = time.monotonic()
        loss = replica(torch.randn(8, WIDTH)).square().mean()
        loss.backward()
        think(began)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % SAVE_EVERY == 0 and dist.get_rank() == 0:
            aside = path.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, aside)
            aside.rename(path)
        timeline.completed(step)


main()
