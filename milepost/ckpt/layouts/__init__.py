"""The layouts of `milepost.registry`: one file declares each, three mechanisms read and write them.

To add a layout, write a module with a `LAYOUT` and register it with one line.
"""

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path

from milepost import registry
from milepost.ckpt import archive
from milepost.ckpt.layouts.base import Layout
from milepost.ckpt.record import CheckpointError

__all__ = ["LAYOUTS", "WRITERS", "Layout", "known_layout", "layout_of", "load_layout"]


def load_layout(name: str, module: str) -> Layout:
    """Return the `LAYOUT` of a registered module; raise ValueError if it has another name than it is registered
    under.
    """
    layout: Layout = importlib.import_module(module).LAYOUT
    if layout.name != name:
        raise ValueError(f"{module}: LAYOUT is named {layout.name!r}, but registered as {name!r}")
    return layout


def check_distinct(layouts: Sequence[Layout]) -> None:
    """Raise ValueError if a layout would take the folders of a later one for its own:
    the first that detects one reads it.
    """
    for earlier, later in itertools.combinations(layouts, 2):
        for names in earlier.marker_sets:
            if set(names) <= set(later.members):
                shared = ", ".join(names)
                raise ValueError(
                    f"layout {later.name}: {earlier.name} takes every folder that holds {shared} for its own; "
                    "choose other file names, or register it before"
                )


LAYOUTS = tuple(load_layout(name, entry.module) for name, entry in registry.LAYOUTS.items())
check_distinct(LAYOUTS)
WRITERS = {name: layout for name in registry.layouts_to_save() for layout in LAYOUTS if layout.name == name}


def layout_of(path: Path) -> Layout | None:
    """Return the first layout that detects `path`, or None."""
    layout = next((layout for layout in LAYOUTS if layout.detect(path)), None)
    if layout is not None and layout.yields_to_folder and any(other.owns(path.parent, path) for other in LAYOUTS):
        return None
    return layout


def known_layout(path: Path) -> Layout:
    """Return the layout of the checkpoint at `path`; raise CheckpointError if it has none."""
    layout = layout_of(path)
    if layout is None:
        names = ", ".join(layout.name for layout in LAYOUTS)
        kind, remedy = (archive.kind_of(path) if path.is_file() else None) or (None, None)
        problem = f"is not a checkpoint of a known layout ({names}){f', but {kind}' if kind else ''}"
        raise CheckpointError(path, problem, remedy, kind="not understood")
    return layout
