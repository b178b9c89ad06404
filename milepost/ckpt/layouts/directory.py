"""A folder of five files that can be read and edited by hand (document 004): `model.pt` (a bare state dict), `config.json`,
`tokenizer.json`, `training_state.json`, `optimizer.pt`; and `manifest.json`, written last.

The manifest has the whole record, so that the other JSON files may be looked at and `config.json` compared field by field.
A folder without it is another program's: its weights are known by their names and shapes.
"""

import os
from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import adopted, files, home
from milepost.ckpt.layouts import sharded
from milepost.ckpt.manifest import (
    check_files,
    file_problems,
    is_regular,
    manifest_metadata,
    read_json,
    read_manifest,
    write_manifest,
)
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, from_metadata, metadata, note_missing_optimizer
from milepost.ckpt.tensors import checked_tensors
from milepost.files import NewFile, new_folder, write_json, written

__all__ = [
    "MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "targets", "verify_file", "write",
]  # fmt: skip

NAME = "directory"
RUN_STEM = ""
MODEL, CONFIG, TOKENIZER, STATE, OPTIMIZER = (
    "model.pt",
    "config.json",
    "tokenizer.json",
    "training_state.json",
    "optimizer.pt",
)
MANIFEST = "manifest.json"
MEMBERS = (MODEL, CONFIG, TOKENIZER, STATE, OPTIMIZER, MANIFEST)
OPTIONAL = (STATE, OPTIMIZER, CONFIG)
MAY_CHANGE = ("batch_size", "device", "dropout")  # the rest decides what the weights mean


def detect(path: Path) -> bool:
    """Whether `path` is a folder with our manifest, or another program's with model.pt and config.json; of `sharded` it is none."""
    if sharded.detect(path):
        return False
    return is_regular(path / MANIFEST) or (is_regular(path / MODEL) and is_regular(path / CONFIG))


def optimizer_file(path: Path) -> Path | None:
    """The file to do without for a checkpoint that only generates."""
    return path / OPTIMIZER


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone; raises CheckpointError if the manifest is damaged or config.json contradicts it."""
    if not os.path.lexists(path / MANIFEST):
        return metadata(_read_foreign(path, whole=False))
    manifest = _bound(read_manifest(path / MANIFEST))
    return manifest_metadata(path, manifest, optimizer=OPTIMIZER, optional=OPTIONAL)


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the folder. Without optimizer.pt it only generates, with a note. Raises CheckpointError in one sentence."""
    if not os.path.lexists(path / MANIFEST):
        return _read_foreign(path, optimizer=optimizer)
    manifest = read_manifest(path / MANIFEST)
    check_files(path, _bound(manifest), hashed=verify, begins=[MODEL, *[OPTIMIZER] * optimizer], optional=OPTIONAL)
    content, _ = archive.load(path / MODEL)
    model_state = checked_tensors(content, str(path / MODEL))
    record = from_metadata(manifest["metadata"], model_state=model_state, optimizer_state=None, where=str(path))
    _take_edits(path, record)
    if not is_regular(path / OPTIMIZER):
        note_missing_optimizer(record, path / OPTIMIZER)
    elif optimizer and "optimizer" in record.parts:
        record.optimizer_state, _ = archive.load(path / OPTIMIZER)
    record.path, record.layout = path, NAME
    return record


def _take_edits(path: Path, record: Checkpoint) -> None:
    """Compares config.json and tokenizer.json with the record; what a hand may change there is taken, the rest is refused by name."""
    if is_regular(path / TOKENIZER) and read_json(path / TOKENIZER) != _tokenizer(record.tokenizer):
        raise CheckpointError(f"{path / TOKENIZER}: is not the tokenizer of these weights: put it back as it was saved")
    if not is_regular(path / CONFIG):
        record.notes.append(f"{path / CONFIG}: not found; the settings in {MANIFEST} are taken")
        return
    saved, now = _config(record), read_json(path / CONFIG)
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name] or type(saved[name]) is not type(now[name]):
            _take_edit(path / CONFIG, record, name, saved[name], now[name])
    unknown, missing = sorted(now.keys() - saved.keys()), sorted(saved.keys() - now.keys())
    if unknown:
        record.notes.append(f"{path / CONFIG}: fields that this version does not know were left out: {unknown!r:.200}")
    if missing:
        record.notes.append(f"{path / CONFIG}: has no {', '.join(missing)}; what was saved is taken")


def _take_edit(config: Path, record: Checkpoint, name: str, saved: Json, now: Json) -> None:
    change = f"{config}: {name} was saved as {saved!r:.40} and is now {now!r:.40}"
    if name not in MAY_CHANGE:
        raise CheckpointError(f"{change}, but the weights are those of {saved!r:.40}: set it back")
    valid = {
        "batch_size": type(now) is int and now > 0,
        "dropout": type(now) in (int, float) and 0 <= now < 1,
        "device": isinstance(now, str),
    }
    if not valid[name]:
        raise CheckpointError(f"{change}, which is no {name}: set it back")
    if name == "device":
        record.notes.append(f"{change}: DEVICE says where it is opened, not the file")
    else:
        record.notes.append(f"{change}: taken")
        record.edited[name.upper()] = [saved, now]
        record.hyperparameters = {**record.hyperparameters, name.upper(): now}
    if name == "dropout":
        record.model_settings = {**record.model_settings, name: float(now)}


def _config(record: Checkpoint) -> dict[str, Json]:
    """What config.json says: the document's fields, and what else makes the model."""
    also = {name.lower(): record.hyperparameters.get(name) for name in ("BATCH_SIZE", "DEVICE")}
    return {"model_type": record.model_type, **record.model_settings, **also}


def _tokenizer(tokenizer: dict[str, Json] | None) -> dict[str, Json]:
    """The record's tokenizer in the document's word for it."""
    values = dict(tokenizer or {})
    return {"token_kind": values.pop("kind", None), **values}


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes the folder `folder/stem`, its manifest last; returns it. The caller holds the folder's lock."""
    (path,) = targets(folder, stem)
    full = record.optimizer_state is not None
    state = {"step": record.step, "epoch": record.epoch, "validation_loss": record.validation_loss}
    with new_folder(path) as hidden:
        made: dict[str, NewFile] = {}
        tensors: dict[str, Any] = {MODEL: record.model_state, **({OPTIMIZER: record.optimizer_state} if full else {})}
        for name, content in tensors.items():
            with written(hidden / name, hashed=True) as made[name]:
                archive.dump(content, made[name])
        made[CONFIG] = write_json(hidden / CONFIG, _config(record))
        made[TOKENIZER] = write_json(hidden / TOKENIZER, _tokenizer(record.tokenizer))
        made[STATE] = write_json(hidden / STATE, state | {"optimizer_file": OPTIMIZER if full else None})
        write_manifest(hidden / MANIFEST, record, made, first={"format": "milepost directory"}, groups=None)
    return path


def targets(folder: Path, stem: str) -> list[Path]:
    """The path that `write` gives a checkpoint of this stem."""
    return [folder / stem]


def verify_file(path: Path) -> list[str]:
    """What is wrong with the folder's bytes, one sentence each; a folder of another program has no checksums but its archives' own."""
    if not os.path.lexists(path / MANIFEST):
        return archive.verify(path / MODEL)
    try:
        if is_regular(path / CONFIG):
            read_json(path / CONFIG)
        return file_problems(path, _bound(read_manifest(path / MANIFEST)), hashed=True, optional=OPTIONAL)
    except CheckpointError as error:
        return [str(error)]


def _bound(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without config.json, which may be edited, so that only its fields are compared."""
    return manifest | {"files": {name: entry for name, entry in manifest["files"].items() if name != CONFIG}}


# ---------------------------------------------------------------------------------------------------------------------
# Another program's folder, without a manifest.


def _read_foreign(path: Path, *, optimizer: bool = True, whole: bool = True) -> Checkpoint:
    content, _ = archive.load(path / MODEL)
    words: dict[str, Any] = {"model_state_dict": content}
    if is_regular(path / STATE):
        words["step"] = read_json(path / STATE).get("step", 0)
    if optimizer and is_regular(path / OPTIMIZER):
        words["optimizer"], _ = archive.load(path / OPTIMIZER)
    record = adopted(path, words, layout=NAME, optimizer=optimizer, whole=whole)
    if not is_regular(path / OPTIMIZER):
        record.notes.append(f"{path}: holds no optimizer's state: it generates but cannot go on exactly")
    return record
