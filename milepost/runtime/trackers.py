"""Mirror metrics.jsonl in a tracker: TensorBoard, Weights & Biases or Trackio.

metrics.jsonl is the record. A tracker gets one row per step; on a resume it continues where its own series ends, so
that no step is doubled or missing after a kill. Nothing here draws a random number or touches the model.
"""

import contextlib
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NOT_PLOTTED = ("step", "time")
FLUSH_SECONDS = 10  # how long events may stay in memory before TensorBoard sees them


class Sink(NamedTuple):
    """An open tracker: `first` is the lowest step that its series lacks, `write` takes a step, its time (Unix seconds)
    and its values.

    `flush` returns when all written values are in the tracker's files, which then supersede the files in `replaces`.
    """

    first: int
    write: Callable[[int, float, dict[str, float]], None]
    close: Callable[[], None]
    flush: Callable[[], None] = lambda: None
    replaces: tuple[Path, ...] = ()


def missing(kind: str) -> str | None:
    """Return one sentence if the package of TRACKER=kind is not installed, else None."""
    spec = None if kind == "none" else importlib.util.find_spec(kind)
    if kind == "none" or (spec and spec.origin):  # the folder `wandb` that W&B creates is not a package
        return None
    return f"TRACKER={kind}: {kind} is not installed: pip install {kind}, or set TRACKER=none"


class Mirror:
    """A run's lines in a tracker. An error of the tracker is logged once and ends the mirror, never the training."""

    def __init__(self, kind: str, start: Callable[[], Sink | None], *, log: Callable[[str], None]) -> None:
        self._kind, self._log = kind, log
        self._sink: Sink | None = None
        self._step, self._time, self._row = -1, 0.0, dict[str, float]()
        with self._guarded():
            self._sink = start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl.

        The training and validation lines of a step become one row when the next step begins.
        """
        step, when = line.get("step"), line.get("time")
        if self._sink is None or not isinstance(step, int) or step < self._sink.first:
            return
        if step != self._step:
            self._send()
            self._step, self._time = step, when if isinstance(when, float) else 0.0
        self._row |= {f"{line.get('split')}/{name}": value for name, value in line.items() if _is_figure(name, value)}

    def replace_earlier(self) -> None:
        """Delete the files of the earlier series, now that the new one holds the same steps."""
        with self._guarded():
            if self._sink:
                self._sink.flush()
                for path in self._sink.replaces:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def close(self, *, complete: bool) -> None:
        """End the series; leave out its last step unless it is `complete`, since a resume adds lines to it."""
        if complete:
            self._send()
        with self._guarded():
            if self._sink:
                self._sink.close()
        self._sink = None

    def _send(self) -> None:
        row, self._row = self._row, {}
        with self._guarded():
            if self._sink and row:
                self._sink.write(self._step, self._time, row)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sink = None
            why = " ".join(str(error).split()) or type(error).__name__
            self._log(
                f"warning: TRACKER={self._kind} failed ({why}); training continues, and metrics.jsonl has every value"
            )


def _is_figure(name: str, value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and name not in NOT_PLOTTED


def open_mirror(kind: str, *, folder: Path, run_id: str, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any],
                wandb: Mapping[str, str], log: Callable[[str], None]) -> Mirror:  # fmt: skip
    """Return the mirror of a run, with its files in the run's `folder` where the tracker allows it.

    `lines` are the run's metrics so far, of which the tracker gets those that it lacks. `settings` are shown beside the
    series. `wandb` holds the `mode` and `project` of Weights & Biases.
    """
    starts: dict[str, Callable[[], Sink | None]] = {
        "none": lambda: None,
        "tensorboard": lambda: _tensorboard(folder / "tensorboard"),
        "wandb": lambda: _wandb(folder, run_id, settings, log, **wandb),
        "trackio": lambda: _trackio(run_id, settings),
    }
    mirror = Mirror(kind, starts[kind], log=log)
    for line in lines:
        mirror.write(line)
    mirror.replace_earlier()
    return mirror


def _tensorboard(folder: Path) -> Sink:
    """Write events to `folder`, the whole series again in a new file.

    With several files, readers order them by the clock in their names. A TensorBoard that has read the earlier file
    drops its events at the `purge_step` with which the new file begins.
    """
    from torch.utils.tensorboard import SummaryWriter

    earlier = tuple(folder.glob("events.out.tfevents.*"))
    writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_SECONDS)

    def write(step: int, when: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step, walltime=when)

    return Sink(0, write, writer.close, writer.flush, earlier)


def _wandb(
    folder: Path, run_id: str, settings: Mapping[str, Any], log: Callable[[str], None], *, mode: str, project: str
) -> Sink:
    """Open a run of Weights & Biases under our run id. Online it continues after the last step that the server has.

    Offline, recorded steps can be neither read nor removed, so the whole series is recorded again and replaces the
    earlier one.
    """
    import wandb

    if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
        log("TRACKER=wandb: no API key is configured, so nothing is sent; run `wandb login` or set WANDB_API_KEY")
        mode = "offline"
    online = mode in ("online", "shared")
    earlier = set((folder / "wandb").glob(f"offline-run-*-{run_id}")) if mode == "offline" else set()
    run = wandb.init(
        project=project, id=run_id, name=run_id, dir=str(folder), config=dict(settings), mode=mode,
        resume="allow" if online else None, settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    if mode == "offline":
        log(f"TRACKER=wandb: recorded offline; send it with: wandb sync {Path(run.dir).parent}")
    elif run.url:
        log(f"TRACKER=wandb: {run.url}")
    replaced = tuple(earlier - {Path(run.dir).parent})
    return Sink(run.step, lambda step, _, values: run.log(values, step=step), run.finish, replaces=replaced)


def _trackio(run_id: str, settings: Mapping[str, Any]) -> Sink:
    """Open a run in Trackio's project `milepost`, continuing after its last recorded step.

    Trackio's own output goes to stderr.
    """
    import trackio

    def finish() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()

    with contextlib.redirect_stdout(sys.stderr):
        run = trackio.init(project="milepost", name=run_id, resume="allow", config=dict(settings))
    # Trackio has no public attribute for the end of a series. If this one disappears, fail visibly instead of doubling
    # steps.
    return Sink(run._next_step, lambda step, _, values: run.log(values, step=step), finish)
