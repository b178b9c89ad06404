"""Checkpoints: the public verbs. Everything else in this package serves them."""

import os
from pathlib import Path

from ckpt.layouts import LAYOUTS, layout_of
from ckpt.record import Checkpoint, CheckpointError
from ckpt.store import (
    BEST_FOLDER,
    Found,
    best,
    best_is_kept,
    due,
    find,
    keep_best,
    latest,
    listing,
    resolve,
    save,
    why_not_saved,
)

__all__ = [
    "BEST_FOLDER",
    "Checkpoint",
    "CheckpointError",
    "Found",
    "best",
    "best_is_kept",
    "due",
    "find",
    "keep_best",
    "latest",
    "listing",
    "load",
    "resolve",
    "save",
    "verify",
    "why_not_saved",
]


def load(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record at `path`, in whatever layout it is. Raises CheckpointError in one sentence.

    `optimizer=False` leaves the optimizer's tensors unread; `verify=True` checks every byte against its checksum first.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"Checkpoint not found: {path}. {listing(path.parent)}")
    layout = layout_of(path)
    if layout is None:
        known = ", ".join(layout.NAME for layout in LAYOUTS)
        raise CheckpointError(f"{path}: is no checkpoint of a known layout ({known})")
    return layout.read(path, optimizer=optimizer, verify=verify)


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`, one sentence each; empty if nothing is."""
    layout = layout_of(path)
    return layout.verify_file(path) if layout else [f"{path}: is no checkpoint of a known layout"]
