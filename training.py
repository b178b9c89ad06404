"""Train a small language model from environment variables, and never lose a step.

    python3 training.py                                                   # a bigram model on the bundled text
    ENABLE_CHECKPOINTS=true MODEL_TYPE=gpt2 python3 training.py           # a small GPT-2, saved as it learns
    RESUME=auto ENABLE_CHECKPOINTS=true MODEL_TYPE=gpt2 python3 training.py   # after a crash: resume exactly
    MODEL_TYPE=gpt2 torchrun --nproc_per_node=2 training.py               # the same with two processes

`python3 training.py --help` lists every variable. This file is the loop, top to bottom; docs/architecture.md shows what it
calls: milepost/run/ builds a run, and milepost/resume.py rebuilds it from a checkpoint.
"""

import sys

if getattr(sys.flags, "safe_path", False):  # python -I and -P leave this folder out
    sys.path.insert(0, __file__.rpartition("training")[0])
from milepost import config

READS = (
    "TRAINING_DATA_SOURCE", "MODEL_TYPE", "GPT2_MODEL_NAME", "TRAINING_STEPS", "BATCH_SIZE", "LEARNING_RATE",
    "ENABLE_CHECKPOINTS", "RESUME",
    "Data", "Model", "Adapters", "Training", "Logging", "Hardware and seed", "Checkpoints if ENABLE_CHECKPOINTS or RESUME",
    "CHECKPOINT_DIR if ENABLE_CHECKPOINTS or RESUME or INIT_FROM", "RUNS_DIR",
    "PUSH_TO_HUB if ENABLE_CHECKPOINTS", "DRY_RUN if PUSH_TO_HUB", "HUB_PRIVATE if PUSH_TO_HUB",
    "RESUME_STEP", "INIT_FROM", "CACHE_GB", "TEMPERATURE", "TOP_K", "TOP_P", "REPETITION_PENALTY",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from milepost.cli import guarded, notify, processes
from milepost.config import Config
from milepost.generation.sampling import generate
from milepost.remote import folder_here
from milepost.reporting import how_to_resume, log_done, log_finished_before, log_plan, log_start, print_resume
from milepost.resume import finished, free_tensors, inexact_reasons, resumed
from milepost.resume_choice import find_record
from milepost.run import TRY_INSTEAD, Clock, Run, agreed, checked, fresh, is_due, sample_start, validation_of
from milepost.run_checkpoints import finish_saving, repair, retry_is_due, save_checkpoint, save_if_a_process_dies
from milepost.run_files import open_run, write_metrics, write_sample
from milepost.run_mirror import behind_mirror, finish_mirroring, help_mirroring
from milepost.run_publishing import check_publishing, publish_last
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import World
from milepost.runtime.errors import TrainingError
from milepost.runtime.interrupt import INTERRUPTED, Interrupt
from milepost.runtime.optim import clip_gradients, gradient_norm
from milepost.runtime.progress import Log, Progress, amount
from milepost.runtime.schedule import lr_at
from milepost.text.addresses import is_address

SAVE_FAILED = 5  # exit code of a run that finished, but whose last save failed
NOT_PUBLISHED = 9  # exit code of a run that finished and is saved, but could not be published
NOT_MIRRORED = 8  # exit code of a run that finished and is saved, but whose last checkpoint is not in the mirror
SKIPS_ALLOWED = 20  # consecutive float16 updates that the scaler may skip while it looks for a scale
SAMPLE_TOKENS = 200
PROBE_SECONDS = 2.0  # at most, to estimate the seconds per step after the warm-up


def main(settings: Config, log: Log) -> int:
    """Train as the settings say, resuming a checkpoint if RESUME asks for it; return the exit code."""
    with processes(settings, log) as world:
        run, done = prepare(settings, log, world)
        return (NOT_MIRRORED if run.saved.not_mirrored else 0) if done else train(run)


def prepare(settings: Config, log: Log, world: World) -> tuple[Run, bool]:
    """Return a fresh run, or the one that RESUME asks for; and whether it is finished already."""
    folder_here(settings)
    log.notify(settings.notify_url, name="NOTIFY_URL")
    record = None
    if settings.resume != "never":
        record = agreed(lambda: find_record(settings, log), world, everywhere=is_address(settings.resume))
    if record is None:
        if settings.resume != "never":
            log(f"RESUME={settings.resume}: no checkpoint in {settings.checkpoint_dir}, so this run starts fresh")
        return fresh(settings, log, world), False

    run, restored = resumed(settings, record, log, world)
    print_resume(run, record, restored)
    free_tensors(record)
    if reasons := inexact_reasons(run, record, restored):
        log(f"not bit-exact: {'; '.join(reasons)}")
    done = finished(run, record)
    if done:
        world.on_rank0(lambda: repair(run, record))
        log_finished_before(run, record)
    return run, done


def train(run: Run) -> int:
    """Train from `run.state.step` to the last step or to a signal; return the exit code.

    Fresh and resumed runs share this one loop.
    """
    hardware.keep_freed_memory()
    check_publishing(run.settings)
    with contextlib.ExitStack() as held:
        run.world.on_rank0(lambda: open_run(run, held))
        help_mirroring(run, held)
        with Interrupt() as stop:
            try:
                log_start(run)
                seconds = warm_up(run)
                log_plan(run, seconds_per_step=seconds_per_step(run, seconds))
                bar = Progress(run.log, start=run.state.step, total=run.end, plain=config.tqdm_disabled())
                with contextlib.closing(bar) as run.bar, save_if_a_process_dies(run):
                    loop(run, stop)
                return end(run)
            except BaseException as error:
                with contextlib.suppress(Exception):
                    run.writer.wait()  # finish the save in flight, even if more signals arrive
                    finish_mirroring(run)
                stopped = f"stopped after step {run.state.step}: {how_to_resume(run)}"
                run.log(stopped)
                notify(error, run.log, more=stopped)
                raise


def loop(run: Run, stop: Interrupt) -> None:
    """Run the training loop. Evaluation, samples, logs and checkpoints change neither weights nor later random draws."""
    state, clock = run.state, Clock(run)
    while True:
        # A signal to one process stops all of them after the same step, or makes all save it; so does a disk with room again.
        stopping, saving, retrying = run.world.any_of(stop.requested, stop.save_requested, retry_is_due(run))
        if saving:
            stop.note_save()
            off = "nothing is saved, because ENABLE_CHECKPOINTS is false"
            run.log(f"SIGUSR1: {f'saving step {state.step}' if run.settings.enable_checkpoints else off}")

        # Evaluate on the validation text and draw a sample. A resumed run skips what its checkpoint had done here.
        if state.observed_step != state.step and not stopping and is_due(run, "eval", "sample"):
            observe(run, stop)
            stopping = run.world.any(stop.requested)
            clock.restart()

        # Save at the interval, at the end and on a signal, and also each new best.
        regular = has_news(run) and (stopping or saving or retrying or is_due(run, "checkpoint"))
        new_best = run.best_is_pending and state.best_step == state.step
        if run.settings.enable_checkpoints and (regular or new_best):
            save_checkpoint(run, regular=regular)
            clock.restart()

        if state.step >= run.end or stopping:
            finish_saving(run)
            return

        # Take one optimizer step, now and then twice to check the device, and log its metrics when due.
        lr = lr_at(state.step, run.schedule)
        metrics = checked(run, partial(training_step, run, lr))
        run.bar.advance(state.step)
        if is_due(run, "log"):
            report(run, clock, metrics)


def has_news(run: Run) -> bool:
    """Return whether the run has something that its last regular checkpoint lacks: steps, or the last step's evaluation.

    A signal can make the last step's first save come before its evaluation.
    """
    state, saved = run.state, run.saved
    evaluated = state.observed_step == state.step and saved.observed_step != state.step
    return state.step > saved.step or (state.step == run.end and evaluated)


# Functions that return further metrics of a training step by name, 0-dim tensors, from the run while its gradients are
# in place, before clipping.
MEASURES: list[Callable[[Run], dict[str, Tensor]]] = []


def training_step(run: Run, lr: float) -> dict[str, Tensor]:
    """Take one optimizer step; return its metrics, 0-dim: loss (nats per token), lr, grad_norm before clipping, the
    model's and MEASURES.

    Raise TrainingError before the weights change if loss or grad_norm is not finite.
    """
    state = run.state
    # Every random draw of the step (dropout) is a function of (seed, step, rank), so a resume needs no generator state.
    hardware.seed_step(run.device, run.settings.seed, state.step, rank=run.world.rank)
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    metrics = accumulate_gradients(run)

    # Measure and clip the gradients. Stop before the update if anything is not finite.
    run.scaler.unscale_(run.optimizer)
    metrics |= {"lr": torch.tensor(lr, dtype=torch.float64), "grad_norm": gradient_norm(run.optimizer)}
    for measure in MEASURES:
        metrics |= {name: distributed.full(value).detach() for name, value in measure(run).items()}
    check_finite(run, metrics["loss"], metrics["grad_norm"])
    clip_gradients(run.optimizer, metrics["grad_norm"], limit=run.settings.grad_clip)

    # Update, once the background save has copied the weights. The scaler skips updates whose float16 gradients
    # overflowed, and does nothing in other dtypes.
    run.writer.settle()
    state.updating = True
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    state.tokens_seen += run.batches.tokens_in(state.step)
    state.step += 1
    state.updating = False
    return metrics


def accumulate_gradients(run: Run) -> dict[str, Tensor]:
    """Leave the step's gradients on the parameters; return the loss and the model's metrics, each the mean over the
    micro-batches; of conversations, over all tokens that count.

    Each process takes its own sequences of every micro-batch; gradients, loss and metrics are means over all processes.
    """
    batch = [hardware.moved(part, run.device) for part in run.batches.at(run.state.step)]  # (A, B, T) each
    divisors = run.batches.divisors(run.state.step)
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=run.device))
    for number, (micro, divisor) in enumerate(zip(zip(*batch, strict=True), divisors, strict=True), 1):
        with distributed.syncing(run.forward, run.engine, now=number == len(divisors)):
            with hardware.autocast(run.device, run.dtype):
                output = run.forward(*micro)
                loss = output.loss / divisor
            run.scaler.scale(loss).backward()
        parts = {name: value.detach() / divisor for name, value in output.metrics.items()} | {"loss": loss.detach()}
        for name, value in parts.items():
            totals[name] += value
    return {name: run.world.mean(total) for name, total in totals.items()}


def check_finite(run: Run, loss: Tensor, grad_norm: Tensor) -> None:
    """Raise TrainingError naming step and batch if loss or gradients are not finite.

    In float16 the scaler handles a few overflows.
    """
    state = run.state
    if torch.isfinite(loss + grad_norm):
        state.skipped_updates = 0
        return
    state.skipped_updates += 1
    if run.scaler.is_enabled() and state.skipped_updates < SKIPS_ALLOWED:
        return
    first, last = run.batches.windows_seen(state.step), run.batches.windows_seen(state.step + 1) - 1
    problem = (
        f"{SKIPS_ALLOWED} float16 updates in a row overflowed"
        if run.scaler.is_enabled()
        else f"the loss is {loss.item():.4g} and the gradient norm {grad_norm.item():.4g}"
    )
    batch = f"batch: windows {first} to {last}, epoch {run.batches.epoch(state.step):.2f}"
    raise TrainingError(
        f"step {state.step + 1} was not taken: {problem} ({batch}); {TRY_INSTEAD}, or look at the text there"
    )


def observe(run: Run, stop: Interrupt) -> None:
    """Evaluate and draw a sample, as far as due at this step.

    A signal during the evaluation leaves both to the resume.
    """
    state = run.state
    if is_due(run, "eval") and len(run.text.split.validation):
        loss = evaluate(run, stop)
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(f"the validation loss after step {state.step} is {loss}; {TRY_INSTEAD}")
        write_metrics(run, "validation", {"loss": loss})
        run.bar.show(state.step, validation=f"{loss:.4f}")
        state.validation_loss = loss
        if state.step and loss < (math.inf if state.best_loss is None else state.best_loss):
            state.best_loss, state.best_step = loss, state.step
    if state.step and is_due(run, "sample"):
        state.last_sample = sample(run)
        write_sample(run, state.last_sample)
    state.observed_step = state.step


@torch.no_grad()
def evaluate(run: Run, stop: Interrupt) -> float | None:
    """Return the mean loss (nats per token) over a fixed set of validation windows, or None if a signal interrupts.

    Each process evaluates its share of every batch. A process without a share of a small last batch evaluates a
    sequence that does not count: with sharded weights, every forward pass needs all processes.
    """
    settings, world, total, count, stopping = run.settings, run.world, 0.0, 0.0, False
    losses, counts = [], []  # of each batch; read at the end, so that nothing waits for the device in between
    run.model.eval()  # the plain module, so that the compiled one never sees another shape
    sizes = {"block_size": settings.block_size, "batch_size": settings.batch_size, "steps": settings.eval_steps}
    for batch in validation_of(run.text, run.model, **sizes):  # (B, T) each
        own = world.share(len(batch[0]))
        counted = int((batch[1][own] >= 0).sum())
        rows = own if counted else slice(1)
        with hardware.autocast(run.device, run.dtype):
            loss = run.model(*(part[rows].to(run.device) for part in batch)).loss
        losses.append(loss)
        counts.append(counted)
        if stopping := world.any(stop.requested):
            break
    run.model.train()
    for value, counted in zip(torch.stack(losses).tolist(), counts, strict=True):
        total, count = total + value * counted, count + counted
    total, count = world.sum(total, count)
    return None if stopping else total / count


def sample(run: Run) -> str:
    """Return up to SAMPLE_TOKENS tokens drawn from the model with a generator of their own, as text: an answer to a question
    where it learns from conversations.
    """
    settings, generator = run.settings, torch.Generator().manual_seed(run.settings.seed)
    start = sample_start(run.text, run.tokenizer)
    drawn = generate(
        run.model,
        start.ids,
        max_new_tokens=SAMPLE_TOKENS,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        generator=generator,
        vocab_size=run.tokenizer.vocab_size,
        stop_ids=start.stop_ids,
    )
    try:
        text = run.tokenizer.decode(drawn)
    except ValueError as error:  # the logits are not finite
        raise TrainingError(f"after step {run.state.step}: {error}") from error
    for stop in start.stops:
        text = text.partition(stop)[0]
    return (run.tokenizer.decode(start.ids) if start.shown else "") + text + "\n"


def report(run: Run, clock: Clock, metrics: Mapping[str, Tensor]) -> None:
    """Write a training line to metrics.jsonl, and show loss and speed beside the bar."""
    values, rate = {name: value.item() for name, value in metrics.items()}, clock.rate()
    write_metrics(run, "train", values | {"tok_s": round(rate, 1)})
    left = (run.end - run.state.step) * run.batches.tokens_in(run.state.step) / max(rate, 1e-9)
    figures = {"loss": f"{values['loss']:.4f}", "tok_s": amount(rate), "not_mirrored": behind_mirror(run)}
    run.bar.show(run.state.step, **figures, seconds_left=left)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after the loop.


def warm_up(run: Run) -> float:
    """Run forward and backward twice on the next batch without an update; return the seconds of the second pass.

    DistributedDataParallel rearranges its buckets after the first backward pass, which changes the order of its sums.
    Every run, fresh or resumed, makes these two passes before its first step, so that equal steps are bit-identical.
    The first pass also compiles and fills caches.
    """
    time_pass(run)
    return time_pass(run)


def time_pass(run: Run) -> float:
    """Return the seconds of one forward and backward pass on the next batch; weights and buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    since = time.monotonic()
    accumulate_gradients(run)["loss"].item()
    seconds = time.monotonic() - since
    run.optimizer.zero_grad(set_to_none=True)
    for name, before in buffers.items():
        run.model.get_buffer(name).copy_(before)
    return seconds


def seconds_per_step(run: Run, seconds: float) -> float:
    """Return the seconds of the fastest pass, `seconds` or one of two more if passes are short; for display only."""
    began = time.monotonic()
    for _ in range(2):
        if run.world.any(seconds + time.monotonic() - began > PROBE_SECONDS):
            break
        seconds = min(seconds, time_pass(run))
    return seconds


def end(run: Run) -> int:
    """Report how the run ended; return the exit code."""
    state = run.state
    if state.step < run.end or state.observed_step != state.step:
        interrupted = f"after step {state.step}: {how_to_resume(run)}"
        run.log(f"interrupted {interrupted}")
        run.log.notices.send("interrupted", interrupted)
        return INTERRUPTED
    log_done(run, sample=state.last_sample or sample(run))
    problems = {
        SAVE_FAILED: run.saved.failed,
        NOT_MIRRORED: run.saved.not_mirrored,
        NOT_PUBLISHED: not publish_last(run),
    }
    return next((code for code, wrong in problems.items() if wrong), 0)


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
