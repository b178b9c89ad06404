"""The weights of a folder as transformers saves it: safetensors, else torch archives; in one file, or in shards that an index lists.

They are read in parts into memory of their own: mapped as a whole, and then copied into a model, they would take their size twice.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milepost.ckpt import archive
from milepost.ckpt.manifest import read_json
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.tensors import checked_tensors, read_safetensors

PARTS, SMALLEST = 16, 2**20  # in how many parts the weights are read, and bytes below which one is not worth it


@dataclass(frozen=True)
class Form:
    """One way in which the weights lie in the folder."""

    whole: str
    index: str
    shards: str  # a glob
    open: Callable[[Path], dict[str, Tensor]]


def read_weights(folder: Path, translate: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `translate` makes of the folder's tensors, each in memory of its own; it must only rename, turn and leave out.

    At most a sixteenth of their bytes, or the largest of them, is in memory twice. Raises CheckpointError for what is missing,
    damaged or no dense float.
    """
    found = checked_tensors(translate(mapped(folder)), str(folder))
    order = list(found)
    parts = list(_parts({name: tensor.nbytes for name, tensor in found.items()}))
    state: dict[str, Tensor] = {}
    for part in parts:
        found = translate(mapped(folder))  # anew: with the mapping before, what was read of it goes out of memory
        state |= {name: found[name].clone(memory_format=torch.contiguous_format) for name in part}
    return {name: state[name] for name in order}


def _parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """All names, those of the largest first, while little is in memory yet, in parts of a sixteenth of the bytes or of one name."""
    limit, taken = max(SMALLEST, sum(sizes.values()) // PARTS), 0
    part: list[str] = []
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if part and taken + sizes[name] > limit:
            yield part
            part, taken = [], 0
        part, taken = [*part, name], taken + sizes[name]
    yield part


def mapped(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors by name, mapped: none of their bytes is read yet. Raises CheckpointError."""
    form, files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        shard = form.open(file)
        if twice := sorted(shard.keys() & weights.keys()):
            raise CheckpointError(f"{file}: {twice[0]} is in an earlier shard too")
        weights |= shard
    listed = read_json(folder / form.index)["weight_map"] if len(files) > 1 or files[0].name != form.whole else {}
    if absent := sorted(listed.keys() - weights.keys()):
        raise CheckpointError(f"{folder / form.index}: names {absent[0]!r:.80}, which is in none of its files")
    return weights


def damaged(folder: Path) -> list[str]:
    """What is wrong with the bytes, one sentence each: torch's archives carry a checksum of each tensor, safetensors have none."""
    form, files = weight_files(folder)
    return [problem for file in files if form is PICKLED for problem in archive.verify(file)]


def weight_files(folder: Path) -> tuple[Form, list[Path]]:
    """The form of the weights, safetensors if they are there, and their files; raises CheckpointError if there are none."""
    for form in (SAFETENSORS, PICKLED):
        if (folder / form.index).is_file():
            return form, _listed(folder, folder / form.index)
        if (folder / form.whole).is_file():
            return form, [folder / form.whole]
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10])
    raise CheckpointError(f"{folder}: has no {SAFETENSORS.whole} and no {PICKLED.whole} (it holds {held})")


def _listed(folder: Path, index: Path) -> list[Path]:
    """The shards that the index names; raises CheckpointError for one that is missing or lies elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names {outside[0]!r:.80}, which lies outside its folder")
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise CheckpointError(f"{index}: names {missing[0]!r:.80}, which is not there")
    return [folder / name for name in names]


def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch archive, whose pickle is looked through before torch opens it with weights_only."""
    if archive.head(file).startswith(b"\x80"):
        raise CheckpointError(
            f"{file}: is a bare pickle, as torch wrote it before 1.6, which is never opened: let transformers open the "
            "folder and save_pretrained() write safetensors"
        )
    tensors = archive.load(file)[0]
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {name!r:.80} is {type(tensor).__name__}, expected a tensor")
    return tensors


SAFETENSORS = Form("model.safetensors", "model.safetensors.index.json", "model-*.safetensors", read_safetensors)
PICKLED = Form("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", _pickled)
