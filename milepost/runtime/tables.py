"""Tables as text: aligned columns, folded where the terminal is too narrow for them.

A row that is too wide keeps its first columns on one line. The rest follows on lines of its own, and no word is ever cut: a path
that is longer than the line is left to the terminal, from which it can still be copied whole.
"""

import textwrap
from collections.abc import Collection, Sequence

from milepost.screen import harmless

Row = tuple[str, ...]
GAP, INDENT = 2, 4
LEAST = 24  # columns in which a sentence is still readable


def table(rows: Sequence[Row], *, columns: int | None = None) -> str:
    """Format rows in aligned columns: each row on one line, or folded into `columns` characters where they do not fit."""
    rows = [tuple(harmless(cell, one_line=True) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if columns is None or _width(widths) <= columns:
        return "\n".join(_aligned(row, widths) for row in rows)
    count = max(1, sum(_width(widths[: end + 1]) <= columns for end in range(len(widths))))
    before = _width(widths[:-1]) + GAP
    in_place = count == len(widths) - 1 and columns - before >= LEAST
    return "\n".join(
        _wrapped(row, widths, columns, before)
        if in_place and max(map(len, row[-1].split()), default=0) <= columns - before
        else _folded(row, widths, columns, count)
        for row in rows
    )


def is_wider(rows: Sequence[Row], columns: int | None) -> bool:
    """Return whether the rows, each on one line, are wider than the terminal."""
    return columns is not None and any(len(line) > columns for line in table(rows).splitlines())


def without_common(rows: Sequence[Row], of: Collection[str]) -> tuple[list[Row], str]:
    """Return the rows, the first of which is the header, without those of the columns `of` that are alike in all, and these as words:
    `layout unified, resumable yes`.
    """
    header, *rest = rows
    common = [
        at
        for at, column in enumerate(zip(*rest, strict=True))
        if header[at] in of and len(rest) > 1 and len(set(column)) == 1
    ]
    words = ", ".join(f"{header[at]} {rest[0][at]}" for at in common if rest[0][at])
    return [tuple(cell for at, cell in enumerate(row) if at not in common) for row in rows], words


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _aligned(row: Row, widths: Sequence[int]) -> str:
    return (" " * GAP).join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _wrapped(row: Row, widths: Sequence[int], columns: int, before: int) -> str:
    """Return the row with its last cell wrapped within its column."""
    first, *more = _wrap(row[-1], columns - before) or [""]
    return "\n".join([_aligned((*row[:-1], first), widths), *(" " * before + line for line in more)])


def _folded(row: Row, widths: Sequence[int], columns: int, count: int) -> str:
    """Return the row with its cells after the first `count` on lines of their own, each cell whole if a line can hold it."""
    lines = [_aligned(row[:count], widths[:count])]
    for cell in filter(None, row[count:]):
        joined = f"{lines[-1]}{' ' * GAP}{cell}"
        if len(lines) > 1 and len(joined) <= columns:
            lines[-1] = joined
        else:
            lines += _wrap(cell, columns, indent=" " * INDENT)
    return "\n".join(lines)


def _wrap(text: str, columns: int, *, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
