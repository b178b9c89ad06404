"""The 64-bit mix of Steele, Lea and Flood 2014 ("Fast Splittable Pseudorandom Number Generators").

Written out, so that neither the order of the data nor a seed depends on a library's generator.
"""

from __future__ import annotations

from milepost.lazy import np


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Return the mix of each of `values`, uint64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def mix(*values: int) -> int:
    """Return one 63-bit seed made of several integers: splitmix64 folded over them."""
    state = 0
    for value in values:
        state = int(splitmix64(np.array([(state + value) % 2**64], dtype=np.uint64))[0])
    return state >> 1
