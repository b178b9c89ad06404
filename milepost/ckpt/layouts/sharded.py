"""A folder that several processes write together: of each the pieces that it holds, in a `__{rank}_0.distcp` of its own.

PyTorch's torch.distributed.checkpoint opens it, by `.metadata`, which is a pickle and is never opened here: `tensors.json` says
where the bytes of each tensor lie, so that they are mapped from the files by however many processes there are. `manifest.json` has the
rest of the record and is written last.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milepost.ckpt import collective, pickles
from milepost.ckpt.foreign.importing import files, home, optimizer_file
from milepost.ckpt.manifest import check_files, file_problems, is_regular, read_json, read_manifest, write_manifest
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, from_metadata
from milepost.ckpt.tensors import DTYPES, checked_tensors, optimizer_groups, optimizer_state
from milepost.files import new_folder, write_json

__all__ = [
    "MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "shapes", "targets", "verify_file",
    "write",
]  # fmt: skip

NAME = "sharded"
RUN_STEM = ""
TORCHS, INDEX, MANIFEST = ".metadata", "tensors.json", "manifest.json"
PIECES = "__*.distcp"
MEMBERS = (TORCHS, PIECES, INDEX, MANIFEST)
MODEL, OPTIMIZER = "model.", "optimizer.state."  # how the names in a torch.distributed.checkpoint begin
NAMED = {short: dtype for dtype, short in DTYPES.items()}
DEEPEST = 8  # dimensions of a tensor; a model's have two


def detect(path: Path) -> bool:
    """Whether `path` is a folder of torch.distributed.checkpoint's, or one of ours that lacks its `.metadata`."""
    return is_regular(path / TORCHS) or (is_regular(path / INDEX) and is_regular(path / MANIFEST))


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone; raises CheckpointError if the manifest is damaged, or a file is missing or of another size."""
    manifest = _manifest(path)
    check_files(path, manifest)
    return manifest["metadata"]


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The whole record, in this process alone; raises CheckpointError in one sentence."""
    problems = verify_file(path) if verify else []
    if problems:
        raise CheckpointError(problems[0])
    manifest = _manifest(path)
    check_files(path, manifest, begins=manifest["files"])
    index = _index(path, manifest)
    model_state = checked_tensors(_tensors(path, manifest, index, begin=MODEL), str(path))
    record = from_metadata(
        manifest["metadata"], model_state=model_state, optimizer_state=None, where=str(path / MANIFEST)
    )
    if optimizer and "optimizer" in record.parts:
        moments = _tensors(path, manifest, index, begin=OPTIMIZER)
        record.optimizer_state = optimizer_state(moments, manifest["optimizer_groups"], str(path))
    record.path, record.layout = path, NAME
    return record


def shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor, by its name in the folder, no tensor's bytes read; raises CheckpointError."""
    index = _index(path, _manifest(path))
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in index.items()}


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes the folder `folder/stem`, its manifest last; returns it. The caller holds the folder's lock.

    Of a record that is shared, the other processes write their pieces meanwhile, in `together.follow`.
    """
    from milepost.ckpt import shard_writer  # which takes most of a second, and nothing else needs

    (path,) = targets(folder, stem)
    state, groups = shard_writer.state_of(record), None
    if record.optimizer_state is not None:
        groups = optimizer_groups(record.optimizer_state)
    with new_folder(path) as hidden:
        collective.announce(record, hidden)
        try:
            made, index = shard_writer.write(state, hidden, group=record.shared_by)
        except shard_writer.CheckpointException as error:
            raise shard_writer.cause(error) from None
        made[INDEX] = write_json(hidden / INDEX, index).entry
        _index(hidden, {"files": made})  # what could not be read, as more pieces than JSON may have, never appears
        write_manifest(hidden / MANIFEST, record, made, first={"format": "milepost sharded"}, groups=groups)
    return path


def targets(folder: Path, stem: str) -> list[Path]:
    """The path that `write` gives a checkpoint of this stem."""
    return [folder / stem]


def verify_file(path: Path) -> list[str]:
    """What is wrong with the folder's bytes, one sentence each."""
    try:
        manifest = _manifest(path)
        problems = file_problems(path, manifest, hashed=True)
        if problems:
            return problems
        _index(path, manifest)
        return _asked_of_torch(path / TORCHS)
    except CheckpointError as error:
        return [str(error)]


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, which must name each file of pieces that is there; raises CheckpointError."""
    if not os.path.lexists(path / MANIFEST):
        raise CheckpointError(
            f"{path}: is a folder of torch.distributed.checkpoint without {MANIFEST}, which is written last and says what model "
            "this is: take an earlier checkpoint"
        )
    manifest = read_manifest(path / MANIFEST)
    for name in (TORCHS, INDEX):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path / MANIFEST}: does not name {name}: the file is damaged")
    for extra in sorted({file.name for file in path.glob("*.distcp")} - manifest["files"].keys()):
        raise CheckpointError(
            f"{path / extra}: is no part of this checkpoint, its manifest does not name it: move it away"
        )
    return manifest


def _asked_of_torch(path: Path) -> list[str]:
    """What is wrong with torch's own metadata for whoever opens the folder with torch: it would run what the pickle asks for."""
    try:
        foreign = pickles.foreign(path.read_bytes(), pickles.METADATA)
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        return [f"{path}: is damaged ({type(error).__name__}): take an earlier checkpoint"]
    listed = ", ".join(f"{wanted:.60}" for wanted in foreign[:8])
    return [f"{path}: asks for Python objects that a checkpoint never needs ({listed})"] if foreign else []


# ---------------------------------------------------------------------------------------------------------------------
# tensors.json: {name: {"dtype": "F32", "shape": [65, 16], "pieces": [[file, where its bytes begin, rows], ...]}}. The pieces are the
# rows in their order, one after the other, so that none can be missing or overlap.


def _index(path: Path, manifest: Mapping[str, Any]) -> dict[str, Json]:
    """The index, each piece inside its file and all pieces together no larger than the files; raises CheckpointError."""
    index, total = read_json(path / INDEX), 0
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    for name, entry in index.items():
        try:
            total += _claimed(entry, sizes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path / INDEX}: {name:.80} has no sound place in the files ({error!s:.80}): it is damaged"
            ) from error
    if total > sum(sizes.values()):
        raise CheckpointError(f"{path / INDEX}: its tensors claim more bytes than the files hold")
    return index


def _claimed(entry: Any, sizes: Mapping[str, int]) -> int:
    """The bytes of a tensor by its entry of the index; raises ValueError, or what Python raises, if it is not as it must be."""
    shape, itemsize = entry["shape"], NAMED[entry["dtype"]].itemsize
    if not isinstance(shape, list) or len(shape) > DEEPEST or any(type(side) is not int or side < 1 for side in shape):
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
    """The tensors whose names begin so, without that beginning: mapped from the file, or joined where they are in several pieces."""
    wanted = {name: entry for name, entry in index.items() if name.startswith(begin)}
    files = {file for entry in wanted.values() for file, *_ in entry["pieces"]}
    mapped = {file: _mapped(path / file, size=manifest["files"][file]["size"]) for file in files}
    return {name.removeprefix(begin): _joined(entry, mapped) for name, entry in wanted.items()}


def _mapped(file: Path, *, size: int) -> Tensor:
    """The bytes of the file, of which none is read yet; torch refuses a file that has fewer by now."""
    try:
        return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[0]:.120})") from error


def _joined(entry: Json, mapped: Mapping[str, Tensor]) -> Tensor:
    shape, dtype = entry["shape"], NAMED[entry["dtype"]]
    row = math.prod(shape[1:]) * dtype.itemsize
    parts = [mapped[file][begin : begin + rows * row].view(dtype) for file, begin, rows in entry["pieces"]]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)
