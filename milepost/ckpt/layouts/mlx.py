"""A safetensors file with flat names, as MLX saves a model (document 000), read only; `<stem>_state.json` beside it tells step, epoch
and metrics.
"""

from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import adopted, adopted_metadata, optimizer_file
from milepost.ckpt.foreign.keys import LOSSES
from milepost.ckpt.layouts import huggingface, stepfiles
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import Checkpoint, CheckpointError, Json
from milepost.ckpt.tensors import read_safetensors

__all__ = ["MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "verify_file"]

NAME = "mlx"
RUN_STEM = ""
MEMBERS: tuple[str, ...] = ()


def detect(path: Path) -> bool:
    """Whether `path` is a safetensors file that is no part of another layout's checkpoint, or the state JSON of one."""
    if not path.name.endswith((stepfiles.STATE, stepfiles.WEIGHTS)) or path.is_dir() or stepfiles.detect(path):
        return False
    weights = _weights(path)
    if weights != path and not is_regular(weights):
        return False
    optimizer = weights.name.endswith(stepfiles.OPTIMIZER)
    member = weights.name in huggingface.MEMBERS and huggingface.detect(weights.parent)
    return not (optimizer or member or archive.is_archive(weights))


def _weights(path: Path) -> Path:
    return path.with_name(_stem(path) + stepfiles.WEIGHTS)


def _state(path: Path) -> Path:
    return path.with_name(_stem(path) + stepfiles.STATE)


def _stem(path: Path) -> str:
    return path.name.removesuffix(stepfiles.STATE).removesuffix(stepfiles.WEIGHTS)


def home(path: Path) -> Path | None:
    """The weights' path; alone, without a state JSON, they may be half of a checkpoint that is being written."""
    return _weights(path) if is_regular(_state(path)) else None


def files(path: Path) -> list[Path]:
    """The files it consists of."""
    return [_weights(path), *([_state(path)] if is_regular(_state(path)) else [])]


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone; the tensors are mapped and left unread."""
    return adopted_metadata(_weights(path), _content(path), layout=NAME)


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the file; raises CheckpointError in one sentence. There are no checksums to `verify`."""
    return adopted(_weights(path), _content(path), layout=NAME)


def _content(path: Path) -> dict[str, Any]:
    """The weights, and what the state JSON says of the training, its metrics among it."""
    values = read_json(_state(path)) if is_regular(_state(path)) else {}
    metrics = values.get("metrics")
    words = (metrics if isinstance(metrics, dict) else {}) | values
    said = {name: words[name] for name in ("step", "epoch", *LOSSES) if name in words}
    return {"model": read_safetensors(_weights(path)), **said}


def verify_file(path: Path) -> list[str]:
    """What is wrong with the file's structure; it has no checksums."""
    try:
        read(path)
    except CheckpointError as error:
        return [str(error)]
    return []
