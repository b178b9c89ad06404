"""The layouts: one file each, the same verbs in every one. Order is priority; detection looks inside, never at a name alone."""

from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from milepost.ckpt.layouts import (
    consolidated,
    directory,
    huggingface,
    lecture,
    lightning,
    mlx,
    nanogpt,
    separated,
    sharded,
    stepfiles,
    unified,
)
from milepost.ckpt.record import Checkpoint, CheckpointError, Json


class Layout(Protocol):
    """What every module here offers; `write` and `targets` only those that can be written."""

    NAME: str
    RUN_STEM: str  # the documented name by step, in the run's own folder; empty where a name of the store's is taken
    MEMBERS: tuple[str, ...]  # the files of a checkpoint that is a folder

    def detect(self, path: Path) -> bool:
        """Whether `path` is this layout's to read, or to refuse with a reason."""

    def home(self, path: Path) -> Path | None:
        """The one path under which the checkpoint that `path` is a part of is listed; None if it is no whole one."""

    def files(self, path: Path) -> list[Path]:
        """The files or the one folder that it consists of, the one that makes it visible last."""

    def optimizer_file(self, path: Path) -> Path | None:
        """The file without which it only generates; None if that is no file of its own."""

    def peek(self, path: Path) -> dict[str, Json]:
        """The metadata without any tensor; raises CheckpointError."""

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """The whole record; raises CheckpointError."""

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Writes the record under the names `targets(folder, stem)`; returns its home."""

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """The visible paths of a checkpoint of this stem, the one that makes it visible last."""

    def verify_file(self, path: Path) -> list[str]:
        """What is wrong with the bytes, one sentence each."""


def _as_layout(module: ModuleType) -> Layout:
    return cast(Layout, module)


LAYOUTS: tuple[Layout, ...] = tuple(
    map(
        _as_layout,
        (
            directory,
            consolidated,
            huggingface,
            sharded,
            stepfiles,
            mlx,
            separated,
            nanogpt,
            lightning,
            lecture,
            unified,
        ),
    )
)
WRITERS: dict[str, Layout] = {layout.NAME: layout for layout in LAYOUTS if hasattr(layout, "write")}


def layout_of(path: Path) -> Layout | None:
    """The layout that claims `path`, or None."""
    return next((layout for layout in LAYOUTS if layout.detect(path)), None)


def known_layout(path: Path) -> Layout:
    """The layout that claims `path`; raises CheckpointError if none does."""
    layout = layout_of(path)
    if layout is None:
        raise CheckpointError(f"{path}: is no checkpoint of a known layout ({', '.join(one.NAME for one in LAYOUTS)})")
    return layout
