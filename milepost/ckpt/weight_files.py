"""The weights of a folder as transformers saves it: safetensors, else torch archives; in one file, or in shards that an
index lists.

They are read in parts into memory of their own: mapping all of them and then copying them into a model would take twice
their size.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from milepost.ckpt import archive
from milepost.ckpt.foreign.keys import unwrapped
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.tensors import bring_in_tensors, checked_tensors, read_safetensors
from milepost.lazy import Tensor, torch

PARTS, SMALLEST = 16, 2**20  # number of parts to read the weights in, and the bytes below which no part is worth it
DOWNLOAD = "download the folder again"


@dataclass(frozen=True)
class Form:
    """A way in which the weights lie in the folder."""

    whole: str
    index: str
    shards: str  # a glob
    open: Callable[[Path], dict[str, Tensor]]


def read_weights(folder: Path, translate: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `translate` makes of the folder's tensors, each in memory of its own; it may only rename, transpose
    and omit.

    At most a sixteenth of their bytes, or the largest tensor, is in memory twice. Raises CheckpointError for what is
    missing, damaged or not a dense float.
    """
    found = checked_tensors(translate(mapped(folder)), str(folder))
    order = list(found)
    parts = list(_parts({name: tensor.nbytes for name, tensor in found.items()}))
    state: dict[str, Tensor] = {}
    for part in parts:
        found = translate(mapped(folder))  # map again: dropping the previous mapping frees the pages that were read
        bring_in_tensors((found[name] for name in part), folder)
        state |= {name: found[name].clone(memory_format=torch.contiguous_format) for name in part}
    return {name: state[name] for name in order}


def _parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names in parts of a sixteenth of the bytes, the largest first, while memory is empty."""
    limit, total = max(SMALLEST, sum(sizes.values()) // PARTS), 0
    part: list[str] = []
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if part and total + sizes[name] > limit:
            yield part
            part, total = [], 0
        part, total = [*part, name], total + sizes[name]
    yield part


def mapped(folder: Path) -> dict[str, Tensor]:
    """Return the folder's tensors by name, without the prefixes of torch.compile and DDP, mapped: none of their bytes is read yet.
    Raises CheckpointError.
    """
    form, files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        shard = form.open(file)
        if twice := sorted(shard.keys() & weights.keys()):
            raise CheckpointError(file, f"{twice[0]} is in an earlier shard too", DOWNLOAD, kind="damaged")
        weights |= shard
    listed = read_json(folder / form.index)["weight_map"] if len(files) > 1 or files[0].name != form.whole else {}
    if absent := sorted(listed.keys() - weights.keys()):
        problem = f"lists {absent[0]!r:.80}, which is in none of its files"
        raise CheckpointError(folder / form.index, problem, DOWNLOAD, kind="damaged")
    bare = {unwrapped(name): tensor for name, tensor in weights.items()}
    if len(bare) < len(weights):
        problem = "has tensors of one name, with and without the prefixes of torch.compile or DDP"
        raise CheckpointError(folder, problem, "save the model again without them", kind="not understood")
    return bare


def checksum_problems(folder: Path) -> list[CheckpointError]:
    """Return what is wrong with the bytes, by the checksums of torch archives; safetensors have none."""
    form, files = weight_files(folder)
    return [problem for file in files if form is PICKLED for problem in archive.verify(file)]


def weight_files(folder: Path) -> tuple[Form, list[Path]]:
    """Return the form of the weights and their files, chosen in the order of transformers: safetensors first, and a
    whole file before an index. Raise CheckpointError if none.
    """
    for form in (SAFETENSORS, PICKLED):
        if (folder / form.whole).is_file():
            return form, [folder / form.whole]
        if (folder / form.index).is_file():
            return form, _listed(folder, folder / form.index)
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10])
    problem = f"has no {SAFETENSORS.whole} and no {PICKLED.whole} (it holds {held})"
    raise CheckpointError(folder, problem, DOWNLOAD, kind="lacking")


def has_weights(folder: Path) -> bool:
    """Whether the folder has weights under the names of transformers, or the index of their shards."""
    return any(is_regular(folder / name) for form in (SAFETENSORS, PICKLED) for name in (form.whole, form.index))


def passed_over(folder: Path) -> str | None:
    """Return a note if an index lies beside weights in one file: other weights, of an earlier save or of none."""
    form, files = weight_files(folder)
    if files[0].name != form.whole or not (folder / form.index).is_file():
        return None
    return f"{folder}: its weights are those of {form.whole}, as for transformers; {form.index} is not used"


def _listed(folder: Path, index: Path) -> list[Path]:
    """Return the shards that the index lists; raise CheckpointError for one that is missing or lies elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "has no weight_map", DOWNLOAD, kind="not understood")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(index, f"names {outside[0]!r:.80}, which lies outside its folder", kind="refused")
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise CheckpointError(index, f"lists {missing[0]!r:.80}, which is missing", DOWNLOAD, kind="damaged")
    return [folder / name for name in names]


def _pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch archive, whose pickle is checked before torch opens it with weights_only."""
    if archive.first_bytes(file).startswith(b"\x80") and not archive.is_legacy(file):
        problem = "is a bare pickle, and is never opened"
        remedy = "load the folder with transformers, and let save_pretrained() write safetensors"
        raise CheckpointError(file, problem, remedy, kind="refused")
    tensors = archive.load(file)[0]
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            problem = f"{name!r:.80} is {type(tensor).__name__}, expected a tensor"
            raise CheckpointError(file, problem, kind="not understood")
    return tensors


SAFETENSORS = Form("model.safetensors", "model.safetensors.index.json", "model-*.safetensors", read_safetensors)
PICKLED = Form("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", _pickled)
