"""The order of the samples: a pure function of (seed, epoch, number of samples), of any part of it, without a list.

Theory of operation
-------------------
A permutation of 0 … n-1 is computed element by element, so that any rank of any world finds any part of any epoch in
no memory and no time, and nothing but (epoch, offset) needs to be in a checkpoint.

The permutation is a Feistel network over the rectangle a x b, where a = ceil(sqrt n) and b = ceil(n / a): a number x
is the pair (x mod a, x div a), and each round adds a keyed hash of one half to the other (modulo a, or modulo b),
which can be undone whatever the hash is; so each round, and all together, are a bijection of 0 … ab-1. Results at or
above n are put through again until they fall below ("cycle walking"): that is a bijection of 0 … n-1, and since
ab < n + a, few need it. See Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), methods 2
and 3. Four rounds are enough for large n (Luby and Rackoff); sixteen make every order of five or six samples equally
likely as well.

A round's key is 64 bits of SHAKE-128 over (seed, epoch, n); its hash multiplies, folds and multiplies, and keeps the
upper bits. Everything is arithmetic of unsigned 64-bit integers: the same on every machine.

Positions in checkpoints and the ledger's proof rest on this order, so it is frozen: a change here would repeat and
lose samples of every run in progress. Golden values in the tests hold it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
"""Numbers of samples in the data set, or places in the order of an epoch."""

_Words: TypeAlias = NDArray[np.uint64]

_ROUNDS = 16
_ORDER_TAG = b"hpcft order 1"
_SAMPLE_TAG = b"hpcft sample 1"
_LARGEST = 2**62

_M1 = np.uint64(0xBF58476D1CE4E5B9)  # the multipliers of SplitMix64
_M2 = np.uint64(0x94D049BB133111EB)
_FOLD = np.uint64(32)
_UPPER = np.uint64(20)


def ids(seed: int, epoch: int, n: int, start: int, stop: int) -> Ids:
    """The numbers of the samples at places `start` … `stop`-1 of the epoch's order: int64, shape (stop - start,).

    ValueError: not 0 <= start <= stop <= n.
    """
    if not 0 <= start <= stop <= n:
        raise ValueError(f"places {start} … {stop} are not within an epoch of {n} samples")
    return ids_at(seed, epoch, n, np.arange(start, stop, dtype=np.int64))


def ids_at(seed: int, epoch: int, n: int, places: Ids) -> Ids:
    """The numbers of the samples at these places (each within 0 … n-1, not checked) of the epoch's order."""
    if not 0 < n <= _LARGEST:
        raise ValueError(f"there is no order of {n} samples")
    keys = _keys(seed, epoch, n)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    result = _permute(places.astype(np.uint64), np.uint64(a), np.uint64(b), keys)
    while (outside := np.flatnonzero(result >= np.uint64(n))).size:
        result[outside] = _permute(result[outside], np.uint64(a), np.uint64(b), keys)
    return result.astype(np.int64)


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """64 bits of randomness for loading one sample in one epoch, whichever process loads it."""
    digest = hashlib.shake_128(_SAMPLE_TAG + _packed(seed, epoch, sample)).digest(8)
    return int.from_bytes(digest, "little")


@lru_cache(maxsize=8)
def _keys(seed: int, epoch: int, n: int) -> _Words:
    digest = hashlib.shake_128(_ORDER_TAG + _packed(seed, epoch, n)).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _packed(seed: int, epoch: int, number: int) -> bytes:
    return struct.pack("<QQQ", seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, number)


def _permute(x: _Words, a: np.uint64, b: np.uint64, keys: _Words) -> _Words:
    right, left = np.divmod(x, a)  # right < b, left < a
    for index in range(0, _ROUNDS, 2):
        left = (left + _hash(right, keys[index])) % a
        right = (right + _hash(left, keys[index + 1])) % b
    return right * a + left


def _hash(x: _Words, key: np.uint64) -> _Words:
    """44 bits: far above a and b, and far enough below 2^64 for the sum with a half."""
    x = (x ^ key) * _M1
    x = (x ^ (x >> _FOLD)) * _M2
    return x >> _UPPER
