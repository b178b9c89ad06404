"""A folder for each step (document 003): `checkpoint_001000/consolidated/` with `consolidated.safetensors` (of adapters alone,
`lora.safetensors`) and `config.json` to share, and beside it `optimizer.safetensors` and `training_state.json` to go on from.

The names repeat from run to run, so they are written into the run's own folder. training_state.json is the manifest, written last.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from milepost.ckpt.foreign.importing import adopted, files, home
from milepost.ckpt.manifest import (
    check_files,
    file_problems,
    is_regular,
    manifest_metadata,
    read_manifest,
    write_manifest,
)
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, from_metadata, metadata
from milepost.ckpt.tensors import (
    checked_tensors,
    optimizer_groups,
    optimizer_tensors,
    read_safetensors,
    take_optimizer,
    write_safetensors,
)
from milepost.files import NewFile, new_folder, write_json

__all__ = [
    "MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "targets", "verify_file", "write",
]  # fmt: skip

NAME = "consolidated"
RUN_STEM = "{prefix}_{step:06d}"
FOLDER = "consolidated"
WEIGHTS, ADAPTERS, CONFIG = (
    f"{FOLDER}/{name}" for name in ("consolidated.safetensors", "lora.safetensors", "config.json")
)
OPTIMIZER, STATE = "optimizer.safetensors", "training_state.json"
MEMBERS = (WEIGHTS, ADAPTERS, CONFIG, OPTIMIZER, STATE)


def detect(path: Path) -> bool:
    """Whether `path` is a folder that holds consolidated/consolidated.safetensors, or lora.safetensors there."""
    return is_regular(path / WEIGHTS) or is_regular(path / ADAPTERS)


def optimizer_file(path: Path) -> Path | None:
    """The file to do without for a checkpoint that only generates."""
    return path / OPTIMIZER


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone; raises CheckpointError if training_state.json is damaged."""
    if not os.path.lexists(path / STATE):
        return metadata(_read_foreign(path, whole=False))
    return manifest_metadata(path, read_manifest(path / STATE), optimizer=OPTIMIZER)


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the folder. Without optimizer.safetensors it only generates, with a note.

    Without training_state.json it is another program's, and its weights are known by their names and shapes.
    """
    if not os.path.lexists(path / STATE):
        return _read_foreign(path)
    manifest = read_manifest(path / STATE)
    weights = _weights_of(manifest["metadata"].get("parts", ()))
    check_files(path, manifest, hashed=verify, begins=[weights, *[OPTIMIZER] * optimizer], optional=[OPTIMIZER])
    model_state = checked_tensors(read_safetensors(path / weights), str(path / weights))
    record = from_metadata(manifest["metadata"], model_state=model_state, optimizer_state=None, where=str(path / STATE))
    take_optimizer(record, path / OPTIMIZER, manifest["optimizer_groups"], wanted=optimizer)
    record.path, record.layout = path, NAME
    return record


def _weights_of(parts: Sequence[str]) -> str:
    return ADAPTERS if "adapters" in parts else WEIGHTS


def _read_foreign(path: Path, *, whole: bool = True) -> Checkpoint:
    record = adopted(path / WEIGHTS, {"model": read_safetensors(path / WEIGHTS)}, layout=NAME, whole=whole)
    record.path = path
    return record


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes the folder `folder/stem`, its training_state.json last; returns it. The caller holds the folder's lock."""
    (path,), weights = targets(folder, stem), _weights_of(record.parts)
    with new_folder(path) as hidden:
        (hidden / FOLDER).mkdir()
        config = {"model_type": record.model_type, **record.model_settings}
        made: dict[str, NewFile] = {
            weights: write_safetensors(hidden / weights, record.model_state),
            CONFIG: write_json(hidden / CONFIG, config),
        }
        groups = None
        if record.optimizer_state is not None:
            made[OPTIMIZER] = write_safetensors(hidden / OPTIMIZER, optimizer_tensors(record.optimizer_state))
            groups = optimizer_groups(record.optimizer_state)
        write_manifest(hidden / STATE, record, made, first={"step": record.step, "epoch": record.epoch}, groups=groups)
    return path


def targets(folder: Path, stem: str) -> list[Path]:
    """The path that `write` gives a checkpoint of this stem."""
    return [folder / stem]


def verify_file(path: Path) -> list[str]:
    """What is wrong with the bytes of the files that are there, one sentence each."""
    try:
        if not os.path.lexists(path / STATE):
            read(path)
            return []
        return file_problems(path, read_manifest(path / STATE), hashed=True, optional=[OPTIMIZER])
    except CheckpointError as error:
        return [str(error)]
