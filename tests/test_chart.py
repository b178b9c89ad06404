"""Charts as text: dots and letters at the right places, in lines of equal width."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.runtime.chart import DOTS, Curve, chart, number, ticks

FALLING = [(float(x), 10.0 - x) for x in range(11)]


def test_a_falling_line_in_letters():
    falling = [(float(x), 3.0 - x / 2) for x in range(5)]
    assert chart("loss", [Curve(falling, mark="a")], columns=15, rows=5, ascii_only=True) == [
        "loss           ",
        "       3 +a    ",
        "         | a   ",
        "       2 +  a  ",
        "         |   a ",
        "       1 +    a",
        "         ++----",
        "          0    ",
    ]


def test_two_points_in_braille_are_a_line_between_opposite_corners():
    lines = chart("", [Curve([(0, 0.0), (1, 1.0)])], columns=12, rows=1)
    # Two characters of 2 x 4 dots: from the lowest dot on the left to the highest on the right.
    assert lines[1][10:] == "⡠⠊"
    assert lines[2][9:] == "└┬─"


def test_points_that_are_not_joined_are_drawn_one_by_one_over_a_line():
    points = Curve([(0.0, 10.0), (10.0, 10.0)], 1, "o", joined=False)
    lines = chart("", [Curve(FALLING), points], columns=21, rows=5)
    assert (lines[1][10], lines[1][20]) == ("o", "o")
    assert "".join(lines).count("o") == 2


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 500, 6, [0, 100, 200, 300, 400, 500]),
        (5, 500, 6, [100, 200, 300, 400, 500]),
        (2.38, 4.3, 4, [2.5, 3, 3.5, 4]),
        (0, 1, 3, [0, 0.5, 1]),
        (-1, 1, 3, [-1, 0, 1]),
        (1e-4, 3e-3, 3, [0.001, 0.002, 0.003]),
    ],
)
def test_ticks_are_round_and_within_the_axis(low, high, most, expected):
    assert ticks(low, high, most) == pytest.approx(expected)


@given(st.floats(-1e30, 1e30), st.floats(1e-30, 1e30), st.integers(1, 20))
def test_there_is_a_tick_and_there_are_never_too_many(low, size, most):
    found = ticks(low, low + size, most)
    assert 1 <= len(found) <= most
    assert all(low <= tick <= low + size for tick in found)


def test_a_label_stands_below_its_tick():
    lines = chart("", [Curve([(0.0, 1.0), (500.0, 2.0)])], columns=80, rows=4)
    at = [place for place, char in enumerate(lines[-2]) if char == "┬"]
    labels = {match.start(): match[0] for match in re.finditer(r"\S+", lines[-1])}
    assert list(labels.values()) == ["0", "100", "200", "300", "400", "500"]
    assert all(start <= place < start + len(label) for place, (start, label) in zip(at, labels.items(), strict=True))


def test_the_dots_of_a_character_are_unicodes():
    """Unicode, Braille Patterns: dots 1 2 3 7 down the left, 4 5 6 8 down the right, each one bit."""
    order = {(0, 0): 1, (1, 0): 2, (2, 0): 3, (3, 0): 7, (0, 1): 4, (1, 1): 5, (2, 1): 6, (3, 1): 8}
    assert {(row, column): bit for row, bits in enumerate(DOTS) for column, bit in enumerate(bits)} == {
        place: 1 << (dot - 1) for place, dot in order.items()
    }


def test_later_curves_lie_over_earlier_ones_and_are_painted():
    flat, falling = [(0.0, 5.0), (10.0, 5.0)], FALLING
    curves = [Curve(flat, 0, "a"), Curve(falling, 1, "b")]
    lines = chart("", curves, columns=21, rows=5, paint=lambda curve, text: f"<{curve}{text}>")
    assert lines[3].count("<0a>") == 8  # of 11 columns, but for those of the other curve
    assert lines[3].count("<1b>") == 3
    assert "<0a>" not in lines[1] + lines[5]


def test_many_points_are_drawn_at_their_mean_and_a_scale_may_begin_at_zero():
    noisy = [(float(x), 5.0 + (-1) ** x) for x in range(1000)]
    lines = chart("", [Curve(noisy, mark="a")], columns=20, rows=5, floor=0)
    assert [line[10:].strip() for line in lines[1:6]] == ["", "aaaaaaaaaa", "", "", ""]
    assert [line[:9].strip() for line in lines[1:6]] == ["", "5", "", "", "0"]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 10**9), st.floats(-1e30, 1e30)), max_size=30), min_size=1, max_size=30),
    st.integers(24, 200),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_line_is_as_wide_as_asked_for(curves, columns, rows, letters):
    points = [sorted({float(x): y for x, y in curve}.items()) for curve in curves]
    drawn = [Curve(each, mark="a" * letters) for each in points]
    lines = chart("title", drawn, columns=columns, rows=rows)
    assert {len(line) for line in lines} == {columns}
    assert len(lines) == (rows + 3 if any(points) else 1)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_fit_their_margin(value):
    assert len(number(value)) <= 8 or abs(value) > 1e15
    if 1e-3 <= abs(value) < 1e15:
        factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(number(value)[-1], 1)
        assert math.isclose(float(number(value).rstrip("kMGT")) * factor, value, rel_tol=6e-3)
