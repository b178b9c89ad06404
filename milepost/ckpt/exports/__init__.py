"""Exports: what other programs open, and no run goes on from. One file each, the same verbs in every one.

A layout keeps all that a run needs; an export keeps what its program has a place for, and refuses what it has none for.
"""

from pathlib import Path
from typing import Protocol, cast

from milepost.ckpt.exports import gguf, nanogpt, peft
from milepost.ckpt.exports.common import Proof
from milepost.ckpt.record import Checkpoint

__all__ = ["EXPORTS", "Export", "Proof", "exporter"]


class Export(Protocol):
    """What every export offers."""

    NAME: str
    NEEDS: tuple[str, ...]  # packages beyond requirements.txt, by the name that pip knows
    HOW: str  # to run it there, with {path} and its {name}
    RUN_STEM: str  # empty: it takes a name of the store's

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """The visible path of an export of this stem."""

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Writes the record as `targets(folder, stem)`; returns its path. Raises CheckpointError for what has no place in it."""

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """That what was written reads back with the record's tensors, as this form keeps them. Raises CheckpointError if not."""


EXPORTS = (gguf.NAME, nanogpt.NAME, peft.NAME)


def exporter(name: str, *, gguf_type: str = "f16") -> Export:
    """The export of this name, one of EXPORTS; `gguf_type` is one of gguf.TYPES."""
    made = {gguf.NAME: lambda: gguf.Gguf(gguf_type), nanogpt.NAME: nanogpt.NanoGpt, peft.NAME: peft.Peft}
    return cast(Export, made[name]())
