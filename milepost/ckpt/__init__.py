"""Checkpoints: the public verbs. Everything else in this package serves them."""

import os
from pathlib import Path

from milepost.ckpt.collective import follow, leading, not_finite
from milepost.ckpt.conversion import convert, export
from milepost.ckpt.exports import EXPORTS, exporter
from milepost.ckpt.finding import BEST_FOLDER, Found, best, due, find, latest, listing, resolve, several, whole_folder
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.retention import best_is_kept, free_space_problem, keep_best, prune, save, why_not_saved

__all__ = [
    "BEST_FOLDER",
    "EXPORTS",
    "WRITERS",
    "Checkpoint",
    "CheckpointError",
    "Found",
    "best",
    "best_is_kept",
    "convert",
    "due",
    "export",
    "exporter",
    "find",
    "follow",
    "free_space_problem",
    "keep_best",
    "latest",
    "leading",
    "listing",
    "load",
    "not_finite",
    "prune",
    "resolve",
    "save",
    "several",
    "verify",
    "whole_folder",
    "why_not_saved",
]


def load(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """Return the record at `path`, in any layout; raise CheckpointError.

    `optimizer=False` leaves the optimizer's tensors unread; `verify=True` checks every byte against its checksum first.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"Checkpoint not found: {path}. {listing(path.parent)}", kind="not found")
    return known_layout(path).read(path, optimizer=optimizer, verify=verify)


def verify(path: Path) -> list[str]:
    """Return what is wrong with the bytes of the checkpoint at `path`, a sentence each; empty if nothing is."""
    try:
        return [str(problem) for problem in known_layout(path).problems(path)]
    except CheckpointError as error:
        return [str(error)]
