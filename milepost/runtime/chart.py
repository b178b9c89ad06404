"""Plot curves as text: braille dots, or a letter per curve where colors or Unicode are missing."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Points = Sequence[tuple[float, float]]  # (x, y), x rising
Paint = Callable[[int, str], str]  # (color of a curve, character) -> colored character

# The bits of U+2800 for the eight dots of a character, by row and column (Unicode, "Braille Patterns").
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MARGIN = 9  # columns for the scale of the y axis
BETWEEN_TICKS = 10  # columns at least
LEAST_STEP = 1e-12  # of the greatest value: a finer scale would not be visible in its numbers


class Curve(NamedTuple):
    """A curve to draw: in dots, or with a character `mark`, joined by lines or as single points."""

    points: Points
    color: int = 0
    mark: str = ""
    joined: bool = True


class Frame(NamedTuple):
    """The limits of a chart's axes."""

    left: float
    right: float
    low: float
    high: float


def frame(curves: Sequence[Curve], *, floor: float | None = None) -> Frame:
    """Return the smallest frame around all points, down to `floor` if set. There must be a point."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points] + ([] if floor is None else [floor])
    low, high = min(ys), max(ys)
    room = 0.0 if high > low else abs(high) / 2 or 0.5
    return Frame(min(xs), max(max(xs), min(xs) + 1), low - room, high + room)


def chart(title: str, curves: Sequence[Curve], *, columns: int, rows: int, ascii_only: bool = False,
          floor: float | None = None, paint: Paint | None = None) -> list[str]:  # fmt: skip
    """Return the lines of a chart, `columns` characters wide: a title, the curves in `rows` lines with ticks, and the x
    axis with its own.

    Later curves cover earlier ones. `paint` colors a character.
    """
    if not any(curve.points for curve in curves):
        return [f"{title}: nothing logged"[:columns].ljust(columns)]
    seen = frame(curves, floor=floor)
    width = columns - MARGIN - 1
    cells = _cells(curves, seen, width=width, rows=rows)
    corner, wall, ground, tick, below = "+|-++" if ascii_only else "└│─┤┬"
    scale = {
        _place(y, seen.high, seen.low, rows): number(y) for y in ticks(seen.low, seen.high, max(2, (rows + 1) // 2))
    }
    lines = [title[:columns].ljust(columns)]
    for row in range(rows):
        marks = [_mark(cells.get((row, column)), curves, paint) for column in range(width)]
        lines.append(f"{scale.get(row, ''):>{MARGIN - 1}} {tick if row in scale else wall}" + "".join(marks))
    places = {
        _place(x, seen.left, seen.right, width): number(x) for x in ticks(seen.left, seen.right, width // BETWEEN_TICKS)
    }
    lines.append(" " * MARGIN + corner + "".join(below if at in places else ground for at in range(width)))
    lines.append(" " * (MARGIN + 1) + _labels(places, width))
    return lines


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round values from `low` to `high`, multiples of 1, 2 or 5 times a power of ten: `most`, and at least one."""
    least = max((high - low) / max(1, most), max(abs(low), abs(high)) * LEAST_STEP)
    power = 10.0 ** math.floor(math.log10(least)) if least > 1e-300 else 1e-300
    for step in (power * factor for factor in (1, 2, 5, 10, 20, 50, 100)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= max(1, most) or step > high - low:
            break
    found = [min(max(count * step, low), high) for count in range(first, last + 1)][: max(1, most)]
    return found or [low]


def _place(value: float, first: float, last: float, count: int) -> int:
    """Return the row or column of a value, of `count` between `first` and `last`."""
    return round((value - first) / (last - first) * (count - 1))


def _labels(places: dict[int, str], width: int) -> str:
    """Return the line with the label of each tick below it, as far as they fit beside each other."""
    line = ""
    for at, label in sorted(places.items()):
        start = max(0, min(at - (len(label) - 1) // 2, width - len(label)))
        if not line or start > len(line):
            line = line.ljust(start) + label
    return line[:width].ljust(width)


def _mark(cell: tuple[int, int] | None, curves: Sequence[Curve], paint: Paint | None) -> str:
    if cell is None:
        return " "
    curve, bits = curves[cell[0]], cell[1]
    text = curve.mark or chr(0x2800 + bits)
    return paint(curve.color, text) if paint else text


def _cells(curves: Sequence[Curve], seen: Frame, *, width: int, rows: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Return {(row, column): (topmost curve, its dots)} for every character that is not empty."""
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for number, curve in enumerate(curves):
        across, down = (1, 1) if curve.mark else (2, 4)
        dots = _thinned(curve.points, seen, width=width * across, height=rows * down)
        for x, y in _joined(dots) if curve.joined else dots:
            place = (y // down, x // across)
            owner, bits = cells.get(place, (number, 0))
            dot = DOTS[y % down][x % across]
            cells[place] = (number, bits | dot if owner == number else dot)
    return cells


def _thinned(points: Points, seen: Frame, *, width: int, height: int) -> list[tuple[int, int]]:
    """Return one dot per column of dots, at the mean of its points; rows count from the top."""
    columns: dict[int, list[float]] = {}
    for x, y in points:
        columns.setdefault(_place(x, seen.left, seen.right, width), []).append(y)
    return [(x, _place(sum(columns[x]) / len(columns[x]), seen.high, seen.low, height)) for x in sorted(columns)]


def _joined(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the dots, and those on straight lines between them."""
    yield from dots[:1]
    for (x, y), (next_x, next_y) in itertools.pairwise(dots):
        steps = max(abs(next_x - x), abs(next_y - y))
        for step in range(1, steps + 1):
            yield x + round((next_x - x) * step / steps), y + round((next_y - y) * step / steps)


def number(value: float) -> str:
    """Format a value in at most eight characters, with up to four significant digits."""
    size, letter = next((pair for pair in UNITS if abs(value) >= pair[0]), (1.0, ""))
    texts = [f"{value / size:.{figures}g}{letter}" for figures in (4, 3, 2, 1)]
    return next((text for text in texts if len(text) < MARGIN), texts[-1])
