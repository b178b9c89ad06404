"""Train a small language model from environment variables, and never lose a step.

    python3 training.py                                                   # a bigram model on the bundled text
    ENABLE_CHECKPOINTS=true MODEL_TYPE=gpt2 python3 training.py           # a small GPT-2, saved as it learns
    RESUME=auto ENABLE_CHECKPOINTS=true MODEL_TYPE=gpt2 python3 training.py   # after a crash: exactly on
    MODEL_TYPE=gpt2 torchrun --nproc_per_node=2 training.py               # the same by two processes

`python3 training.py --help` lists every variable. This file is the loop, top to bottom; milepost/run.py puts a run together, milepost/resume.py
brings one back from a checkpoint, and milepost/cli.py says what went wrong.
"""

import sys

from milepost import config

READS = (
    "TRAINING_DATA_SOURCE", "MODEL_TYPE", "GPT2_MODEL_NAME", "TRAINING_STEPS", "BATCH_SIZE", "LEARNING_RATE", "ENABLE_CHECKPOINTS", "RESUME",
    "Data", "Model", "Adapters", "Training", "Logging", "Hardware and seed", "Checkpoints",
    "RESUME_STEP", "INIT_FROM", "TEMPERATURE", "TOP_K", "TOP_P", "REPETITION_PENALTY",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.leftovers import prepare_folder
from milepost.ckpt.record import bytes_on_disk
from milepost.cli import TrainingError, guarded, processes
from milepost.config import Config, ConfigError
from milepost.generate.sampling import generate
from milepost.locks import RunLock
from milepost.paths import check_inside
from milepost.resume import explain, find_record, finished, let_go, not_exact, resumed
from milepost.run import Run, agreed, fresh, memory_needed, to_record
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import World
from milepost.runtime.interrupt import INTERRUPTED, Interrupt
from milepost.runtime.optim import clip_gradients, gradient_norm, lr_at
from milepost.runtime.progress import (
    Log,
    Metrics,
    Progress,
    amount,
    command_line,
    duration,
    read_metrics,
    shown,
    tell,
    write_own,
)
from milepost.runtime.trackers import missing, open_mirror
from milepost.text.batches import validation_windows

ROOT = Path(__file__).resolve().parent
LOAD_CHECKPOINT = ROOT / "scripts" / "load_checkpoint.py"
SAVE_FAILED = 5  # exit code of a run that finished, but whose last save did not
SKIPS_ALLOWED = 20  # float16 updates in a row that the scaler may skip while it looks for a scale
SAMPLE_TOKENS = 200
LEASE = 120  # seconds after which a network file system frees the locks of a machine that is gone
FOLDERS_OF_A_RUN = ("samples", "tensorboard", "wandb")  # in RUNS_DIR/<run_id>, made when they are needed
PROBE_SECONDS = 2.0  # that estimating the seconds per step may take beyond the warm-up
METRICS = "metrics.jsonl"
TRY_INSTEAD = "try a lower LEARNING_RATE, a longer WARMUP_STEPS or GRAD_CLIP=1"


def main(settings: Config, log: Log) -> int:
    """Trains as the settings say; returns the exit code."""
    with processes(settings, log) as world:
        return train_as_told(settings, log, world)


def train_as_told(settings: Config, log: Log, world: World) -> int:
    """A fresh run, or the one that RESUME means; returns the exit code."""
    if settings.resume == "never":
        return train(fresh(settings, log, world))
    record = agreed(lambda: find_record(settings, log), world)
    if record is None:
        log(f"RESUME={settings.resume}: {settings.checkpoint_dir} holds no checkpoint, so this run starts fresh")
        return train(fresh(settings, log, world))
    run, restored = resumed(settings, record, log, world)
    tell(explain(run, record, restored))
    let_go(record)
    if reasons := not_exact(run, record, restored):
        log(f"not bit-exact: {'; '.join(reasons)}")
    if finished(run, record):
        world.on_rank0(lambda: repair(run))
        more = command_line(LOAD_CHECKPOINT, CHECKPOINT_PATH=record.path, MODE="resume", RESUME_TRAINING_STEPS=1000)
        log(f"run {record.run_id} is finished: {run.step} of {run.end} steps are done. More: {more}")
        return 0
    return train(run)


def repair(run: Run) -> None:
    """Bring back what a finished run lacks on the disk: metrics that an earlier resume had set aside, the best step in best/."""
    aside = Metrics(run.folder / METRICS).set_aside
    if aside.exists() or (run.best_is_pending and ckpt.saved_best(Path(run.settings.checkpoint_dir), **best_of(run))):
        with contextlib.ExitStack() as held:
            open_run(run, held)
            keep_saved_best(run)


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def train(run: Run) -> int:
    """Trains from `run.step` to the plan's end or to a signal; returns the exit code. There is no second loop."""
    hardware.keep_freed_memory()
    with contextlib.ExitStack() as held:
        run.world.on_rank0(lambda: open_run(run, held))
        with Interrupt() as stop:
            try:
                say_start(run)
                say_plan(run, warm_up(run))
                bar = Progress(run.log, start=run.step, total=run.end, plain=config.tqdm_disabled())
                with contextlib.closing(bar) as run.progress, kept_if_lost(run):
                    loop(run, stop)
                return say_end(run)
            except BaseException:
                with contextlib.suppress(Exception):
                    run.writer.wait()  # what was being saved is whole then, whatever signal comes meanwhile
                run.log(f"stopped after step {run.step}: {kept(run)}")
                raise


@contextlib.contextmanager
def kept_if_lost(run: Run) -> Iterator[None]:
    """If another process dies, the first saves the last whole step before it ends too, where it has all of the weights.

    Gradients are waited for before the update; muon waits in it too, and an update that is half done is no step.
    """
    try:
        yield
    except Exception as error:
        whole = run.world.is_rank0 and run.engine == "ddp" and not run.updating
        if distributed.lost(error) and whole and run.settings.enable_checkpoints and run.step > run.saved_step:
            keep(run, save=True)
            run.writer.wait()
        raise


def loop(run: Run, stop: Interrupt) -> None:
    """The training loop. Whatever is done between two steps changes neither the weights nor any later random draw."""
    clock = Clock(run)
    while True:
        stopping = run.world.any(stop.requested)  # a signal to one process stops all, after the same step

        # Look: evaluate on the validation text and draw a sample. After a resume, only what the checkpoint had not seen yet.
        if run.observed_step != run.step and not stopping and is_due(run, "eval", "sample"):
            observe(run, stop)
            stopping = run.world.any(stop.requested)
            clock.restart()

        # Keep: at the interval, at the end and when asked to stop; and the best so far beside them. The last step is saved again
        # if a signal had come before its evaluation.
        unsaved = run.step > run.saved_step or (
            run.step == run.end and run.observed_step == run.step != run.saved_observed_step
        )
        save = unsaved and (stopping or is_due(run, "checkpoint"))
        if run.settings.enable_checkpoints and (save or (run.best_is_pending and run.best_step == run.step)):
            keep(run, save=save)
            clock.restart()

        if run.step >= run.end or stopping:
            run.writer.wait()
            keep_saved_best(run)
            return

        # Learn: one optimizer step, and its line in the metrics when it is due.
        lr = lr_at(run.step, run.schedule)
        metrics = training_step(run, lr)
        run.progress.advance(run.step)
        if is_due(run, "log"):
            report(run, clock, metrics)


# Further metrics of a training step, by name: 0-dim tensors, computed from the run while the gradients are in place, before clipping.
MEASURES: dict[str, Callable[[Run], Tensor]] = {}


def training_step(run: Run, lr: float) -> dict[str, Tensor]:
    """Take one optimizer step; return its metrics, 0-dim: loss (nats per token), lr, grad_norm before clipping, the model's and MEASURES.

    Raises TrainingError before the weights are touched if loss or grad_norm is not finite.
    """
    # Every random draw of the step, dropout's, is a function of (seed, step, rank): resuming needs no generator's state.
    hardware.seed_step(run.device, run.settings.seed, run.step, rank=run.world.rank)
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    metrics = accumulate_gradients(run)

    # Clip, and stop while the weights are still good if something is not finite.
    run.scaler.unscale_(run.optimizer)
    metrics |= {"lr": torch.tensor(lr, dtype=torch.float64), "grad_norm": gradient_norm(run.optimizer)}
    metrics |= {name: distributed.full(measure(run)).detach() for name, measure in MEASURES.items()}
    check_finite(run, metrics["loss"], metrics["grad_norm"])
    clip_gradients(run.optimizer, metrics["grad_norm"], limit=run.settings.grad_clip)

    # Update, once what is being saved is copied. The scaler leaves out an update whose float16 gradients overflowed; without float16 it does nothing.
    run.writer.settle()
    run.updating = True
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.tokens_seen += run.batches.rows_per_step * run.settings.block_size
    run.updating = False
    return metrics


def accumulate_gradients(run: Run) -> dict[str, Tensor]:
    """Leave the step's gradients on the parameters; return the loss and the model's metrics, each the mean over the micro-batches.

    Each process takes its own sequences of every micro-batch; gradients, loss and metrics are means over all processes.
    """
    x, y = (ids.to(run.device, non_blocking=True) for ids in run.batches.at(run.step))  # (A, B, T) both
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=run.device))
    for number, (micro_x, micro_y) in enumerate(zip(x, y, strict=True), 1):
        with distributed.syncing(run.forward, run.engine, now=number == len(x)):
            with hardware.autocast(run.device, run.dtype):
                output = run.forward(micro_x, micro_y)
                loss = output.loss / len(x)
            run.scaler.scale(loss).backward()
        parts = {name: value.detach() / len(x) for name, value in output.metrics.items()} | {"loss": loss.detach()}
        for name, value in parts.items():
            totals[name] += value
    return {name: run.world.mean(total) for name, total in totals.items()}


def check_finite(run: Run, loss: Tensor, grad_norm: Tensor) -> None:
    """Raises TrainingError naming step and batch if the step must not be taken. In float16 a few overflows are the scaler's to handle."""
    if torch.isfinite(loss + grad_norm):
        run.skipped_updates = 0
        return
    run.skipped_updates += 1
    if run.scaler.is_enabled() and run.skipped_updates < SKIPS_ALLOWED:
        return
    first, last = run.batches.windows_seen(run.step), run.batches.windows_seen(run.step + 1) - 1
    what = (
        f"{SKIPS_ALLOWED} float16 updates in a row overflowed"
        if run.scaler.is_enabled()
        else f"the loss is {loss.item():.4g} and its gradient's norm {grad_norm.item():.4g}"
    )
    raise TrainingError(
        f"step {run.step + 1} was not taken: {what} (batch: windows {first} to {last}, epoch {run.batches.epoch(run.step):.2f}); "
        f"{TRY_INSTEAD}, or look at the text there"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the loop calls between two steps.


def is_due(run: Run, *what: str) -> bool:
    """Whether any of `what` (eval, sample, log, checkpoint) is due at this step by its interval; at the last step everything is."""
    return any(ckpt.due(run.step, getattr(run.settings, f"{name}_interval"), last=run.end) for name in what)


class Clock:
    """Tokens per second since the line before."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.restart()

    def restart(self) -> None:
        """Counts from now: evaluation and saving are no training time."""
        self._since, self._tokens = time.monotonic(), self._run.tokens_seen

    def rate(self) -> float:
        """Tokens per second since the last call or restart."""
        rate = (self._run.tokens_seen - self._tokens) / max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return rate


def report(run: Run, clock: Clock, metrics: Mapping[str, Tensor]) -> None:
    """Write a line of training to metrics.jsonl, and show loss and speed beside the bar."""
    values, rate = {name: value.item() for name, value in metrics.items()}, clock.rate()
    write_metrics(run, "train", values | {"tok_s": round(rate, 1)})
    left = (run.end - run.step) * run.batches.rows_per_step * run.settings.block_size / max(rate, 1e-9)
    run.progress.show(run.step, loss=f"{values['loss']:.4f}", tok_s=amount(rate), seconds_left=left)


def write_metrics(run: Run, split: str, values: Mapping[str, float]) -> None:
    """Write one line to metrics.jsonl and to the tracker, on rank 0. Every line has the first names, null where the split has no value."""
    if not run.world.is_rank0:
        return
    own = {"run_id": run.run_id, "step": run.step, "time": round(time.time(), 3), "split": split}
    usual = {"loss": None, "lr": None, "grad_norm": None, "tokens": run.tokens_seen, "tok_s": None}
    line: dict[str, Any] = own | usual | dict(values) | own  # no metric takes the place of what a line is known by
    with may_be_refused(run, METRICS):
        run.metrics.write(**line)
    run.mirror.write(line)


@contextlib.contextmanager
def may_be_refused(run: Run, what: str) -> Iterator[None]:
    """A disk that refuses what only tells of the training does not stop it; it is said once."""
    try:
        yield
    except OSError as error:
        if what not in run.refused:
            run.refused.add(what)
            run.log(f"{what} could not be written ({error}); training goes on")


def observe(run: Run, stop: Interrupt) -> None:
    """Evaluates and samples, as far as either is due at this step. A signal leaves it undone, for the resume to do first."""
    if is_due(run, "eval") and len(run.text.split.validation):
        loss = evaluate(run, stop)
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(f"the validation loss after step {run.step} is {loss}; {TRY_INSTEAD}")
        write_metrics(run, "validation", {"loss": loss})
        run.progress.show(run.step, validation=f"{loss:.4f}")
        run.validation_loss = loss
        if run.step and loss < (math.inf if run.best_loss is None else run.best_loss):
            run.best_loss, run.best_step = loss, run.step
    if run.step and is_due(run, "sample"):
        run.last_sample = sample(run)
        if run.world.is_rank0:
            write_sample(run, run.last_sample)
    run.observed_step = run.step


def write_sample(run: Run, text: str) -> None:
    """Puts a sample of this step beside those of the steps before."""
    with may_be_refused(run, "samples/"):
        path = run.folder / "samples" / f"step{run.step:06d}.txt"
        path.parent.mkdir(exist_ok=True)
        write_own(path, text)


@torch.no_grad()
def evaluate(run: Run, stop: Interrupt) -> float | None:
    """The mean loss (nats per token) over fixed validation windows, the same ones at every call; None if a signal comes in between.

    Each process takes its rows of every batch. One that has none of a small last one takes any, uncounted: where parts of the
    weights are gathered for every pass, all must make it.
    """
    settings, world, total, count, stopping = run.settings, run.world, 0.0, 0.0, False
    run.model.eval()  # the plain module: another shape must never reach the compiled one
    sizes = {"block_size": settings.block_size, "batch_size": settings.batch_size, "steps": settings.eval_steps}
    for x, y in validation_windows(run.text.split.validation, **sizes):  # (B, T) both
        own = world.share(len(x))
        counted = x[own].numel()
        rows = own if counted else slice(1)
        with hardware.autocast(run.device, run.dtype):
            loss = run.model(x[rows].to(run.device), y[rows].to(run.device)).loss
        total, count = total + loss.item() * counted, count + counted
        if stopping := world.any(stop.requested):
            break
    run.model.train()
    total, count = world.sum(total, count)
    return None if stopping else total / count


def sample(run: Run) -> str:
    """A little text from the model as it stands, with a generator of its own."""
    settings, generator = run.settings, torch.Generator().manual_seed(run.settings.seed)
    start = run.tokenizer.end_of_text
    ids = [start] if start is not None else run.tokenizer.encode(first_character(run))
    drawn = generate(
        run.model,
        ids,
        max_new_tokens=SAMPLE_TOKENS,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        generator=generator,
        vocab_size=run.tokenizer.vocab_size,
    )
    try:
        return run.tokenizer.decode([*([] if start is not None else ids), *drawn]) + "\n"
    except ValueError as error:  # no sample can be drawn from logits that are not finite
        raise TrainingError(f"after step {run.step}: {error}") from error


def first_character(run: Run) -> str:
    """Where a sample begins if the tokenizer has no mark for a text's beginning: a newline, or else the text's first character."""
    alphabet = run.text.scan.alphabet
    return "\n" if "\n" in alphabet else alphabet[0]


def keep(run: Run, *, save: bool) -> None:
    """Save this step if `save`, and put it into best/ if it is the best so far; in the background where that is set.

    Raises what the save before raised.
    """
    run.writer.wait()
    best = run.best_is_pending and run.best_step == run.step
    if save:
        run.saved_step, run.saved_observed_step = run.step, run.observed_step
        run.save_failed = run.world.is_rank0  # until it has not
    if save or best:
        record = to_record(run)
        if run.world.is_rank0 or run.saves_parts:
            run.writer.submit(record, lambda copy: write(run, copy, save=save))


def write(run: Run, record: Checkpoint, *, save: bool) -> None:
    """Save the record, keep the best, and delete expired checkpoints. A disk that refuses does not stop the training.

    Raises TrainingError instead of saving weights that are NaN or Inf: the next step would find out too late. Of several processes
    that each save a part, rank 0 leads.
    """
    if bad := ckpt.not_finite(record):
        raise TrainingError(f"{bad[0]} after step {record.step} is not finite, so nothing was saved; {TRY_INSTEAD}")
    if not run.world.is_rank0:
        ckpt.follow(record)
        return
    with ckpt.leading(record):
        write_and_prune(run, record, save=save)


def write_and_prune(run: Run, record: Checkpoint, *, save: bool) -> None:
    """Do rank 0's part of `write`."""
    settings, folder, saved = run.settings, Path(run.settings.checkpoint_dir), None
    form: dict[str, Any] = {"layout": settings.checkpoint_layout, "prefix": settings.checkpoint_prefix}
    need = bytes_on_disk(record)
    if save:
        with told_if_refused(run, f"step {record.step} could not be saved", need):
            saved = run.last_saved = ckpt.save(record, folder, **form)
            run.save_failed = False
    # An earlier best step that the disk refused is tried again from its ordinary save, which stays until then.
    best = best_of(record)
    if record.best_step not in (None, run.kept_best_step) and settings.checkpoint_keep_best:
        with told_if_refused(run, f"step {record.best_step}, the best so far, could not be saved", need):
            if record.best_step != record.step or (not saved and ckpt.saved_best(folder, **best)):
                keep_saved_best(run, record)
            else:
                ckpt.keep_best(record, folder, saved=saved, count=settings.checkpoint_keep_best, **form)
                run.kept_best_step = record.step
    if saved and settings.checkpoint_keep_last:
        with told_if_refused(run, "older checkpoints could not be removed", need):
            policy = {"keep_last": settings.checkpoint_keep_last, "keep_every": settings.checkpoint_keep_every}
            pending = record.best_step not in (None, run.kept_best_step) and settings.checkpoint_keep_best
            ordinary = ckpt.saved_best(folder, **best) if pending else None
            spare = ordinary.path if ordinary else None
            ckpt.prune(folder, run_id=run.run_id, latest_valid=saved, spare=spare, **policy)


def best_of(one: Run | Checkpoint) -> dict[str, Any]:
    """The best step of a run so far, as `ckpt.saved_best` looks for it."""
    return {"run_id": one.run_id, "step": one.best_step, "loss": one.best_loss}


def keep_saved_best(run: Run, record: Checkpoint | None = None) -> None:
    """Put the best step, as of the record or of the run, into best/ from its ordinary save, if it is not there; rank 0 only."""
    if run.world.is_rank0 and run.best_is_pending:
        best, count = best_of(record or run), run.settings.checkpoint_keep_best
        with told_if_refused(run, f"step {best['step']}, the best so far, could not be saved", 0):
            if ckpt.keep_saved_best(Path(run.settings.checkpoint_dir), count=count, **best):
                run.kept_best_step = best["step"]


@contextlib.contextmanager
def told_if_refused(run: Run, what: str, need: int) -> Iterator[None]:
    """Says why the disk refused something, and what it would have needed."""
    try:
        yield
    except (OSError, ckpt.CheckpointError) as error:
        why = ckpt.why_not_saved(error, Path(run.settings.checkpoint_dir), need=need)
        run.log(f"{what} ({why}); training goes on")


# ---------------------------------------------------------------------------------------------------------------------
# What a run says at its start and at its end.


def open_run(run: Run, held: contextlib.ExitStack) -> None:
    """Makes the run's folders, locks the run for this process and opens what it writes; fails before step 1 if it cannot.

    The run is locked where its checkpoints are and where its metrics are, each of which another process may share alone.
    """
    if problem := missing(run.settings.tracker):
        raise ConfigError([problem])
    runs, checkpoints = Path(run.settings.runs_dir), Path(run.settings.checkpoint_dir)
    own = [run.folder, *(run.folder / name for name in FOLDERS_OF_A_RUN)]
    with refused_as("RUNS_DIR", run.folder):
        for place in own:
            check_inside(runs, place)
        lock_place(run, run.folder, held)
    if run.settings.enable_checkpoints:
        with refused_as("CHECKPOINT_DIR", checkpoints):
            for place in (checkpoints / ckpt.BEST_FOLDER, checkpoints / run.run_id / ckpt.BEST_FOLDER):
                check_inside(checkpoints, place)
            lock_place(run, checkpoints, held)
        check_space(run)
        protect_base(run)
    with refused_as("RUNS_DIR", run.folder):
        run.log.open(run.folder / "training.log")
        write_own(run.folder / "config.env", config.as_env(run.settings))
        origin = {"run_id": run.run_id, "parent": run.parent}
        write_own(run.folder / "run.json", json.dumps(origin, indent=1) + "\n")
        run.metrics = held.enter_context(contextlib.closing(Metrics(run.folder / METRICS)))
        # Set aside metrics newer than the checkpoint: resuming rewrites them.
        run.metrics.rewind(lambda line: was_seen(run, line), until=run.resumed_save)
    open_tracker(run, held)


def lock_place(run: Run, place: Path, held: contextlib.ExitStack) -> None:
    """Makes the folder and locks the run there for this process."""
    prepare_folder(place)
    lock = RunLock(place, run.run_id)
    lock.acquire(patience=LEASE if config.was_restarted() else 0)
    held.callback(lock.release)


@contextlib.contextmanager
def refused_as(variable: str, place: Path) -> Iterator[None]:
    """Raises ConfigError naming the variable of a folder that cannot be written."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        problem = f"{variable}: {place} cannot be written ({error})"
        raise ConfigError([f"{problem}: make room or mend its permissions, or set another {variable}"]) from error


def protect_base(run: Run) -> None:
    """Leave a note beside the base of adapters that are saved elsewhere: retention in its folder does not see them."""
    if not (run.base and run.settings.checkpoint_adapters_only):
        return
    try:
        note = ckpt.note_use(run.base, run_id=run.run_id, checkpoint_dir=Path(run.settings.checkpoint_dir))
    except OSError as error:
        base, why = run.base.get("source"), f"no note can be left beside it ({error})"
        run.log(f"warning: pruning may delete {base}, which these adapters need, because {why}: copy it elsewhere")
    else:
        if note:
            run.log(f"{shown(note)} keeps the base of these adapters from being pruned; delete it with them")


def open_tracker(run: Run, held: contextlib.ExitStack) -> None:
    """Begins to mirror metrics.jsonl in the tracker, with what it lacks of the steps before."""
    kind, path = run.settings.tracker, run.metrics.path
    run.mirror = open_mirror(
        kind, folder=run.folder, run_id=run.run_id, lines=read_metrics(path) if kind != "none" and path.exists() else [],
        settings=config.to_dict(run.settings), wandb=config.wandb_options(), say=run.log,
    )  # fmt: skip
    # Stopped before an evaluation that is due, the step is not whole: the resume evaluates it first.
    held.callback(lambda: run.mirror.close(whole=run.observed_step == run.step or not is_due(run, "eval")))


def was_seen(run: Run, line: dict[str, Any]) -> bool:
    """Whether the checkpoint that the run goes on from was written after this line of its metrics."""
    step = line.get("step", 0)
    return step < run.step or (step == run.step and (line.get("split") == "train" or run.observed_step == run.step))


def say_start(run: Run) -> None:
    """At most 15 lines: what is trained on what, for how long, and where it goes."""
    settings, text, say = run.settings, run.text, run.log
    count = models.parameter_count(run.model)
    shared = f"{run.world.size} processes by {run.engine}, each " if run.world.size > 1 else ""
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    numerics = f"{shared}{threads}, {run.dtype}, {'compiled' if run.compile_step else 'eager'}"
    say(f"run {run.run_id}: {settings.model_type} on {run.device.type} ({numerics})")
    sizes = f"{len(text.split.train)} tokens to train on, {len(text.split.validation)} to validate on"
    tokenizer = f"{run.tokenizer.kind} tokenizer of {run.tokenizer.vocab_size}"
    say(f"data: {shown(text.corpus.source)}: {amount(text.scan.characters)} characters, {tokenizer}; {sizes}")
    trained = models.trained_count(run.model)
    adapters = f", {amount(trained)} of them trained" if trained < count else ""
    say(f"model: {amount(count)} parameters ({count * 4 / 1e6:.1f} MB){adapters}, block size {settings.block_size}")
    warn_of_memory(run)
    say(f"output: {shown(run.folder)} (metrics.jsonl, training.log, samples, config.env, run.json)")
    say_checkpoints(run)
    for line in config.describe(settings):
        say(line)


def say_checkpoints(run: Run) -> None:
    """When and where checkpoints are saved, and which are kept."""
    settings, say = run.settings, run.log
    if not settings.enable_checkpoints:
        say("checkpoints are OFF: nothing of this model will be kept; set ENABLE_CHECKPOINTS=true to keep it")
        return
    interval, last, multiple = (
        settings.checkpoint_interval,
        settings.checkpoint_keep_last,
        settings.checkpoint_keep_every,
    )
    every = f"every {interval} steps and at the end" if interval else "at the end"
    kept = f", the last {last} kept" + (f" and models at multiples of {multiple}" if multiple else "") if last else ""
    say(f"checkpoints: {every}{kept}, to {shown(Path(settings.checkpoint_dir))} ({settings.checkpoint_layout})")
    if settings.checkpoint_model_only:
        say("CHECKPOINT_MODEL_ONLY=true: without their optimizer, checkpoints generate but cannot go on exactly")
    if settings.checkpoint_layout == "huggingface" and settings.model_type not in models.with_trait("transformers"):
        say(f"transformers has no {settings.model_type} model: only milepost will open these folders")


def check_space(run: Run) -> None:
    """Raises ConfigError if what the policy keeps will not fit on the disk; if all checkpoints are kept it only warns."""
    settings, folder = run.settings, Path(run.settings.checkpoint_dir)
    interval, last = settings.checkpoint_interval, settings.checkpoint_keep_last
    saves = 1 + (run.end - run.step) // interval if interval else 1
    count = min(saves, last + 1 if last else saves) + settings.checkpoint_keep_best  # one more while it is written
    trained = models.trained_count(run.model)
    weights = trained if settings.checkpoint_adapters_only else models.parameter_count(run.model)
    size = 4 * (weights + (0 if settings.checkpoint_model_only else 2 * trained))
    if problem := ckpt.free_space_problem(folder, need=count * size):
        plan = f"{count} checkpoints of {amount(size, 'B')}: {problem}"
        if last:
            raise ConfigError([f"CHECKPOINT_KEEP_LAST={last}: {plan}; keep fewer, or set another CHECKPOINT_DIR"])
        run.log(f"warning: {plan}; set CHECKPOINT_KEEP_LAST")


def warn_of_memory(run: Run) -> None:
    """Says so if the estimate is above what the device has free."""
    need = memory_needed(run.model, run.settings, run.world, engine=run.engine, device=run.device, dtype=run.dtype)
    free = hardware.free_memory(run.device)
    if free is not None and need > free:
        estimate = f"a step needs about {amount(need, 'B')} of memory and {amount(free, 'B')} are free"
        run.log(f"warning: {estimate}; lower BATCH_SIZE, BLOCK_SIZE or N_LAYER if it fails")


def say_plan(run: Run, seconds: float) -> None:
    """Log how long the run is, in steps, tokens and time. `seconds` is what a step takes at most."""
    steps, rows, block_size = run.end - run.step, run.batches.rows_per_step, run.settings.block_size
    epochs = run.batches.epoch(run.end) - run.batches.epoch(run.step)
    amounts = f"{amount(steps * rows * block_size)} tokens, {epochs:.2g} epochs"
    left = duration(steps * seconds_per_step(run, seconds))
    run.log(f"plan: {steps} steps of {rows} x {block_size} tokens = {amounts}; about {left}")


def warm_up(run: Run) -> float:
    """Pass forward and backward twice over the next batch without an update; return the seconds that the second pass took.

    After the first backward pass DistributedDataParallel rearranges its buckets, and the order of its sums with them: every run, new or
    resumed, makes these two passes before its first step, so that its steps have the same bits. A compiler compiles in the first one,
    and caches fill.
    """
    time_pass(run)
    return time_pass(run)


def time_pass(run: Run) -> float:
    """Return the seconds that a pass over the next batch takes, forward and backward; weights and buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    since = time.monotonic()
    accumulate_gradients(run)["loss"].item()
    seconds = time.monotonic() - since
    run.optimizer.zero_grad(set_to_none=True)
    for name, before in buffers.items():
        run.model.get_buffer(name).copy_(before)
    return seconds


def seconds_per_step(run: Run, seconds: float) -> float:
    """Return the seconds of the fastest pass: `seconds`, or those of two more if they are short. For display only."""
    began = time.monotonic()
    for _ in range(2):
        if run.world.any(seconds + time.monotonic() - began > PROBE_SECONDS):
            break
        seconds = min(seconds, time_pass(run))
    return seconds


def say_end(run: Run) -> int:
    """How the run ended, a sample if it is done, and the next command; returns the exit code."""
    if run.step < run.end or run.observed_step != run.step:
        run.log(f"interrupted after step {run.step}: {kept(run)}")
        return INTERRUPTED
    losses = (
        f"validation loss {run.validation_loss:.4f}, best {run.best_loss:.4f} at step {run.best_step}"
        if run.validation_loss is not None and run.best_loss is not None
        else "no validation text"
    )
    run.log(f"done: {run.step} steps, {losses}")
    tell(run.last_sample or sample(run))  # only the first process has a stdout
    if run.save_failed:
        run.log(f"step {run.step} is not saved, for the reason above; {kept(run)}")
    elif run.last_saved:
        run.log("next: " + command_line(LOAD_CHECKPOINT, CHECKPOINT_PATH=run.last_saved, **base_of(run)))
    return SAVE_FAILED if run.save_failed else 0


def kept(run: Run) -> str:
    """What is left of a run that stopped early, and how to go on with it."""
    if not run.world.is_rank0:
        return "the first process tells"
    if not run.settings.enable_checkpoints:
        return "nothing was kept, because ENABLE_CHECKPOINTS is false"
    folder = Path(run.settings.checkpoint_dir)
    try:
        newest = ckpt.latest([one for one in ckpt.find(folder) if one.metadata.get("run_id") == run.run_id])
    except OSError as error:
        return f"what is kept cannot be told ({error})"
    if newest is None:
        return "nothing was kept"
    is_kept, count = f"step {newest.step} is kept in {shown(newest.path)}", run.world.local_size
    if count < run.world.size:
        return f"{is_kept}; go on with the same torchrun commands and RESUME=auto"
    processes = count if count > 1 else None
    again = command_line(
        ROOT / "training.py", processes=processes, RESUME="auto", CHECKPOINT_DIR=folder, **base_of(run)
    )
    return f"{is_kept}; go on with: {again}"


def base_of(run: Run) -> dict[str, Any]:
    """The variable that names the base of a run's checkpoints, if they hold adapters alone."""
    if not (run.base and run.settings.checkpoint_adapters_only):
        return {}
    return {"GPT2_MODEL_NAME" if run.settings.gpt2_model_name else "BASE_CHECKPOINT": str(run.base.get("source"))}


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
