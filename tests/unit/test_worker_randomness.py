from __future__ import annotations

import random

import numpy as np
import torch

from hpcft.ids import Rank
from hpcft.worker.randomness import Randomness

CPU = torch.device("cpu")


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_a_step_draws_the_same_numbers_whatever_came_before() -> None:
    mine = Randomness(7, Rank(3), CPU)
    mine.seed(12)
    first = [drawn() for _ in range(3)]
    random.gauss(0, 1)  # leaves a second value behind, as numpy's and torch's normal do
    np.random.normal()
    torch.randn(1)
    mine.seed(13)
    Randomness(7, Rank(3), CPU).seed(12)
    assert [drawn() for _ in range(3)] == first
    mine.seed(12)
    random.gauss(0, 1), np.random.normal(), torch.randn(1)
    mine.seed(12)
    normal = random.gauss(0, 1), float(np.random.normal()), float(torch.randn(1))
    mine.seed(12)
    assert (random.gauss(0, 1), float(np.random.normal()), float(torch.randn(1))) == normal


def test_seed_step_rank_and_library_each_have_a_stream_of_their_own() -> None:
    streams = set()
    for seed in (0, 1, -1, 2**63):
        for step in (0, 1, 2**40):
            for rank in (0, 1, 4095):
                Randomness(seed, Rank(rank), CPU).seed(step)
                streams.update(round(number, 7) for number in drawn())
    assert len(streams) == 4 * 3 * 3 * 3


def test_models_are_built_alike_on_all_ranks() -> None:
    weights = []
    for rank in (0, 5):
        for number in (0, 1):
            Randomness(7, Rank(rank), CPU).seed_build(number)
            weights.append(torch.nn.Linear(3, 3).weight.detach().clone())
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
