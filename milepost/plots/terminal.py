"""Draw runs on a terminal: a chart of both losses, a small one of each further metric, and a table of the runs."""

import itertools
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from milepost import config
from milepost.plots.curves import PANELS, Drawn, columns_of, last_step, origin, panels, points, smoothed
from milepost.runtime.chart import LETTERS, Curve, chart
from milepost.runtime.tables import table
from milepost.screen import stdout_columns, write_stdout

ROWS, SMALL_ROWS = (5, 20), (3, 5)  # of the chart of the losses and of those below it, at least and at most
LOW = 30  # lines of a window in which the charts below are small
FRAME = 3  # lines of a chart besides its rows
MIN_COLUMNS, SIDE_BY_SIDE, MAX_COLUMNS = 40, 70, 180  # SIDE_BY_SIDE: from here on two small charts per line
COLORS = (36, 33, 35, 32, 34, 31)  # of a terminal (ECMA-48), legible on dark and light backgrounds
HEAD = ("", "run", "step", "train", "val", "best", "tokens/s", "resumed from", "settings that differ, note")


def draw_terminal(runs: list[Drawn]) -> None:
    """Print the charts and a table of the runs: in color and within the window on a terminal, as plain text into a pipe
    or with NO_COLOR.
    """
    ascii_only = not _has_characters(getattr(sys.stdout, "encoding", None) or "utf-8")
    colored = sys.stdout.isatty() and not config.no_color()
    letters = ascii_only or (len(runs) > 1 and not colored)
    window = shutil.get_terminal_size((80, 24))
    columns = min(MAX_COLUMNS, max(MIN_COLUMNS, window.columns))
    style: dict[str, Any] = {"ascii_only": ascii_only, "paint": painted if colored else None}
    legend = summary(runs, letters=letters, columns=stdout_columns())
    small = below(runs, columns, SMALL_ROWS[window.lines >= LOW], letters=letters, **style)
    taken = (
        sum(map(len, small)) + len(small) + len(legend) + FRAME + 3
    )  # blank lines, a line of the log, the next prompt
    rows = min(ROWS[1], max(ROWS[0], window.lines - taken))
    title = f"loss (nats per token), validation as {'A' if letters else 'o'}"
    losses = [curve for number, run in enumerate(runs) for curve in both_losses(run, number, letters=letters)]
    main_chart = chart(title, losses, columns=columns, rows=rows, **style)
    text = "\n\n".join("\n".join(map(str.rstrip, lines)) for lines in (main_chart, *small))
    write_stdout("\n".join([text, "", *(in_colors(legend) if colored else legend)]), colored=colored)


def both_losses(run: Drawn, number: int, *, letters: bool) -> list[Curve]:
    """Return the curves of a run's training loss, smoothed if it is long, and of its validation loss, as points."""
    letter = LETTERS[number % len(LETTERS)]
    xs, ys = columns_of(points(run, PANELS[0]))
    training = Curve(list(zip(xs, smoothed(ys), strict=True)), number, letter if letters else "")
    return [training, Curve(points(run, PANELS[1]), number, letter.upper() if letters else "o", joined=False)]


def below(runs: list[Drawn], columns: int, rows: int, *, letters: bool, **style: Any) -> list[list[str]]:
    """Return the lines of the charts of all metrics but the losses, two beside each other where the window is wide."""
    abreast = 2 if columns >= SIDE_BY_SIDE else 1
    width = (columns - 2) // 2 if abreast == 2 else columns
    mark = [LETTERS[number % len(LETTERS)] if letters else "" for number in range(len(runs))]
    charts = [
        chart(panel.title, [Curve(points(run, panel), at, mark[at]) for at, run in enumerate(runs)],
              columns=width, rows=rows, floor=0 if panel.from_zero else None, **style)
        for panel in panels(runs)[2:]
    ]  # fmt: skip
    return [beside(charts[at : at + abreast], width) for at in range(0, len(charts), abreast)]


def _has_characters(encoding: str) -> bool:
    """Return whether the encoding has the characters of the charts."""
    try:
        "⣿│└─".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def painted(curve: int, text: str) -> str:
    """Return `text` in the color of a curve."""
    return f"\x1b[{COLORS[curve % len(COLORS)]}m{text}\x1b[0m"


def in_colors(legend: list[str]) -> Iterator[str]:
    """Yield the lines of the table, those of a run in its color; the first of a run begins with its mark."""
    number = -1
    for line in legend:
        number += not line.startswith(" ")
        yield line if number < 0 else painted(number, line)


def beside(charts: list[list[str]], width: int) -> list[str]:
    """Return the lines of charts of equal width side by side."""
    return ["  ".join(row) for row in itertools.zip_longest(*charts, fillvalue=" " * width)]


def summary(runs: list[Drawn], *, letters: bool, columns: int | None) -> list[str]:
    """Return the lines of a table with a row per run: its last step, losses, speed, parent, and what tells it apart."""
    rows: list[tuple[str, ...]] = [HEAD]
    for number, run in enumerate(runs):
        train, validation, _, speed = ([y for _, y in points(run, panel)] for panel in PANELS)
        middle = f"{sorted(speed)[len(speed) // 2]:.0f}" if speed else ""
        losses = [f"{ys[-1]:.4f}" if ys else "" for ys in (train, validation)]
        best = f"{min(validation):.4f}" if validation else ""
        mark = LETTERS[number % len(LETTERS)] if letters else "*" if run.requested else "."
        rows.append((mark, run.name, str(last_step(run)), *losses, best, middle, origin(run), run.label))
    used = [at for at in range(len(HEAD)) if at < 2 or any(row[at] for row in rows[1:])]
    return table([tuple(row[at] for at in used) for row in rows], columns=columns).splitlines()
