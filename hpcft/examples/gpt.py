"""A small GPT on bytes of text, in plain PyTorch, trained with hpcft: the demonstration, and a start for your own.

What makes it fault-tolerant are the lines with `run` in `train`; the rest is as anywhere. `[train]` in the
configuration sets what is in `Settings`. It runs alone as well: `python -m hpcft.examples.gpt`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import hpcft
from hpcft.data import Data, JsonLines
from hpcft.examples import text

BYTES = 256


@dataclass(frozen=True, slots=True)
class Settings:
    data: str = "data/topics"
    steps: int = 300
    batch_size: int = 32
    context: int = 128
    width: int = 96
    layers: int = 3
    heads: int = 4
    dropout: float = 0.05
    learning_rate: float = 3e-3
    warmup: int = 20


class Block(nn.Module):
    """Pre-norm transformer block: every byte looks at itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.attended(mixed.transpose(1, 2).reshape(batch, length, width)))
        fed: Tensor = self.dropout(self.feed(self.norm_feed(x)))
        return x + fed


class GPT(nn.Module):
    """Predicts the next byte. Input: bytes, int64 of shape (batch, length); output: logits (batch, length, 256)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, settings.width)
        self.place = nn.Embedding(settings.context, settings.width)
        blocks = (Block(settings.width, settings.heads, settings.dropout) for _ in range(settings.layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(settings.width)
        self.byte.weight = nn.Parameter(torch.randn(BYTES, settings.width) * 0.02)
        self.place.weight = nn.Parameter(torch.randn(settings.context, settings.width) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) + self.place.weight[: tokens.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.byte.weight)


class Bytes(torch.utils.data.Dataset[Tensor]):
    """Records {"text": ...} as bytes, from a random place: int64 of shape (context + 1,), zero where text ends."""

    def __init__(self, lines: JsonLines, context: int) -> None:
        self.lines = lines
        self.length = context + 1

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Tensor:
        record = self.lines[index]["text"].encode()
        start = int(torch.randint(max(1, len(record) - self.length + 1), ()))
        tokens = torch.zeros(self.length, dtype=torch.int64)
        piece = record[start : start + self.length]
        tokens[: len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        return tokens


def build(settings: Settings, device: torch.device) -> tuple[GPT, torch.optim.Optimizer, Data]:
    """Once per process, on every rank alike: what is random here is seeded the same on all."""
    model = GPT(settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    lines = JsonLines(text.prepare(Path(settings.data)))
    return model, optimizer, Data(Bytes(lines, settings.context), batch_size=settings.batch_size)


def learning_rate(settings: Settings, step: int) -> float:
    """Warm-up, then half a cosine: a function of the step, so that nothing of it has to be restored."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))


def train(run: hpcft.Run) -> None:
    settings = Settings(**run.config)
    model, optimizer, data = run.once(lambda: build(settings, run.device))
    run.restore(model=model, optimizer=optimizer, data=data)
    replica = run.ddp(model)

    for tokens in data:
        if run.done(settings.steps):
            break
        tokens = tokens.to(run.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, run.step)
        logits = replica(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
        run.backward(loss)
        run.update(optimizer, loss=loss, tokens=tokens[:, 1:].numel())
        if run.rank == 0 and run.step % 20 == 0:
            print(f"step {run.step}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    hpcft.main(train)
