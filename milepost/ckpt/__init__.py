"""Checkpoints: the public functions of this package."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milepost.ckpt.bases import base_in, find_base, is_beside, is_replaced, note_use
from milepost.ckpt.best import best_is_kept, keep_best, keep_saved_best, pending_best, saved_best
from milepost.ckpt.collective import follow, leading, not_finite
from milepost.ckpt.exports import EXPORTS, exporter
from milepost.ckpt.finding import (
    BEST_FOLDER,
    best,
    due,
    find,
    latest,
    lowest_loss,
    orphans,
)
from milepost.ckpt.index import Found
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.opening import load, load_named
from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.resolving import listing, resolve, several, whole_folder
from milepost.ckpt.retention import prune
from milepost.ckpt.saving import copy_into, free_space_problem, save, why_not_saved
from milepost.ckpt.selection import Selection, select
from milepost.ckpt.tensor_listing import held

if TYPE_CHECKING:
    from milepost.ckpt.conversion import convert, export

__all__ = [
    "BEST_FOLDER",
    "EXPORTS",
    "WRITERS",
    "Checkpoint",
    "CheckpointError",
    "Found",
    "Selection",
    "base_in",
    "best",
    "best_is_kept",
    "convert",
    "copy_into",
    "due",
    "export",
    "exporter",
    "find",
    "find_base",
    "follow",
    "free_space_problem",
    "is_beside",
    "is_replaced",
    "keep_best",
    "keep_saved_best",
    "latest",
    "leading",
    "listing",
    "load",
    "load_named",
    "lowest_loss",
    "not_finite",
    "note_use",
    "orphans",
    "pending_best",
    "prune",
    "resolve",
    "save",
    "saved_best",
    "select",
    "several",
    "verify",
    "whole_folder",
    "why_not_saved",
]


# Of conversion.py, which is imported when one is first used: it compares logits, and so imports the models and torch.
LATER = ("convert", "export")


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("milepost.ckpt.conversion"), name)


def verify(path: Path) -> list[str]:
    """Return a sentence for each problem of the checkpoint at `path`; an empty list if it is intact.

    Compares every byte with its checksum; then reads the metadata and looks up every tensor without reading it.
    """
    try:
        layout = known_layout(path)
        problems = [str(problem) for problem in layout.problems(path)]
        if not problems:
            layout.read_metadata(path)
            held(path)
    except CheckpointError as error:
        problems = [str(error)]
    return problems
