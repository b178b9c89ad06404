"""Plot curves as text: braille dots, or a letter per curve where colors or Unicode are missing."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Points = Sequence[tuple[float, float]]  # (x, y), x rising
Paint = Callable[[int, str], str]  # (index of a curve, character) -> colored character

# The bits of U+2800 for the eight dots of a character, by row and column (Unicode, "Braille Patterns").
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MARGIN = 9  # columns for the scale of the y axis


class Frame(NamedTuple):
    """The limits of a chart's axes."""

    left: float
    right: float
    low: float
    high: float


def frame(curves: Sequence[Points], *, floor: float | None = None) -> Frame:
    """Return the smallest frame around all points, down to `floor` if set. There must be a point."""
    xs = [x for points in curves for x, _ in points]
    ys = [y for points in curves for _, y in points] + ([] if floor is None else [floor])
    low, high = min(ys), max(ys)
    room = 0.0 if high > low else abs(high) / 2 or 0.5
    return Frame(min(xs), max(max(xs), min(xs) + 1), low - room, high + room)


def chart(title: str, curves: Sequence[Points], *, columns: int, rows: int, letters: bool, ascii_only: bool = False,
          floor: float | None = None, paint: Paint | None = None) -> list[str]:  # fmt: skip
    """Return the lines of a chart, `columns` characters wide: a title, the curves in `rows` lines with their scale, and
    the x axis.

    Later curves cover earlier ones. With `letters` each curve is drawn in its own letter, otherwise in dots. `paint`
    colors a character.
    """
    if not any(curves):
        return [f"{title}: nothing logged"[:columns].ljust(columns)]
    seen = frame(curves, floor=floor)
    width = columns - MARGIN - 1
    cells = _cells(curves, seen, width=width, rows=rows, across=1 if letters else 2, down=1 if letters else 4)
    corner, wall, ground = ("+", "|", "-") if ascii_only else ("└", "│", "─")
    lines = [title[:columns].ljust(columns)]
    for row in range(rows):
        scale = {0: number(seen.high), rows - 1: number(seen.low)}.get(row, "")
        marks = [_mark(cells.get((row, column)), letters=letters, paint=paint) for column in range(width)]
        lines.append(f"{scale:>{MARGIN - 1}} {wall}" + "".join(marks))
    first, last = number(seen.left), number(seen.right)
    lines.append(" " * MARGIN + corner + ground * width)
    lines.append(" " * (MARGIN + 1) + first + last.rjust(width - len(first)))
    return lines


def _mark(cell: tuple[int, int] | None, *, letters: bool, paint: Paint | None) -> str:
    if cell is None:
        return " "
    curve, bits = cell
    text = LETTERS[curve % len(LETTERS)] if letters else chr(0x2800 + bits)
    return paint(curve, text) if paint else text


def _cells(
    curves: Sequence[Points], seen: Frame, *, width: int, rows: int, across: int, down: int
) -> dict[tuple[int, int], tuple[int, int]]:
    """Return {(row, column): (topmost curve, its dots)} for every character that is not empty."""
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for curve, points in enumerate(curves):
        dots = _thinned(points, seen, width=width * across, height=rows * down)
        for x, y in _joined(dots):
            place = (y // down, x // across)
            owner, bits = cells.get(place, (curve, 0))
            dot = DOTS[y % down][x % across]
            cells[place] = (curve, bits | dot if owner == curve else dot)
    return cells


def _thinned(points: Points, seen: Frame, *, width: int, height: int) -> list[tuple[int, int]]:
    """Return one dot per column of dots, at the mean of its points; rows count from the top."""
    columns: dict[int, list[float]] = {}
    for x, y in points:
        columns.setdefault(round((x - seen.left) / (seen.right - seen.left) * (width - 1)), []).append(y)
    means = {x: sum(ys) / len(ys) for x, ys in columns.items()}
    return [(x, round((seen.high - means[x]) / (seen.high - seen.low) * (height - 1))) for x in sorted(means)]


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
