"""Exports: files that other programs open, and that no run resumes from. One file each, with the same verbs.

A layout holds all that a run needs; an export holds what its program can represent, and refuses anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from milepost.ckpt.record import Checkpoint
from milepost.registry import imported

if TYPE_CHECKING:
    from milepost.ckpt.exports.common import Proof

__all__ = ["EXPORTS", "Export", "exporter"]


class Export(Protocol):
    """The traits and verbs of every export."""

    name: str
    needs: tuple[str, ...]  # packages beyond requirements.txt, by their names on PyPI
    trains: bool  # whether it holds the optimizer's state, with which its program trains on
    run_stem: str  # as in a Layout; empty: named by model, source, step and time

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the visible path of an export of this stem."""

    def how(self, path: Path) -> str:
        """Return the command that runs the export at `path` there, to be pasted: in a shell, or in Python."""

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the record; return its path. Raises CheckpointError for what the program cannot represent."""

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Read the export back and compare its tensors with the record's. Raises CheckpointError if they differ."""


EXPORTS = {  # name: its class, which is imported with torch when it is first used
    "gguf": "milepost.ckpt.exports.gguf:Gguf",
    "nanogpt": "milepost.ckpt.exports.nanogpt:NanoGpt",
    "lecture": "milepost.ckpt.exports.lecture:Lecture",
    "peft": "milepost.ckpt.exports.peft:Peft",
}


def exporter(name: str, *, gguf_type: str = "f16") -> Export:
    """Return the export of this name, one of EXPORTS; `gguf_type` is one of gguf.TYPES."""
    make = imported(EXPORTS[name])
    return cast(Export, make(gguf_type) if name == "gguf" else make())
