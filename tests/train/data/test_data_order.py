"""Order and randomness: permutations, streams and their independence of everything but integers."""

import numpy as np
import pytest

from train.data.order import mix, mix_array, shuffled, uniforms

# 1 and 2: the smallest; 16 and 256: whole Feistel domains; 17 and 257: one past them; 1000: many walks.
SIZES = [1, 2, 3, 16, 17, 255, 256, 257, 1000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_every_position_has_its_own_sample(size, key):
    assert sorted(shuffled(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_position_does_not_depend_on_the_others_asked_for():
    whole = shuffled(np.arange(1000), 1000, 7)
    some = np.array([999, 0, 500, 3])
    assert np.array_equal(shuffled(some, 1000, 7), whole[some])


def test_order_fits_sizes_of_large_collections():
    size = 12_000_000_019
    positions = np.array([0, 1, size - 1])
    chosen = shuffled(positions, size, 3)
    assert len(set(chosen.tolist())) == 3
    assert chosen.min() >= 0 and chosen.max() < size


def test_permutations_of_different_keys_are_unrelated():
    size, keys = 1000, 200
    orders = np.stack([shuffled(np.arange(size), size, mix(5, epoch)) for epoch in range(keys)])
    # A random permutation has one fixed point on average, and so have two relative to one another.
    meetings = (orders[1:] == orders[:-1]).sum(axis=1)
    assert 0.7 < meetings.mean() < 1.3
    # Ranks of neighbours are uncorrelated.
    lag = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(lag) < 0.01


def test_each_position_sees_all_samples_evenly():
    size, keys = 20, 2000
    orders = np.stack([shuffled(np.arange(size), size, mix(9, epoch)) for epoch in range(keys)])
    counts = np.stack([np.bincount(orders[:, position], minlength=size) for position in range(size)])
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    # 19 x 19 degrees of freedom: 361 expected, standard deviation 27.
    assert chi_square < 361 + 5 * 27


def test_mix_of_arrays_is_mix_of_integers():
    values = np.array([0, 1, 2**40, 2**63 - 1])
    assert mix_array(mix(3, -4), values).tolist() == [mix(3, -4, int(v)) for v in values]


def test_mix_tells_order_and_length_apart():
    words = {mix(), mix(0), mix(0, 0), mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(12)}
    assert len(words) == 7


def test_streams_are_fixed_for_all_time():
    # Runs are resumed, and compared, across machines and versions.
    assert mix(1, 2, 3) == 0x48CF5028B6DF10DB
    assert uniforms(0, 2).tolist() == [0.8833108082136426, 0.43152799704850997]
    assert shuffled(np.arange(8), 8, 1).tolist() == [5, 1, 7, 4, 6, 2, 0, 3]


def test_uniforms_are_uniform():
    numbers = np.concatenate([uniforms(mix(4, i), 256) for i in range(400)])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 5 * 10
