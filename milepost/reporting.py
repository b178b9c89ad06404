"""What a run reports at its start, at a resume and at its end."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import models
from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.hub import is_pinned
from milepost.ckpt.index import look
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.restore import Restored
from milepost.places import SCRIPTS_FOLDER
from milepost.resume import PLAN, changed_settings, inexact_reasons, same_position, same_schedule, unfinished_run
from milepost.run import Run, memory_needed, shapes, why_not_replayed
from milepost.runtime import hardware
from milepost.runtime.progress import amount, command_line, duration, shown
from milepost.runtime.schedule import lr_at
from milepost.runtime.tables import table
from milepost.screen import stdout_columns, write_stdout
from milepost.text.addresses import is_address, is_masked
from milepost.text.mixtures import MixedBatches

TRAINING = config.ROOT / "training.py"
COPIES = ("CHECKPOINT_FALLBACK_DIR", "CHECKPOINT_MIRROR", "MIRROR_KEEP_LAST", "MIRROR_MB_S")
LOAD_CHECKPOINT = SCRIPTS_FOLDER / "load_checkpoint.py"


# ---------------------------------------------------------------------------------------------------------------------
# Start


def log_start(run: Run) -> None:
    """Log, in at most 15 lines, what is trained on which data and where the output goes."""
    settings, text, log = run.settings, run.text, run.log
    log.notices.run_id = run.run_id
    count, trained = models.parameter_count(run.model), models.trained_count(run.model)
    shared = f"{run.world.size} processes by {run.engine}, each " if run.world.size > 1 else ""
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    numerics = f"{shared}{threads}, {run.dtype}, {'compiled' if run.compile_step else 'eager'}"
    log(f"run {run.run_id}: {settings.model_type} on {run.device.type} ({numerics})")
    held_out = f", from {shown(text.held_out[0].source)}" if text.held_out else ""
    sizes = f"{len(text.split.train)} tokens to train on, {len(text.split.validation)} to validate on{held_out}"
    tokenizer = f"{run.tokenizer.kind} tokenizer of {run.tokenizer.vocab_size}"
    log(f"data: {shown(text.corpus.source)}: {amount(text.scan.characters)} characters, {tokenizer}; {sizes}")
    if run.tokenizer.kind == "char" and settings.tokenizer == "auto" and settings.is_set("TRAINING_DATA_SOURCE"):
        log(f"only these {run.tokenizer.vocab_size} characters can be read later; TOKENIZER=byte or bpe reads any text")
    adapters = f", {amount(trained)} of them trained" if trained < count else ""
    log(f"model: {amount(count)} parameters ({amount(count * 4, 'B')}){adapters}, block size {settings.block_size}")
    warn_of_memory(run)
    log(f"output: {shown(run.folder)} (metrics.jsonl, training.log, samples, config.env, run.json)")
    if settings.run_note:
        log(f"note: {settings.run_note}")
    log_checkpoint_policy(run)
    log_unfinished(run)
    interval = settings.replay_check_interval
    if interval and run.end // interval > run.state.step // interval and (reason := why_not_replayed(run)):
        log(f"REPLAY_CHECK_INTERVAL={interval}: no step is taken twice to find faults of the device, because {reason}")
    for line in config.describe(settings):
        log(line)


def log_unfinished(run: Run) -> None:
    """Log that RESUME=auto would resume an interrupted run with the settings of this new one, if there is such a run."""
    if run.state.step or not run.settings.enable_checkpoints or run.settings.is_set("RESUME") or not run.world.is_rank0:
        return
    with contextlib.suppress(OSError):  # a folder that cannot be listed: the first save will report it
        if found := unfinished_run(run):
            place = f"an unfinished run of these settings is at step {found.step} ({shown(found.path)})"
            run.log(f"{place}: RESUME=auto resumes it; RESUME=never starts anew without this line")


def log_checkpoint_policy(run: Run) -> None:
    """Log when and where checkpoints are saved, and which are kept."""
    settings, log = run.settings, run.log
    if not settings.enable_checkpoints:
        log(
            f"checkpoints are OFF: this model will not be saved{_in_vain(settings)}; set ENABLE_CHECKPOINTS=true to save it"
        )
        return
    interval, last, multiple = (
        settings.checkpoint_interval,
        settings.checkpoint_keep_last,
        settings.checkpoint_keep_every,
    )
    every = f"every {interval} steps and at the end" if interval else "at the end"
    kept = f", the last {last} kept" + (f" and models at multiples of {multiple}" if multiple else "") if last else ""
    log(f"checkpoints: {every}{kept}, to {shown(Path(settings.checkpoint_dir))} ({run.layout})")
    if settings.checkpoint_model_only:
        log("CHECKPOINT_MODEL_ONLY=true: without the optimizer, checkpoints generate but cannot resume bit-exactly")
    if run.layout == "huggingface" and settings.model_type not in models.with_trait("transformers"):
        log(f"transformers has no {settings.model_type} model: only milepost will open these folders")


def _in_vain(settings: config.Config) -> str:
    """Return what RESUME hopes for and gets nothing of while nothing is saved. Without RESUME, `no_effect` has said so."""
    if settings.resume == "never":
        return ""
    names = [name for name, each in config.VARIABLES.items() if each.metadata["group"] == "Checkpoints"]
    policy = [
        name for name in names if settings.is_set(name) and name not in (*config.EVERYWHERE, "ENABLE_CHECKPOINTS")
    ]
    unused = f", {' and '.join(policy)} without effect" if policy else ""
    return f", RESUME={shown(settings.resume)} will not find it{unused}"


def warn_of_memory(run: Run) -> None:
    """Log a warning if a step is estimated to need more memory than the device has free."""
    need = memory_needed(run.model, run.settings, run.world, engine=run.engine, device=run.device, dtype=run.dtype)
    free = hardware.free_memory(run.device)
    if free is not None and need > free:
        estimate = f"a step needs about {amount(need, 'B')} of memory and {amount(free, 'B')} are free"
        run.log(f"warning: {estimate}; lower BATCH_SIZE, BLOCK_SIZE or N_LAYER if it fails")


def log_plan(run: Run, *, seconds_per_step: float) -> None:
    """Log how long the run is: in steps, tokens, epochs and time."""
    steps, rows, block_size = run.end - run.state.step, run.batches.rows_per_step, run.settings.block_size
    epochs = run.batches.epoch(run.end) - run.batches.epoch(run.state.step)
    amounts = f"{amount(steps * rows * block_size)} tokens, {epochs:.2g} epochs"
    seconds = steps * seconds_per_step
    about = "about " if seconds >= 0.95 else ""
    run.log(f"plan: {steps} steps of {rows} x {block_size} tokens = {amounts}; {about}{duration(seconds)}")


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def print_resume(run: Run, record: Checkpoint, restored: Restored, *, rate_note: str = "") -> None:
    """Print a table to stdout: what was restored, reset, overridden or missing, the learning rates with a note, and
    whether the resume is bit-exact.
    """
    state = run.state
    child, schedule = run.run_id != record.run_id, run.schedule
    changed, exact = changed_settings(run, record), same_position(run, record)
    rates = (
        f"{schedule.kind}, peak {schedule.peak:g}, floor {schedule.floor:g}, "
        f"{schedule.warmup_steps} warm-up steps from step {schedule.start_step}{rate_note}"
    )
    parameters = amount(models.parameter_count(run.model))
    moments = f"moments of {restored.restored} of {restored.total} parameters"
    position = f"window {run.batches.windows_seen(state.step)}, epoch {run.batches.epoch(state.step):.2f}"
    reasons = inexact_reasons(run, record, restored)
    rows = [
        ("checkpoint", "", shown(record.path) if record.path else ""),
        ("run", "reset", f"{run.run_id}, a child of {record.run_id or 'another program'}")
        if child
        else ("run", "restored", run.run_id),
        ("weights", "restored", f"{len(record.model_state)} tensors, {parameters} parameters"),
        *(("adapters", "restored", count) for count in models.adapter_counts(shapes(run.model)).values()),
        ("optimizer", "missing" if restored.missing else "restored", moments),
        ("step", "restored", f"{record.step}; {run.end - state.step} more, to {run.end}"),
        ("learning rate", "restored" if same_schedule(run, record) else "overridden", rates),
        ("data position", "restored" if exact else "reset", position),
        *([("float16 scale", "restored" if record.scaler else "missing", "")] if run.scaler.is_enabled() else []),
        ("random draws", "restored", f"functions of SEED={run.settings.seed} and the step"),
        ("tokenizer", "restored", f"{run.tokenizer.kind}, {run.tokenizer.vocab_size} tokens"),
        *((name, "overridden", f"{before} -> {now}") for name, (before, now) in changed.items()),
        *((f"group {number}", "", _group(run, group)) for number, group in enumerate(run.optimizer.param_groups, 1)),
        ("bit-exact", "no", "; ".join(reasons))
        if reasons
        else ("bit-exact", "yes", "ends where the uninterrupted run would have ended"),
    ]
    write_stdout(table(rows, columns=stdout_columns()))
    run.log.notices.run_id = run.run_id
    if state.step < run.end:
        run.log.notices.send("resumed", f"at step {state.step} of {run.end}{', not bit-exactly' if reasons else ''}")


def _group(run: Run, group: dict[str, Any]) -> str:
    rate = f"next learning rate {lr_at(run.state.step, run.schedule):.4g}"
    return f"{rate}, weight decay {group['weight_decay']:g}, {len(group['params'])} tensors"


# ---------------------------------------------------------------------------------------------------------------------
# End


def log_finished_before(run: Run, record: Checkpoint) -> None:
    """Log that the checkpoint's run has no step left, and the command that trains more."""
    places = {"CHECKPOINT_PATH": record.path, "RUNS_DIR": Path(run.settings.runs_dir)} | _base_variable(run)
    more = command_line(LOAD_CHECKPOINT, **places, MODE="resume", RESUME_TRAINING_STEPS=1000)
    run.log(f"run {record.run_id} is finished: {run.state.step} of {run.end} steps are done. To train more: {more}")


def log_done(run: Run, *, sample: str) -> None:
    """Log the losses of a finished run, print a sample to stdout (rank 0 alone has one), and log the next command."""
    state = run.state
    losses = (
        f"validation loss {state.validation_loss:.4f}, best {state.best_loss:.4f} at step {state.best_step}"
        if state.validation_loss is not None and state.best_loss is not None
        else "no validation text"
    )
    run.log(f"done: {state.step} steps, {losses}")
    if isinstance(run.batches, MixedBatches):
        log_mixture(run, run.batches)
    missing = f"; step {state.step} is NOT saved" if run.saved.failed else ""
    missing += "; the mirror lacks the last checkpoint" if run.saved.not_mirrored else ""
    run.log.notices.send("finished", f"{state.step} steps, {losses}{missing}")
    write_stdout(sample)
    if run.saved.failed:
        run.log(f"step {state.step} is not saved, for the reason above; {how_to_resume(run)}")
    elif run.saved.path:
        run.log("next: " + command_line(LOAD_CHECKPOINT, CHECKPOINT_PATH=run.saved.path, **_base_variable(run)))


def log_mixture(run: Run, batches: MixedBatches) -> None:
    """Log how many windows came from each source of a mixture since the run began, and how often each was read."""
    counts, epochs = batches.windows_by_source(run.state.step), batches.epochs_by_source(run.state.step)
    rows = zip(run.text.corpus.parts, counts, epochs, strict=True)
    named = [f"{count / sum(counts):.1%} from {shown(part.source)} (epoch {epoch:.2f})" for part, count, epoch in rows]
    run.log(f"windows read: {', '.join(named)}")


def how_to_resume(run: Run) -> str:
    """Return which step of the run is saved, and the command that resumes from it."""
    if not run.world.is_rank0:
        return "see the log of rank 0"
    if not run.settings.enable_checkpoints:
        return "nothing was saved, because ENABLE_CHECKPOINTS is false"
    processes = run.world.local_size
    try:
        latest = _latest_saved(run)
    except OSError as error:
        return f"the saved checkpoints cannot be listed ({error})"
    if latest is None:
        return "nothing was saved"
    saved = f"step {latest.step} is saved in {shown(latest.path)}"
    if processes < run.world.size:
        return f"{saved}; resume with the same torchrun commands and RESUME=auto"
    # The checkpoint itself and every folder, so that neither another run nor another folder continues.
    settings = run.settings
    command = resume_command(
        latest.path, checkpoint_dir=Path(settings.checkpoint_dir), runs_dir=Path(settings.runs_dir),
        processes=processes if processes > 1 else None,
        more=_copies(settings) | _set_otherwise(run, step=latest.step) | _base_variable(run),
    )  # fmt: skip
    return f"{saved}; resume with: {command}{_secret(run)}"


def resume_command(
    path: Path,
    *,
    checkpoint_dir: Path,
    runs_dir: Path,
    processes: int | None = None,
    more: dict[str, Any] | None = None,
) -> str:
    """Return the shell command that resumes training from a checkpoint. `more` are variables besides its folders."""
    folders = {"CHECKPOINT_DIR": checkpoint_dir, "RUNS_DIR": runs_dir}
    return command_line(TRAINING, processes=processes, RESUME=path, **folders, **(more or {}))


def _copies(settings: config.Config) -> dict[str, Any]:
    """Return the variables of where else checkpoints go, which no checkpoint brings back, as far as they may be shown."""
    chosen = [name for name in COPIES if settings.is_set(name) and not _is_hidden(settings, name)]
    values = {name: getattr(settings, name.lower()) for name in chosen}
    return {name: Path(value) if name.endswith("_DIR") and value else value for name, value in values.items()}


def _set_otherwise(run: Run, *, step: int) -> dict[str, Any]:
    """Return the variables that would make another run of the resume, as they must be for this one: the env file may set
    them for every command. The device decides bits and is in no checkpoint; RESUME_STEP may be where this run began;
    MODE=resume follows a schedule of its own.
    """
    settings, followed = run.settings, run.resolved()
    values = {name: followed[name] for name in sorted(PLAN)} | {"RESUME_STEP": step}
    differ = {
        name for name, value in values.items() if settings.is_set(name) and value != getattr(settings, name.lower())
    }
    in_file = {name for name in settings.overridden if name == "CHECKPOINT_LAYOUT" or not _is_of_session(name)}
    in_file -= {name for name in in_file if _is_hidden(settings, name)}
    device = {"DEVICE": settings.device} if settings.device != "auto" else {}
    values = {name: values.get(name, getattr(settings, name.lower())) for name in sorted(differ | in_file)}
    return device | {name: config.as_text(each) for name, each in values.items() if each is not None}


def _is_of_session(name: str) -> bool:
    return bool(config.VARIABLES[name].metadata["scope"] == "session")


def _is_hidden(settings: config.Config, name: str) -> bool:
    return config.public(settings, name) != getattr(settings, name.lower())


def _secret(run: Run) -> str:
    """Return what a printed command cannot name."""
    names = [name for name in COPIES if _is_hidden(run.settings, name)]
    if run.base and run.settings.checkpoint_adapters_only and is_masked(str(run.base.get("source"))):
        names.append("BASE_CHECKPOINT")
    return "".join(f", with {name} set again: it holds a secret, which is not shown" for name in names)


def _latest_saved(run: Run) -> ckpt.Found | None:
    """Return the checkpoint that this process saved last, else the one that it resumed from, else the run's latest in
    CHECKPOINT_DIR; None without any.
    """
    saved = run.saved
    folders = {Path(run.settings.checkpoint_dir), *([saved.path.parent] if saved.path else [])}
    own = [found for folder in folders for found in ckpt.find(folder) if found.run_id == run.run_id]
    if saved.resumed:
        with contextlib.suppress(ckpt.CheckpointError):  # it is gone
            own.append(look(saved.resumed, known_layout(saved.resumed)))
    last = [found for found in own if found.path == saved.path]
    numbered = [found for found in own if found.metadata.get("save_number") == saved.number]
    return ckpt.latest(last or numbered or own)


def _base_variable(run: Run) -> dict[str, Any]:
    """Return the variable that names the base, if the run's checkpoints hold only adapters."""
    if not (run.base and run.settings.checkpoint_adapters_only):
        return {}
    return base_variable(run.base, pretrained=bool(run.settings.gpt2_model_name))


def base_variable(base: Mapping[str, Any], *, pretrained: bool) -> dict[str, Any]:
    """Return the variable that names a base, if it has to be named: a model of the hub and an address are known from the
    checkpoint.
    """
    source = str(base.get("source"))
    if is_pinned(source) or is_address(source):
        return {}
    return {"GPT2_MODEL_NAME" if pretrained else "BASE_CHECKPOINT": source}
