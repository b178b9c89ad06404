"""Exports: files that other programs open, and that no run resumes from. One file each, with the same verbs.

A layout holds all that a run needs; an export holds what its program can represent, and refuses anything else.
"""

from pathlib import Path
from typing import Protocol, cast

from milepost.ckpt.exports import gguf, lecture, nanogpt, peft
from milepost.ckpt.exports.common import Proof
from milepost.ckpt.record import Checkpoint

__all__ = ["EXPORTS", "Export", "Proof", "exporter"]


class Export(Protocol):
    """The traits and verbs of every export."""

    name: str
    needs: tuple[str, ...]  # packages beyond requirements.txt, by their names on PyPI
    how: str  # the command that runs it there, with {path} and its {name}
    trains: bool  # whether it holds the optimizer's state, with which its program trains on
    run_stem: str  # as in a Layout; empty: named by model, source, step and time

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the visible path of an export of this stem."""

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the record; return its path. Raises CheckpointError for what the program cannot represent."""

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Read the export back and compare its tensors with the record's. Raises CheckpointError if they differ."""


EXPORTS = (gguf.NAME, nanogpt.NAME, lecture.NAME, peft.NAME)


def exporter(name: str, *, gguf_type: str = "f16") -> Export:
    """Return the export of this name, one of EXPORTS; `gguf_type` is one of gguf.TYPES."""
    if name == gguf.NAME:
        return cast(Export, gguf.Gguf(gguf_type))
    return cast(Export, {nanogpt.NAME: nanogpt.NanoGpt, lecture.NAME: lecture.Lecture, peft.NAME: peft.Peft}[name]())
