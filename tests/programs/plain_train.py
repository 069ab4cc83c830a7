"""An ordinary torchrun script, which knows nothing of hpcft: DDP over gloo, and a checkpoint of its own.

torchrun --nproc-per-node 4 plain_train.py --checkpoint FILE [--steps N] [--every N] [--pause SECONDS] [--out FILE]
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep in each step")
    parser.add_argument("--out", type=Path, help="rank 0 writes here what it has done")
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    first_step = 0
    if options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    replica = DistributedDataParallel(model)

    loss = torch.tensor(float("nan"))
    for step in range(first_step, options.steps):
        generator = torch.Generator().manual_seed(step * world_size + rank)
        inputs = torch.randn(8, 16, generator=generator)
        loss = nn.functional.mse_loss(replica(inputs), inputs.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if rank == 0:
            print(f"step {done} loss {loss.item():.4f}", flush=True)
        if rank == 0 and (done % options.every == 0 or done == options.steps):
            aside = options.checkpoint.with_suffix(".aside")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, aside)
            aside.rename(options.checkpoint)
        time.sleep(options.pause)

    if rank == 0 and options.out is not None:
        facts = {
            "world_size": world_size,
            "first_step": first_step,
            "last_step": options.steps,
            "loss": loss.item(),
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        }
        options.out.write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
