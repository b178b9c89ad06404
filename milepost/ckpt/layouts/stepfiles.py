"""Files by step: `step_000100.safetensors`, `step_000100_optimizer.safetensors` and, last, `step_000100_state.json` (document 000).

The names repeat from run to run, so they are written into the run's own folder. The state JSON is the head and the manifest: step,
epoch and metrics for people, then everything else of the record, and the sha256 of the other files.
"""

from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.manifest import (
    check_files,
    file_problems,
    manifest_metadata,
    read_json,
    read_manifest,
    sha256,
    write_manifest,
)
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, from_metadata
from milepost.ckpt.tensors import (
    checked_tensors,
    optimizer_groups,
    optimizer_tensors,
    read_safetensors,
    take_optimizer,
    write_safetensors,
)
from milepost.files import new_group
from milepost.paths import is_real_file

NAME = "stepfiles"
RUN_STEM = "step_{step:06d}"
MEMBERS: tuple[str, ...] = ()
STATE, OPTIMIZER, WEIGHTS = "_state.json", "_optimizer.safetensors", ".safetensors"


def detect(path: Path) -> bool:
    """Whether `path` is a state JSON with a manifest, or one of the files beside one."""
    if path.is_dir() or not path.name.endswith((STATE, OPTIMIZER, WEIGHTS)):
        return False
    state = _sibling(path, STATE)
    if not state.is_file():
        return False
    try:
        return "files" in read_json(state)
    except CheckpointError:
        return not archive.is_archive(state)  # damaged: for this layout to refuse


def _sibling(path: Path, suffix: str) -> Path:
    stem = path.name.removesuffix(STATE).removesuffix(OPTIMIZER).removesuffix(WEIGHTS)
    return path.with_name(stem + suffix)


def home(path: Path) -> Path | None:
    """The weights' file, once the state JSON says that all are there."""
    return _sibling(path, WEIGHTS)


def files(path: Path) -> list[Path]:
    """The files it consists of, the head last."""
    return [file for suffix in (WEIGHTS, OPTIMIZER, STATE) if (file := _sibling(path, suffix)).is_file()]


def optimizer_file(path: Path) -> Path | None:
    """The file to do without for a checkpoint that only generates."""
    return _sibling(path, OPTIMIZER)


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone; raises CheckpointError if the state JSON is damaged."""
    return manifest_metadata(path.parent, _manifest(path), optimizer=_sibling(path, OPTIMIZER).name)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest about the files that lie beside it now: all of them may have been given another name."""
    manifest = read_manifest(_sibling(path, STATE))
    suffixes = {name: OPTIMIZER if name.endswith(OPTIMIZER) else WEIGHTS for name in manifest["files"]}
    manifest["files"] = {_sibling(path, suffixes[name]).name: entry for name, entry in manifest["files"].items()}
    return manifest


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the files, by any of them. Without the optimizer's file it only generates, with a note."""
    state, weights, other = (_sibling(path, suffix) for suffix in (STATE, WEIGHTS, OPTIMIZER))
    manifest = _manifest(path)
    begins = [weights.name, *[other.name] * optimizer]
    check_files(path.parent, manifest, hashed=verify, begins=begins, optional=[other.name])
    model_state = checked_tensors(read_safetensors(weights), str(weights))
    record = from_metadata(manifest["metadata"], model_state=model_state, optimizer_state=None, where=str(state))
    take_optimizer(record, other, manifest["optimizer_groups"], wanted=optimizer)
    record.path, record.layout = weights, NAME
    return record


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes the files, the state JSON last; returns the weights' path."""
    weights, other, state = targets(folder, stem)
    full = record.optimizer_state is not None
    names = [weights.name, *([other.name] if full else []), state.name]
    with new_group(folder, names) as hidden:
        made = {weights.name: write_safetensors(hidden / weights.name, record.model_state)}
        if record.optimizer_state is not None:
            made[other.name] = write_safetensors(hidden / other.name, optimizer_tensors(record.optimizer_state))
        losses = {"validation_loss": record.validation_loss, "best_loss": record.best_loss}
        metrics = {name: value for name, value in losses.items() if value is not None}
        first = {"step": record.step, "epoch": record.epoch, "metrics": metrics}
        groups = optimizer_groups(record.optimizer_state) if record.optimizer_state else None
        write_manifest(hidden / state.name, record, made, first=first, groups=groups)
    return weights


def targets(folder: Path, stem: str) -> list[Path]:
    """The paths that `write` gives a checkpoint of this stem, its head last."""
    return [folder / f"{stem}{suffix}" for suffix in (WEIGHTS, OPTIMIZER, STATE)]


def parts_of(head: Path, folder: Path) -> list[Path]:
    """The visible files in `folder` whose bytes `head`, the state JSON of a killed save or removal, has the sha256 of."""
    if not head.name.endswith(STATE) or not is_real_file(head):
        return []
    try:
        manifest = read_manifest(head)
        entries = {} if manifest["problem"] else manifest["files"]
        parts = [_sibling(folder / head.name, suffix) for suffix in (WEIGHTS, OPTIMIZER)]
        return [part for part in parts if is_real_file(part) and _is_entry(part, entries.get(part.name))]
    except (CheckpointError, OSError):
        return []


def _is_entry(part: Path, entry: dict[str, Json] | None) -> bool:
    return entry is not None and part.stat().st_size == entry["size"] and sha256(part) == entry["sha256"]


def verify_file(path: Path) -> list[str]:
    """What is wrong with the bytes of the files that are there, one sentence each."""
    try:
        return file_problems(path.parent, _manifest(path), hashed=True, optional=[_sibling(path, OPTIMIZER).name])
    except CheckpointError as error:
        return [str(error)]
