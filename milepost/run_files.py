"""The files of a run: folders, locks, metrics, samples and trackers in RUNS_DIR, checkpoints in CHECKPOINT_DIR."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import models
from milepost import ckpt, config
from milepost.ckpt.finding import highest_number, in_best
from milepost.ckpt.leftovers import prepare_folder
from milepost.ckpt.restore import moment_bytes
from milepost.ckpt.retention import bytes_taken, own_in
from milepost.config import ConfigError
from milepost.files import in_words, instead, lacks, largest_file, make_folder, note_mount
from milepost.locks import RunLock
from milepost.paths import check_inside, is_real_file
from milepost.run import Run, is_due
from milepost.run_mirror import check_mirror, open_mirror
from milepost.runtime import trackers
from milepost.runtime.progress import Metrics, amount, read_metrics, shown, write_own
from milepost.runtime.tracking.base import Tracker
from milepost.runtime.tracking.mirror import Mirror

METRICS = "metrics.jsonl"
LATER = ", and its lines wait in memory until it can be"
LOCK_PATIENCE = 120  # seconds after which a network file system releases the locks of a dead machine


# ---------------------------------------------------------------------------------------------------------------------
# Open: folders, locks and logs, before the first step.


def open_run(run: Run, held: contextlib.ExitStack) -> None:
    """Create the run's folders, lock the run for this process and open its files; raise ConfigError if it cannot.

    The run is locked in its checkpoint folder and in its metrics folder, since another process may share only one of
    them.
    """
    check_tracker(run.settings.tracker)
    if run.settings.enable_checkpoints:
        check_mirror(run.settings)
    runs, checkpoints = Path(run.settings.runs_dir), Path(run.settings.checkpoint_dir)
    with _blaming("RUNS_DIR", run.folder):
        check_inside(runs, run.folder)
        for name in ("samples", *trackers.TRACKERS):  # created when needed
            if not is_real_file(run.folder / name):  # a file in the way of samples or events costs only these
                check_inside(runs, run.folder / name)
        _lock(run, run.folder, held)
    if run.settings.enable_checkpoints:
        with _blaming("CHECKPOINT_DIR", checkpoints):
            for folder in (checkpoints / ckpt.BEST_FOLDER, checkpoints / run.run_id / ckpt.BEST_FOLDER):
                check_inside(checkpoints, folder)
            _lock(run, checkpoints, held)
        if fallback := run.settings.checkpoint_fallback_dir:
            with _blaming("CHECKPOINT_FALLBACK_DIR", Path(fallback)):
                prepare_folder(Path(fallback))
                if checkpoints.samefile(fallback):
                    problem = f"CHECKPOINT_FALLBACK_DIR={fallback} is CHECKPOINT_DIR"
                    raise ConfigError([f"{problem}: set a folder on another disk, or unset it"])
                note_mount(Path(fallback))
            # Newer saves than the one resumed may lie only there, after RESUME_STEP: the next are numbered above them.
            run.saved.number = max(run.saved.number, highest_number(Path(fallback)))
            copy_from_fallback(run)
        check_space(run)
        check_file_size(run)
        protect_base(run, held)
        open_mirror(run, held)
    log_lacks(run)
    with _blaming("RUNS_DIR", run.folder):
        run.log.open(run.folder / "training.log")
        write_own(run.folder / "config.env", config.as_env(run.settings, run.resolved()))
        origin = {"run_id": run.run_id, "parent": run.parent}
        write_own(run.folder / "run.json", json.dumps(origin, indent=1) + "\n")
        run.metrics = Metrics(run.folder / METRICS)
        held.callback(_close_metrics, run)
        # Set aside metrics newer than the checkpoint: resuming rewrites them.
        lost = run.metrics.rewind(lambda line: _precedes_checkpoint(run, line), until=run.saved.resumed_time)
        if lost:
            where = shown(run.metrics.unreadable)
            run.log(
                f"{lost:,} {'lines' if lost > 1 else 'line'} of {METRICS} cannot be read; {where} keeps what stood there"
            )
    open_tracker(run, held)


def _close_metrics(run: Run) -> None:
    if lost := run.metrics.close():
        run.log(f"{METRICS} lacks {lost:,} {'lines' if lost > 1 else 'line'}, which could not be written until the end")


def _lock(run: Run, folder: Path, held: contextlib.ExitStack) -> None:
    prepare_folder(folder)
    note_mount(folder)
    lock = RunLock(folder, run.run_id)
    lock.acquire(patience=LOCK_PATIENCE if config.was_restarted() else 0)
    held.callback(lock.release)


def copy_from_fallback(run: Run) -> None:
    """Copy the checkpoint that the run resumes from to CHECKPOINT_DIR, if it lies in CHECKPOINT_FALLBACK_DIR; on rank 0.

    There `latest`, best/ and retention look for it. The one in the fallback folder stays. The next save must still have room:
    a disk that lacks it, or refuses, is only logged.
    """
    settings, path, folder = run.settings, run.saved.resumed, Path(run.settings.checkpoint_dir)
    fallback = Path(settings.checkpoint_fallback_dir or folder)
    if not (settings.enable_checkpoints and path and path.is_relative_to(fallback) and fallback != folder):
        return
    need = checkpoint_sizes(run)[1] * (2 if run.state.step < run.end else 1)
    try:
        make_folder(folder)
        problem = ckpt.free_space_problem(folder, need=need)
        copy = None if problem else ckpt.copy_into(path, folder, run_id=run.run_id)
    except (OSError, ckpt.CheckpointError) as error:
        problem, copy = ckpt.why_not_saved(error, folder, need=need), None
    if problem:
        run.log(f"{shown(path)} is not copied to {shown(folder)}: {problem}")
    elif copy:
        run.log(f"step {run.state.step} is now in {shown(copy)} too")


def log_lacks(run: Run) -> None:
    """Log what the file systems of the run's folders lack, and what is done instead: a line for each that lacks
    something.
    """
    settings, told = run.settings, set()
    saved: list[str | None] = []
    if settings.enable_checkpoints:
        saved = [settings.checkpoint_dir, settings.checkpoint_fallback_dir]
    folders = [Path(place) for place in saved if place is not None]
    for folder in [*folders, run.folder]:
        if (lacking := lacks(folder)) and lacking not in told:
            told.add(lacking)
            run.log(f"the file system of {shown(folder)} lacks something: {instead(lacking)}")


@contextlib.contextmanager
def _blaming(variable: str, folder: Path) -> Iterator[None]:
    """Raise ConfigError naming the variable of a folder that cannot be written."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        problem = f"{variable}: {folder} cannot be written ({in_words(error)})"
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        remedy = "a file is where a folder must be" if in_the_way else "free space, fix its permissions"
        raise ConfigError([f"{problem}: {remedy}, or set another {variable}"]) from error


def check_space(run: Run) -> None:
    """Raise ConfigError if the checkpoints that the policy keeps do not fit on the disk beside those that are there, of
    which it deletes the run's own.

    If it keeps all of them, only warn.
    """
    folder, last = Path(run.settings.checkpoint_dir), run.settings.checkpoint_keep_last
    own = own_in(folder, run_id=run.run_id) if last else []
    there = [found.step for found in own if found.resumable and not in_best(found, folder)]
    full, stripped = kept_in_the_end(run, there)
    weights, size = checkpoint_sizes(run)
    # The next checkpoint is written before any of those that are there is deleted.
    need = max(size, full * size + stripped * weights - bytes_taken(own))
    if problem := ckpt.free_space_problem(folder, need=need):
        thinned = f" and {stripped} of {amount(weights, 'B')}" if stripped else ""
        counted = f", {len(own)} of them here" if own else ""
        plan = f"{full} checkpoints of {amount(size, 'B')}{thinned}{counted}: {problem}"
        if last:
            raise ConfigError([f"CHECKPOINT_KEEP_LAST={last}: {plan}; keep fewer, or set another CHECKPOINT_DIR"])
        run.log(f"warning: {plan}; set CHECKPOINT_KEEP_LAST")


def kept_in_the_end(run: Run, there: list[int]) -> tuple[int, int]:
    """Return how many checkpoints the policy keeps at most, with their optimizer and without, of those of the steps `there` and
    of those that the run will save.
    """
    settings, first = run.settings, run.state.step
    interval, last, every = (
        settings.checkpoint_interval, settings.checkpoint_keep_last, settings.checkpoint_keep_every
    )  # fmt: skip
    saved = len(there) + (1 + (run.end - first) // interval if interval else 1)
    full = min(saved, last + 1) if last else saved  # + 1: written before one is pruned
    both = math.lcm(interval, every)  # steps that are saved, and stay without their optimizer
    if not last or not both:
        return full + settings.checkpoint_keep_best, 0
    multiples = sum(step % every == 0 for step in there) + run.end // both - first // both
    return full + settings.checkpoint_keep_best, min(multiples, max(0, saved - last))


def checkpoint_sizes(run: Run) -> tuple[int, int]:
    """Return the bytes of a checkpoint without and with its optimizer, as far as the settings save them."""
    trained = models.trained_count(run.model)
    weights = 4 * (trained if run.settings.checkpoint_adapters_only else models.parameter_count(run.model))
    return weights, weights + (0 if run.settings.checkpoint_model_only else moment_bytes(run.optimizer))


def check_file_size(run: Run) -> None:
    """Raise ConfigError if a file of a checkpoint will be larger than its file system allows, as FAT does at 4 GiB."""
    limit = largest_file(folder := Path(run.settings.checkpoint_dir))
    weights, size = checkpoint_sizes(run)
    largest = size if run.layout == "unified" else max(weights, size - weights)
    if limit is not None and largest > limit:
        sizes = f"ends files at {amount(limit, 'B')}, and a checkpoint's has {amount(largest, 'B')}"
        raise ConfigError([f"CHECKPOINT_DIR: the file system of {folder} {sizes}: set a folder on another disk"])


def protect_base(run: Run, held: contextlib.ExitStack) -> None:
    """Leave a note beside the base of adapters that are saved alone, so that pruning keeps the base.

    In the folder of the adapters the note counts only until they are saved there, so it goes with this process.
    """
    if not (run.base and run.settings.checkpoint_adapters_only):
        return
    folder = Path(run.settings.checkpoint_dir)
    try:
        note = ckpt.note_use(run.base, run_id=run.run_id, checkpoint_dir=folder)
    except OSError as error:
        base, why = run.base.get("source"), f"no note can be left beside it ({in_words(error)})"
        run.log(f"warning: pruning may delete {base}, which these adapters need, because {why}: copy it elsewhere")
        return
    if note and ckpt.is_beside(note, folder):
        held.callback(_forget_use, run, note)
    elif note:
        run.log(f"{shown(note)} keeps the base of these adapters from being pruned; delete it with them")


def _forget_use(run: Run, note: Path) -> None:
    """Delete the note, unless the adapters may be saved in the fallback folder only."""
    if not run.settings.checkpoint_fallback_dir:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def check_tracker(name: str) -> None:
    """Raise ConfigError if the tracker cannot be used: its package is not installed, or its class is incomplete."""
    try:
        if name != "none":
            trackers.load(name)
    except ValueError as error:
        raise ConfigError([f"TRACKER={name}: {error}, or set TRACKER=none"]) from error


def open_tracker(run: Run, held: contextlib.ExitStack) -> None:
    """Start mirroring metrics.jsonl in the tracker, beginning with the earlier lines that the tracker lacks."""
    name, path = run.settings.tracker, run.metrics.path

    def start() -> Tracker:
        return trackers.load(name)(
            folder=run.folder / name, run_id=run.run_id, settings=run.hyperparameters(),
            variables=config.environment(trackers.TRACKERS[name].variables), log=run.log,
        )  # fmt: skip

    lines = read_metrics(path) if name != "none" and path.exists() else []
    run.mirror = Mirror(
        f"TRACKER={name}", None if name == "none" else start, lines=lines, whole=_reach_back(run, lines), log=run.log
    )
    # A step that was stopped before its evaluation is incomplete: the resume evaluates it first.
    held.callback(
        lambda: run.mirror.close(complete=run.state.observed_step == run.state.step or not is_due(run, "eval"))
    )


def _reach_back(run: Run, lines: list[dict[str, Any]]) -> bool:
    """Return whether the lines begin where the run did: not more than an interval after its first step."""
    begin = (run.parent or {}).get("step") or 0
    steps = sorted({line["step"] for line in lines if isinstance(line.get("step"), int)})
    if not steps:
        return run.state.step <= begin
    interval = steps[1] - steps[0] if len(steps) > 1 else 0  # LOG_INTERVAL may have been another
    return steps[0] <= begin + max(interval, run.settings.log_interval)


def _precedes_checkpoint(run: Run, line: dict[str, Any]) -> bool:
    """Return whether this line of metrics was written before the checkpoint that the run resumes from."""
    state = run.state
    step = line.get("step", 0)
    return step < state.step or (
        step == state.step and (line.get("split") == "train" or state.observed_step == state.step)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and samples. Write errors are reported once and never stop training.


def write_metrics(run: Run, split: str, values: Mapping[str, float]) -> None:
    """Write one line to metrics.jsonl and to the tracker, on rank 0.

    Every line has the common names, null where the split lacks a value.
    """
    if not run.world.is_rank0:
        return
    identity = {"run_id": run.run_id, "step": run.state.step, "time": round(time.time(), 3), "split": split}
    common = {"loss": None, "lr": None, "grad_norm": None, "tokens": run.state.tokens_seen, "tok_s": None}
    line: dict[str, Any] = identity | common | dict(values) | identity  # no metric replaces what identifies a line
    with _report_once(run, METRICS, LATER):
        run.metrics.write(**line)
    run.mirror.write(line)


def flush_lines(run: Run) -> None:
    """Write the lines of metrics.jsonl and training.log that wait in memory, on rank 0."""
    if run.world.is_rank0:
        with _report_once(run, METRICS, LATER):
            run.metrics.flush()
        run.log.flush()


def write_sample(run: Run, text: str) -> None:
    """Write the sample of this step to samples/, on rank 0."""
    if not run.world.is_rank0:
        return
    with _report_once(run, "samples/"):
        path = run.folder / "samples" / f"step{run.state.step:06d}.txt"
        path.parent.mkdir(exist_ok=True)
        write_own(path, text)


@contextlib.contextmanager
def _report_once(run: Run, name: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if name not in run.state.reported:
            run.state.reported.add(name)
            run.log(f"{name} could not be written ({in_words(error)}); training continues{then}")
