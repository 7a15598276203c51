"""Random numbers as a pure function of (seed, stream, index): no state, so a scene is the same alone or among thousands."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["normal", "uniform"]

Floats = NDArray[np.floating[Any]]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, in place."""
    words ^= words >> np.uint64(30)
    words *= FIRST
    words ^= words >> np.uint64(27)
    words *= SECOND
    words ^= words >> np.uint64(31)
    return words


def _bits(seeds_N: NDArray[np.integer[Any]], num: int, stream: int) -> NDArray[np.uint64]:
    offset = np.array([stream], dtype=np.uint64) * FIRST + SECOND
    starts_N = _mixed(seeds_N.astype(np.uint64) * GOLDEN + offset)
    return _mixed(starts_N[:, None] + np.arange(1, num + 1, dtype=np.uint64) * GOLDEN)


def uniform(seeds_N: NDArray[np.integer[Any]], num: int, stream: int) -> NDArray[np.float64]:
    """`num` numbers in [0, 1) for each seed, shape (N, num); another stream gives independent ones."""
    return (_bits(seeds_N, num, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seeds_N: NDArray[np.integer[Any]], num: int, stream: int) -> NDArray[np.float32]:
    """`num` standard normal numbers for each seed, shape (N, num), two from each 64 bits (Box-Muller)."""
    bits = _bits(seeds_N, (num + 1) // 2, stream)
    first = ((bits >> np.uint64(40)).astype(np.float32) + 1) * np.float32(2.0**-24)
    second = (bits & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2.0**-24)
    radius = np.sqrt(np.float32(-2) * np.log(first))
    both = np.stack([radius * np.cos(second), radius * np.sin(second)], axis=-1)
    return both.reshape(len(seeds_N), -1)[:, :num]
