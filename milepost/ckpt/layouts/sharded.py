"""A folder that several processes write together: each writes the pieces that it holds into a `__{rank}_0.distcp` of
its own.

PyTorch's torch.distributed.checkpoint opens the folder by `.metadata`, a pickle that is never opened here:
`tensors.json` says where the bytes of each tensor lie, so that any number of processes can map them. `manifest.json`
has the rest of the record.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt import collective, pickles
from milepost.ckpt.dtypes import BY_SAFETENSORS, DTYPES
from milepost.ckpt.layouts.base import ListedTensor
from milepost.ckpt.layouts.manifest_layout import Made, ManifestLayout, format_line
from milepost.ckpt.manifest import read_json, unreachable_behind, unreadable
from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError, Json
from milepost.ckpt.tensors import bring_in_tensors, checked_tensors, optimizer_state
from milepost.files import read_steadily, write_json
from milepost.lazy import Tensor, import_torch, torch

TORCH_METADATA, INDEX, MANIFEST = ".metadata", "tensors.json", "manifest.json"
PIECES = "__*.distcp"
MODEL, OPTIMIZER = "model.", "optimizer.state."  # how the names in a torch.distributed.checkpoint begin
MOST_DIMENSIONS = 8  # of a tensor; a model's have two


def _write_tensors(record: Checkpoint, folder: Path) -> Made:
    """Write the pieces and the index; other ranks write theirs meanwhile, in `collective.follow`."""
    from milepost.ckpt import shard_writer  # its import takes most of a second, and nothing else needs it

    state = shard_writer.state_of(record)
    collective.announce(record, folder)
    try:
        made, index = shard_writer.write(state, folder, group=record.shared_by)
    except shard_writer.CheckpointException as error:
        raise shard_writer.cause(error) from None
    made[INDEX] = write_json(folder / INDEX, index).entry
    _index(folder, {"files": made})  # never reveal what could not be read, such as more pieces than JSON may have
    return {**made}


def _load_weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    return checked_tensors(_tensors(path, manifest, _index(path, manifest), begin=MODEL), str(path))


def _load_optimizer(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    moments = _tensors(path, manifest, _index(path, manifest), begin=OPTIMIZER)
    return optimizer_state(moments, manifest["optimizer_groups"], str(path))


def _list_tensors(path: Path, manifest: Mapping[str, Any]) -> list[ListedTensor]:
    listed = []
    for name, entry in _index(path, manifest).items():
        part = "optimizer" if name.startswith(OPTIMIZER) else "weights"
        listed.append(ListedTensor(name.removeprefix(MODEL), part, entry["dtype"], tuple(entry["shape"])))
    return listed


# ---------------------------------------------------------------------------------------------------------------------
# Checking.


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the manifest lists the index and every file of pieces that is there."""
    for name in (TORCH_METADATA, INDEX):
        if name not in manifest["files"]:
            raise CheckpointError(path / MANIFEST, f"is damaged: it does not list {name}", EARLIER, kind="damaged")
    for extra in sorted({file.name for file in path.glob("*.distcp")} - manifest["files"].keys()):
        problem = "is not part of this checkpoint: its manifest does not list it"
        raise CheckpointError(path / extra, problem, "move it away", kind="refused")


def _check_bytes(path: Path, manifest: Mapping[str, Any]) -> list[CheckpointError]:
    """Check the index, and torch's metadata for those who open the folder with torch."""
    try:
        _index(path, manifest)
    except CheckpointError as error:
        return [error]
    return _torch_metadata_problems(path / TORCH_METADATA)


def _torch_metadata_problems(path: Path) -> list[CheckpointError]:
    """Return what is wrong with torch's metadata: torch would run whatever the pickle asks for."""
    try:
        foreign = pickles.forbidden_names(read_steadily(path), pickles.METADATA)
    except OSError as error:
        return [unreadable(path, error)]
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        return [CheckpointError(path, f"is damaged ({type(error).__name__})", EARLIER, kind="damaged")]
    if not foreign:
        return []
    listed = ", ".join(f"{name:.60}" for name in foreign[:8])
    problem = f"asks for Python objects that a checkpoint never needs ({listed})"
    return [CheckpointError(path, problem, "do not open this folder with torch", kind="refused")]


# ---------------------------------------------------------------------------------------------------------------------
# tensors.json: {name: {"dtype": "F32", "shape": [65, 16], "pieces": [[file, offset in bytes, rows], ...]}}. The pieces
# are consecutive rows in order, so that none can be missing or overlap.


def _index(path: Path, manifest: Mapping[str, Any]) -> dict[str, Json]:
    """Return the index; raise CheckpointError unless its pieces lie in the files and are no larger in all."""
    index, total = read_json(path / INDEX), 0
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    for name, entry in index.items():
        try:
            total += _claimed(entry, sizes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"is damaged: {name:.80} has no valid place in the files ({error!s:.80})"
            raise CheckpointError(path / INDEX, problem, EARLIER, kind="damaged") from error
    if total > sum(sizes.values()):
        problem = "is damaged: its tensors claim more bytes than the files hold"
        raise CheckpointError(path / INDEX, problem, EARLIER, kind="damaged")
    return index


def _claimed(entry: Any, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a tensor by its entry; raise ValueError, or what Python raises, if it is invalid."""
    shape, itemsize = entry["shape"], DTYPES[BY_SAFETENSORS[entry["dtype"]]].itemsize
    if (
        not isinstance(shape, list)
        or len(shape) > MOST_DIMENSIONS
        or any(type(size) is not int or size < 1 for size in shape)
    ):
        raise ValueError(f"shape {shape!r:.40}")
    row = math.prod(shape[1:]) * itemsize
    for file, begin, rows in entry["pieces"]:
        if type(begin) is not int or begin < 0 or begin % itemsize or type(rows) is not int or rows < 1:
            raise ValueError(f"rows {rows!r:.20} at {begin!r:.20}")
        if begin + rows * row > sizes[file]:
            raise ValueError(f"it claims more bytes than {file:.40} has")
    if sum(rows for _, _, rows in entry["pieces"]) != math.prod(shape[:1]):
        raise ValueError("its pieces are not all its rows")
    return math.prod(shape) * itemsize


def _tensors(path: Path, manifest: Mapping[str, Any], index: Mapping[str, Json], *, begin: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `begin`, without it: mapped, or joined from several pieces."""
    chosen = {name: entry for name, entry in index.items() if name.startswith(begin)}
    files = {file for entry in chosen.values() for file, *_ in entry["pieces"]}
    mapped = {file: _mapped(path / file, size=manifest["files"][file]["size"]) for file in files}
    return {name.removeprefix(begin): _joined(path, entry, mapped) for name, entry in chosen.items()}


def _mapped(file: Path, *, size: int) -> Tensor:
    """Map the bytes of the file; torch raises if it has become shorter."""
    import_torch()
    try:
        return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        if away := unreachable_behind(error):
            raise unreadable(file, away) from error
        problem = f"cannot be read ({str(error).splitlines()[0]:.120})"
        raise CheckpointError(file, problem, EARLIER, kind="damaged") from error


def _joined(path: Path, entry: Json, mapped: Mapping[str, Tensor]) -> Tensor:
    shape, dtype = entry["shape"], getattr(torch, BY_SAFETENSORS[entry["dtype"]])
    row = math.prod(shape[1:]) * dtype.itemsize
    parts = [mapped[file][begin : begin + rows * row].view(dtype) for file, begin, rows in entry["pieces"]]
    for (file, *_), part in zip(entry["pieces"], parts, strict=True):
        bring_in_tensors([part], path / file)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


LAYOUT = ManifestLayout(
    name="sharded",
    members=(PIECES, TORCH_METADATA, INDEX, MANIFEST),
    of_rank=r"__(\d{1,9})_0\.distcp",
    manifest=MANIFEST,
    head=format_line("milepost sharded"),
    markers=((TORCH_METADATA,), (INDEX, MANIFEST)),
    why_no_manifest="it was copied in part, or is another program's folder of torch.distributed.checkpoint",
    check_manifest=_check_manifest,
    check_bytes=_check_bytes,
    write_tensors=_write_tensors,
    load_weights=_load_weights,
    load_optimizer=_load_optimizer,
    list_tensors=_list_tensors,
)
