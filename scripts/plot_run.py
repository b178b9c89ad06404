"""Plot loss, validation loss, learning rate and throughput of runs and their parents, on the terminal or into a file.

python3 scripts/plot_run.py
RUN=latest,20251110 OUTPUT=curves.png python3 scripts/plot_run.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("RUN", "OUTPUT", "RUNS_DIR")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from milepost.ckpt import CheckpointError
from milepost.ckpt.manifest import is_regular, read_json
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.files import replacing
from milepost.run.build import is_run
from milepost.runtime.chart import LETTERS, Curve, Points, chart
from milepost.runtime.progress import Log, read_metrics, shown
from milepost.runtime.tables import table
from milepost.screen import harmless, stdout_columns, write_stdout
from milepost.text.errors import DataError

METRICS = "metrics.jsonl"
SUFFIXES = {".png", ".svg", ".pdf"}
MAX_VALUE = 1e300  # differences and means of a few such values are finite
MAX_NAMED = 8  # runs in a message
ROWS, SMALL_ROWS = (5, 20), (3, 5)  # of the chart of the losses and of those below it, at least and at most
LOW = 30  # lines of a window in which the charts below are small
FRAME = 3  # lines of a chart besides its rows
MIN_COLUMNS, SIDE_BY_SIDE, MAX_COLUMNS = 40, 70, 180  # SIDE_BY_SIDE: from here on two small charts per line
COLORS = (36, 33, 35, 32, 34, 31)  # of a terminal (ECMA-48), legible on dark and light backgrounds


class Panel(NamedTuple):
    """A chart: a field of the lines of a split, and whether its y axis starts at zero."""

    title: str
    split: str
    field: str
    from_zero: bool


PANELS = (
    Panel("training loss (nats per token)", "train", "loss", False),
    Panel("validation loss (nats per token)", "validation", "loss", False),
    Panel("learning rate", "train", "lr", True),
    Panel("tokens per second", "train", "tok_s", True),
)

TITLE = "loss (nats per token): training thin, validation thick with dots"  # of a picture's first panel
HIDDEN = "_"  # label of a curve that the legend does not list

USUAL = ("run_id", "step", "time", "split", "loss", "lr", "grad_norm", "tokens", "tok_s")  # names in every line


class Drawn(NamedTuple):
    """A run to draw: its lines, up to the step where a requested run resumed from it, and its parent."""

    name: str
    lines: list[dict[str, Any]]
    parent: dict[str, Any] | None
    requested: bool
    label: str = ""  # what tells it apart from the other runs that are drawn


def main(settings: Config, log: Log) -> int:
    """Draw the runs that RUN names; return the exit code."""
    output = Path(settings.output) if settings.output else None
    if output:
        check_output(output)
    folders = chosen(settings.run, Path(settings.runs_dir))
    runs = labelled(with_parents(folders, log), Path(settings.runs_dir))
    if not any(run.lines for run in runs):
        raise DataError(
            f"{', '.join(map(shown, folders))}: {METRICS} is empty; a run writes a line every LOG_INTERVAL steps"
        )
    if output:
        draw_file(runs, output)
        log(f"drawn: {shown(output)}")
    else:
        draw_terminal(runs)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Which runs.


def chosen(requested: str, folder: Path) -> list[Path]:
    """Return the folders of the runs that RUN names, each once, in its order; matches of a prefix or glob by name, so
    by start.

    Raises ConfigError if RUN is empty, and listing the runs if a part of it matches none.
    """
    parts = [part.strip() for part in requested.split(",") if part.strip()]
    if not parts:
        raise ConfigError(
            [f"RUN={requested}: expected latest, the beginning of a run's name, a glob or a run's folder"]
        )
    if not folder.is_dir():
        raise ConfigError([f"RUNS_DIR={folder}: no such folder; training creates it, or set another"])
    there = sorted(path.parent for path in folder.glob(f"*/{METRICS}") if is_regular(path))
    folders: dict[Path, None] = {}
    for part in parts:
        if os.path.lexists(file := folder / part / METRICS) and not is_regular(file):  # reading a pipe would block
            raise DataError(f"{shown(file)}: is not a regular file, expected the metrics of a run: remove it")
        found = runs_of(part, there)
        if not found:
            raise ConfigError([f"RUN={part}: no run in {shown(folder)} matches; {listed(there)}"])
        folders |= dict.fromkeys(found)
    return list(folders)


def runs_of(part: str, there: list[Path]) -> list[Path]:
    """Return the runs that a part of RUN names: latest, a folder, a RUN_NAME, or an id, its beginning or a glob."""
    if part.lower() == "latest":
        return [max(there, key=last_time)] if there else []
    if os.path.isfile(os.path.join(part, METRICS)):
        return [Path(os.path.abspath(part))]
    same = [path for path in there if path.name == part]
    return same or [path for path in there if is_run(path.name, part)]


def last_time(folder: Path) -> float:
    """Return the Unix time of the run's last complete line. File times would change with a copy."""
    ends: list[bytes] = []
    with contextlib.suppress(OSError), open(folder / METRICS, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        ends = file.read().splitlines()
    for end in reversed(ends):
        # A torn line, or not one of ours.
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return float(json.loads(end)["time"])
    return -math.inf


def listed(there: list[Path]) -> str:
    """Return the names of the runs, latest first, for a message."""
    if not there:
        return "it holds no runs; was RUNS_DIR different in training?"
    names = [path.name for path in sorted(there, key=last_time, reverse=True)]
    return f"it holds {', '.join(names[:MAX_NAMED])}" + (
        f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else ""
    )


def with_parents(folders: list[Path], log: Log) -> list[Drawn]:
    """Return the runs of `folders` and their parents, parents first.

    A parent that is not requested ends where its child resumed.
    """
    curves: dict[str, Drawn] = {}
    for folder in folders:
        own = drawable(folder, requested=True)
        curves[folder.name] = own
        for name, step in ancestors(own, folder.parent, log):
            known = curves.get(name)
            if known and (known.requested or max((line["step"] for line in known.lines), default=0) >= step):
                continue
            parent = drawable(folder.with_name(name), requested=False)
            curves[name] = parent._replace(lines=[line for line in parent.lines if line["step"] <= step])
    return sorted(curves.values(), key=lambda run: (run.requested, run.lines[0]["time"] if run.lines else math.inf))


def drawable(folder: Path, *, requested: bool) -> Drawn:
    """Return the run of a folder with all its lines."""
    return Drawn(folder.name, lines_of(folder), parent_of(folder), requested)


def ancestors(run: Drawn, runs_dir: Path, log: Log) -> Iterator[tuple[str, int]]:
    """Yield name and last step of each run that this one continues, nearest first, as far as they exist."""
    seen, last = {run.name}, run
    while (parent := last.parent) and not weights_only(last):
        if not (isinstance(parent.get("run_id"), str) and isinstance(parent.get("step"), int)):
            return
        name = Path(parent["run_id"]).name  # the file must not lead out of RUNS_DIR
        if name in seen:
            return
        if not (runs_dir / name / METRICS).is_file():
            log(f"{run.name} resumed from {name}, which is missing in {shown(runs_dir)}")
            return
        seen.add(name)
        yield name, parent["step"]
        last = drawable(runs_dir / name, requested=False)


def weights_only(run: Drawn) -> bool:
    """Return whether the run took its parent's weights but counts its steps from 0, as with INIT_FROM: it continues no
    curve.

    A resumed run trains from the parent's step on, and may validate at that step.
    """
    step = run.parent.get("step") if run.parent else None
    if not isinstance(step, int):
        return False
    return step == 0 or any(line["step"] < step + (line.get("split") == "train") for line in run.lines)


def labelled(runs: list[Drawn], runs_dir: Path) -> list[Drawn]:
    """Return the runs, each with the settings in which it differs from the others, and the note on it."""
    own = {run.name: config.env_values(runs_dir / run.name / "config.env") for run in runs}
    texts = {
        name: ", ".join(filter(None, (text, own[name].get("RUN_NOTE")))) for name, text in config.labels(own).items()
    }
    return [run._replace(label=harmless(texts[run.name], one_line=True)) for run in runs]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the run's lines that have a time and a step that a float can hold exactly."""
    lines = read_metrics(folder / METRICS)
    timed = [line for line in lines if isinstance(line.get("time"), int | float)]
    return [line for line in timed if isinstance(line.get("step"), int) and abs(line["step"]) < 2**53]


def parent_of(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint that the run began with, from run.json; None if there is none or it is unknown."""
    try:
        parent = read_json(folder / "run.json").get("parent")
    except CheckpointError:
        return None
    return parent if isinstance(parent, dict) else None


def panels(runs: list[Drawn]) -> list[Panel]:
    """Return the usual panels, and one for each further metric of the training lines."""
    lines = [line for run in runs for line in run.lines if line.get("split") == "train"]
    names = dict.fromkeys(name for line in lines for name, y in line.items() if math.isfinite(_number(y)))
    return [
        *PANELS,
        *(Panel(harmless(name, one_line=True), "train", name, False) for name in names if name not in USUAL),
    ]


def points(run: Drawn, panel: Panel) -> Points:
    """Return the (step, value) pairs of a run in a panel."""
    own = [line for line in run.lines if line.get("split") == panel.split]
    values = [(line["step"], _number(line.get(panel.field))) for line in own]
    return sorted((step, y) for step, y in values if math.isfinite(y))


def _number(value: Any) -> float:
    """Return a value as a float; NaN if it is not a number, or so large that arithmetic would overflow."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_VALUE:
        return math.nan
    return float(value)


# ---------------------------------------------------------------------------------------------------------------------
# On the terminal.


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


HEAD = ("", "run", "step", "train", "val", "best", "tokens/s", "resumed from", "settings that differ, note")


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


def last_step(run: Drawn) -> int:
    """Return the last step that is drawn."""
    return max((line["step"] for line in run.lines), default=0)


def origin(run: Drawn) -> str:
    """Describe the checkpoint that the run began with."""
    if run.parent is None:
        return ""
    parent = f"{run.parent.get('run_id') or run.parent.get('file')} at step {run.parent.get('step')}"
    return f"weights from {parent}" if weights_only(run) else parent


# ---------------------------------------------------------------------------------------------------------------------
# Into a file.


def check_output(output: Path) -> None:
    """Raise ConfigError if OUTPUT cannot be written, before anything is read."""
    if output.suffix.lower() not in SUFFIXES or output.is_dir() or not output.parent.is_dir():
        raise ConfigError(
            [f"OUTPUT={output}: expected a file name that ends in .png, .svg or .pdf, in an existing folder"]
        )
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "pip install matplotlib, or unset OUTPUT to plot on the terminal"
        raise ConfigError([f"OUTPUT={output}: plotting into a file needs matplotlib: {remedy}"])


def draw_file(runs: list[Drawn], output: Path) -> None:
    """Write the charts and a legend to `output`, atomically."""
    from matplotlib.figure import Figure  # without pyplot, no screen is needed

    drawn = [panel for panel in panels(runs) if panel.split != "validation"]  # which the first panel has
    rows = math.ceil(len(drawn) / 2)
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, sharex=True).flat)
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    for panel, axes in zip(drawn, grid, strict=False):
        for number, run in enumerate(runs):
            draw_curve(axes, run, panel, number)
        axes.set_title(TITLE if panel is PANELS[0] else panel.title, fontsize=10, parse_math=False)
        axes.grid(alpha=0.3)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    for axes in grid[: len(drawn)][-2:]:  # the last of each column
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelbottom=True)
    handles = [line for line in grid[-1 if len(drawn) == 1 else 1].lines if line.get_label() != HIDDEN]
    legend = figure.legend(handles, list(map(legend_of, runs)), loc="outside lower center", fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is not mathematics
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=120)
        if output.suffix.lower() == ".svg":
            temporary.write_text(dark_too(temporary.read_text(encoding="utf-8")), encoding="utf-8")


def draw_curve(axes: Any, run: Drawn, panel: Panel, number: int) -> None:
    """Draw a run into a panel; its validation loss too, thick and with dots, beside its training loss, smoothed if it is long."""
    style = {"color": f"C{number}", "linestyle": "-" if run.requested else "--"}
    xs, ys = columns_of(points(run, panel))
    if panel is not PANELS[0]:
        axes.plot(xs, ys, linewidth=1, label=legend_of(run), **style)
        return
    smooth = smoothed(ys)
    if smooth != ys:
        axes.plot(xs, ys, linewidth=0.6, alpha=0.25, label=HIDDEN, **style)
    axes.plot(xs, smooth, linewidth=1, label=legend_of(run), **style)
    axes.plot(*columns_of(points(run, PANELS[1])), marker="o", markersize=3, linewidth=2, label=HIDDEN, **style)


def columns_of(pairs: Points) -> tuple[list[float], list[float]]:
    """Return the x and the y values."""
    return [x for x, _ in pairs], [y for _, y in pairs]


def smoothed(values: list[float]) -> list[float]:
    """Return the means over a window of a fiftieth of the values around each; short curves as they are."""
    reach = len(values) // 100
    windows = (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows] if reach else values


def dark_too(svg: str) -> str:
    """Return the picture with a style that turns its lightness around where the reader's screen is dark."""
    start, end, rest = svg.partition("<svg ")
    tag, close, content = rest.partition(">")
    style = "<style>@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }</style>"
    return f"{start}{end}{tag}{close}\n {style}{content}"


def legend_of(run: Drawn) -> str:
    """Return the run's name, its parent, and the settings in which it differs."""
    begun = "" if run.parent is None else f" ({origin(run)})" if weights_only(run) else f" (from {origin(run)})"
    return harmless(f"{run.name}{begun}{': ' * bool(run.label)}{run.label}", one_line=True)


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
