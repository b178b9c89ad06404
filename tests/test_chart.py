"""Charts as text: dots and letters at the right places, in lines of equal width."""

import math

from hypothesis import given
from hypothesis import strategies as st

from milepost.runtime.chart import DOTS, chart, number

FALLING = [(float(x), 10.0 - x) for x in range(11)]


def test_a_falling_line_in_letters():
    falling = [(float(x), 3.0 - x / 2) for x in range(5)]
    assert chart("loss", [falling], columns=15, rows=5, letters=True, ascii_only=True) == [
        "loss           ",
        "       3 |a    ",
        "         | a   ",
        "         |  a  ",
        "         |   a ",
        "       1 |    a",
        "         +-----",
        "          0   4",
    ]


def test_two_points_in_braille_are_a_line_between_opposite_corners():
    lines = chart("", [[(0, 0.0), (1, 1.0)]], columns=12, rows=1, letters=False)
    # Two characters of 2 x 4 dots: from the lowest dot on the left to the highest on the right.
    assert lines[1][10:] == "⡠⠊"
    assert lines[2][9:] == "└──"


def test_the_dots_of_a_character_are_unicodes():
    """Unicode, Braille Patterns: dots 1 2 3 7 down the left, 4 5 6 8 down the right, each one bit."""
    order = {(0, 0): 1, (1, 0): 2, (2, 0): 3, (3, 0): 7, (0, 1): 4, (1, 1): 5, (2, 1): 6, (3, 1): 8}
    assert {(row, column): bit for row, bits in enumerate(DOTS) for column, bit in enumerate(bits)} == {
        place: 1 << (dot - 1) for place, dot in order.items()
    }


def test_later_curves_lie_over_earlier_ones_and_are_painted():
    flat, falling = [(0.0, 5.0), (10.0, 5.0)], FALLING
    lines = chart("", [flat, falling], columns=21, rows=5, letters=True, paint=lambda curve, text: f"<{curve}{text}>")
    assert lines[3].count("<0a>") == 8  # of 11 columns, but for those of the other curve
    assert lines[3].count("<1b>") == 3
    assert "<0a>" not in lines[1] + lines[5]


def test_many_points_are_drawn_at_their_mean_and_a_scale_may_begin_at_zero():
    noisy = [(float(x), 5.0 + (-1) ** x) for x in range(1000)]
    lines = chart("", [noisy], columns=20, rows=5, letters=True, floor=0)
    assert [line[10:].strip() for line in lines[1:6]] == ["", "aaaaaaaaaa", "", "", ""]
    assert [line[:9].strip() for line in lines[1:6]] == ["6", "", "", "", "0"]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 10**9), st.floats(-1e30, 1e30)), max_size=30), min_size=1, max_size=30),
    st.integers(24, 200),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_line_is_as_wide_as_asked_for(curves, columns, rows, letters):
    points = [sorted({float(x): y for x, y in curve}.items()) for curve in curves]
    lines = chart("title", points, columns=columns, rows=rows, letters=letters)
    assert {len(line) for line in lines} == {columns}
    assert len(lines) == (rows + 3 if any(points) else 1)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_fit_their_margin(value):
    assert len(number(value)) <= 8 or abs(value) > 1e15
    if 1e-3 <= abs(value) < 1e15:
        factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(number(value)[-1], 1)
        assert math.isclose(float(number(value).rstrip("kMGT")) * factor, value, rel_tol=6e-3)
