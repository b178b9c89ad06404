"""The tensors of a checkpoint: listed without reading any, and compared byte by byte."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.dtypes import BY_SAFETENSORS, name_of
from milepost.ckpt.layouts import Layout, known_layout
from milepost.ckpt.manifest import matches
from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.tensors import optimizer_tensors, tensor_shapes
from milepost.ckpt.torch_pickle import Header
from milepost.lazy import Tensor

MOST_LEVELS = 16  # of nested dicts and lists in a file


@dataclass(frozen=True)
class Held:
    """A tensor in a file of a checkpoint; `part` is weights or optimizer."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes in the file, without those that a tensor listed before has too


def all_files(path: Path) -> list[Path]:
    """Return every file of the checkpoint at `path` in order of name; of a folder, every file in it."""
    files = known_layout(path).files(path)
    found = [file for entry in files for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])]
    return [file for file in found if file.is_file()]


def held(path: Path) -> list[Held]:
    """Return the tensors of the checkpoint at `path` under their names in its files, from headers, without reading a
    tensor.

    Raises CheckpointError if a file is damaged.
    """
    layout = known_layout(path)
    if (listed := layout.listed_tensors(path)) is not None:
        return [_held(name, dtype, shape, part=part) for name, part, dtype, shape in listed]
    tensors: list[Held] = []
    for file in all_files(path):
        part = "optimizer" if layout.is_optimizer_file(path, file) else "weights"
        if file.suffix == ".safetensors":
            shapes = tensor_shapes(file).items()
            tensors += [_held(name, dtype, shape, part=part) for name, (dtype, shape) in shapes]
        elif archive.is_archive(file) and _belongs(layout, path, file):
            tensors += _in_archive(file, part)
    return tensors


def _belongs(layout: Layout, path: Path, file: Path) -> bool:
    """Whether an archive is part of the checkpoint: any file may lie in a folder."""
    return not layout.is_folder or matches(file.relative_to(path).as_posix(), layout.members)


def _held(name: str, dtype: str, shape: tuple[int, ...], *, part: str) -> Held:
    """Return a tensor whose dtype is in the words of safetensors."""
    bits = re.search(r"\d+", dtype)
    size = math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
    return Held(name, part, BY_SAFETENSORS.get(dtype, dtype), shape, size)


def _in_archive(file: Path, part: str) -> Iterator[Held]:
    content = archive.headers(file)
    left: dict[str, int] = {}  # bytes of each storage that no tensor before has: tied weights are in the file once
    for key, value in content.items():
        key_part = "optimizer" if str(key).startswith("optim") else part
        for name, tensor in _walk(value, [str(key)] if isinstance(value, Header) else [], seen=set()):
            size = min(tensor.size, left.setdefault(tensor.storage, tensor.storage_size))
            left[tensor.storage] -= size
            yield Held(name, key_part, tensor.dtype, tensor.shape, size)


def _walk(value: Any, path: list[str], *, seen: set[int]) -> Iterator[tuple[str, Header]]:
    """Yield the tensors below `value` by their dotted names; enter each container once."""
    if isinstance(value, Header):
        yield ".".join(path), value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen and len(path) < MOST_LEVELS:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(item, [*path, str(key)], seen=seen)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing records by their bytes.


def labelled(record: Checkpoint) -> dict[str, Tensor]:
    """Return weights by name and optimizer tensors as `optimizer: {parameter}.{kind}`, in any layout."""
    return {**record.model_state, **{f"optimizer: {name}": tensor for name, tensor in _moments(record).items()}}


def _moments(record: Checkpoint) -> Mapping[str, Tensor]:
    if record.optimizer_state is None:
        return {}
    try:
        return optimizer_tensors(record.optimizer_state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"its optimizer state is not in torch's form with param_names ({error})"
        raise CheckpointError(record.path or "checkpoint", problem, kind="not understood") from error


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors that are not the same in both, by name, with a description of the difference."""
    found = {}
    for name in [*first, *(name for name in second if name not in first)]:
        if difference := _difference(first.get(name), second.get(name)):
            found[name] = difference
    return found


def _difference(first: Tensor | None, second: Tensor | None) -> str | None:
    if first is None or second is None:
        return "only in the second" if first is None else "only in the first"
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"{_kind(first)} against {_kind(second)}"
    if (archive.bytes_of(first) == archive.bytes_of(second)).all():
        return None
    most = (first.cpu().double() - second.cpu().double()).abs().max().item()
    return f"max |difference| {most:.3g}" if most else "max |difference| 0, but other bytes"  # -0.0 and 0.0


def _kind(tensor: Tensor) -> str:
    return f"{name_of(tensor.dtype)} {tuple(tensor.shape)}"
