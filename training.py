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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.record import bytes_on_disk
from milepost.cli import TrainingError, guarded, processes
from milepost.config import Config, ConfigError
from milepost.files import prepare_folder
from milepost.generate.sampling import generate
from milepost.locks import RunLock
from milepost.resume import explain, find_record, finished, let_go, not_exact, resumed
from milepost.run import Run, agreed, fresh, memory_needed, to_record
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import World
from milepost.runtime.interrupt import INTERRUPTED, Interrupt
from milepost.runtime.optim import clip_gradients, gradient_norm, lr_at
from milepost.runtime.progress import Log, Metrics, Progress, amount, command_line, duration, read_metrics, shown, tell
from milepost.runtime.trackers import missing, open_mirror
from milepost.text.batches import validation_windows

ROOT = Path(__file__).resolve().parent
LOAD_CHECKPOINT = ROOT / "scripts" / "load_checkpoint.py"
SAVE_FAILED = 5  # exit code of a run that finished, but whose last save did not
SKIPS_ALLOWED = 20  # float16 updates in a row that the scaler may skip while it looks for a scale
SAMPLE_TOKENS = 200
LEASE = 120  # seconds after which a network file system frees the locks of a machine that is gone
PROBE_SECONDS = 2.0  # of the time that an estimate of the run's length may take, once it has two measurements
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
        more = command_line(LOAD_CHECKPOINT, CHECKPOINT_PATH=record.path, MODE="resume", RESUME_TRAINING_STEPS=1000)
        log(f"run {record.run_id} is finished: {run.step} of {run.end} steps are done. More: {more}")
        return 0
    return train(run)


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def train(run: Run) -> int:
    """Trains from `run.step` to the plan's end or to a signal; returns the exit code. There is no second loop."""
    hardware.keep_freed_memory()
    with contextlib.ExitStack() as held:
        run.world.on_rank0(lambda: open_run(run, held))
        try:
            with Interrupt() as stop:
                say_start(run)
                bar = Progress(run.log, start=run.step, total=run.end, plain=config.tqdm_disabled())
                with contextlib.closing(bar) as run.progress, kept_if_lost(run):
                    loop(run, stop)
                return say_end(run)
        except BaseException:
            with contextlib.suppress(Exception):
                run.writer.wait()  # what was being saved is whole then
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

        # Keep: at the interval, at the end and when asked to stop; and the best so far beside them.
        save = run.step > run.saved_step and (stopping or is_due(run, "checkpoint"))
        if run.settings.enable_checkpoints and (save or run.best_step not in (None, run.kept_best_step)):
            keep(run, save=save)
            clock.restart()

        if run.step >= run.end or stopping:
            run.writer.wait()
            return

        # Learn: one optimizer step, and its line in the metrics when it is due.
        lr = lr_at(run.step, run.schedule)
        loss, grad_norm = training_step(run, lr)
        run.progress.advance(run.step)
        if is_due(run, "log"):
            report(run, clock, loss=loss, lr=lr, grad_norm=grad_norm)


def training_step(run: Run, lr: float) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns its loss (mean over the batch, nats per token) and its gradient's norm before clipping, both 0-dim.

    Raises TrainingError before the weights are touched if either is not finite.
    """
    # Every random draw of the step, dropout's, is a function of (seed, step, rank): resuming needs no generator's state.
    hardware.seed_step(run.device, run.settings.seed, run.step, rank=run.world.rank)
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    loss = accumulate_gradients(run)

    # Clip, and stop while the weights are still good if something is not finite.
    run.scaler.unscale_(run.optimizer)
    grad_norm = gradient_norm(run.optimizer)
    check_finite(run, loss, grad_norm)
    clip_gradients(run.optimizer, grad_norm, limit=run.settings.grad_clip)

    # Update, once what is being saved is copied. The scaler leaves out an update whose float16 gradients overflowed; without float16 it does nothing.
    run.writer.settle()
    run.updating = True
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.tokens_seen += run.batches.rows_per_step * run.settings.block_size
    run.updating = False
    return loss, grad_norm


def accumulate_gradients(run: Run) -> Tensor:
    """Leaves the step's gradients on the parameters and returns its loss: each micro-batch counts for its share of the whole batch.

    Of several processes each takes its own rows of every micro-batch; gradients and loss are the means over all.
    """
    x, y = (ids.to(run.device, non_blocking=True) for ids in run.batches.at(run.step))  # (A, B, T) both
    total = torch.zeros((), device=run.device)
    for number, (micro_x, micro_y) in enumerate(zip(x, y, strict=True), 1):
        with distributed.syncing(run.forward, run.engine, now=number == len(x)):
            with hardware.autocast(run.device, run.dtype):
                _, loss = run.forward(micro_x, micro_y)
                loss = loss / len(x)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return run.world.mean(total)


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


def report(run: Run, clock: Clock, *, loss: Tensor, lr: float, grad_norm: Tensor) -> None:
    """One line of training in metrics.jsonl, and the figures beside the bar."""
    value, rate = loss.item(), clock.rate()
    write_metrics(run, split="train", loss=value, lr=lr, grad_norm=grad_norm.item(), tok_s=round(rate, 1))
    left = (run.end - run.step) * run.batches.rows_per_step * run.settings.block_size / max(rate, 1e-9)
    run.progress.show(run.step, loss=f"{value:.4f}", tok_s=amount(rate), seconds_left=left)


def write_metrics(
    run: Run,
    *,
    split: str,
    loss: float | None,
    lr: float | None = None,
    grad_norm: float | None = None,
    tok_s: float | None = None,
) -> None:
    """One object with the same names in every line, null where a name has no meaning for the split; and its mirror in the tracker.

    Of several processes, the first one's.
    """
    if not run.world.is_rank0:
        return
    values = {"split": split, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": run.tokens_seen, "tok_s": tok_s}
    line = {"run_id": run.run_id, "step": run.step, "time": round(time.time(), 3)} | values
    with may_be_refused(run, "metrics.jsonl"):
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
        write_metrics(run, split="validation", loss=loss)
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
        path.write_text(text, encoding="utf-8")


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
            _, loss = run.model(x[rows].to(run.device), y[rows].to(run.device))
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
    """Has this step saved if `save`, and kept under best/ if it is the best so far; in the background where that is set.

    Raises what the save before raised.
    """
    run.writer.wait()
    best = run.best_step == run.step and run.settings.checkpoint_keep_best > 0
    run.kept_best_step = run.best_step
    if save:
        run.saved_step, run.save_failed = run.step, run.world.is_rank0  # until it has not
    if save or best:
        record = to_record(run)
        if run.world.is_rank0 or run.saves_parts:
            run.writer.submit(record, lambda copy: write(run, copy, save=save, best=best))


def write(run: Run, record: Checkpoint, *, save: bool, best: bool) -> None:
    """Saves the record, keeps it as the best, and lets go what has expired. A disk that refuses does not stop the training.

    Raises TrainingError instead of saving weights that are no numbers: the next step would find out too late. Of several processes
    that each save a part, the first leads.
    """
    if bad := ckpt.not_finite(record):
        raise TrainingError(f"{bad[0]} after step {record.step} is not finite, so nothing was saved; {TRY_INSTEAD}")
    if not run.world.is_rank0:
        ckpt.follow(record)
        return
    with ckpt.leading(record):
        write_and_prune(run, record, save=save, best=best)


def write_and_prune(run: Run, record: Checkpoint, *, save: bool, best: bool) -> None:
    """What the first process does of it."""
    settings, folder, saved = run.settings, Path(run.settings.checkpoint_dir), None
    form: dict[str, Any] = {"layout": settings.checkpoint_layout, "prefix": settings.checkpoint_prefix}
    if save:
        with told_if_refused(run, f"step {record.step} could not be saved", record):
            saved = run.last_saved = ckpt.save(record, folder, **form)
            run.save_failed = False
    if best:
        with told_if_refused(run, f"step {record.step}, the best so far, could not be saved", record):
            ckpt.keep_best(record, folder, saved=saved, count=settings.checkpoint_keep_best, **form)
    if saved and settings.checkpoint_keep_last:
        with told_if_refused(run, "older checkpoints could not be removed", record):
            policy = {"keep_last": settings.checkpoint_keep_last, "keep_every": settings.checkpoint_keep_every}
            ckpt.prune(folder, run_id=run.run_id, newest_good=saved, **policy)


@contextlib.contextmanager
def told_if_refused(run: Run, what: str, record: Checkpoint) -> Iterator[None]:
    """Says why the disk refused something, and what it would have needed."""
    try:
        yield
    except (OSError, ckpt.CheckpointError) as error:
        why = ckpt.why_not_saved(error, Path(run.settings.checkpoint_dir), need=bytes_on_disk(record))
        run.log(f"{what} ({why}); training goes on")


# ---------------------------------------------------------------------------------------------------------------------
# What a run says at its start and at its end.


def open_run(run: Run, held: contextlib.ExitStack) -> None:
    """Makes the run's folders, locks the run for this process and opens what it writes; fails before step 1 if it cannot.

    The run is locked where its checkpoints are and where its metrics are, each of which another process may share alone.
    """
    if problem := missing(run.settings.tracker):
        raise ConfigError([problem])
    places = [run.folder, *([Path(run.settings.checkpoint_dir)] if run.settings.enable_checkpoints else [])]
    for place in places:
        try:
            prepare_folder(place)
        except (OSError, NotImplementedError) as error:
            problem = f"{place} cannot be written ({error})"
            raise ConfigError(
                [f"{problem}: mend its permissions, or set another CHECKPOINT_DIR or RUNS_DIR"]
            ) from error
        lock = RunLock(place, run.run_id)
        lock.acquire(patience=LEASE if config.was_restarted() else 0)
        held.callback(lock.release)
    if run.settings.enable_checkpoints:
        check_space(run)
    try:
        run.log.open(run.folder / "training.log")
        (run.folder / "config.env").write_text(config.as_env(run.settings), encoding="utf-8")
        origin = {"run_id": run.run_id, "parent": run.parent}
        (run.folder / "run.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [f"RUNS_DIR: {run.folder} cannot be written ({error}): make room, or set another RUNS_DIR"]
        ) from error
    run.metrics = held.enter_context(contextlib.closing(Metrics(run.folder / "metrics.jsonl")))
    # What was logged after the checkpoint is logged again, so it goes; what it had not seen yet at its own step, too.
    run.metrics.rewind(lambda line: was_seen(run, line))
    open_tracker(run, held)


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
    count, steps, rows = models.parameter_count(run.model), run.end - run.step, run.batches.rows_per_step
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
    epochs = run.batches.epoch(run.end) - run.batches.epoch(run.step)
    amounts = f"{amount(steps * rows * settings.block_size)} tokens, {epochs:.2g} epochs"
    left = duration(steps * seconds_per_step(run))
    say(f"plan: {steps} steps of {rows} x {settings.block_size} tokens = {amounts}; about {left}")
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
    if settings.checkpoint_layout == "huggingface" and settings.model_type == "bigram":
        say("transformers has no bigram model: only milepost will open these folders")


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


def seconds_per_step(run: Run) -> float:
    """Times a few passes over the next batch, forward and backward, and takes the fastest; weights stay as they are.

    Two at least: with them DistributedDataParallel has arranged its buckets (see `data_parallel`), and its sums have their order.
    """
    began, fastest = time.monotonic(), math.inf
    for number in range(4):  # the first one also warms caches up, or compiles
        since = time.monotonic()
        if number >= 2 and run.world.any(since - began > PROBE_SECONDS):
            break
        accumulate_gradients(run).item()
        run.optimizer.zero_grad(set_to_none=True)
        fastest = min(fastest, time.monotonic() - since)
    return fastest


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
