"""Runs and their parents as curves: the lines of their metrics, and what tells one run from another."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from milepost import config
from milepost.ckpt import CheckpointError
from milepost.ckpt.manifest import read_json
from milepost.runtime.chart import Points
from milepost.runtime.progress import Log, parse_line, read_metrics, shown
from milepost.screen import harmless

METRICS = "metrics.jsonl"
RUN_ID = re.compile(r"\w[\w.-]{0,199}", re.ASCII)  # of any run: a part of names of files
TAILS = (2**12, 2**17, 2**22)  # bytes before the end of a file in which its last line is looked for
MAX_VALUE = 1e300  # differences and means of a few such values are finite


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

USUAL = ("run_id", "step", "time", "split", "loss", "lr", "grad_norm", "tokens", "tok_s")  # names in every line


class Drawn(NamedTuple):
    """A run to draw: its lines, up to the step where a requested run resumed from it, and its parent."""

    name: str
    lines: list[dict[str, Any]]
    parent: dict[str, Any] | None
    requested: bool
    folder: Path
    label: str = ""  # what tells it apart from the other runs that are drawn
    later: list[dict[str, Any]] = []  # noqa: RUF012  (never changed); lines after that step, which are not drawn


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
            curves[name] = until(step, drawable(folder.with_name(name), requested=False))
    return sorted(curves.values(), key=lambda run: (run.requested, run.lines[0]["time"] if run.lines else math.inf))


def until(step: int, run: Drawn) -> Drawn:
    """Return the run, drawn up to a step."""
    lines, later = ([line for line in run.lines if (line["step"] > step) == is_later] for is_later in (False, True))
    return run._replace(lines=lines, later=later)


def drawable(folder: Path, *, requested: bool) -> Drawn:
    """Return the run of a folder with all its lines."""
    return Drawn(folder.name, lines_of(folder), parent_of(folder), requested, folder)


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
    first = {split: min((line["step"] for line in run.lines if line.get("split") == split), default=None)
             for split in ("train", "validation")}  # fmt: skip
    return begins_anew(run.parent, **first)


def begins_anew(parent: dict[str, Any] | None, *, train: float | None, validation: float | None) -> bool:
    """Return whether a run whose lines begin at these steps counts its steps from 0 and not from its parent's."""
    step = parent.get("step") if parent else None
    if not isinstance(step, int):
        return False
    return step == 0 or (train is not None and train <= step) or (validation is not None and validation < step)


def labelled(runs: list[Drawn]) -> list[Drawn]:
    """Return the runs, each with the settings in which it differs from the others, and the note on it."""
    own = {run.name: config.env_values(run.folder / "config.env") for run in runs}
    texts = {
        name: ", ".join(filter(None, (text, own[name].get("RUN_NOTE")))) for name, text in config.labels(own).items()
    }
    return [run._replace(label=harmless(texts[run.name], one_line=True)) for run in runs]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the run's lines that have a time and a step that a float can hold exactly."""
    return [line for line in read_metrics(folder / METRICS) if is_line(line)]


def is_line(line: dict[str, Any]) -> bool:
    """Return whether a line has a time, and a step that a float can hold exactly."""
    step = line.get("step")
    return isinstance(line.get("time"), int | float) and isinstance(step, int) and abs(step) < 2**53


def parent_of(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint that the run began with, from run.json; None if there is none or it is unknown."""
    parent = origin_of(folder).get("parent")
    return parent if isinstance(parent, dict) else None


def run_id_of(folder: Path) -> str:
    """Return the id of the run in a folder, from run.json, since a folder may be renamed; the folder's name if it is unknown."""
    run_id = origin_of(folder).get("run_id")
    return run_id if isinstance(run_id, str) and RUN_ID.fullmatch(run_id) else folder.name


def origin_of(folder: Path) -> dict[str, Any]:
    """Return what run.json holds; an empty dict if it cannot be read."""
    try:
        return read_json(folder / "run.json")
    except CheckpointError:
        return {}


def last_time(folder: Path) -> float:
    """Return the Unix time of the run's last complete line. File times would change with a copy."""
    with contextlib.suppress(OSError), open(folder / METRICS, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for reach in TAILS:
            file.seek(max(0, size - reach))
            lines = map(parse_line, reversed(file.read(reach).decode(errors="replace").split("\n")))
            times = (number(line.get("time")) for line in lines if line)  # without torn lines
            if (last := next(filter(math.isfinite, times), None)) is not None:
                return last
    return -math.inf


def panels(runs: list[Drawn]) -> list[Panel]:
    """Return the usual panels, and one for each further metric of the training lines."""
    lines = [line for run in runs for line in run.lines if line.get("split") == "train"]
    names = dict.fromkeys(name for line in lines for name, y in line.items() if math.isfinite(number(y)))
    return [
        *PANELS,
        *(Panel(harmless(name, one_line=True), "train", name, False) for name in names if name not in USUAL),
    ]


def points(run: Drawn, panel: Panel) -> Points:
    """Return the (step, value) pairs of a run in a panel."""
    own = [line for line in run.lines if line.get("split") == panel.split]
    values = [(line["step"], number(line.get(panel.field))) for line in own]
    return sorted((step, y) for step, y in values if math.isfinite(y))


def number(value: Any) -> float:
    """Return a value as a float; NaN if it is not a number, or so large that arithmetic would overflow."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_VALUE:
        return math.nan
    return float(value)


def columns_of(pairs: Points) -> tuple[list[float], list[float]]:
    """Return the x and the y values."""
    return [x for x, _ in pairs], [y for _, y in pairs]


def smoothed(values: list[float]) -> list[float]:
    """Return the means over a window of a fiftieth of the values around each; short curves as they are."""
    count, reach = len(values), len(values) // 100
    if not reach:
        return values
    edge = [0.0] * reach
    sums = window_sums([*edge, *values, *edge], 2 * reach + 1)
    return [total / (min(count, at + reach + 1) - max(0, at - reach)) for at, total in enumerate(sums)]


def window_sums(values: list[float], width: int) -> list[float]:
    """Return the sum of every `width` values in a row, put together from sums of 1, 2, 4, ... values. Sums up to each value,
    whose differences are these too, would lose all digits behind one huge value.
    """
    totals, parts, taken, size = [0.0] * (len(values) - width + 1), values, 0, 1
    while size <= width:
        if width & size:
            totals = [total + part for total, part in zip(totals, parts[taken:], strict=False)]
            taken += size
        parts = [first + second for first, second in zip(parts, parts[size:], strict=False)]
        size *= 2
    return totals


def last_step(run: Drawn) -> int:
    """Return the last step that is drawn."""
    return max((line["step"] for line in run.lines), default=0)


def origin(run: Drawn) -> str:
    """Describe the checkpoint that the run began with."""
    if run.parent is None:
        return ""
    parent = f"{run.parent.get('run_id') or run.parent.get('file')} at step {run.parent.get('step')}"
    return f"weights from {parent}" if weights_only(run) else parent
