"""Randomness as a function of (seed, step, rank), so that a step that is replayed is the same step.

Before every step the generators of torch, numpy and `random` are seeded anew: nothing of them needs to be saved, and
what was drawn before (in a step that was undone, on another rank, in another world) does not matter. The seeds are
parts of one xxh3-128 over (seed, step, rank); different parts, because torch's and numpy's generators are the same
Mersenne Twister and would yield the same stream from the same seed. Both take 32 bits. (The seed is hashed and not
given to the hash as its own: in short inputs that only moves bits, and seed 1 would give rank 1 what seed 0 gave
rank 0.)

Samples are seeded by (seed, epoch, sample) where they are loaded: `hpcft.data.fetch`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import numpy as np
import torch
import xxhash

from hpcft.ids import Rank

_pack = struct.Struct("<QQQ").pack
_digest = xxhash.xxh3_128_intdigest
_WORD = 0xFFFF_FFFF
_LONG = 0xFFFF_FFFF_FFFF_FFFF
_BUILD = _LONG
"""Stands for a rank: models are built with the same numbers on all of them."""


class Randomness:
    """The random state of one rank. `seed(step)` costs about 8 µs, 5 of which are Python's own `random`."""

    __slots__ = ("_cuda", "_rank", "_seed", "_seed_torch")

    def __init__(self, seed: int, rank: Rank, device: torch.device) -> None:
        self._seed = seed & _LONG
        self._rank = rank
        # `torch.manual_seed` asks after every kind of device: 78 µs.
        self._seed_torch: Callable[[int], object] = torch.default_generator.manual_seed
        self._cuda = device.index if device.type == "cuda" else None

    def seed(self, step: int) -> None:
        """Seeds everything for the step that follows `step` completed ones."""
        self._set(_digest(_pack(self._seed, step, self._rank)))

    def seed_build(self, number: int) -> None:
        """Seeds everything for the construction of models, number `number`, alike on all ranks and in every life."""
        self._set(_digest(_pack(self._seed, number, _BUILD)))

    def _set(self, digest: int) -> None:
        self._seed_torch(digest & _LONG)
        np.random.seed(digest >> 64 & _WORD)
        random.seed(digest >> 96)
        if self._cuda is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.default_generators[self._cuda].manual_seed(digest & _LONG)
