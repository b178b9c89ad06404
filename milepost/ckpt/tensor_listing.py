"""What a checkpoint holds, tensor by tensor: listed without reading any, and compared byte by byte."""

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from milepost.ckpt import archive
from milepost.ckpt.layouts import known_layout, sharded
from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.tensors import DTYPES, optimizer_tensors, tensor_shapes

DEEPEST = 16  # levels of dicts and lists in a file that are looked through
TORCH_NAMES = {short: str(dtype).removeprefix("torch.") for dtype, short in DTYPES.items()}


@dataclass(frozen=True)
class Held:
    """A tensor in one of a checkpoint's files; `part` is weights or optimizer."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes


def all_files(path: Path) -> list[Path]:
    """Every file of the checkpoint at `path`, in order of name; of one that is a folder, all that lie in it."""
    files = known_layout(path).files(path)
    found = [each for file in files for each in (sorted(file.rglob("*")) if file.is_dir() else [file])]
    return [file for file in found if file.is_file()]


def held(path: Path) -> list[Held]:
    """The tensors in the files of the checkpoint at `path`, as they are called there: headers are read, and no tensor's bytes.

    Raises CheckpointError if a file is damaged.
    """
    if known_layout(path).NAME == sharded.NAME:
        return list(_in_sharded(path))
    members = known_layout(path).MEMBERS
    tensors: list[Held] = []
    for file in all_files(path):
        if file.suffix == ".safetensors":
            tensors += _in_safetensors(file)
        elif archive.is_archive(file) and (not members or _is_among(file.relative_to(path).as_posix(), members)):
            tensors += _in_archive(file)
    return tensors


def _is_among(name: str, members: tuple[str, ...]) -> bool:
    """Whether a file of this name belongs to the checkpoint; of shards its members have a pattern."""
    return any(fnmatch.fnmatchcase(name, member) for member in members)


def _in_safetensors(file: Path) -> Iterator[Held]:
    for name, about in tensor_shapes(file).items():
        yield _held(name, *about, part=_part(file.name))


def _held(name: str, dtype: str, shape: tuple[int, ...], *, part: str) -> Held:
    """A tensor whose dtype is in safetensors' words."""
    bits = re.search(r"\d+", dtype)
    size = math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
    return Held(name, part, TORCH_NAMES.get(dtype, dtype), shape, size)


def _in_sharded(path: Path) -> Iterator[Held]:
    for name, about in sharded.shapes(path).items():
        part = "optimizer" if _is_optimizers(name) else "weights"
        yield _held(name.removeprefix(sharded.MODEL), *about, part=part)


def _in_archive(file: Path) -> Iterator[Held]:
    content, _ = archive.load(file)  # mapped from the file
    for key, value in content.items():
        part = "optimizer" if _is_optimizers(str(key)) else _part(file.name)
        for name, tensor in _walk(value, [str(key)] if isinstance(value, Tensor) else [], seen=set()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield Held(name, part, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _is_optimizers(key: str) -> bool:
    return key.startswith("optim")


def _part(name: str) -> str:
    return "optimizer" if name.endswith(("optimizer.pt", "optimizer.safetensors")) else "weights"


def _walk(value: Any, words: list[str], *, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors below `value` by their dotted names; what a file holds twice, or inside itself, is entered once."""
    if isinstance(value, Tensor):
        yield ".".join(words), value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen and len(words) < DEEPEST:
        seen.add(id(value))
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(each, [*words, str(key)], seen=seen)


# ---------------------------------------------------------------------------------------------------------------------
# Records, by their bytes.


def labelled(record: Checkpoint) -> dict[str, Tensor]:
    """Weights by their names, and the optimizer's tensors as `optimizer: {parameter}.{kind}`, whatever layout they came from."""
    return {**record.model_state, **{f"optimizer: {name}": tensor for name, tensor in _moments(record).items()}}


def _moments(record: Checkpoint) -> Mapping[str, Tensor]:
    if record.optimizer_state is None:
        return {}
    try:
        return optimizer_tensors(record.optimizer_state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{record.path}: its optimizer state is not in torch's form with param_names ({error})"
        ) from error


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, str]:
    """The tensors that are not the same in both, by name, and how they differ in words."""
    found = {}
    for name in [*one, *(name for name in other if name not in one)]:
        if difference := _difference(one.get(name), other.get(name)):
            found[name] = difference
    return found


def _difference(one: Tensor | None, other: Tensor | None) -> str | None:
    if one is None or other is None:
        return "only in the second" if one is None else "only in the first"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{_kind(one)} against {_kind(other)}"
    if (archive.bytes_of(one) == archive.bytes_of(other)).all():
        return None
    most = (one.cpu().double() - other.cpu().double()).abs().max().item()
    return f"max |difference| {most:.3g}" if most else "max |difference| 0, but other bytes"  # -0.0 and 0.0


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
