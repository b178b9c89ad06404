"""Check a checkpoint, or every one of a folder: bytes, shapes, numbers, tokenizer, and whether it can go on exactly.

CHECKPOINT_PATH=latest python3 scripts/verify_checkpoint.py
CHECKPOINT_PATH=checkpoints python3 scripts/verify_checkpoint.py
CHECKPOINT_PATH=latest REPLAY=true python3 scripts/verify_checkpoint.py     # trains again from the one before, and compares
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "REPLAY", "CHECKPOINT_DIR", "TRAINING_DATA_SOURCE", "BASE_CHECKPOINT", "INIT_FROM", "DEVICE",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, Found
from milepost.ckpt.conversion import origin, size_of
from milepost.ckpt.finding import scan
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.ckpt.tensor_listing import all_files, differing, labelled
from milepost.ckpt.tensors import digest, not_finite
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.resume import not_exact, resumed, saved_schedule, saved_settings
from milepost.run import Run, fresh, to_record, with_its_base
from milepost.runtime.hardware import DeviceError
from milepost.runtime.interrupt import Interrupt
from milepost.runtime.progress import Log, Progress, amount, shown, table, tell
from milepost.text.errors import DataError
from milepost.text.tokenization import UnknownCharacters
from training import loop, open_run

Row = tuple[str, str, str]  # what was checked, how it went, and more about it
FAILED, BAD = "FAILED", 3
SAMPLE = "Dear Wren,\nna\u00efve \u6f22\u5b57 \U0001f642 \t1,234 == 5\n"  # for tokenizers that take any text


def main(settings: Config, log: Log) -> int:
    """Prints a table for each checkpoint; returns the exit code, 3 if any check failed."""
    paths = meant(settings, log)
    failed = []
    for path in paths:
        rows = examined(path, settings, log)
        failed += [path] if any(status == FAILED for _, status, _ in rows) else []
        tell(f"{shown(path)}\n{table(rows)}\n")
    if len(paths) > 1:
        tell(f"{len(paths)} checkpoints, {len(failed)} bad")
    return BAD if failed else 0


def meant(settings: Config, log: Log) -> list[Path]:
    """The one checkpoint that CHECKPOINT_PATH means, or all of the folder that it names, each file once."""
    folder = ckpt.whole_folder(settings.checkpoint_path)
    if folder is None:
        path, notes = ckpt.resolve(settings.checkpoint_path, Path(settings.checkpoint_dir))
        for note in notes:
            log(note)
        return [path]
    paths = [one.path for one in sorted(scan(folder), key=lambda one: one.save_order)]
    once = {identity(path): path for path in reversed(paths)}  # best/ holds second names
    if not once:
        raise CheckpointError(ckpt.listing(folder))
    return list(reversed(once.values()))


def identity(path: Path) -> Any:
    """What all names of one file have in common; of a link to nothing, its own name."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def examined(path: Path, settings: Config, log: Log) -> list[Row]:
    """Every check of one checkpoint."""
    rows = [checked("bytes", lambda: bytes_agree(path))]
    try:
        record = ckpt.load(path)
    except CheckpointError as error:
        return [*rows, ("opens", FAILED, str(error))]
    for note in record.notes:
        log(note)
    rows += [
        shapes(record, settings, log),
        checked("numbers", lambda: numbers_finite(record)),
        checked("tokenizer", lambda: round_trip(record)) if record.tokenizer else ("tokenizer", "none", "carries none"),
    ]
    damaged = any(status == FAILED for _, status, _ in rows)
    rows += [("goes on exactly", "no", "it is damaged") if damaged else can_go_on(record, settings, log)]
    if settings.replay:
        rows += replayed(record, settings, log)
    return rows


def checked(name: str, check: Callable[[], str]) -> Row:
    """The row of a check that returns what it saw, and raises for what is wrong."""
    try:
        return name, "ok", check()
    except (CheckpointError, ValueError) as error:
        return name, FAILED, str(error)


def bytes_agree(path: Path) -> str:
    """Whether every byte agrees with its checksum, as far as the layout has any."""
    if problems := ckpt.verify(path):
        raise CheckpointError("; ".join(problems))
    return f"{amount(size_of(path), 'B')}, files: {len(all_files(path))}"


def shapes(record: Checkpoint, settings: Config, log: Log) -> Row:
    """The row of the shapes; adapters alone have theirs checked where their base is named."""
    try:
        return checked("shapes", lambda: shapes_fit(with_its_base(record, settings, log)))
    except ConfigError as error:
        return "shapes", "none", str(error)


def shapes_fit(record: Checkpoint) -> str:
    """Whether the weights are those of the model that the settings describe."""
    model = build_model(record, device=torch.device("cpu"))
    return f"{len(record.model_state)} tensors, {amount(models.parameter_count(model))} parameters"


def numbers_finite(record: Checkpoint) -> str:
    """Whether weights and optimizer hold no NaN and no infinity."""
    tensors = labelled(record)
    if bad := not_finite(tensors):
        raise CheckpointError(f"NaN or infinity in {', '.join(bad[:5])}" + (" and more" if len(bad) > 5 else ""))
    return f"{len(tensors)} tensors are finite"


def round_trip(record: Checkpoint) -> str:
    """Whether the tokenizer is the one that was saved, and gives back the text that it was given."""
    tokenizer = build_tokenizer(record)
    text = "".join((record.tokenizer or {}).get("chars", ())) or SAMPLE
    if tokenizer.decode(tokenizer.encode(text)) != text:
        raise CheckpointError(f"decoding what was encoded gives another text than {text[:40]!r}")
    known = f"sha256 {tokenizer.digest[:12]}..." if record.tokenizer_sha256 else "no hash recorded"
    return f"{tokenizer.kind}, {tokenizer.vocab_size} tokens, {known}, round trip of {len(text)} characters"


def can_go_on(record: Checkpoint, settings: Config, log: Log) -> Row:
    """Whether a resume here and now would end with the uninterrupted run's bits; no is no failure."""
    try:
        run, restored = resumed(own_settings(settings), record, log)
        reasons = not_exact(run, record, restored)
    except (ConfigError, DataError, DeviceError, UnknownCharacters, CheckpointError) as error:
        reasons = [str(error)]
    return "goes on exactly", "no" if reasons else "yes", "; ".join(reasons)


def own_settings(settings: Config) -> Config:
    """The settings without those of training, which are the run's own; where the text lies may be given."""
    scopes = {name: each.metadata["scope"] for name, each in config.VARIABLES.items()}
    own = [name for name, scope in scopes.items() if scope != "session" and name != "TRAINING_DATA_SOURCE"]
    return config.without(settings, own)


# ---------------------------------------------------------------------------------------------------------------------
# REPLAY=true


def replayed(record: Checkpoint, settings: Config, log: Log) -> list[Row]:
    """Trains again to the record's step and compares every byte of every tensor."""
    try:
        start = beginning(record)
        with tempfile.TemporaryDirectory() as temporary:
            again = trained(record, start, own_settings(settings), log, folder=temporary)
    except (ConfigError, DataError, DeviceError, UnknownCharacters, CheckpointError) as error:
        return [("replay", FAILED, f"cannot be done: {error}")]
    if record.optimizer_state is None:
        again = dataclasses.replace(again, optimizer_state=None)
    saved, made = labelled(record), labelled(again)
    hashes = [("sha256 saved", "", digest(saved)), ("sha256 replayed", "", digest(made))]
    since = f"from step {start.step} ({shown(start.path)})" if start else "from fresh weights"
    if different := differing(saved, made):
        name, how = next(iter(different.items()))
        return [
            ("replay", FAILED, f"{since}: {len(different)} of {len(saved)} tensors differ, first {name}: {how}"),
            *hashes,
        ]
    return [("replay", "ok", f"{since}: {len(saved)} tensors, all bytes equal"), *hashes]


def beginning(record: Checkpoint) -> Found | None:
    """What to train again from: the run's newest full checkpoint before the record's step, else the one that the run began with.

    None for fresh weights. Raises CheckpointError if there is nothing to begin with.
    """
    if record.path is None or record.run_id is None or not record.schedule:
        raise CheckpointError("another program's training cannot be repeated")
    if (processes := record.runtime.get("processes", 1)) > 1:
        raise CheckpointError(f"{processes} processes trained it, whose rounding one process does not repeat")
    full = [one for one in ckpt.find(origin(record, record.path)[0]) if one.resumable and one.step < record.step]
    if own := [one for one in full if one.run_id == record.run_id]:
        return max(own, key=lambda one: (one.step, one.save_order))
    parent = record.parent or {}
    if parent.get("run_id") is None:
        return None
    if went_on(record, parent):
        for one in full:
            if one.metadata.get("save_id") == parent.get("save_id"):
                return one
    began = f"its run began with step {parent.get('step')} of run {parent['run_id']}"
    raise CheckpointError(f"{began}, which is not there in full, and neither is an earlier one of its own")


def went_on(record: Checkpoint, parent: dict[str, Any]) -> bool:
    """Whether the run surely went on from its parent's step; INIT_FROM takes the weights alone, and is not told apart otherwise."""
    return bool(parent.get("changed")) or record.schedule.get("start_step") == parent.get("step") != 0


def trained(record: Checkpoint, start: Found | None, settings: Config, log: Log, *, folder: str) -> Checkpoint:
    """The run at the record's step again, from `start` or from nothing; what it writes besides goes to `folder`."""
    schedule = saved_schedule(record)
    if start:
        first = ckpt.load(start.path, verify=True)
        first = dataclasses.replace(
            first, hyperparameters=record.hyperparameters, runtime=record.runtime
        )  # a parent has others
        run, _ = resumed(settings, first, log, schedule=schedule, end=record.step)
    else:
        run = fresh(config.from_saved(settings, saved_settings(record)), log)
        run.schedule = schedule
    run.settings = config.replaced(
        run.settings,
        "plan",
        training_steps=record.step,
        enable_checkpoints=False,
        checkpoint_model_only=False,
        runs_dir=folder,
    )
    run.observed_step = record.step  # neither evaluated nor sampled there: the weights do not depend on it
    train_quietly(run, log)
    return to_record(run)


def train_quietly(run: Run, log: Log) -> None:
    """The one training loop, without what a run says at its start and end; raises KeyboardInterrupt if it was stopped."""
    run.log = log = Log(log.stream)  # so that the run's training.log ends with it
    with contextlib.closing(log), contextlib.ExitStack() as held, Interrupt() as stop:
        open_run(run, held)
        bar = Progress(log, start=run.step, total=run.end, plain=config.tqdm_disabled())
        with contextlib.closing(bar) as run.progress:
            loop(run, stop)
        if stop.requested:
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
