"""The default layout: one `.pt` file, a torch archive with the seven keys of document 001 and the record's metadata.

The metadata is there twice: in the pickle for who opens the file with torch.load, and as the archive's JSON member, so that
listing a folder never unpickles one. Each member carries its CRC-32; `verify_file` checks them all. An archive without metadata is
another program's: `model`, `state_dict` or `model_state_dict`, `optimizer`, `global_step`, `iter_num` and the like are understood.
"""

from pathlib import Path

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import adopted, adopted_metadata, files, home, kind, optimizer_file, verify_file
from milepost.ckpt.layouts import separated
from milepost.ckpt.layouts.separated import read_model
from milepost.ckpt.manifest import plain_metadata
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, check_metadata
from milepost.files import new_file

__all__ = [
    "MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "targets", "verify_file", "write",
]  # fmt: skip

NAME = "unified"
RUN_STEM = ""
MEMBERS: tuple[str, ...] = ()


def detect(path: Path) -> bool:
    """Whether `path` is a torch archive that no other layout claims, to read or to refuse."""
    return archive.is_archive(path) and kind(path) == NAME and not separated.detect(path)


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone, tensors untouched; raises CheckpointError if the file is damaged. Only another program's is unpickled."""
    values = archive.read_metadata(path)
    if values is not None:
        return check_metadata(values, str(path))
    content, _ = archive.load(path)
    if content.get("metadata") is not None:  # torch.save of what torch.load gave
        return check_metadata(content["metadata"], str(path))
    return adopted_metadata(path, content, layout=NAME)


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record in `path`. `optimizer=False` leaves the optimizer's tensors on disk; `verify=True` checks every byte against its CRC.

    Raises CheckpointError in one sentence for whatever is wrong with the file. Never runs code from it.
    """
    problems = verify_file(path) if verify else []
    if problems:
        raise CheckpointError(problems[0])
    content, values = archive.load(path)
    values = (
        content.get("metadata") if values is None else values
    )  # torch.save of what torch.load gave loses the member
    if values is None:
        return adopted(path, content, layout=NAME, optimizer=optimizer)
    record = read_model(path, content, values)
    record.optimizer_state = content.get("optimizer_state_dict") if optimizer else None
    record.path, record.layout = path, NAME
    return record


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes `folder/stem.pt`, atomically and durably; returns its path. The caller holds the folder's lock."""
    (path,) = targets(folder, stem)
    values = plain_metadata(record)
    content = {
        "model_state_dict": record.model_state,
        "optimizer_state_dict": record.optimizer_state,
        "hyperparameters": values["hyperparameters"],
        "vocab_size": values["model_settings"].get("vocab_size"),
        "block_size": values["model_settings"].get("block_size"),
        "batch_size": values["hyperparameters"].get("BATCH_SIZE"),
        "step": record.step,
        "metadata": values,
    }
    with new_file(path) as file:
        archive.dump(content, file, metadata=values)
    return path


def targets(folder: Path, stem: str) -> list[Path]:
    """The paths that `write` gives a checkpoint of this stem, its head last."""
    return [folder / f"{stem}.pt"]
