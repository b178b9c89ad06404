"""Confidence intervals and significance tests for accuracies and differences."""

import math
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
DRAWS = 10_000  # of a resampling test: p has a standard error of about 0.002 at 0.05
AT_ONCE = 2**22  # random numbers per batch, 32 MB
SEED = 0  # fixed, so that figures repeat
FEWEST = 10  # differences for a resampling test: with fewer, the bootstrap interval is far too narrow


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion with `successes` of `trials`; (0, 1) without trials.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike the normal interval it
    is valid near 0 and 1 and for few trials.
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    low, high = min(share, middle - half), max(share, middle + half)  # rounding must not leave the share outside
    return max(0.0, low), min(1.0, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value of McNemar's test: of the same items, one model alone has `only_first`
    correct, the other `only_second`.

    If neither model is better, each such item is the toss of a fair coin. McNemar 1947, "Note on the sampling error
    of the difference between correlated proportions".
    """
    n, ways, tail = only_first + only_second, 1, 0
    for k in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)  # for k + 1 heads in n tosses
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True)
class Difference:
    """The mean difference of pairs, its 95 % interval, and its p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired(differences: np.ndarray) -> Difference | None:
    """Return the mean of the differences (N,) between two models on the same N blocks of text; None below FEWEST.

    The interval is the percentile bootstrap's over blocks (Efron 1979, "Bootstrap methods: another look at the
    jackknife"), p that of the two-sided sign-flip test (Fisher 1935, "The Design of Experiments", section 21), both
    with DRAWS draws and a fixed seed.
    """
    n = len(differences)
    if n < FEWEST:
        return None
    generator, mean = np.random.default_rng(SEED), float(differences.mean())
    means, flipped = np.empty(DRAWS), np.empty(DRAWS)
    rows = max(1, AT_ONCE // n)
    for first in range(0, DRAWS, rows):
        part = slice(first, min(first + rows, DRAWS))
        shape = (part.stop - part.start, n)
        means[part] = differences[generator.integers(n, size=shape)].mean(axis=1)
        signs = generator.integers(2, size=shape, dtype=np.int8)
        flipped[part] = np.where(signs, differences, -differences).mean(axis=1)
    as_large = int(
        (np.abs(flipped) >= abs(mean) * (1 - 1e-12)).sum()
    )  # 1 + : the observed assignment counts as one draw
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(mean, float(low), float(high), (1 + as_large) / (1 + DRAWS))
