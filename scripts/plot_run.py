"""Draw loss, validation loss, learning rate and throughput of runs, with what they go on from: on the terminal, or into a file.

python3 scripts/plot_run.py
RUN=latest,20251110 OUTPUT=curves.png python3 scripts/plot_run.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("RUN", "OUTPUT", "RUNS_DIR")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import fnmatch
import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.runtime.chart import LETTERS, Points, chart
from milepost.runtime.progress import Log, harmless, ignore_stdout, read_metrics, replacing, shown, table
from milepost.text.errors import DataError

METRICS = "metrics.jsonl"
DRAWN = {".png", ".svg", ".pdf"}
LARGEST = 1e300  # figure: differences and means of a few are floats too
MOST_NAMED = 8  # runs in a message
ROWS, NARROW, SIDE_BY_SIDE, WIDEST = 8, 40, 110, 180  # of charts on the terminal: rows of one, columns
COLOURS = (36, 33, 35, 32, 34, 31)  # of a terminal (ECMA-48): they can be told apart on dark and on light


class Panel(NamedTuple):
    """One chart: what it shows of which lines, and whether its scale begins at zero."""

    title: str
    split: str
    figure: str
    from_zero: bool


PANELS = (
    Panel("training loss (nats a token)", "train", "loss", False),
    Panel("validation loss (nats a token)", "validation", "loss", False),
    Panel("learning rate", "train", "lr", True),
    Panel("tokens a second", "train", "tok_s", True),
)

USUAL = ("run_id", "step", "time", "split", "loss", "lr", "grad_norm", "tokens", "tok_s")  # names in every line


class Drawn(NamedTuple):
    """A run as it is drawn: its lines up to where the run that was asked for left it, and what it goes on from."""

    name: str
    lines: list[dict[str, Any]]
    parent: dict[str, Any] | None
    asked: bool


def main(settings: Config, log: Log) -> int:
    """Draws the runs that RUN means; returns the exit code."""
    output = Path(settings.output) if settings.output else None
    if output:
        check_output(output)
    folders = chosen(settings.run, Path(settings.runs_dir))
    runs = with_parents(folders, log)
    if not any(run.lines for run in runs):
        raise DataError(
            f"{', '.join(map(shown, folders))}: {METRICS} holds no line yet; a run writes one every LOG_INTERVAL steps"
        )
    if output:
        draw_file(runs, output)
        log(f"drawn: {shown(output)}")
    else:
        draw_terminal(runs)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Which runs.


def chosen(wish: str, folder: Path) -> list[Path]:
    """The folders of the runs that RUN means, each once, as they were named; those of one prefix or glob by name, so by their start.

    Raises ConfigError if `wish` names none at all, and listing what there is if a part of it means none.
    """
    parts = [part.strip() for part in wish.split(",") if part.strip()]
    if not parts:
        raise ConfigError(
            [f"RUN={wish}: names no run: expected latest, the beginning of a name, a glob or a run's folder"]
        )
    if not folder.is_dir():
        raise ConfigError([f"RUNS_DIR={folder}: there is no such folder; training makes it, or name another"])
    there = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    meant: dict[Path, None] = {}
    for part in parts:
        found = runs_of(part, there)
        if not found:
            raise ConfigError([f"RUN={part}: no run in {shown(folder)} is meant by it; {listed(there)}"])
        meant |= dict.fromkeys(found)
    return list(meant)


def runs_of(part: str, there: list[Path]) -> list[Path]:
    """What one part of RUN means: latest, a run's folder, a glob of names, a name or the beginning of some."""
    if part.lower() == "latest":
        return [max(there, key=last_time)] if there else []
    if os.path.isfile(os.path.join(part, METRICS)):
        return [Path(os.path.abspath(part))]
    same = [path for path in there if path.name == part]
    return same or [path for path in there if path.name.startswith(part) or fnmatch.fnmatchcase(path.name, part)]


def last_time(folder: Path) -> float:
    """When the run wrote its last whole line (Unix seconds): times of files change when they are copied."""
    with open(folder / METRICS, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        ends = file.read().splitlines()
    for end in reversed(ends):
        try:
            return float(json.loads(end)["time"])
        except (ValueError, TypeError, KeyError, OverflowError):  # a torn line, or somebody else's
            continue
    return -math.inf


def listed(there: list[Path]) -> str:
    """The names of the runs, newest first, for a message."""
    if not there:
        return "it holds none; was RUNS_DIR another when training?"
    names = [path.name for path in sorted(there, key=last_time, reverse=True)]
    return f"it holds {', '.join(names[:MOST_NAMED])}" + (
        f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else ""
    )


def with_parents(folders: list[Path], log: Log) -> list[Drawn]:
    """The runs of `folders` and those they go on from, parents first; of a parent that nobody asked for, the part that led on."""
    drawn: dict[str, Drawn] = {}
    for folder in folders:
        own = drawable(folder, asked=True)
        drawn[folder.name] = own
        for name, step in ancestors(own, folder.parent, log):
            known = drawn.get(name)
            if known and (known.asked or max((line["step"] for line in known.lines), default=0) >= step):
                continue
            parent = drawable(folder.with_name(name), asked=False)
            drawn[name] = parent._replace(lines=[line for line in parent.lines if line["step"] <= step])
    return sorted(drawn.values(), key=lambda run: (run.asked, run.lines[0]["time"] if run.lines else math.inf))


def drawable(folder: Path, *, asked: bool) -> Drawn:
    """The run of a folder with all of its lines."""
    return Drawn(folder.name, lines_of(folder), parent_of(folder), asked)


def ancestors(run: Drawn, runs_dir: Path, log: Log) -> Iterator[tuple[str, int]]:
    """Name and last step of each run whose steps this one goes on counting, nearest first, as far as they are there."""
    seen, last = {run.name}, run
    while (parent := last.parent) and not weights_alone(last):
        if not (isinstance(parent.get("run_id"), str) and isinstance(parent.get("step"), int)):
            return
        name = Path(parent["run_id"]).name  # a file of anybody's must not lead elsewhere
        if name in seen:
            return
        if not (runs_dir / name / METRICS).is_file():
            log(f"{run.name} goes on from {name}, which is not in {shown(runs_dir)}")
            return
        seen.add(name)
        yield name, parent["step"]
        last = drawable(runs_dir / name, asked=False)


def weights_alone(run: Drawn) -> bool:
    """Whether the run took its parent's weights but counts its steps anew, as with INIT_FROM: it is no continuation of that curve.

    One that goes on trains from the parent's step on; that step itself it may only validate.
    """
    step = run.parent.get("step") if run.parent else None
    if not isinstance(step, int):
        return False
    return step == 0 or any(line["step"] < step + (line.get("split") == "train") for line in run.lines)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The run's lines that have a step, no larger than any program counts, and a time."""
    lines = read_metrics(folder / METRICS)
    timed = [line for line in lines if isinstance(line.get("time"), int | float)]
    return [line for line in timed if isinstance(line.get("step"), int) and abs(line["step"]) < 2**53]


def parent_of(folder: Path) -> dict[str, Any] | None:
    """The checkpoint that the run goes on from, as run.json has it; None if from none, or if that is not known."""
    try:
        parent = json.loads((folder / "run.json").read_text(encoding="utf-8"))["parent"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return parent if isinstance(parent, dict) else None


def panels(runs: list[Drawn]) -> list[Panel]:
    """Return the usual panels, and one for each further metric of the training lines."""
    lines = [line for run in runs for line in run.lines if line.get("split") == "train"]
    names = dict.fromkeys(name for line in lines for name, y in line.items() if math.isfinite(_figure(y)))
    return [*PANELS, *(Panel(harmless(name), "train", name, False) for name in names if name not in USUAL)]


def points(run: Drawn, panel: Panel) -> Points:
    """What a panel shows of a run: (step, figure)."""
    own = [line for line in run.lines if line.get("split") == panel.split]
    values = [(line["step"], _figure(line.get(panel.figure))) for line in own]
    return sorted((step, y) for step, y in values if math.isfinite(y))


def _figure(value: Any) -> float:
    """A figure as a number; NaN for null, true, words, and what is so large that reckoning with it would overflow."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


# ---------------------------------------------------------------------------------------------------------------------
# On the terminal.


def draw_terminal(runs: list[Drawn]) -> None:
    """The charts and a line for each run to stdout: in colour on a terminal, as plain text into a pipe or with NO_COLOR."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    ascii_only = not _can(encoding)
    coloured = sys.stdout.isatty() and not config.no_color()
    letters = ascii_only or (len(runs) > 1 and not coloured)
    columns = min(WIDEST, max(NARROW, shutil.get_terminal_size().columns))
    abreast = 2 if columns >= SIDE_BY_SIDE else 1
    width = (columns - 2) // 2 if abreast == 2 else columns
    charts = [
        chart(panel.title, [points(run, panel) for run in runs], columns=width, rows=ROWS, letters=letters, ascii_only=ascii_only,
              floor=0 if panel.from_zero else None, paint=painted if coloured else None)
        for panel in panels(runs)
    ]  # fmt: skip
    text = "\n\n".join(beside(charts[at : at + abreast], width) for at in range(0, len(charts), abreast))
    legend = harmless(summary(runs, letters=letters))
    if coloured:
        head, *rest = legend.splitlines()
        legend = "\n".join([head, *(painted(number, line) for number, line in enumerate(rest))])
    try:
        print(f"{text}\n\n{legend}".encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        ignore_stdout()


def _can(encoding: str) -> bool:
    """Whether a stream of this encoding shows what charts are drawn with."""
    try:
        "⣿│└─".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def painted(curve: int, text: str) -> str:
    """`text` in a curve's colour."""
    return f"\x1b[{COLOURS[curve % len(COLOURS)]}m{text}\x1b[0m"


def beside(charts: list[list[str]], width: int) -> str:
    """Charts of one width side by side."""
    rows = itertools.zip_longest(*charts, fillvalue=" " * width)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def summary(runs: list[Drawn], *, letters: bool) -> str:
    """A table with a line for each run: how far it is, how well it does, and what it goes on from."""
    head = ("", "run", "step", "loss", "validation", "best", "tokens/s", "goes on from")
    rows: list[tuple[str, ...]] = [head]
    for number, run in enumerate(runs):
        train, validation, _, speed = ([y for _, y in points(run, panel)] for panel in PANELS)
        middle = f"{sorted(speed)[len(speed) // 2]:.0f}" if speed else ""
        losses = [f"{ys[-1]:.4f}" if ys else "" for ys in (train, validation)]
        best = f"{min(validation):.4f}" if validation else ""
        mark = LETTERS[number % len(LETTERS)] if letters else "*" if run.asked else "."
        rows.append((mark, run.name, str(last_step(run)), *losses, best, middle, origin(run)))
    return table(rows)


def last_step(run: Drawn) -> int:
    """The last step that is drawn."""
    return max((line["step"] for line in run.lines), default=0)


def origin(run: Drawn) -> str:
    """What the run goes on from, in words."""
    if run.parent is None:
        return ""
    parent = f"{run.parent.get('run_id') or run.parent.get('file')} at step {run.parent.get('step')}"
    return f"weights from {parent}" if weights_alone(run) else parent


# ---------------------------------------------------------------------------------------------------------------------
# Into a file.


def check_output(output: Path) -> None:
    """Raises ConfigError if OUTPUT cannot be drawn into, before anything is read."""
    if output.suffix.lower() not in DRAWN or output.is_dir() or not output.parent.is_dir():
        raise ConfigError(
            [f"OUTPUT={output}: expected a file whose name ends in .png, .svg or .pdf, in a folder that is there"]
        )
    if importlib.util.find_spec("matplotlib") is None:
        without = "without OUTPUT the curves are drawn on the terminal"
        raise ConfigError([f"OUTPUT={output}: drawing into a file needs matplotlib: pip install matplotlib; {without}"])


def draw_file(runs: list[Drawn], output: Path) -> None:
    """The charts with a legend into `output`, whole or not at all."""
    from matplotlib.figure import Figure  # draws without a screen, as long as pyplot is left alone

    drawn = panels(runs)
    rows = math.ceil(len(drawn) / 2)
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, sharex=True).flat)
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    for panel, axes in zip(drawn, grid, strict=False):
        for number, run in enumerate(runs):
            xs, ys = [list(values) for values in zip(*points(run, panel), strict=True)] or ([], [])
            style = {"color": f"C{number}", "linestyle": "-" if run.asked else "--", "label": legend_of(run)}
            axes.plot(xs, ys, marker="." if panel.split == "validation" else "", linewidth=1, **style)
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.3)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("optimizer step", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=120)


def legend_of(run: Drawn) -> str:
    """The run's name, and what it goes on from."""
    if run.parent is None:
        return run.name
    return f"{run.name} ({origin(run)})" if weights_alone(run) else f"{run.name} (from {origin(run)})"


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
