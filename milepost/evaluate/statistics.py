"""How far a measured share or difference can be trusted."""

import math
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # 97.5 % of a normal distribution lie below
DRAWS = 10_000  # of a resampling test: p is known to about 0.005 at 0.05
AT_ONCE = 2**22  # numbers drawn at once, 32 MB
SEED = 0  # the same figures at every run
FEWEST = 10  # differences that make a resampling test: of fewer, the bootstrap's interval is far too narrow


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `successes` of `trials` were seen; (0, 1) without trials.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference"; unlike the normal interval it holds
    near 0 and 1 and for few trials.
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, min(share, middle - half)), min(
        1.0, max(share, middle + half)
    )  # rounding must not leave the share outside


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value of McNemar's test: `only_first` of the same items one model alone gets right, `only_second` the other.

    Under the hypothesis that neither is better each such item is a fair coin's throw. McNemar 1947, "Note on the sampling error
    of the difference between correlated proportions".
    """
    n, ways, tail = only_first + only_second, 1, 0
    for k in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)  # of k + 1 heads among n throws
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True)
class Difference:
    """The mean difference of pairs, its 95 % interval, and how often chance alone would give one as large (p)."""

    mean: float
    low: float
    high: float
    p: float


def paired(differences: np.ndarray) -> Difference | None:
    """What `differences` (N,) between two models on the same N pieces of text say of their mean; None below FEWEST.

    The interval is that of the percentile bootstrap over pieces (Efron 1979, "Bootstrap methods: another look at the jackknife"), p
    that of the two-sided sign-flip test (Fisher 1935, "The Design of Experiments", section 21), both over DRAWS draws of a fixed seed.
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
        flipped[part] = np.where(generator.integers(2, size=shape, dtype=np.int8), differences, -differences).mean(
            axis=1
        )
    as_large = int((np.abs(flipped) >= abs(mean) * (1 - 1e-12)).sum())  # the draw that was seen counts as one of them
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(mean, float(low), float(high), (1 + as_large) / (1 + DRAWS))
