"""Show what a checkpoint is and holds, without loading a tensor; or what differs between two.

CHECKPOINT_PATH=latest python3 scripts/inspect_checkpoint.py
CHECKPOINT_PATH=best COMPARE_WITH=latest python3 scripts/inspect_checkpoint.py
"""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import config

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported, Ctrl-C just ends
    SETTINGS = config.from_command_line(sys.argv)  # before that, so that a typing error costs no seconds

import json
from collections.abc import Iterator, Mapping
from typing import Any

import models
from milepost import ckpt
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import Checkpoint, metadata
from milepost.ckpt.tensor_listing import Held, all_files, differing, held, labelled
from milepost.cli import guarded
from milepost.config import Config
from milepost.runtime.progress import Log, amount, shown, table, tell
from milepost.text import tokenization

FIRST = 5  # tensors that are named, as in document 004's example
WIDEST = 60  # characters of a value
# What two saves of one state may have otherwise, and what is shown under other names.
NOT_COMPARED = ("save_id", "model_settings", "hyperparameters", "tokenizer")


def main(settings: Config, log: Log) -> int:
    """Prints the sections of CHECKPOINT_PATH, or how it differs from COMPARE_WITH; returns the exit code."""
    path = resolved(settings.checkpoint_path, settings, log)
    if settings.compare_with is None:
        tell("\n\n".join(sections(path)))
        return 0
    other = resolved(settings.compare_with, settings, log)
    records = [ckpt.load(each) for each in (path, other)]
    if differences := compared(*records):
        tell(table([("", "", shown(path), shown(other)), *differences]))
    else:
        log(f"{shown(path)} and {shown(other)} are the same")
    return 0


def resolved(wish: str, settings: Config, log: Log) -> Path:
    """The checkpoint that `wish` means; what is to be told of the choice goes to the log."""
    path, notes = ckpt.resolve(wish, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One checkpoint.


def sections(path: Path) -> Iterator[str]:
    """The text of each section, metadata and headers read and no tensor."""
    values, tensors = known_layout(path).read_metadata(path), held(path)
    yield "=== FORMAT ===\n" + file_lines(path, values)
    settings = values.get("model_settings", {}) | values.get("hyperparameters", {})
    yield "=== CONFIG ===\n" + pairs({"model_type": values.get("model_type"), **settings})
    yield "=== TOKENIZER ===\n" + pairs(tokenizer_of(values))
    yield "=== TRAINING STATE ===\n" + state_lines(values)
    yield "=== TENSORS ===\n" + tensor_lines(path, tensors, apart="adapters" in values.get("parts", ()))


def file_lines(path: Path, values: Mapping[str, Any]) -> str:
    """Layout, location and files."""
    written = values.get("written_by") or "another program"
    top = {"layout": known_layout(path).name, "format": values.get("format_version"), "written by": written}
    files = [(str(file.relative_to(path.parent)), f"{file.stat().st_size:,} bytes") for file in all_files(path)]
    return f"{pairs(top)}\nLocation: {shown(path)}\n{table([('  ' + name, size) for name, size in files])}"


def tokenizer_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, size and hash of the tokenizer that the metadata carries."""
    saved = values.get("tokenizer")
    if not saved:
        return {"kind": "none recorded; what is taken instead is said when it is opened"}
    try:
        tokenizer = tokenization.from_dict(saved)
    except ValueError as error:
        return {"kind": saved.get("kind"), "problem": str(error)}
    return {"kind": tokenizer.kind, "vocab": f"{tokenizer.vocab_size} tokens", "sha256": tokenizer.digest}


def state_lines(values: Mapping[str, Any]) -> str:
    """Where training stands, and whether it can go on."""
    names = ("epoch", "tokens_seen", "windows_seen", "validation_loss", "best_loss", "best_step", "schedule", "data", "run_id", "parent", "base",
             "save_number", "saved_at", "runtime")  # fmt: skip
    full = "optimizer" in values.get("parts", ())
    can = "Optimizer state available - can resume training" if full else "No optimizer state - model-only checkpoint"
    planned = values.get("hyperparameters", {}).get("TRAINING_STEPS")
    last = f"Last recorded training step: {values.get('step')}" + (f" of {planned}" if planned else "")
    return f"{last}\n{pairs({name: values.get(name) for name in names})}\n{can}"


def tensor_lines(path: Path, tensors: list[Held], *, apart: bool) -> str:
    """How many there are, the first of each part, and bytes by part. `apart`: its weights are adapters without their base."""
    total = sum(file.stat().st_size for file in all_files(path))
    lines, parts = [f"Number of tensors: {len(tensors)}"], []
    weights = {one.name: one.shape for one in tensors if one.part == "weights"}
    without = " (the base is not in it)" if apart else ""
    lines += [f"Found {count}{without}" for count in models.adapter_counts(weights).values()]
    for part in ("weights", "optimizer"):
        own = [one for one in tensors if one.part == part]
        if own:
            names = [(f"  {one.name}", one.dtype, str(one.shape)) for one in own[:FIRST]]
            rest = [f"  ... and {len(own) - FIRST} more"] if len(own) > FIRST else []
            lines += [f"{part}:", table(names), *rest]
        parts.append((part, sum(one.size for one in own)))
    parts += [("rest", total - sum(size for _, size in parts)), ("total", total)]
    return "\n".join([*lines, table([(name, f"{size:,} bytes", amount(size, "B")) for name, size in parts])])


def pairs(values: Mapping[str, Any]) -> str:
    """A line for each name and value; dicts become lines of their own."""
    rows = [(f"{name}:", clipped(value)) for name, value in flat(values).items() if value is not None]
    return table(rows or [("nothing recorded",)])


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values by dotted names; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def clipped(value: Any) -> str:
    """A value in one line of at most WIDEST characters."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= WIDEST + 4 else text[:WIDEST] + " ..."


# ---------------------------------------------------------------------------------------------------------------------
# Two of them.


def compared(one: Checkpoint, other: Checkpoint) -> list[tuple[str, ...]]:
    """A row for each setting, field of the metadata and tensor that is not the same in both."""
    rows = []
    for kind, values in (
        ("setting", (settings_of(one), settings_of(other))),
        ("metadata", (fields_of(one), fields_of(other))),
    ):
        for name in dict.fromkeys([*values[0], *values[1]]):
            if values[0].get(name) != values[1].get(name):
                rows.append((kind, name, *(clipped(each.get(name)) for each in values)))
    tensors = differing(labelled(one), labelled(other))
    return rows + [("tensor", name, difference, "") for name, difference in tensors.items()]


def settings_of(record: Checkpoint) -> dict[str, Any]:
    """What the model is made of, and what it was trained with."""
    return record.model_settings | record.hyperparameters


def fields_of(record: Checkpoint) -> dict[str, Any]:
    """The rest of the metadata by dotted names."""
    return flat({name: value for name, value in metadata(record).items() if name not in NOT_COMPARED})


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
