"""The lecture model of document 004 in one file: read only. Each head has weights of its own, which are joined; its ReLU is kept."""

from pathlib import Path

from milepost.ckpt.foreign import importing
from milepost.ckpt.foreign.importing import files, home, optimizer_file, verify_file
from milepost.ckpt.layouts import separated
from milepost.ckpt.record import Checkpoint, Json

__all__ = ["MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "verify_file"]

NAME = "lecture"
RUN_STEM = ""
MEMBERS: tuple[str, ...] = ()


def detect(path: Path) -> bool:
    """Whether `path` is an archive with tensors of single heads, and no half of a pair."""
    return importing.kind(path) == NAME and not separated.detect(path)


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone; the tensors are mapped and left unread."""
    return importing.peek(path, layout=NAME)


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the archive at `path`; raises CheckpointError in one sentence."""
    return importing.read(path, layout=NAME, optimizer=optimizer, verify=verify)
