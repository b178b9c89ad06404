"""Remove the temporary files of killed writers. They are recognised by the full form of this program's temporary names.

A killed save of several files may have left some of them visible. Such a file is removed only if its primary file is
not visible, the primary file in the hidden folder records its sha256 or its save id, and it is part of no checkpoint.
"""

import os
import re
from pathlib import Path

from milepost.ckpt.finding import names_in, places
from milepost.ckpt.layouts import LAYOUTS, layout_of
from milepost.files import (
    TEMPORARY,
    UNFINISHED,
    delete_unfinished,
    discard,
    hidden_name,
    look,
    make_folder,
    unfinished,
    written,
)  # fmt: skip
from milepost.locks import folder_lock, remove_free_locks
from milepost.paths import is_real_folder

OWN_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<name>.+)-(?P<process>[0-9]{1,10})-[0-9a-f]{8}")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files of killed writers in `folder` and return them. The caller holds the folder's lock.

    Files of a living process stay: in a run folder or in best/ it may hold the lock of the folder above instead.
    """
    paths = [folder / name for name in names_in(folder) if name.startswith(TEMPORARY)]
    leftovers = [path for path in paths if _is_left_over(path)]
    for path in leftovers:
        for part in _visible_parts(path):
            part.unlink(missing_ok=True)
        discard(path)
    marks = [mark for mark in folder.glob(f"{TEMPORARY}*{UNFINISHED}") if _is_left_mark(mark)]
    for mark in marks:
        delete_unfinished(mark)
    return leftovers + marks


def _is_left_mark(mark: Path) -> bool:
    marked = unfinished(mark)
    return not mark.is_symlink() and (marked is None or not _has_writer(marked[0]))


def remove_leftovers_below(folder: Path, places: set[Path]) -> None:
    """Call `remove_leftovers` for `folder` and those `places` in it that are not links."""
    for place in {folder, *places}:
        steps = [above for above in (place, *place.parents) if above.is_relative_to(folder) and above != folder]
        if all(map(is_real_folder, steps)):
            remove_leftovers(place)


def _is_left_over(path: Path) -> bool:
    named = OWN_NAME.fullmatch(path.name)
    return named is not None and not path.is_symlink() and not _has_writer(int(named["process"]))


def _has_writer(process: int) -> bool:
    """Whether another process of this number is alive on this host."""
    if os.name == "nt" or process == os.getpid():
        return False  # on Windows, asking would end the process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _visible_parts(hidden: Path) -> list[Path]:
    """Return the visible files of an interrupted save or removal, as its hidden primary file proves."""
    named = OWN_NAME.fullmatch(hidden.name)
    if named is None or not is_real_folder(hidden) or os.path.lexists(hidden.parent / named["name"]):
        return []
    primary = hidden / named["name"]
    parts = [part for layout in LAYOUTS for part in layout.parts_of(primary, hidden.parent)]
    return [part for part in parts if not _is_in_a_checkpoint(part)]


def _is_in_a_checkpoint(part: Path) -> bool:
    layout = layout_of(part)
    return layout_of(part.parent) is not None or (layout is not None and layout.primary_file(part) is not None)


def prepare_folder(folder: Path) -> None:
    """Create the folder and try what its file system can do, so that a run fails before its first step and not at its
    first save.

    Remove what killed runs left in it and in the folders of runs: whoever writes there holds the lock of this folder.
    Raise OSError if it cannot be written.
    """
    make_folder(folder)
    look(folder)
    with folder_lock(folder):
        remove_leftovers_below(folder, set(places(folder)))
        remove_free_locks(folder)
        probe = hidden_name(folder / "probe")
        with written(probe):
            pass
        probe.unlink()
