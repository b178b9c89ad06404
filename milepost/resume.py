"""A run from a checkpoint: which checkpoint is meant, what of it comes back, and the table that says so."""

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import models
from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.finding import folder_of
from milepost.ckpt.restore import Restored, build_model, build_tokenizer, restore_optimizer
from milepost.config import Config, ConfigError
from milepost.run import (
    Run,
    adapter_variables,
    built_on,
    check_shares,
    lineage,
    planned,
    put_together,
    read_text,
    scan_source,
    shapes,
    with_its_base,
)
from milepost.runtime import hardware
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.optim import Schedule, lr_at
from milepost.runtime.progress import Log, amount, shown, table

# The variables that make up the schedule: given anew, they plan it anew.
PLAN = {"TRAINING_STEPS", "LEARNING_RATE", "MIN_LEARNING_RATE", "WARMUP_STEPS", "LR_SCHEDULE"}


def find_record(settings: Config, log: Log) -> Checkpoint | None:
    """The newest valid checkpoint that RESUME means, of the same model, data and tokenizer; None if there is none at all.

    Damaged ones are skipped loudly. Raises ConfigError listing the differences if none fits, or the steps of the run if RESUME_STEP
    is not among them; CheckpointError if all are damaged.
    """
    if settings.resume != "auto":
        return _named(settings, log)
    folder = Path(settings.checkpoint_dir)
    found = ckpt.find(folder)
    readable = _readable(found, log)
    if settings.resume_step is None or not readable:
        record = newest_fitting(exact_first(readable), settings, log)
    else:
        # The run that RESUME=auto alone would resume: the newest one that fits. Another run's step is never taken for its own.
        newest = newest_fitting(exact_first(readable), settings, log, verify=False)
        if newest:
            log(f"RESUME=auto takes step {settings.resume_step} of run {newest.run_id}, the newest run that fits")
        record = _of_step(newest, readable, folder, settings, log) if newest else None
    if record is None and found:
        raise ckpt.CheckpointError(f"no checkpoint in {folder} can be read; RESUME=never starts a new run beside them")
    return record


def _named(settings: Config, log: Log) -> Checkpoint:
    """The checkpoint that RESUME names, or the one of RESUME_STEP of the same run. Raises as `find_record` does."""
    path, notes = ckpt.resolve(settings.resume, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    if settings.resume_step is None:
        return check_fits(ckpt.load(path, verify=True), settings, log)
    named = ckpt.load(path, optimizer=False)
    if named.step == settings.resume_step:
        return check_fits(ckpt.load(path, verify=True), settings, log)
    folder = folder_of(path, named.run_id)
    return _of_step(named, _readable(ckpt.find(folder), log), folder, settings, log)


def _readable(found: list[ckpt.Found], log: Log) -> list[ckpt.Found]:
    """The checkpoints without a problem, newest first; the others are logged."""
    for each in found:
        if each.problem:
            log(f"skipped: {each.problem}")
    return [each for each in reversed(found) if not each.problem]


def _of_step(record: Checkpoint, readable: list[ckpt.Found], folder: Path, settings: Config, log: Log) -> Checkpoint:
    """The checkpoint of RESUME_STEP of the record's run.

    Raises ConfigError listing the steps of that run, and the other runs that have such a step, if the run has none;
    CheckpointError if all of them are damaged.
    """
    step, run_id = settings.resume_step, record.run_id
    same_step = [each for each in readable if each.step == step]
    own = [each for each in same_step if each.run_id == run_id is not None]
    if own and (whole := newest_fitting(exact_first(own), settings, log)):
        return whole
    if own:
        problem = f"step {step} of run {run_id} in {folder} is damaged"
        raise ckpt.CheckpointError(f"{problem}: set another RESUME_STEP; {_steps_of(record, readable)}")
    problem = f"RESUME_STEP={step}: not found in {folder}: {_steps_of(record, readable)}"
    others = sorted({str(each.run_id or each.path) for each in same_step})
    elsewhere = f"; step {step} of another run is there ({', '.join(others[:5])})" if others else ""
    raise ConfigError([f"{problem}{elsewhere}: set a step of this run, or name the checkpoint in RESUME"])


def _steps_of(record: Checkpoint, readable: list[ckpt.Found]) -> str:
    """Which steps of the record's run can be read, for a message."""
    if record.run_id is None:
        return f"{record.path} is at step {record.step} and names no run, so no other step is known to be of its run"
    steps = sorted({each.step for each in readable if each.run_id == record.run_id})
    return f"run {record.run_id} has the steps {', '.join(map(str, steps)) or record.step}"


def let_go(record: Checkpoint) -> None:
    """Gives back the memory of its tensors, now that a run has taken what it needs of them."""
    record.model_state, record.optimizer_state = {}, None


def exact_first(newest_first: list[ckpt.Found]) -> list[ckpt.Found]:
    """Of each run first those that can go on exactly, and then those without an optimizer's state; the run of the newest first."""
    runs = [one.run_id for one in newest_first]
    return sorted(newest_first, key=lambda one: (runs.index(one.run_id), not one.resumable))


def newest_fitting(
    candidates: list[ckpt.Found], settings: Config, log: Log, *, verify: bool = True
) -> Checkpoint | None:
    """The first of `candidates` that is whole and fits; None if all are damaged, ConfigError if a whole one does not fit."""
    misfits = []
    for one in candidates:
        try:
            return check_fits(ckpt.load(one.path, verify=verify), settings, log)
        except ckpt.CheckpointError as error:
            log(f"skipped: {error}")
        except ConfigError as error:
            misfits.append(error)
    if misfits:
        raise misfits[0]
    return None


def check_fits(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """The record itself if it has the model, data and tokenizer that were asked for; raises ConfigError listing what differs."""
    saved = saved_settings(record)
    differences = [
        f"{name} is {given!r}, the checkpoint has {kept!r}"
        for name, given, kept in config.contradictions(settings, fixed_settings(record))
    ]
    wanted = config.from_saved(settings, saved)
    if "sha256" not in record.data:
        raise ConfigError(
            [
                f"RESUME={settings.resume}: {record.path} does not say what text it was trained on, as another program's; "
                "MODE=resume of scripts/load_checkpoint.py goes on from it"
            ]
        )
    _, scanned = scan_source(wanted.training_data_source, log)
    if scanned.sha256 != record.data.get("sha256"):
        was = record.data.get("source")
        differences.append(
            f"the text of {wanted.training_data_source} is not the one the checkpoint was trained on ({was})"
        )
    if wanted.validation_fraction != record.data.get("validation_fraction"):
        was = record.data.get("validation_fraction")
        differences.append(f"VALIDATION_FRACTION is {wanted.validation_fraction}, the checkpoint has {was}")
    if differences:
        remedy = "set what differs back, choose another CHECKPOINT_DIR, or RESUME=never"
        raise ConfigError(
            [f"RESUME={settings.resume}: cannot go on with {record.path}: {'; '.join(differences)}: {remedy}"]
        )
    return record


def saved_settings(record: Checkpoint) -> dict[str, Any]:
    """The settings of a checkpoint: what it was trained with, and what `auto` had come to mean there.

    One that names neither optimizer nor schedule is another program's or an old one, and those had AdamW and cosine: what it brings
    is to be gone on with.
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
    """Those of `saved_settings` that a wish may not contradict. A base is known by its weights, whatever its folder is called."""
    return {
        name: value for name, value in saved_settings(record).items() if not (record.base and name == "GPT2_MODEL_NAME")
    }


def resumed(settings: Config, record: Checkpoint, log: Log, world: World = SINGLE, *, schedule: Schedule | None = None,
            end: int | None = None) -> tuple[Run, Restored]:  # fmt: skip
    """The record's run at its step, and how much of the optimizer came back.

    A setting given anew that changes the mathematics, another text, moments that are not there, or a `schedule` and an `end` of its
    own (MODE=resume) make it a child run: it has an id of its own and names its parent.
    """
    saved = saved_settings(record)
    changed = changes(settings, record, planned_anew=schedule is not None)
    settings = config.from_saved(settings, saved)
    check_shares(settings, world)
    if "TRAINING_STEPS" in changed and settings.training_steps < record.step:
        problem = f"TRAINING_STEPS={settings.training_steps}: the checkpoint is at step {record.step} already"
        raise ConfigError([f"{problem}; set more, or go on from an earlier one with RESUME_STEP"])
    if "OPTIMIZER" in changed and schedule is None and not settings.is_set("LEARNING_RATE"):
        before, now = changed["OPTIMIZER"]
        log(
            f"OPTIMIZER={now}: the learning rates stay those that were planned for {before}; set LEARNING_RATE for others"
        )
    record = with_its_base(record, settings, log)
    device = hardware.choose_device(settings.device, local_rank=world.local_rank, local_size=world.local_size)
    hardware.make_deterministic(settings.deterministic, device)
    text, tokenizer = read_text(settings, log, world, tokenizer=build_tokenizer(record))
    same_text = all(record.data.get(name) == text.fingerprint()[name] for name in ("sha256", "validation_fraction"))
    child = schedule is not None or bool(changed) or not same_text
    if schedule is None:
        schedule = saved_schedule(record) if record.schedule and not changed.keys() & PLAN else planned(settings)
    if not settings.is_set("CHECKPOINT_LAYOUT"):
        layout = record.layout if record.layout in ckpt.WRITERS else "unified"
        settings = config.replaced(settings, "checkpoint", checkpoint_layout=layout)
    settings = config.replaced(
        settings, "plan", training_steps=settings.training_steps if end is None else end, lr_schedule=schedule.kind,
        learning_rate=schedule.peak, min_learning_rate=schedule.floor, warmup_steps=schedule.warmup_steps,
    )  # fmt: skip
    run = put_together(
        settings,
        log,
        world,
        device=device,
        model=build_model(record, device=built_on(device, world), dropout=settings.dropout),
        text=text,
        tokenizer=tokenizer,
        schedule=schedule,
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
        take_standing(run, record)
    return run, restored


def saved_schedule(record: Checkpoint) -> Schedule:
    """The record's plan of learning rates; raises CheckpointError if it is none."""
    try:
        return Schedule(**record.schedule)
    except TypeError as error:
        raise ckpt.CheckpointError(
            f"{record.path}: its schedule cannot be read ({error}): the file is damaged"
        ) from error


def changes(settings: Config, record: Checkpoint, *, planned_anew: bool) -> dict[str, Any]:
    """The settings given anew, or edited in the checkpoint, that change the mathematics: {name: [saved, given]}.

    A plan of its own leaves those of the plan out.

    Who asks for what the run was once asked for changes nothing, whatever it came to: COMPILE=true without a compiler, say.
    """
    given = record.edited | config.changes(settings, saved_settings(record))
    asked = record.hyperparameters
    return {
        name: change
        for name, change in given.items()
        if not (planned_anew and name in PLAN) and not (name in ("DTYPE", "COMPILE") and change[1] == asked.get(name))
    }


def other_plan(record: Checkpoint, schedule: Schedule) -> dict[str, Any]:
    """The peak learning rate if it is another than the record's: {name: [saved, planned]}."""
    saved = record.schedule.get("peak")
    return {} if saved in (None, schedule.peak) else {"LEARNING_RATE": [saved, schedule.peak]}


def take_standing(run: Run, record: Checkpoint) -> None:
    """Take over where the same run stood: what it had evaluated and kept, and when."""
    with contextlib.suppress(ValueError):
        run.resumed_save = datetime.datetime.fromisoformat(record.saved_at or "").timestamp()
    run.parent, run.observed_step, run.validation_loss = record.parent, record.observed_step, record.validation_loss
    run.best_loss, run.best_step = record.best_loss, record.best_step
    run.saved_observed_step = record.observed_step
    # A kill, or a disk that refused, may have come between saving a best step and keeping it as the best: then it is kept later.
    folder, loss = Path(run.settings.checkpoint_dir), record.best_loss
    kept = loss is None or run.world.on_rank0(lambda: ckpt.best_is_kept(folder, run_id=record.run_id, loss=loss))
    run.kept_best_step = record.best_step if run.world.broadcast(kept) else None


def finished(run: Run, record: Checkpoint) -> bool:
    """Whether nothing is left to do. A signal may have come before the last evaluation: a resume of the same run does it."""
    looked = run.observed_step == run.step or run.run_id != record.run_id
    return run.step > run.end or (run.step == run.end and looked)


def explain(run: Run, record: Checkpoint, restored: Restored) -> str:
    """The table of a resume: what became of each part, the next learning rates, and whether the bits will be the uninterrupted run's."""
    child, plan = run.run_id != record.run_id, run.schedule
    changed, same_text = _changed(run, record), _same_position(run, record)
    rates = f"{plan.kind}, peak {plan.peak:g}, floor {plan.floor:g}, {plan.warmup_steps} warm-up steps from step {plan.start_step}"
    position = f"window {run.batches.windows_seen(run.step)}, epoch {run.batches.epoch(run.step):.2f}"
    reasons = not_exact(run, record, restored)
    adapters = models.adapter_counts(shapes(run.model))
    rows = [
        ("checkpoint", "", shown(record.path) if record.path else ""),
        ("run", "reset", f"{run.run_id}, a child of {record.run_id or 'another program'}")
        if child
        else ("run", "restored", run.run_id),
        (
            "weights",
            "restored",
            f"{len(record.model_state)} tensors, {amount(models.parameter_count(run.model))} parameters",
        ),
        *(("adapters", "restored", count) for count in adapters.values()),
        (
            "optimizer",
            "missing" if restored.missing else "restored",
            f"moments of {restored.restored} of {restored.total} parameters",
        ),
        ("step", "restored", f"{record.step}; {run.end - run.step} more, to {run.end}"),
        ("learning rate", "restored" if _same_plan(run, record) else "overridden", rates),
        ("data position", "restored" if same_text else "reset", position),
        *([("float16 scale", "restored" if record.scaler else "missing", "")] if run.scaler.is_enabled() else []),
        ("random draws", "restored", f"functions of SEED={run.settings.seed} and the step"),
        ("tokenizer", "restored", f"{run.tokenizer.kind}, {run.tokenizer.vocab_size} tokens"),
        *((name, "overridden", f"{before} -> {now}") for name, (before, now) in changed.items()),
        *((f"group {number}", "", _group(run, group)) for number, group in enumerate(run.optimizer.param_groups, 1)),
        (
            "bit-exact",
            "no" if reasons else "yes",
            "; ".join(reasons) or "ends where the uninterrupted run would have ended",
        ),
    ]
    return table(rows)


def _group(run: Run, group: dict[str, Any]) -> str:
    return f"next learning rate {lr_at(run.step, run.schedule):.4g}, weight decay {group['weight_decay']:g}, {len(group['params'])} tensors"


def not_exact(run: Run, record: Checkpoint, restored: Restored) -> list[str]:
    """Why going on cannot give the uninterrupted run's bits, one reason each; empty if it can."""
    reasons = [f"{name} was {before}, is {now}" for name, (before, now) in _changed(run, record).items()]
    reasons += [] if _same_plan(run, record) else ["the learning rates are planned anew"]
    text = "the text is another" if "sha256" in record.data else "what text it was trained on is not recorded"
    reasons += [] if _same_position(run, record) else [text]
    reasons += [f"{len(restored.missing)} parameters have no optimizer state"] if restored.missing else []
    planned_end = record.hyperparameters.get("TRAINING_STEPS", run.end)
    reasons += [f"the uninterrupted run would have ended at step {planned_end}"] if run.end > planned_end else []
    now, told = (
        run.fingerprint(),
        {name.lower() for name in _changed(run, record)},
    )  # what was said above is not said twice
    before = {name: now.get(name) if name in told else value for name, value in record.runtime.items()}
    return reasons + hardware.bit_changes(before, now)


def _changed(run: Run, record: Checkpoint) -> dict[str, Any]:
    """The settings that this run was given anew; an exact run has the list of its own beginning instead."""
    return (run.parent or {}).get("changed", {}) if run.run_id != record.run_id else {}


def _same_plan(run: Run, record: Checkpoint) -> bool:
    return dataclasses.asdict(run.schedule) == record.schedule


def _same_position(run: Run, record: Checkpoint) -> bool:
    return run.batches.windows_seen(run.step) == record.windows_seen and run.text.scan.sha256 == record.data.get(
        "sha256"
    )
