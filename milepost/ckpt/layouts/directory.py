"""A folder of five files to read and edit by hand: `model.pt` (a bare state dict), `config.json`,
`tokenizer.json`, `training_state.json`, `optimizer.pt`; and `manifest.json`, written last.

The manifest has the whole record, so the other JSON files are for people, and `config.json` is compared with it field
by field. A folder without a manifest is another program's: names and shapes of its weights tell what model it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.layouts.foreign_layout import ForeignReader
from milepost.ckpt.layouts.manifest_layout import ManifestLayout, TorchFile, format_line
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import Checkpoint, CheckpointError, Json

MODEL, OPTIMIZER = "model.pt", "optimizer.pt"
CONFIG, TOKENIZER, STATE, MANIFEST = "config.json", "tokenizer.json", "training_state.json", "manifest.json"
MAY_CHANGE = ("batch_size", "device", "dropout")  # every other field decides what the weights mean


def _extra(record: Checkpoint) -> dict[str, Json]:
    optimizer = OPTIMIZER if record.optimizer_state is not None else None
    state = {"step": record.step, "epoch": record.epoch, "validation_loss": record.validation_loss}
    return {
        CONFIG: _config(record),
        TOKENIZER: _tokenizer(record.tokenizer),
        STATE: state | {"optimizer_file": optimizer},
    }


def _config(record: Checkpoint) -> dict[str, Json]:
    """Return what config.json says: the document's fields, and the model's settings."""
    also = {name.lower(): record.hyperparameters.get(name) for name in ("BATCH_SIZE", "DEVICE")}
    return {"model_type": record.model_type, **record.model_settings, **also}


def _tokenizer(tokenizer: dict[str, Json] | None) -> dict[str, Json]:
    """Return the record's tokenizer under the document's names."""
    values = dict(tokenizer or {})
    return {"token_kind": values.pop("kind", None), **values}


# ---------------------------------------------------------------------------------------------------------------------
# What a hand may edit.


def _apply_edits(path: Path, record: Checkpoint) -> None:
    """Apply the allowed edits of config.json; refuse any other, and another tokenizer.json, by name."""
    if is_regular(path / TOKENIZER) and read_json(path / TOKENIZER) != _tokenizer(record.tokenizer):
        problem = "is not the tokenizer of these weights"
        raise CheckpointError(path / TOKENIZER, problem, "put the saved file back", kind="refused")
    if not is_regular(path / CONFIG):
        record.notes.append(f"{path / CONFIG}: not found; the settings in {MANIFEST} apply")
        return
    saved, now = _config(record), read_json(path / CONFIG)
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name] or type(saved[name]) is not type(now[name]):
            _apply_edit(path / CONFIG, record, name, saved[name], now[name])
    unknown, missing = sorted(now.keys() - saved.keys()), sorted(saved.keys() - now.keys())
    if unknown:
        record.notes.append(f"{path / CONFIG}: fields that this version does not know were left out: {unknown!r:.200}")
        record.left_out.append(f"fields of {CONFIG} that this version does not know ({', '.join(unknown)[:200]})")
    if missing:
        record.notes.append(f"{path / CONFIG}: lacks {', '.join(missing)}; the saved values apply")


def _apply_edit(config: Path, record: Checkpoint, name: str, saved: Json, now: Json) -> None:
    before, after = (json.dumps(value)[:40] for value in (saved, now))
    change = f"{name} was saved as {before} and is now {after}"
    if name not in MAY_CHANGE:
        problem = f"{change}, but the weights are those of {before}"
        raise CheckpointError(config, problem, "set it back", kind="refused")
    valid = {
        "batch_size": type(now) is int and now > 0,
        "dropout": type(now) in (int, float) and 0 <= now < 1,
        "device": isinstance(now, str),
    }
    if not valid[name]:
        raise CheckpointError(config, f"{change}, not a valid {name}", "set it back", kind="refused")
    if name == "device":
        record.notes.append(f"{config}: {change}: ignored, because DEVICE decides where a checkpoint is loaded")
    else:
        record.notes.append(f"{config}: {change}: applied")
        record.edited[name.upper()] = [saved, now]
        record.hyperparameters = {**record.hyperparameters, name.upper(): now}
    if name == "dropout":
        record.model_settings = {**record.model_settings, name: float(now)}


def _check_config(path: Path, manifest: Mapping[str, Any]) -> list[CheckpointError]:
    """Return the problem of a config.json that is not JSON; it has no checksum."""
    try:
        if is_regular(path / CONFIG):
            read_json(path / CONFIG)
    except CheckpointError as error:
        return [error]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Another program's folder, without a manifest.


def _foreign_content(path: Path, optimizer: bool) -> Mapping[str, Any]:
    keys: dict[str, Any] = {"model_state_dict": archive.load(path / MODEL)[0]}
    if is_regular(path / STATE):
        keys = {"step": 0, **read_json(path / STATE), **keys}
    if optimizer and is_regular(path / OPTIMIZER):
        keys["optimizer"], _ = archive.load(path / OPTIMIZER)
    return keys


def _foreign_problems(path: Path) -> list[CheckpointError]:
    files = [path / name for name in (MODEL, OPTIMIZER) if name == MODEL or is_regular(path / name)]
    return [problem for file in files for problem in archive.verify(file)]


def _foreign_note(path: Path) -> str | None:
    missing = not is_regular(path / OPTIMIZER)
    return f"{path}: holds no optimizer state: it generates but cannot resume bit-exactly" if missing else None


LAYOUT = ManifestLayout(
    name="directory",
    members=(MODEL, OPTIMIZER, CONFIG, TOKENIZER, STATE, MANIFEST),
    manifest=MANIFEST,
    weights=TorchFile(MODEL),
    optimizer=TorchFile(OPTIMIZER),
    extra=_extra,
    head=format_line("milepost directory"),
    optional=(STATE, CONFIG),
    editable=(CONFIG,),
    markers=((MANIFEST,), (MODEL, CONFIG)),
    check_record=_apply_edits,
    check_bytes=_check_config,
    foreign=ForeignReader(
        layout="directory",
        content=_foreign_content,
        checksums=_foreign_problems,
        optimizer_file=OPTIMIZER,
        note=_foreign_note,
    ),
)
