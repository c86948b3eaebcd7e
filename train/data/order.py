"""Order and randomness of samples as pure functions of integers.

    f(z)              SplitMix64's finaliser, a bijection of 64-bit words
    mix(p1, ..., pn)  h <- f((h xor p) + c) over the parts: one 64-bit word
    uniforms(k)_i     f(k + (i + 1) c) / 2^64, truncated to 53 bits
    shuffled(x)       Feistel network of six rounds on 2^(2m) >= n words, walked along its cycle until below n

Nothing is stored and nothing is iterated over: any position of any epoch costs the same, for any size of data.
"""

import numpy as np

_WORD = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_ROUNDS = 6

# What a word is for, so that no two uses share one.
ORDER, STAND_IN, CAPTION, CROP, SEED, PLACES, REGIONS, AUGMENT = range(1, 9)


def _finalise_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mix(*parts: int) -> int:
    """A 64-bit word that depends on every part and on their order.

    Args:
        parts: integers of any size and sign, taken modulo 2^64.

    Returns:
        An int in [0, 2^64).
    """
    h = _STEP
    for part in parts:
        h = _finalise_int(((h ^ (part & _WORD)) + _STEP) & _WORD)
    return h


def mix_array(key: int, values: np.ndarray) -> np.ndarray:
    """`mix` of a prefix already mixed and of each value: `mix(a, b, v) == mix_array(mix(a, b), [v])[0]`.

    Args:
        key: the word that `mix` returned for the leading parts.
        values: (n,) integers.

    Returns:
        (n,) uint64.
    """
    return _finalise((np.asarray(values).astype(np.uint64) ^ np.uint64(key)) + np.uint64(_STEP))


_STEPS = np.arange(1, 257, dtype=np.uint64) * np.uint64(_STEP)


def uniforms(key: int, count: int) -> np.ndarray:
    """SplitMix64's stream that starts at `key`.

    Args:
        key: a 64-bit word.
        count: how many numbers, at most 256.

    Returns:
        (count,) float64 in [0, 1).
    """
    words = _finalise(_STEPS[:count] + np.uint64(key & _WORD))
    return (words >> np.uint64(11)) * 2.0**-53


def shuffled(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends the positions.

    Args:
        positions: (n,) int64 in [0, size).
        size: length of the permutation, at least 1.
        key: a 64-bit word that chooses the permutation.

    Returns:
        (n,) int64 in [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    rounds = [np.uint64(mix(key, i)) for i in range(_ROUNDS)]
    words = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    outside = np.arange(words.size)
    while outside.size:
        left, right = words[outside] >> half, words[outside] & low
        for word in rounds:
            left, right = right, left ^ (_finalise(right ^ word) & low)
        words[outside] = (left << half) | right
        outside = outside[words[outside] >= np.uint64(size)]
    return words.astype(np.int64)


def held_out_rows(words: np.ndarray, share: float) -> np.ndarray:
    """Which rows validation gets, (n,) bool, where each is told by a hash (n,) uint64 and a list has no splits."""
    held = words < np.uint64(int(share * 2**64))
    # Retrieval among the held-out images needs two.
    least = max(0, min(2, len(words) - 1))
    if held.sum() < least:
        held[np.argsort(words, kind="stable")[:least]] = True
    if len(words) > 1 and held.all():
        held[np.argmax(words)] = False
    return held
