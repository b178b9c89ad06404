"""Two files: `<stem>-model.pt` to share and to generate from, `<stem>-optimizer.pt` to go on from (document 002).

Both are torch archives and carry the same save id, so that halves of different saves are never taken for a pair. The model's half
is the head: a pair is there when it is.
"""

from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import adopted
from milepost.ckpt.foreign.keys import WEIGHTS, keys_seen
from milepost.ckpt.manifest import plain_metadata
from milepost.ckpt.record import (
    Checkpoint,
    CheckpointError,
    Json,
    check_metadata,
    from_metadata,
    metadata,
    note_missing_optimizer,
    without_optimizer,
)
from milepost.ckpt.tensors import checked_tensors
from milepost.files import new_group, written
from milepost.paths import is_real_file

NAME = "separated"
RUN_STEM = ""
MEMBERS: tuple[str, ...] = ()
MODEL, OPTIMIZER = "-model.pt", "-optimizer.pt"


def detect(path: Path) -> bool:
    """Whether `path` is a half of such a pair: an archive whose metadata says so, or that holds nothing but optimizer states."""
    if not archive.is_archive(path) or not path.name.endswith((MODEL, OPTIMIZER)):
        return False
    return _half(path) is not None


def _half(path: Path) -> str | None:
    """`model` or `optimizer`, as the file itself says; None if it says neither."""
    try:
        half = archive.half(path)
    except CheckpointError:
        return "model" if path.name.endswith(MODEL) else "optimizer"  # damaged: for this layout to refuse
    if half in ("model", "optimizer"):
        return half
    words = archive.words(path)  # another program's; of ours there are none
    if ("optimizer_states" in words) is not path.name.endswith(OPTIMIZER):
        return None
    if path.name.endswith(OPTIMIZER):
        return None if words & set(WEIGHTS) else "optimizer"
    return "model" if {"model_state_dict", "global_step"} <= words and _sibling(path, OPTIMIZER).is_file() else None


def home(path: Path) -> Path | None:
    """The model's half; None for an optimizer's half alone, which is no checkpoint."""
    if path.name.endswith(MODEL):
        return path
    model = _sibling(path, MODEL)
    return model if model.is_file() else None


def _sibling(path: Path, suffix: str) -> Path:
    stem = path.name.removesuffix(MODEL).removesuffix(OPTIMIZER)
    return path.with_name(stem + suffix)


def files(path: Path) -> list[Path]:
    """The files it consists of, the head last."""
    return [file for file in (_sibling(path, OPTIMIZER), _sibling(path, MODEL)) if file.is_file()]


def optimizer_file(path: Path) -> Path | None:
    """The file to do without for a checkpoint that only generates."""
    return _sibling(path, OPTIMIZER)


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone, of either half; raises CheckpointError if the model's half is damaged or not there."""
    model = _model_half(path)
    own = archive.read_metadata(model)
    if own is None:
        return metadata(_read_foreign(model, _sibling(path, OPTIMIZER), archive.load(model)[0], whole=False))
    values = check_metadata(own, str(model))
    other = _sibling(path, OPTIMIZER)
    if not other.is_file():
        return without_optimizer(values)
    _check_pair(model, other)
    return values


def _model_half(path: Path) -> Path:
    model = _sibling(path, MODEL)
    if not model.is_file():
        raise CheckpointError(f"{path}: holds only an optimizer's state; its model's half {model.name} is not there")
    return model


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the pair, by either half. Without the optimizer's half it only generates, with a note.

    Raises CheckpointError in one sentence, for halves of different saves too.
    """
    problems = verify_file(path) if verify else []
    if problems:
        raise CheckpointError(problems[0])
    model, other = _model_half(path), _sibling(path, OPTIMIZER)
    content, values = archive.load(model)
    if values is None:
        return _read_foreign(model, other, content, optimizer=optimizer)
    record = read_model(model, content, {name: value for name, value in values.items() if name != "half"})
    if other.is_file():
        _check_pair(model, other)
        record.optimizer_state = _optimizer_of(archive.load(other)[0], other) if optimizer else None
    else:
        note_missing_optimizer(record, other)
    record.path, record.layout = model, NAME
    return record


def _read_foreign(
    model: Path, other: Path, content: dict[Any, Any], *, optimizer: bool = True, whole: bool = True
) -> Checkpoint:
    """A pair that another program wrote, known to belong together by its step."""
    if other.is_file() and optimizer:
        rest, _ = archive.load(other)
        if rest.get("global_step") != content.get("global_step"):
            raise CheckpointError(
                f"{other}: belongs to another step than {model.name}: move it away to open {model.name} alone"
            )
        content = {"epoch": rest.get("epoch"), **content, "optimizer": _optimizer_of(rest, other)}
    return adopted(model, content, layout=NAME, optimizer=optimizer, whole=whole)


def read_model(path: Path, content: dict[Any, Any], values: Json) -> Checkpoint:
    """The record of an archive's weights and metadata, without an optimizer; raises CheckpointError if the weights are not there."""
    if "model_state_dict" not in content:
        raise CheckpointError(
            f"{path}: does not contain model_state_dict (keys seen: {keys_seen(content)}): it may be damaged or another program's; try an earlier checkpoint"
        )
    model_state = checked_tensors(content["model_state_dict"], f"{path}: model_state_dict")
    return from_metadata(values, model_state=model_state, optimizer_state=None, where=str(path))


def _check_pair(model: Path, other: Path) -> None:
    ids = [(archive.read_metadata(half) or {}).get("save_id") for half in (model, other)]
    if ids[0] != ids[1]:
        raise CheckpointError(
            f"{other}: belongs to another save than {model.name} ({ids[1]!r:.40}, not {ids[0]!r:.40}): "
            f"move it away to open {model.name} alone"
        )


def parts_of(head: Path, folder: Path) -> list[Path]:
    """The visible optimizer's half in `folder` that is of the same save as `head`, the model's half of a killed save or removal."""
    other = _sibling(folder / head.name, OPTIMIZER)
    if not head.name.endswith(MODEL) or not (is_real_file(head) and is_real_file(other)):
        return []
    try:
        model, optimizer = (archive.read_metadata(half) for half in (head, other))
    except CheckpointError:
        return []
    same = isinstance(model, dict) and isinstance(optimizer, dict) and optimizer.get("half") == "optimizer"
    return [other] if same and model.get("save_id") == optimizer.get("save_id") is not None else []


def _optimizer_of(content: dict[Any, Any], path: Path) -> dict[str, Any]:
    states = content.get("optimizer_states")
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        raise CheckpointError(f"{path}: expected optimizer_states with one optimizer's state: the file is damaged")
    return states[0]


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes both halves, or the model's alone for a record without an optimizer; returns the model's path."""
    paths = targets(folder, stem) if record.optimizer_state is not None else targets(folder, stem)[-1:]
    values = plain_metadata(record)
    mark = {"save_id": record.save_id, "run_id": record.run_id, "step": record.step}
    with new_group(folder, [path.name for path in paths]) as hidden:
        if record.optimizer_state is not None:
            content = {"optimizer_states": [record.optimizer_state], "lr_scheduler_states": [values["schedule"]]}
            where = {"global_step": record.step, "epoch": record.epoch}
            with written(hidden / paths[0].name) as file:
                archive.dump(content | where, file, metadata=mark | {"half": "optimizer"})
        config = values["model_settings"] | {"model_type": record.model_type}
        with written(hidden / paths[-1].name) as file:
            archive.dump(
                {
                    "model_state_dict": record.model_state,
                    "global_step": record.step,
                    "config": config,
                    "metadata": values,
                },
                file,
                metadata=values | {"half": "model"},
            )
    return paths[-1]


def targets(folder: Path, stem: str) -> list[Path]:
    """The paths that `write` gives a checkpoint of this stem, its head last."""
    return [folder / f"{stem}{OPTIMIZER}", folder / f"{stem}{MODEL}"]


def verify_file(path: Path) -> list[str]:
    """What is wrong with the bytes of the halves that are there, one sentence each."""
    try:
        _model_half(path)
    except CheckpointError as error:
        return [str(error)]
    return [problem for file in files(path) for problem in archive.verify(file)]
