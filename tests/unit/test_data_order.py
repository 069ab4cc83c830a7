"""The order of samples: a bijection for every size, a good shuffle, and frozen."""

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.data import order

SIZES = sorted(
    {1, 2, 3, 5, 7, 11, 13, 97, 101, 997, 7919}
    | {2**k + d for k in range(1, 15) for d in (-1, 0, 1)}
    | {m * m + d for m in (3, 10, 31, 100) for d in (-1, 0, 1)}
)


@pytest.mark.parametrize("n", SIZES)
def test_each_sample_stands_at_exactly_one_place(n: int) -> None:
    assert np.array_equal(np.sort(order.ids(1, 0, n, 0, n)), np.arange(n))


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**40), st.integers(1, 3000))
def test_any_seed_and_epoch_gives_a_bijection(seed: int, epoch: int, n: int) -> None:
    assert np.array_equal(np.sort(order.ids(seed, epoch, n, 0, n)), np.arange(n))


@given(st.data(), st.integers(1, 2**62))
def test_a_part_is_the_same_wherever_it_is_cut_from(data: st.DataObject, n: int) -> None:
    start = data.draw(st.integers(0, n - 1))
    stop = min(n, start + data.draw(st.integers(0, 50)))
    part = order.ids(3, 1, n, start, stop)
    assert part.dtype == np.int64 and part.shape == (stop - start,)
    assert len(set(part.tolist())) == len(part)
    assert all(0 <= each < n for each in part.tolist())
    for offset in range(stop - start):
        assert order.ids(3, 1, n, start + offset, start + offset + 1)[0] == part[offset]


def test_epochs_and_seeds_and_sizes_have_orders_of_their_own() -> None:
    orders = [
        order.ids(seed, epoch, n, 0, 1000).tolist()
        for seed, epoch, n in itertools.product((0, 1, 2**63), (0, 1, 2), (1000, 1001))
    ]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 15  # 1 expected of two independent shuffles


def test_every_order_of_few_samples_is_equally_likely() -> None:
    seen = Counter(tuple(order.ids(9, epoch, 5, 0, 5).tolist()) for epoch in range(12_000))
    assert len(seen) == 120
    chi_square = sum((count - 100) ** 2 / 100 for count in seen.values())
    assert chi_square < 119 + 5 * (2 * 119) ** 0.5  # mean and standard deviation of chi-square with 119 degrees


@pytest.mark.parametrize("n", [50, 64, 101])
def test_every_sample_is_equally_likely_at_every_place(n: int) -> None:
    counts = np.zeros((n, n))
    epochs = 3000
    for epoch in range(epochs):
        counts[np.arange(n), order.ids(4, epoch, n, 0, n)] += 1
    degrees = (n - 1) ** 2
    chi_square = float(((counts - epochs / n) ** 2 / (epochs / n)).sum())
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_neighbours_are_scattered() -> None:
    shuffled = order.ids(5, 0, 100_000, 0, 100_000)
    assert np.count_nonzero(np.abs(np.diff(shuffled)) == 1) < 12  # 2 expected
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), shuffled)[0, 1]) < 0.02
    # A tenth of the epoch has its fair share of every tenth of the data.
    shares = np.bincount(shuffled[:10_000] // 10_000, minlength=10)
    assert shares.min() > 850 and shares.max() < 1150


def test_places_outside_the_epoch_are_refused() -> None:
    for start, stop in ((-1, 1), (0, 11), (5, 4)):
        with pytest.raises(ValueError, match="not within an epoch of 10"):
            order.ids(0, 0, 10, start, stop)
    with pytest.raises(ValueError, match="no order of 0"):
        order.ids_at(0, 0, 0, np.zeros(0, dtype=np.int64))


def test_sample_seeds_differ_by_seed_epoch_and_sample() -> None:
    seeds = {order.sample_seed(s, e, i) for s in range(10) for e in range(10) for i in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)


def in_plain_integers(seed: int, epoch: int, n: int, place: int) -> int:
    """The definition once more, without numpy, word size or byte order."""
    packed = b"".join(each.to_bytes(8, "little") for each in (seed % 2**64, epoch, n))
    keys = hashlib.shake_128(b"hpcft order 1" + packed).digest(128)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def mixed(half: int, turn: int) -> int:
        x = (half ^ int.from_bytes(keys[8 * turn : 8 * turn + 8], "little")) * 0xBF58476D1CE4E5B9 % 2**64
        return (x ^ (x >> 32)) * 0x94D049BB133111EB % 2**64 >> 20

    while True:
        right, left = divmod(place, a)
        for turn in range(0, 16, 2):
            left = (left + mixed(right, turn)) % a
            right = (right + mixed(left, turn + 1)) % b
        place = right * a + left
        if place < n:
            return place


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(1, 2**62), st.integers(0, 2**62))
def test_the_order_is_the_same_in_plain_integers(seed: int, epoch: int, n: int, place: int) -> None:
    place %= n
    assert order.ids(seed, epoch, n, place, place + 1).tolist() == [in_plain_integers(seed, epoch, n, place)]


def test_the_order_is_frozen() -> None:
    """Checkpoints of runs in progress hold positions in these orders: these values must never change."""
    assert order.ids(0, 0, 1, 0, 1).tolist() == [0]
    assert order.ids(0, 0, 10, 0, 10).tolist() == GOLDEN_10
    assert order.ids(42, 7, 1_000_003, 500_000, 500_006).tolist() == GOLDEN_PRIME
    assert order.ids(2**63 + 5, 3, 2**40, 2**39, 2**39 + 4).tolist() == GOLDEN_LARGE
    assert order.sample_seed(42, 7, 123_456) == GOLDEN_SEED


GOLDEN_10 = [9, 0, 1, 7, 3, 8, 6, 2, 5, 4]
GOLDEN_PRIME = [314250, 914644, 104977, 700357, 968872, 977973]
GOLDEN_LARGE = [401242162201, 1018872059065, 840197817710, 145888223832]
GOLDEN_SEED = 6279158857667494474
