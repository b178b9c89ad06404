"""Checkpoints: the public verbs. Everything else in this package serves them."""

import os
from pathlib import Path

from milepost.ckpt import archive
from milepost.ckpt.bases import note_use
from milepost.ckpt.collective import follow, leading, not_finite
from milepost.ckpt.conversion import convert, export
from milepost.ckpt.exports import EXPORTS, exporter
from milepost.ckpt.finding import BEST_FOLDER, Found, best, due, find, latest, listing, resolve, several, whole_folder
from milepost.ckpt.layouts import LAYOUTS, WRITERS, layout_of
from milepost.ckpt.record import Checkpoint, CheckpointError, printable
from milepost.ckpt.retention import (
    best_is_kept,
    free_space_problem,
    keep_best,
    keep_saved_best,
    prune,
    save,
    saved_best,
    why_not_saved,
)
from milepost.ckpt.tensor_listing import held

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
    "keep_saved_best",
    "latest",
    "leading",
    "listing",
    "load",
    "not_finite",
    "note_use",
    "prune",
    "resolve",
    "save",
    "saved_best",
    "several",
    "verify",
    "whole_folder",
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
        kind = archive.kind_of(path) if os.path.isfile(path) else None
        raise CheckpointError(f"{path}: is no checkpoint of a known layout ({known}){f', but {kind}' if kind else ''}")
    return layout.read(path, optimizer=optimizer, verify=verify)


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`, one sentence each; empty if nothing is.

    Every byte is compared with its checksum; then the metadata is read, and every tensor looked up without reading it.
    """
    layout = layout_of(path)
    if layout is None:
        return [f"{path}: is no checkpoint of a known layout"]
    problems = layout.verify_file(path)
    if not problems:
        try:
            layout.peek(path)
            held(path)
        except CheckpointError as error:
            problems = [str(error)]
    return [printable(problem) for problem in problems]
