"""Rebuild a run from a checkpoint: restore its parts, and check whether the resume is bit-exact."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.foreign.importing import rate_in_use
from milepost.ckpt.hub import is_same_model
from milepost.ckpt.restore import Restored, build_model, restore_optimizer
from milepost.config import Config, ConfigError
from milepost.locks import is_trained
from milepost.run import (
    Run,
    adapter_variables,
    assemble,
    build_device,
    changeable,
    check_batch_size,
    lineage,
    planned,
    read_text,
    with_its_base,
)
from milepost.run.same_text import same_texts, validation_of
from milepost.runtime import hardware
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.progress import Log
from milepost.runtime.schedule import SCHEDULES, Schedule
from milepost.text.errors import DataError

# The variables that make up the schedule. Changing one makes a new schedule.
PLAN = {"TRAINING_STEPS", "LEARNING_RATE", "MIN_LEARNING_RATE", "WARMUP_STEPS", "LR_SCHEDULE"}


@contextlib.contextmanager
def naming_the_text(settings: Config) -> Iterator[None]:
    """Raise DataError with what to do if the text that only the checkpoint names is not where it was."""
    try:
        yield
    except DataError as error:
        if settings.is_set("TRAINING_DATA_SOURCE") or os.path.exists(settings.training_data_source):
            raise
        moved = "if the text is elsewhere now, set TRAINING_DATA_SOURCE to it: it is known by its content"
        raise DataError(f"{error}; the checkpoint was trained on it: {moved}") from error


def free_tensors(record: Checkpoint) -> None:
    """Free the record's tensors, once a run has copied them."""
    record.model_state, record.optimizer_state = {}, None


def unfinished_run(run: Run) -> ckpt.Found | None:
    """Return the newest checkpoint of an unfinished run in CHECKPOINT_DIR with the settings and the text of this one.

    A run that a process trains at this moment is not meant.
    """
    folder, asked, text = Path(run.settings.checkpoint_dir), run.hyperparameters(), run.text.fingerprint()
    scopes = {name: variable.metadata["scope"] for name, variable in config.VARIABLES.items()}
    known_by_hash = (
        "TRAINING_DATA_SOURCE",
        "TEXT_FIELD",
        "DOCUMENT_SEPARATOR",
        "PROMPT_FIELD",
        "ANSWER_FIELD",
        "VALIDATION_DATA",
    )
    names = [name for name, scope in scopes.items() if scope in ("identity", "math") and name not in known_by_hash]
    newest: dict[str, ckpt.Found] = {}
    for found in ckpt.find(folder) if folder.is_dir() else []:
        if found.run_id and not found.problem:
            newest[found.run_id] = found
    for found in sorted(newest.values(), key=lambda found: found.save_order, reverse=True):
        saved = found.metadata.get("hyperparameters", {})
        same = all(name in saved and saved[name] == asked[name] for name in names)
        data = found.metadata.get("data", {})
        same_text = all(data.get(name) == text.get(name) for name in ("sha256", "validation_sha256"))
        if same and same_text and found.step < run.end and not is_trained(folder, str(found.run_id)):
            return found
    return None


def saved_settings(record: Checkpoint) -> dict[str, Any]:
    """Return the settings that a checkpoint was trained with, with `auto` resolved.

    A checkpoint that records neither optimizer nor schedule is another program's or an old one: those used AdamW and
    cosine.
    """
    shape = {name.upper(): value for name, value in record.model_settings.items() if name != "vocab_size"}
    resolved = {"MODEL_TYPE": record.model_type, "BLOCK_SIZE": record.model_settings["block_size"]}
    if record.tokenizer:
        resolved["TOKENIZER"] = record.tokenizer["kind"]
    if {"dtype", "compile"} <= record.runtime.keys():
        resolved |= {"DTYPE": record.runtime["dtype"], "COMPILE": str(record.runtime["compile"]).lower()}
    return (
        {"OPTIMIZER": "adamw", "LR_SCHEDULE": "cosine", "LORA_RANK": 0, "TTT_LAYERS": None}
        | shape
        | record.hyperparameters
        | adapter_variables(record.model_settings)
        | resolved
    )


def fixed_settings(record: Checkpoint) -> dict[str, Any]:
    """Return the `saved_settings` that must not be contradicted. A base is identified by its weights: its folder may be renamed."""
    free = ("PRETRAINED", "GPT2_MODEL_NAME") if record.base else ("PRETRAINED",)
    return {name: value for name, value in saved_settings(record).items() if name not in free}


def fixed_for_resume(record: Checkpoint, settings: Config) -> dict[str, Any]:
    """Return the `fixed_settings` of a resume, which also needs the same model of the hub, whose branch may have moved."""
    saved = saved_settings(record).get("PRETRAINED")
    return fixed_settings(record) | ({} if is_same_model(settings.pretrained, saved) else {"PRETRAINED": saved})


def resumed(settings: Config, record: Checkpoint, log: Log, world: World = SINGLE, *, schedule: Schedule | None = None,
            end: int | None = None) -> tuple[Run, Restored]:  # fmt: skip
    """Return the record's run at its step, and how much of the optimizer was restored.

    Changed settings that affect the result, another text, missing moments, or a `schedule` and `end` (MODE=resume) make
    it a child run: it gets its own id and records its parent.
    """
    saved = saved_settings(record)
    changed = changes(settings, record, new_schedule=schedule is not None)
    settings = config.from_saved(settings, saved)
    check_batch_size(settings, world)
    if "TRAINING_STEPS" in changed and settings.training_steps < record.step:
        problem = f"TRAINING_STEPS={settings.training_steps}: the checkpoint is already at step {record.step}"
        raise ConfigError([f"{problem}; set more, or resume an earlier checkpoint with RESUME_STEP"])
    if "OPTIMIZER" in changed and schedule is None and not settings.is_set("LEARNING_RATE"):
        before, now = changed["OPTIMIZER"]
        log(f"OPTIMIZER={now}: the learning-rate schedule is still that of {before}; set LEARNING_RATE to change it")
    logged = schedule is None and not record.adapters_only  # RESUME has logged that INIT_FROM is not used, and why
    record = with_its_base(record, config.without(settings, ["INIT_FROM"]) if logged else settings, log)
    device = hardware.choose_device(settings.device, local_rank=world.local_rank, local_size=world.local_size)
    hardware.make_deterministic(settings.deterministic, device)
    with naming_the_text(settings):
        text, tokenizer = read_text(settings, log, world, record=record)
    same_text, same_validation = same_texts(record, text)
    if not same_validation and "sha256" in record.data:
        before, now = validation_of(record.data), validation_of(text.fingerprint())
        log(f"validation is on {now}, before it was on {before}: its losses cannot be compared")
    child = schedule is not None or bool(changed) or not same_text or not same_validation
    if schedule is None:
        schedule = _schedule(settings, record, changed)
    run = assemble(
        settings,
        log,
        world,
        device=device,
        model=build_model(record, device=build_device(device, world), changes=changeable(settings)),
        text=text,
        tokenizer=tokenizer,
        schedule=schedule,
        end=settings.training_steps if end is None else end,
        record=record,
        window=record.windows_seen if same_text else 0,
    )
    run.base = record.base
    restored = restore_optimizer(run.optimizer, record, kind=settings.optimizer)
    if record.scaler and run.scaler.is_enabled():
        run.scaler.load_state_dict(record.scaler)
    if child or restored.missing or record.run_id is None:
        run.parent = lineage(record, changed | other_plan(record, schedule))
    else:
        run.run_id = record.run_id
        restore_progress(run, record)
    return run, restored


def _schedule(settings: Config, record: Checkpoint, changed: dict[str, Any]) -> Schedule:
    """Return the saved schedule, or a new one if a variable of it changed, from the step where the saved one began.

    Another program's checkpoint without one holds the learning rate that it records, unless a variable is set.
    """
    if record.schedule:
        saved = saved_schedule(record)
        return dataclasses.replace(planned(settings), start_step=saved.start_step) if changed.keys() & PLAN else saved
    asked = any(map(settings.is_set, PLAN - {"TRAINING_STEPS"}))
    if record.run_id is None and not asked:
        end = max(settings.training_steps, record.step + 1)
        return held_schedule(record, end) or planned(settings)
    return planned(settings)


def held_schedule(record: Checkpoint, end: int) -> Schedule | None:
    """Return a constant schedule to the step `end` at the rate that another program recorded; None if there is none."""
    rate = rate_in_use(record)
    if rate is None:
        return None
    return Schedule(kind="constant", peak=rate, floor=rate, warmup_steps=0, start_step=record.step, end_step=end)


def saved_schedule(record: Checkpoint) -> Schedule:
    """Return the record's learning-rate schedule. Raise CheckpointError if it cannot be read."""
    path = record.path or "the checkpoint"
    try:
        schedule = Schedule(**record.schedule)
    except TypeError as error:
        problem = f"its schedule cannot be read ({error})"
        raise ckpt.CheckpointError(path, problem, "take an earlier checkpoint", kind="damaged") from error
    if schedule.kind not in SCHEDULES:
        problem = f"its learning-rate schedule {schedule.kind!r} is none of {', '.join(SCHEDULES)}"
        raise ckpt.CheckpointError(path, problem, "register it in milepost/runtime/schedule.py", kind="not understood")
    return schedule


def changes(settings: Config, record: Checkpoint, *, new_schedule: bool) -> dict[str, Any]:
    """Return the settings changed in the environment, or edited in the checkpoint, that affect the result: {name:
    [saved, now]}.

    With a new schedule, the variables of the schedule do not count. Repeating the original request is not a change,
    however it resolved: COMPILE=true without a compiler, for example.
    """
    changed = record.edited | config.changes(settings, saved_settings(record))
    original = record.hyperparameters
    return {
        name: values
        for name, values in changed.items()
        if not (new_schedule and name in PLAN)
        and not (name in ("DTYPE", "COMPILE") and values[1] == original.get(name))
    }


def other_plan(record: Checkpoint, schedule: Schedule) -> dict[str, Any]:
    """Return the peak learning rate if it is not the record's: {name: [saved, now]}."""
    saved = record.schedule.get("peak")
    return {} if saved in (None, schedule.peak) else {"LEARNING_RATE": [saved, schedule.peak]}


def restore_progress(run: Run, record: Checkpoint) -> None:
    """Restore the progress of the same run: what it had evaluated and saved, and when."""
    with contextlib.suppress(ValueError):
        run.saved.resumed_time = datetime.datetime.fromisoformat(record.saved_at or "").timestamp()
    run.parent, run.saved.observed_step = record.parent, record.observed_step
    run.saved.number, run.saved.resumed = record.save_number or 0, record.path
    for name in ("observed_step", "validation_loss", "best_loss", "best_step"):
        setattr(run.state, name, getattr(record, name))
    # After a kill or a disk error, the best step may be saved but not in best/ yet: then it is pending.
    folder, loss = Path(run.settings.checkpoint_dir), record.best_loss
    in_best = loss is None or run.world.on_rank0(lambda: ckpt.best_is_kept(folder, run_id=record.run_id, loss=loss))
    run.saved.best_step = record.best_step if run.world.broadcast(in_best) else None


def finished(run: Run, record: Checkpoint) -> bool:
    """Return whether nothing is left to do.

    If a signal came before the last evaluation, a resume of the same run does it.
    """
    state = run.state
    observed = state.observed_step == state.step or run.run_id != record.run_id
    return state.step > run.end or (state.step == run.end and observed)


def inexact_reasons(run: Run, record: Checkpoint, restored: Restored) -> list[str]:
    """Return the reasons why the resume is not bit-identical to the uninterrupted run; empty if it is."""
    reasons = [f"{name} was {before}, is {now}" for name, (before, now) in changed_settings(run, record).items()]
    reasons += [] if same_schedule(run, record) else ["the learning-rate schedule is a new one"]
    text = "the training text differs" if "sha256" in record.data else "the training text is not recorded"
    reasons += [] if same_position(run, record) else [text]
    reasons += [f"{len(restored.missing)} parameters have no optimizer state"] if restored.missing else []
    planned_end = record.hyperparameters.get("TRAINING_STEPS", run.end)
    reasons += [f"the uninterrupted run would have ended at step {planned_end}"] if run.end > planned_end else []
    # Differences in settings that are reported above are not repeated.
    now, reported = run.fingerprint(), {name.lower() for name in changed_settings(run, record)}
    before = {name: now.get(name) if name in reported else value for name, value in record.runtime.items()}
    return reasons + hardware.bit_changes(before, now)


def changed_settings(run: Run, record: Checkpoint) -> dict[str, Any]:
    """Return the settings that this resume changed, {name: [saved, now]}: none if the run keeps its id, whose `parent` is older."""
    return (run.parent or {}).get("changed", {}) if run.run_id != record.run_id else {}


def same_schedule(run: Run, record: Checkpoint) -> bool:
    """Return whether the learning rates of the remaining steps are those of the record's schedule."""
    return dataclasses.asdict(run.schedule) == record.schedule


def same_position(run: Run, record: Checkpoint) -> bool:
    """Return whether the next batch is the one that followed the record's step."""
    same_text = run.text.scan.sha256 == record.data.get("sha256")
    return run.batches.windows_seen(run.state.step) == record.windows_seen and same_text
