"""The layouts: one file each, the same verbs in every one. Order is priority; detection looks inside, never at a name alone."""

from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from ckpt.layouts import huggingface, unified
from ckpt.record import Checkpoint, Json


class Layout(Protocol):
    """What every module here offers; `write` and `target` only those that can be written."""

    NAME: str

    def detect(self, path: Path) -> bool:
        """Whether `path` is this layout's to read, or to refuse with a reason."""

    def peek(self, path: Path) -> dict[str, Json]:
        """The metadata without any tensor; raises CheckpointError."""

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """The whole record; raises CheckpointError."""

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Writes the record under the name `target(folder, stem)`."""

    def target(self, folder: Path, stem: str) -> Path:
        """The visible path of a checkpoint of this stem."""

    def verify_file(self, path: Path) -> list[str]:
        """What is wrong with the bytes, one sentence each."""


def _as_layout(module: ModuleType) -> Layout:
    return cast(Layout, module)


LAYOUTS: tuple[Layout, ...] = (_as_layout(huggingface), _as_layout(unified))
WRITERS: dict[str, Layout] = {layout.NAME: layout for layout in LAYOUTS if hasattr(layout, "write")}


def layout_of(path: Path) -> Layout | None:
    """The layout that claims `path`, or None."""
    return next((layout for layout in LAYOUTS if layout.detect(path)), None)
