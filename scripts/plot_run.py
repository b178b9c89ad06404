"""Plot loss, validation loss, learning rate and throughput of runs and their parents, on the terminal or into a file.

python3 scripts/plot_run.py
RUN=latest,20251110 OUTPUT=curves.png python3 scripts/plot_run.py
RUN=latest OUTPUT=report.html python3 scripts/plot_run.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("RUN", "OUTPUT", "RUNS_DIR", "CHECKPOINT_DIR")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import importlib.util
import os
from pathlib import Path

from milepost.ckpt.manifest import is_regular
from milepost.ckpt.selection import is_run
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.plots.curves import METRICS, labelled, last_time, with_parents
from milepost.plots.picture import SUFFIXES, draw_file
from milepost.plots.terminal import draw_terminal
from milepost.runtime.progress import Log, shown
from milepost.text.errors import DataError

MAX_NAMED = 8  # runs in a message
PAGE = ".html"  # the page of watch_runs.py, with the data in it


def main(settings: Config, log: Log) -> int:
    """Draw the runs that RUN names; return the exit code."""
    output = Path(settings.output) if settings.output else None
    if output:
        check_output(output)
    folders = chosen(settings.run, Path(settings.runs_dir))
    runs = labelled(with_parents(folders, log))
    if not any(run.lines for run in runs):
        raise DataError(
            f"{', '.join(map(shown, folders))}: {METRICS} is empty; a run writes a line every LOG_INTERVAL steps"
        )
    if output:
        if output.suffix.lower() == PAGE:
            from milepost.page.report import write_report  # its commands to resume need torch

            write_report(runs, output, checkpoint_dir=Path(settings.checkpoint_dir), runs_dir=Path(settings.runs_dir))
        else:
            draw_file(runs, output)
        log(f"drawn: {shown(output)}")
    else:
        draw_terminal(runs)
    return 0


def check_output(output: Path) -> None:
    """Raise ConfigError if OUTPUT cannot be written, before anything is read."""
    if output.suffix.lower() not in {PAGE, *SUFFIXES} or output.is_dir() or not output.parent.is_dir():
        raise ConfigError(
            [f"OUTPUT={output}: expected a file name that ends in .html, .png, .svg or .pdf, in an existing folder"]
        )
    if output.suffix.lower() != PAGE and importlib.util.find_spec("matplotlib") is None:
        remedy = "pip install matplotlib, or unset OUTPUT to plot on the terminal"
        raise ConfigError([f"OUTPUT={output}: plotting into a file needs matplotlib: {remedy}"])


def chosen(requested: str, folder: Path) -> list[Path]:
    """Return the folders of the runs that RUN names, each once, in its order; matches of a prefix or glob by name, so
    by start.

    Raises ConfigError if RUN is empty, and listing the runs if a part of it matches none.
    """
    alone = any(is_regular(place / METRICS) for place in (folder / requested, Path(os.path.expanduser(requested))))
    parts = [requested] if alone else [part.strip() for part in requested.split(",") if part.strip()]
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
    return told_apart(list(folders), requested)


def told_apart(folders: list[Path], requested: str) -> list[Path]:
    """Return the folders, one that has several paths once. Raise ConfigError if two are called alike: a run is known by
    its folder's name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        other = found.setdefault(folder.name, folder)
        if not os.path.samefile(folder, other):
            places = f"{shown(other)} and {shown(folder)} have the same name"
            raise ConfigError([f"RUN={requested}: {places}: rename one, or plot them one after the other"])
    return list(found.values())


def runs_of(part: str, there: list[Path]) -> list[Path]:
    """Return the runs that a part of RUN names: latest, a folder, a RUN_NAME, or an id, its beginning or a glob."""
    if part.lower() == "latest":
        return [max(there, key=last_time)] if there else []
    place = os.path.expanduser(part)  # a shell leaves a ~ after a comma
    if os.path.isfile(os.path.join(place, METRICS)):
        return [Path(os.path.abspath(place))]
    same = [path for path in there if path.name == part]
    return same or [path for path in there if is_run(path.name, part)]


def listed(there: list[Path]) -> str:
    """Return the names of the runs, latest first, for a message."""
    if not there:
        return "it holds no runs; was RUNS_DIR different in training?"
    names = [path.name for path in sorted(there, key=last_time, reverse=True)]
    return f"it holds {', '.join(names[:MAX_NAMED])}" + (
        f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else ""
    )


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
