"""Show the metadata and contents of a checkpoint without loading a tensor, or the differences between two.

CHECKPOINT_PATH=latest python3 scripts/inspect_checkpoint.py
CHECKPOINT_PATH=best COMPARE_WITH=latest python3 scripts/inspect_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("CHECKPOINT_PATH", "COMPARE_WITH", "CHECKPOINT_DIR", "CACHE_GB", "FORMAT")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import models
from milepost import ckpt
from milepost.ckpt.foreign.importing import lacks_n_head
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import Checkpoint, metadata, without_secrets
from milepost.ckpt.tensor_listing import Held, all_files, differing, held, labelled
from milepost.cli import guarded
from milepost.config import Config
from milepost.remote import address_of, headers, local_path
from milepost.runtime.progress import Log, amount, shown
from milepost.runtime.tables import table
from milepost.screen import stdout_columns, write_json, write_stdout
from milepost.text import tokenization

SHOWN_TENSORS = 5  # per part
MAX_WIDTH = 60  # characters of a value
# Differs between two saves of the same state, or is shown under another name.
NOT_COMPARED = ("save_id", "model_settings", "hyperparameters", "tokenizer")


def main(settings: Config, log: Log) -> int:
    """Print the sections of CHECKPOINT_PATH, or its differences from COMPARE_WITH; return the exit code."""
    if settings.compare_with is None:
        with looked_at(settings, log) as (path, where):
            if settings.format == "json":
                write_json(as_json(path, where))
            else:
                write_stdout("\n\n".join(sections(path, where)))
        return 0
    path, other = (resolved(name, settings, log) for name in (settings.checkpoint_path, settings.compare_with))
    records = ckpt.load(path), ckpt.load(other)
    differences = compared(*records)
    if settings.format == "json":
        rows = [dict(zip(("part", "name", "one", "other"), row, strict=True)) for row in differences]
        write_json({"paths": [path, other], "identical": not differences, "differences": rows})
    elif differences:
        write_stdout(table([("", "", shown(path), shown(other)), *differences], columns=stdout_columns()))
    else:
        log(f"{shown(path)} and {shown(other)} are identical")
    return 0


def resolved(name: str, settings: Config, log: Log) -> Path:
    """Return the path of the checkpoint that `name` stands for; log notes on the choice."""
    path, notes = ckpt.resolve(local_path(name, settings, log), Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    return path


@contextlib.contextmanager
def looked_at(settings: Config, log: Log) -> Iterator[tuple[Path, Path | str]]:
    """Yield the path of the checkpoint of CHECKPOINT_PATH, and where it lies. Of one in a mirror, no tensor is downloaded."""
    address = address_of(settings.checkpoint_path, settings)
    if address is None:
        path = resolved(settings.checkpoint_path, settings, log)
        yield path, path
    else:
        with headers(address, log) as (path, where):
            yield path, where


# ---------------------------------------------------------------------------------------------------------------------
# One checkpoint.


def sections(path: Path, where: Path | str) -> Iterator[str]:
    """Yield the text of each section of the checkpoint at `path`, shown as `where`. Reads metadata and headers, no tensor."""
    values, tensors = without_secrets(known_layout(path).read_metadata(path)), held(path)
    yield "=== FORMAT ===\n" + file_lines(path, where, values)
    settings = values.get("model_settings", {}) | values.get("hyperparameters", {})
    missing = {"n_head": "not recorded; set N_HEAD to open the checkpoint"} if lacks_n_head(values) else {}
    yield "=== CONFIG ===\n" + pairs({"model_type": values.get("model_type"), **missing, **settings})
    yield "=== TOKENIZER ===\n" + pairs(tokenizer_of(values))
    yield "=== TRAINING STATE ===\n" + state_lines(values, tensors)
    yield "=== TENSORS ===\n" + tensor_lines(path, tensors, apart="adapters" in values.get("parts", ()))


def as_json(path: Path, where: Path | str) -> dict[str, Any]:
    """Return the metadata, files and tensors of the checkpoint at `path`, shown as `where`, as JSON values."""
    values, tensors = without_secrets(known_layout(path).read_metadata(path)), held(path)
    listed = [
        {"part": each.part, "name": each.name, "dtype": each.dtype, "shape": each.shape, "bytes": each.size}
        for each in tensors
    ]
    place = str(where).removesuffix(path.name)
    files = [
        {"path": f"{place}{file.relative_to(path.parent).as_posix()}", "bytes": file.stat().st_size}
        for file in all_files(path)
    ]
    about = {"path": where, "layout": known_layout(path).name, "files": files, "tokenizer": tokenizer_of(values)}
    plain = {name: value for name, value in values.items() if name != "tokenizer"}
    return about | {"metadata": plain, "tensors": listed}


def file_lines(path: Path, where: Path | str, values: Mapping[str, Any]) -> str:
    """Return the lines on layout, location and files."""
    written = values.get("written_by") or "another program"
    top = {"layout": known_layout(path).name, "format": values.get("format_version"), "written by": written}
    files = [(str(file.relative_to(path.parent)), f"{file.stat().st_size:,} bytes") for file in all_files(path)]
    return f"{pairs(top)}\nLocation: {shown(where)}\n{table([('  ' + name, size) for name, size in files], columns=stdout_columns())}"


def tokenizer_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind, vocabulary size and hash of the tokenizer in the metadata."""
    saved = values.get("tokenizer")
    if not saved:
        return {"kind": "not recorded; opening the checkpoint logs which tokenizer it takes instead"}
    try:
        tokenizer = tokenization.from_dict(saved)
    except ValueError as error:
        return {"kind": saved.get("kind"), "problem": str(error)}
    return {"kind": tokenizer.kind, "vocab": f"{tokenizer.vocab_size} tokens", "sha256": tokenizer.digest}


def state_lines(values: Mapping[str, Any], tensors: list[Held]) -> str:
    """Return the lines on the training state, and on whether it can be resumed."""
    names = ("epoch", "tokens_seen", "windows_seen", "validation_loss", "best_loss", "best_step", "schedule", "data", "run_id", "parent", "base",
             "save_number", "saved_at", "runtime", "imported")  # fmt: skip
    if "optimizer" in values.get("parts", ()):
        resumable = "Optimizer state available - can resume training"
    elif reason := (values.get("imported") or {}).get("optimizer"):
        resumable = f"Optimizer state of another program - model only: {reason}"
    elif unused := [tensor.size for tensor in tensors if tensor.part == "optimizer"]:
        size = amount(sum(unused), "B")
        resumable = (
            f"Optimizer state of another program ({len(unused)} tensors, {size}) that cannot be used - model only"
        )
    else:
        resumable = "No optimizer state - model-only checkpoint"
    planned = values.get("hyperparameters", {}).get("TRAINING_STEPS")
    last = f"Last recorded training step: {values.get('step')}" + (f" of {planned}" if planned else "")
    digits = {"epoch": 2, "validation_loss": 4, "best_loss": 4}
    rounded = {
        name: f"{value:.{digits[name]}f}"
        for name, value in values.items()
        if name in digits and isinstance(value, float)
    }
    return f"{last}\n{pairs({name: values.get(name) for name in names} | rounded)}\n{resumable}"


def tensor_lines(path: Path, tensors: list[Held], *, apart: bool) -> str:
    """Return the lines on tensors: their number, the first of each part, and bytes by part. `apart`: adapters without their base."""
    total = sum(file.stat().st_size for file in all_files(path))
    lines, parts = [f"Number of tensors: {len(tensors)}"], []
    weights = {tensor.name: tensor.shape for tensor in tensors if tensor.part == "weights"}
    without = " (without their base)" if apart else ""
    lines += [f"Found {count}{without}" for count in models.adapter_counts(weights).values()]
    for part in ("weights", "optimizer"):
        own = [tensor for tensor in tensors if tensor.part == part]
        if own:
            names = [(f"  {tensor.name}", tensor.dtype, str(tensor.shape)) for tensor in own[:SHOWN_TENSORS]]
            rest = [f"  ... and {len(own) - SHOWN_TENSORS} more"] if len(own) > SHOWN_TENSORS else []
            lines += [f"{part}:", table(names, columns=stdout_columns()), *rest]
        parts.append((part, sum(tensor.size for tensor in own)))
    parts += [("rest", total - sum(size for _, size in parts)), ("total", total)]
    return "\n".join([*lines, table([(name, f"{size:,} bytes", amount(size, "B")) for name, size in parts])])


def pairs(values: Mapping[str, Any]) -> str:
    """Return a line per name and value; nested dicts get dotted names."""
    rows = [(f"{name}:", clipped(value)) for name, value in flat(values).items() if value is not None]
    return table(rows or [("not recorded",)], columns=stdout_columns())


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values by dotted names; a list counts as one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def clipped(value: Any) -> str:
    """Return a value as one line of at most MAX_WIDTH characters."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= MAX_WIDTH + 4 else text[:MAX_WIDTH] + " ..."


# ---------------------------------------------------------------------------------------------------------------------
# Two checkpoints.


def compared(first: Checkpoint, second: Checkpoint) -> list[tuple[str, ...]]:
    """Return a row for each setting, metadata field and tensor that differs."""
    rows = []
    for kind, values in (
        ("setting", (settings_of(first), settings_of(second))),
        ("metadata", (fields_of(first), fields_of(second))),
    ):
        for name in dict.fromkeys([*values[0], *values[1]]):
            if values[0].get(name) != values[1].get(name):
                rows.append((kind, name, *(clipped(side.get(name)) for side in values)))
    tensors = differing(labelled(first), labelled(second))
    return rows + [("tensor", name, difference, "") for name, difference in tensors.items()]


def settings_of(record: Checkpoint) -> dict[str, Any]:
    """Return the settings of the model and of its training, `auto` as it was resolved."""
    from milepost.resume import saved_settings  # with torch, which comparing tensors needs anyway

    hyperparameters = without_secrets({"hyperparameters": record.hyperparameters})["hyperparameters"]
    settings, followed = record.model_settings | hyperparameters, saved_settings(record)
    settings |= {name: followed.get(name, value) for name, value in settings.items() if value == "auto"}
    device = record.runtime.get("device") if settings.get("DEVICE") == "auto" else None
    return settings | ({"DEVICE": device} if device else {})


def fields_of(record: Checkpoint) -> dict[str, Any]:
    """Return the rest of the metadata by dotted names."""
    return flat({name: value for name, value in metadata(record).items() if name not in NOT_COMPARED})


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
