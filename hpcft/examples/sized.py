"""A model of as many parameters as you ask for, on made-up data: what `hpcft bench` trains.

The model is the GPT of `hpcft.examples.gpt`, with width and depth chosen by `shape_of`; the data is a function of the
sample's number. So the state, weights and two AdamW moments in float32, is that of a real model of this size: 12 bytes
for each parameter. `[train]` in the configuration sets what is in `Settings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import hpcft
from hpcft.data import Data
from hpcft.examples import gpt

SMALLEST = 10_000
"""Fewer parameters are not made."""
_HEADS = 4
_WIDTH_UNIT = 4 * _HEADS
_DEEPEST = 128
_CLOSE = 0.02
"""A model this near to the number that was asked for is near enough; among several, the best proportioned is taken."""
_WIDTH_PER_LAYER = 64
"""Of published models of all sizes, about."""


@dataclass(frozen=True, slots=True)
class Settings:
    parameters: int = 1_000_000
    samples: int = 80
    """Of an epoch."""
    batch_size: int = 4
    context: int = 32
    learning_rate: float = 1e-3
    steps: int = 1_000_000_000
    """As good as endless: whoever measures it ends it."""

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> Settings:
        """From `[train]` of a configuration. ValueError says which key cannot be used, and why."""
        kinds = {each.name: type(each.default) for each in fields(cls)}
        for key, value in train.items():
            if key not in kinds:
                raise ValueError(f"train.{key} is none of its settings, which are {', '.join(kinds)}")
            takes = int | float if kinds[key] is float else int
            if isinstance(value, bool) or not isinstance(value, takes) or value <= 0:
                number = "number" if kinds[key] is float else "whole number"
                raise ValueError(f"train.{key} = {value!r} is no {number} above 0")
        found = cls(**train)
        shape_of(found.parameters, found.context)
        return found


class Shape(NamedTuple):
    layers: int
    width: int

    def parameters(self, context: int) -> int:
        """Of a `gpt.GPT` of this shape, whose output layer shares the weights of its input."""
        layers, width = self
        return layers * (12 * width**2 + 13 * width) + width * (gpt.BYTES + context + 2)


def shape_of(parameters: int, context: int) -> Shape:
    """The shape of a GPT of about so many parameters. ValueError: fewer than `SMALLEST`."""
    if parameters < SMALLEST:
        raise ValueError(f"a model of {parameters} parameters is not made: the smallest has {SMALLEST}")
    shapes = [Shape(layers, width) for layers in range(1, _DEEPEST + 1) for width in _widths(parameters, layers)]

    def flaws(shape: Shape) -> tuple[float, float]:
        error = abs(shape.parameters(context) / parameters - 1)
        return max(error, _CLOSE), abs(math.log(shape.width / (_WIDTH_PER_LAYER * shape.layers)))

    return min(shapes, key=flaws)


def _widths(parameters: int, layers: int) -> tuple[int, ...]:
    nearest = round(math.sqrt(parameters / (12 * layers)) / _WIDTH_UNIT)
    return tuple(each * _WIDTH_UNIT for each in range(max(1, nearest - 2), nearest + 2))


class MadeUp(torch.utils.data.Dataset[Tensor]):
    """Sample `i` is a sequence that `i` determines: int64 of shape (context + 1,)."""

    def __init__(self, samples: int, context: int) -> None:
        self._samples = samples
        self._places = torch.arange(context + 1)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        return (self._places * (2 * index + 1) + 7 * index) % (gpt.BYTES - 1)


def build(settings: Settings, device: torch.device) -> tuple[gpt.GPT, torch.optim.Optimizer, Data]:
    layers, width = shape_of(settings.parameters, settings.context)
    model = gpt.GPT(gpt.Settings(context=settings.context, width=width, layers=layers, heads=_HEADS, dropout=0.0))
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=settings.learning_rate)
    return model, optimizer, Data(MadeUp(settings.samples, settings.context), batch_size=settings.batch_size)


def train(run: hpcft.Run) -> None:
    settings = Settings.of(run.config)
    model, optimizer, data = run.once(lambda: build(settings, run.device))
    run.restore(model=model, optimizer=optimizer, data=data)
    replica = run.ddp(model)
    for tokens in data:
        if run.done(settings.steps):
            break
        tokens = tokens.to(run.device)
        logits = replica(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        run.backward(loss)
        run.update(optimizer, loss=loss, tokens=tokens[:, 1:].numel())


if __name__ == "__main__":
    hpcft.main(train)
