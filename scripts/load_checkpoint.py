"""Open a checkpoint: MODE=inference generates text from it, MODE=resume continues its training as a child run.

CHECKPOINT_PATH=latest PROMPT="Dear Wren," python3 scripts/load_checkpoint.py
CHECKPOINT_PATH=latest MODE=resume RESUME_TRAINING_STEPS=2000 RESUME_LEARNING_RATE=1e-4 python3 scripts/load_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "MODE", "PROMPT if MODE=inference", "LOSS_ON if MODE=resume", "PACKING if MODE=resume", "MAX_NEW_TOKENS if MODE=inference", "TEMPERATURE",
    "RESUME_TRAINING_STEPS", "RESUME_LEARNING_RATE",
    "Generation if MODE=inference", "TOP_K", "TOP_P", "REPETITION_PENALTY",
    "Training if MODE=resume", "Logging if MODE=resume", "Hardware and seed if MODE=resume", "DEVICE", "DTYPE",
    "Checkpoints if MODE=resume", "CHECKPOINT_DIR", "CACHE_GB", "RUNS_DIR", "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "PROMPT_FIELD", "ANSWER_FIELD", "TOKENIZER",
    "UNKNOWN_CHARACTERS", "VALIDATION_FRACTION if MODE=resume", "VALIDATION_DATA if MODE=resume", "DROPOUT if MODE=resume", "N_HEAD",
    "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM", "PUSH_TO_HUB if MODE=resume", "DRY_RUN if PUSH_TO_HUB", "HUB_PRIVATE if PUSH_TO_HUB",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.finding import folder_of
from milepost.cli import guarded, processes
from milepost.config import Config, ConfigError
from milepost.remote import folder_here, is_remote, local
from milepost.reporting import print_resume
from milepost.resume import (
    changed_settings,
    free_tensors,
    held_schedule,
    resumed,
    saved_schedule,
    saved_settings,
)
from milepost.resume_choice import check_text_named
from milepost.run import Run, agreed, completed, planned
from milepost.runtime.distributed import World
from milepost.runtime.progress import Log
from milepost.runtime.schedule import Schedule, replan
from milepost.samples import drop_conflicts, read_prompt, sample_seed, sample_texts
from milepost.screen import ignore, put_pieces
from training import train


def main(settings: Config, log: Log) -> int:
    """Open the checkpoint of CHECKPOINT_PATH, do what MODE asks, and return the exit code."""
    resuming = settings.mode == "resume"
    if resuming and settings.resume_training_steps:
        more = f"MODE=resume trains {settings.resume_training_steps} more steps"
        log(f"{more}; to see only what would be restored and the plan, stop and set RESUME_TRAINING_STEPS=0")
    if config.torchrun() and not resuming:
        raise ConfigError(["MODE=inference runs in one process: start it without torchrun"])
    if resuming:
        folder_here(settings)
    mirrored, settings = is_remote(settings), local(settings, log)
    with processes(settings, log) as world:
        name, folder = settings.checkpoint_path, Path(settings.checkpoint_dir)
        found = agreed(
            lambda: ckpt.load_named(
                name,
                folder,
                say=log,
                optimizer=resuming,
                verify=resuming,  # of every byte
                certain=resuming,
            ),
            world,
            optimizer=resuming,
            everywhere=mirrored,
        )
        assert found is not None  # `load_named` raises
        record = completed(found, settings, log)
        for note in record.notes:
            log(note)
        settings = drop_conflicts(record, settings, log)
        return resume(settings, record, log, world) if resuming else infer(settings, record, log)


# ---------------------------------------------------------------------------------------------------------------------
# MODE=inference


def infer(settings: Config, record: Checkpoint, log: Log) -> int:
    """Write prompt and continuations to stdout, of a question only its answers, and everything else to stderr."""
    prompt = read_prompt(settings)
    try:
        for before, pieces in sample_texts(settings, record, log, prompt=prompt, seed=sample_seed(settings)):
            whole = itertools.chain([before], pieces)
            put_pieces(itertools.chain(whole if settings.stream else ["".join(whole)], "\n"))
    except BrokenPipeError:
        ignore(sys.stdout)  # the reader closed the pipe, as `| head` does
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# MODE=resume

# Settings that do not affect the schedule of the added steps. Keeping the saved schedule, none does.
UNUSED = ("LEARNING_RATE", "TRAINING_STEPS")
UNUSED_KEEPING = (*UNUSED, "LR_SCHEDULE", "MIN_LEARNING_RATE", "WARMUP_STEPS")


def resume(settings: Config, record: Checkpoint, log: Log, world: World) -> int:
    """Train RESUME_TRAINING_STEPS more steps; with 0, print what would be restored and stop."""
    for name in filter(settings.is_set, UNUSED_KEEPING if settings.resume_learning_rate == "keep" else UNUSED):
        log(f"{name} is not used: MODE=resume follows RESUME_LEARNING_RATE and RESUME_TRAINING_STEPS")
    check_text_named(record, settings, "MODE=resume")
    schedule = plan(settings, record)
    end = record.step + settings.resume_training_steps
    settings = config.with_values(settings, destination(settings, record), source="MODE=resume")
    run, restored = resumed(settings, record, log, world, schedule=schedule, end=end)
    if settings.resume_training_steps:
        log.notify(settings.notify_url, name="NOTIFY_URL")
    print_resume(run, record, restored, rate_note=own_peak(run, record))
    free_tensors(record)
    if settings.resume_training_steps == 0:
        log("RESUME_TRAINING_STEPS=0: nothing is trained")
        return 0
    return train(run)


def own_peak(run: Run, record: Checkpoint) -> str:
    """Return the end of a sentence with the peak of the saved schedule, if the default of RESUME_LEARNING_RATE replaced another."""
    own = record.schedule.get("peak", record.hyperparameters.get("LEARNING_RATE"))
    chosen = run.settings.is_set("RESUME_LEARNING_RATE") or "OPTIMIZER" in changed_settings(run, record)
    if chosen or own is None or own == run.schedule.peak:
        return ""
    return f"; the default, while the peak was {own:g} before: RESUME_LEARNING_RATE={own:g} returns to it"


def destination(settings: Config, record: Checkpoint) -> dict[str, Any]:
    """Return the settings that save the result: to CHECKPOINT_DIR if it is set, else beside the checkpoint."""
    saves = {} if settings.is_set("ENABLE_CHECKPOINTS") else {"ENABLE_CHECKPOINTS": True}
    if settings.is_set("CHECKPOINT_DIR") or record.path is None:
        return saves
    return saves | {"CHECKPOINT_DIR": str(folder_of(record.path, record.run_id))}


def plan(settings: Config, record: Checkpoint) -> Schedule:
    """Return the learning-rate schedule of the added steps: the run's kind, restarted at RESUME_LEARNING_RATE, or with `keep` the saved one.

    Another program's checkpoint without a schedule holds the learning rate that it records.

    There is no second warmup unless WARMUP_STEPS is set. The minimum keeps its ratio to the peak unless MIN_LEARNING_RATE is set.
    Raise ConfigError if it is above the peak.
    """
    if settings.resume_learning_rate == "keep" and not record.schedule and record.run_id is None:
        end = record.step + max(1, settings.resume_training_steps)
        if schedule := held_schedule(record, end):
            return schedule
        problem = f"RESUME_LEARNING_RATE=keep: {record.path} records no learning rate"
        raise ConfigError([f"{problem}: set RESUME_LEARNING_RATE to a number"])
    saved = saved_schedule(record) if record.schedule else planned(config.from_saved(settings, saved_settings(record)))
    if settings.resume_learning_rate == "keep":
        return saved
    new = replan(
        saved,
        peak=float(settings.resume_learning_rate),
        start_step=record.step,
        steps=max(1, settings.resume_training_steps),
        warmup_steps=settings.warmup_steps if settings.is_set("WARMUP_STEPS") else 0,
    )
    given = {"lr_schedule": "kind", "min_learning_rate": "floor"}
    new = dataclasses.replace(
        new, **{field: getattr(settings, name) for name, field in given.items() if settings.is_set(name.upper())}
    )
    if new.floor > new.peak:
        problem = f"MIN_LEARNING_RATE={new.floor:g} is above RESUME_LEARNING_RATE={new.peak:g}"
        raise ConfigError([f"{problem}: set a lower MIN_LEARNING_RATE"])
    return new


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
