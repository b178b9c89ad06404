"""Verify a checkpoint, or every checkpoint of a folder: bytes, shapes, numbers, tokenizer, and whether it resumes exactly.

CHECKPOINT_PATH=latest python3 scripts/verify_checkpoint.py
CHECKPOINT_PATH=checkpoints python3 scripts/verify_checkpoint.py
CHECKPOINT_PATH='checkpoints/*step0100*' python3 scripts/verify_checkpoint.py
CHECKPOINT_PATH=latest REPLAY=true python3 scripts/verify_checkpoint.py     # trains again from the previous one, and compares
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "REPLAY", "CHECKPOINT_DIR", "CACHE_GB", "TRAINING_DATA_SOURCE", "VALIDATION_DATA", "BASE_CHECKPOINT", "INIT_FROM", "DEVICE", "DEVICE_CHECK",
    "FORMAT", "N_HEAD",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, Found
from milepost.ckpt.conversion import origin, size_of
from milepost.ckpt.finding import folders_below, scan
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.ckpt.tensor_listing import all_files, differing, labelled
from milepost.ckpt.tensors import digest, not_finite
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.remote import local
from milepost.resume import inexact_reasons, resumed, saved_schedule, saved_settings
from milepost.resume_choice import check_text_named
from milepost.run import Run, fresh, to_record, with_heads, with_its_base
from milepost.run_files import open_run
from milepost.runtime.hardware import DeviceError
from milepost.runtime.interrupt import Interrupt
from milepost.runtime.progress import Log, Progress, amount, shown
from milepost.runtime.tables import table
from milepost.screen import stdout_columns, write_json, write_stdout
from milepost.text.errors import DataError
from milepost.text.tokenization import UnknownCharacters
from training import loop

Row = tuple[str, str, str]  # check, status, details
FAILED, BAD = "FAILED", 3
SAMPLE = "Dear Wren,\nna\u00efve \u6f22\u5b57 \U0001f642 \t1,234 == 5\n"  # for tokenizers that encode any text


def main(settings: Config, log: Log) -> int:
    """Print a table per checkpoint, and PASSED or FAILED; return the exit code, 3 if any check failed."""
    settings = local(settings, log, every=True, certain=True)
    paths, as_text = chosen(settings, log), settings.format == "text"
    failed, values = [], []
    for path in paths:
        rows = verified(path, settings, log)
        failed += [path] if any(status == FAILED for _, status, _ in rows) else []
        values.append(as_json(path, rows))
        if as_text:
            write_stdout(f"{shown(path)}\n{table(rows, columns=stdout_columns())}\n")
    if not as_text:
        write_json({"passed": not failed, "checkpoints": values})
        return BAD if failed else 0
    if len(paths) > 1:
        write_stdout(f"{len(paths)} checkpoints, {len(failed)} bad")
    write_stdout(f"{FAILED}: {', '.join(map(shown, failed))}" if failed else "PASSED")
    return BAD if failed else 0


def as_json(path: Path, rows: list[Row]) -> dict[str, Any]:
    """Return the checks of a checkpoint as JSON values."""
    checks = [{"check": check, "status": status, "details": details} for check, status, details in rows]
    return {"path": path, "passed": all(status != FAILED for _, status, _ in rows), "checks": checks}


def chosen(settings: Config, log: Log) -> list[Path]:
    """Return the checkpoints that CHECKPOINT_PATH names, the damaged ones too:
    every file of a folder and below it once.
    """
    selection = ckpt.select(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in selection.notes:
        log(note)
    if selection.whole is None:
        return [found.path for found in selection.found]
    found = [sorted(scan(place), key=lambda each: each.save_order) for place in folders_below(selection.whole)]
    paths = list(dict.fromkeys(each.path for each in itertools.chain(*found)))
    by_file = {identity(path): path for path in reversed(paths)}  # best/ holds hard links
    return [*reversed(by_file.values()), *(each.path for each in selection.found if each.path not in paths)]


def identity(path: Path) -> Any:
    """Return what all hard links of a file share; of a broken link, its path."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def verified(path: Path, settings: Config, log: Log) -> list[Row]:
    """Return the rows of every check of a checkpoint."""
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
        *(("adapters", "ok", count) for count in models.adapter_counts(shapes_of(record)).values()),
        checked("tokenizer", lambda: round_trip(record))
        if record.tokenizer
        else ("tokenizer", "none", "not saved with it"),
    ]
    failed = [name for name, status, _ in rows if status == FAILED]
    why = "it is damaged" if "bytes" in failed else f"it fails a check ({', '.join(failed)})"
    rows += [("resumes exactly", "no", why) if failed else resumes_exactly(record, settings, log)]
    if settings.replay:
        rows += replayed(record, settings, log)
    return rows


def checked(name: str, check: Callable[[], str]) -> Row:
    """Return the row of a check, which returns details or raises what is wrong."""
    try:
        return name, "ok", check()
    except (CheckpointError, ValueError) as error:
        return name, FAILED, str(error)


def bytes_agree(path: Path) -> str:
    """Compare every byte with its checksum, as far as the layout has checksums."""
    if problems := ckpt.verify(path):
        raise CheckpointError("; ".join(problems))
    return f"{amount(size_of(path), 'B')}, files: {len(all_files(path))}"


def shapes(record: Checkpoint, settings: Config, log: Log) -> Row:
    """Return the row of the shapes. Those of a checkpoint of adapters need its base."""
    try:
        return checked("shapes", lambda: shapes_fit(with_heads(with_its_base(record, settings, log), settings)))
    except ConfigError as error:
        return "shapes", "none", str(error)


def shapes_of(record: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by name."""
    return {name: tuple(tensor.shape) for name, tensor in record.model_state.items()}


def shapes_fit(record: Checkpoint) -> str:
    """Check that the weights fit the model that the settings describe."""
    model = build_model(record, device=torch.device("cpu"))
    return f"{len(record.model_state)} tensors, {amount(models.parameter_count(model))} parameters"


def numbers_finite(record: Checkpoint) -> str:
    """Check weights and optimizer for NaN and Inf."""
    tensors = labelled(record)
    if bad := not_finite(tensors):
        raise CheckpointError(f"NaN or Inf in {', '.join(bad[:5])}" + (" and more" if len(bad) > 5 else ""))
    return f"{len(tensors)} tensors are finite"


def round_trip(record: Checkpoint) -> str:
    """Check the tokenizer's hash, and that it decodes what it encodes."""
    tokenizer = build_tokenizer(record)
    text = "".join((record.tokenizer or {}).get("chars", ())) or SAMPLE
    if tokenizer.decode(tokenizer.encode(text)) != tokenizer.prefix + text:
        raise CheckpointError(f"decoding the encoded text differs from {text[:40]!r}")
    known = f"sha256 {tokenizer.digest[:12]}..." if record.tokenizer_sha256 else "no hash recorded"
    return f"{tokenizer.kind}, {tokenizer.vocab_size} tokens, {known}, round trip of {len(text)} characters"


def resumes_exactly(record: Checkpoint, settings: Config, log: Log) -> Row:
    """Return the row on whether a resume on this machine would be bit-exact. "no" does not count as a failure."""
    try:
        check_text_named(record, settings, "a resume")
        run, restored = resumed(own_settings(settings), record, log)
        reasons = inexact_reasons(run, record, restored)
    except (ConfigError, DataError, DeviceError, UnknownCharacters, CheckpointError) as error:
        reasons = [str(error)]
    return "resumes exactly", "no" if reasons else "yes", "; ".join(reasons)


def own_settings(settings: Config) -> Config:
    """Return the settings without those of training, which come from the checkpoint;
    the places of the texts may be set.
    """
    scopes = {name: each.metadata["scope"] for name, each in config.VARIABLES.items()}
    own = [
        name
        for name, scope in scopes.items()
        if scope != "session" and name not in ("TRAINING_DATA_SOURCE", "VALIDATION_DATA")
    ]
    return config.without(settings, own)


# ---------------------------------------------------------------------------------------------------------------------
# REPLAY=true


def replayed(record: Checkpoint, settings: Config, log: Log) -> list[Row]:
    """Train again to the record's step and compare every byte of every tensor."""
    try:
        start = beginning(record)
        with tempfile.TemporaryDirectory() as temporary:
            again = trained(record, start, own_settings(settings), log, folder=temporary)
    except (ConfigError, DataError, DeviceError, UnknownCharacters, CheckpointError) as error:
        return [("replay", FAILED, f"cannot be replayed: {error}")]
    if record.optimizer_state is None:
        again = dataclasses.replace(again, optimizer_state=None)
    saved, made = labelled(record), labelled(again)
    hashes = [("sha256 saved", "", digest(saved)), ("sha256 replayed", "", digest(made))]
    since = f"from step {start.step} ({shown(start.path)})" if start else "from new weights"
    if different := differing(saved, made):
        name, how = next(iter(different.items()))
        return [
            ("replay", FAILED, f"{since}: {len(different)} of {len(saved)} tensors differ, first {name}: {how}"),
            *hashes,
        ]
    return [("replay", "ok", f"{since}: {len(saved)} tensors, all bytes equal"), *hashes]


def beginning(record: Checkpoint) -> Found | None:
    """Return the checkpoint to replay from: the run's latest resumable one before the record's step, else the one it
    began with.

    None for new weights. Raises CheckpointError if the run began with a checkpoint that is missing.
    """
    if record.path is None or record.run_id is None or not record.schedule:
        raise CheckpointError("the training of another program cannot be replayed")
    if (processes := record.runtime.get("processes", 1)) > 1:
        raise CheckpointError(f"{processes} processes trained it, and one process rounds differently")
    earlier = [f for f in ckpt.find(origin(record, record.path)[0]) if f.resumable and f.step < record.step]
    if own := [found for found in earlier if found.run_id == record.run_id]:
        return max(own, key=lambda found: (found.step, found.save_order))
    parent = record.parent or {}
    if parent.get("run_id") is None:
        return None
    if continues(record, parent):
        for found in earlier:
            if found.metadata.get("save_id") == parent.get("save_id"):
                return found
    began = f"its run began with step {parent.get('step')} of run {parent['run_id']}"
    raise CheckpointError(
        f"{began}; neither that checkpoint nor an earlier one of its own run is there with its optimizer"
    )


def continues(record: Checkpoint, parent: dict[str, Any]) -> bool:
    """Return whether the run certainly continued its parent's steps. One with INIT_FROM took only the weights."""
    return bool(parent.get("changed")) or record.schedule.get("start_step") == parent.get("step") != 0


def trained(record: Checkpoint, start: Found | None, settings: Config, log: Log, *, folder: str) -> Checkpoint:
    """Train to the record's step again, from `start` or new weights, and return the record. Logs go to `folder`."""
    schedule = saved_schedule(record)
    writes = {"ENABLE_CHECKPOINTS": False, "CHECKPOINT_MODEL_ONLY": False, "RUNS_DIR": folder}
    settings = config.with_values(settings, writes, source="REPLAY")
    if start:
        first = ckpt.load(start.path, verify=True)
        # A parent run may have had other settings.
        first = dataclasses.replace(first, hyperparameters=record.hyperparameters, runtime=record.runtime)
        run, _ = resumed(settings, first, log, schedule=schedule, end=record.step)
    else:
        run = fresh(config.from_saved(settings, saved_settings(record)), log)
        run.schedule, run.end = schedule, record.step
    run.state.observed_step = record.step  # skips evaluation and samples, which do not change the weights
    train_quietly(run, log)
    return to_record(run)


def train_quietly(run: Run, log: Log) -> None:
    """Run the training loop without its reports at start and end. Raise KeyboardInterrupt if it was stopped."""
    run.log = log = Log(log.stream)  # closes the run's training.log with it
    with contextlib.closing(log), contextlib.ExitStack() as held, Interrupt() as stop:
        open_run(run, held)
        bar = Progress(log, start=run.state.step, total=run.end, plain=config.tqdm_disabled())
        with contextlib.closing(bar) as run.bar:
            loop(run, stop)
        if stop.requested:
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
