"""milepost/evaluate/statistics.py against published values, exact enumeration and the normal distribution."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.evaluate.statistics import DRAWS, FEWEST, mcnemar, paired, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_as_published(successes, trials, low, high):
    assert wilson(successes, trials) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_knows_nothing_without_trials():
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_solves_its_equation_and_is_symmetric(trials, data):
    """Its ends are the shares p for which the one seen lies exactly 1.96 standard errors sqrt(p (1 - p) / n) away."""
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    for end in (low, high):
        assert abs(successes / trials - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), abs=1e-6)
    assert wilson(trials - successes, trials) == (pytest.approx(1 - high), pytest.approx(1 - low))


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (0, 6, 2 / 64), (3, 1, 10 / 16)]
)
def test_mcnemar_by_hand(b, c, p):
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_share_of_throws_as_uneven(b, c):
    n = b + c
    throws = [sum(throw) for throw in itertools.product((0, 1), repeat=n)]
    as_uneven = sum(abs(2 * heads - n) >= abs(b - c) for heads in throws)
    assert mcnemar(b, c) == pytest.approx(min(1.0, as_uneven / len(throws)), rel=1e-12)


def test_mcnemar_of_many_items():
    """The normal approximation with continuity correction, which is close for so many."""
    b, c = 5200, 4800
    z = (abs(b - c) - 1) / math.sqrt(b + c)
    assert mcnemar(b, c) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_too_few_pairs_are_not_significant():
    assert paired(np.ones(FEWEST - 1)) is None
    assert paired(np.zeros(0)) is None
    assert paired(np.ones(FEWEST)) is not None


def test_the_sign_flip_test_against_all_flips():
    differences = np.array([0.3, -0.1, 0.4, 0.2, -0.2, 0.5, 0.1, 0.35, -0.05, 0.15])
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=10)]
    exact = np.mean(np.array(flips) >= abs(differences.sum()) - 1e-12)
    assert 0.01 < exact < 0.1
    assert paired(differences).p == pytest.approx(exact, abs=4 * math.sqrt(exact / DRAWS))


def test_the_interval_of_many_pairs_is_the_normal_interval():
    differences = np.random.default_rng(4).normal(0.1, 2.0, size=900)
    found, half = paired(differences), 1.959964 * differences.std() / 30
    assert found.mean == pytest.approx(differences.mean(), rel=1e-12)
    assert found.low == pytest.approx(differences.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.06 * half)
    z = abs(differences.mean()) / np.sqrt((differences**2).mean() / 900)
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)


def test_zero_and_constant_differences():
    nothing, steady = paired(np.zeros(50)), paired(np.full(50, -0.25))
    assert (nothing.mean, nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 0.0, 1.0)
    assert (steady.mean, steady.low, steady.high) == (-0.25, -0.25, -0.25)
    assert steady.p == 1 / (1 + DRAWS)  # 2 of 2**50 flips are as large


def test_the_same_differences_give_the_same_figures():
    differences = np.random.default_rng(5).normal(size=600)
    assert paired(differences) == paired(differences.copy())
    assert paired(-differences).mean == -paired(differences).mean


def test_chance_is_found_significant_as_often_as_it_should():
    """Of 200 comparisons of equals, about one in twenty has p < 0.05: more than 20 would be a one in 1000 event."""
    generator = np.random.default_rng(6)
    ps = [paired(generator.normal(size=20)).p for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in ps) <= 20
