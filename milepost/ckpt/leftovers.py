"""Remove the temporary files of killed writers. They are recognised by the full form of this program's temporary names.

A killed save of several files may have left some of them visible. Such a file is removed only if its primary file is
not visible, the primary file in the hidden folder records its sha256 or its save id, and it is part of no checkpoint.
"""

import os
from pathlib import Path

from milepost import files
from milepost.ckpt.finding import hidden_in, places
from milepost.ckpt.index import look
from milepost.ckpt.layouts import LAYOUTS, layout_of
from milepost.ckpt.names import has_form_of_save
from milepost.files import (
    OWN_NAME,
    RENAME,
    RENAME_FOLDERS,
    TEMPORARY,
    UNFINISHED,
    delete_marked,
    discard,
    has_writer,
    hidden_name,
    lacks,
    make_folder,
    unfinished,
    written,
)  # fmt: skip
from milepost.locks import folder_lock, remove_free_locks
from milepost.paths import is_real_file, is_real_folder


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files of killed writers in `folder` and return them. The caller holds the folder's lock.

    Files of a living process stay: in a run folder or in best/ it may hold the lock of the folder above instead.
    """
    paths = [folder / name for name in hidden_in(folder, {}) if name.startswith(TEMPORARY)]
    leftovers = [path for path in paths if _is_left_over(path)]
    for path in leftovers:
        for part in _visible_parts(path):
            part.unlink(missing_ok=True)
        discard(path)
    marks = [path for path in paths if path.name.endswith(UNFINISHED) and _is_left_mark(path)]
    return leftovers + [mark for mark in marks if _remove_marked(mark)]


def _is_left_mark(mark: Path) -> bool:
    marked = unfinished(mark)
    return is_real_file(mark) and (marked is None or not has_writer(marked[0]))


def _remove_marked(mark: Path) -> bool:
    """Remove a mark, and what it marks as a half of a save; return whether it was removed.

    A file that another person may have written decides nothing: marks are only heeded where the file system cannot rename, and
    only what has the form of a save's name and is no whole checkpoint, nor part of one, is deleted.
    """
    if not {RENAME, RENAME_FOLDERS} & lacks(mark.parent):
        return False
    marked = unfinished(mark)
    if marked is None:  # it is written first: without a whole mark, nothing was
        discard(mark)
        return True
    paths = marked[1]
    if not all(map(has_form_of_save, paths)):
        return False
    discard(mark)
    doomed = [path for path in paths if not _is_whole(path)]
    if paths[-1] in doomed:
        delete_marked(doomed)
    return True


def _is_whole(path: Path) -> bool:
    """Whether `path` is a checkpoint of ours or a part of one, or may be: it does not answer."""
    layout = layout_of(path)
    primary = layout.primary_file(path) if layout else None
    if layout is None or primary is None:
        return False
    found = look(primary, layout)
    return found.kind == "unreachable" or bool(found.metadata.get("save_id"))


def remove_leftovers_below(folder: Path, places: set[Path]) -> None:
    """Call `remove_leftovers` for `folder` and those `places` in it that are not links."""
    for place in {folder, *places}:
        steps = [above for above in (place, *place.parents) if above.is_relative_to(folder) and above != folder]
        if all(map(is_real_folder, steps)):
            remove_leftovers(place)


def _is_left_over(path: Path) -> bool:
    named = OWN_NAME.fullmatch(path.name)
    return named is not None and not path.is_symlink() and not has_writer(int(named["process"]))


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
    files.look(folder)
    with folder_lock(folder):
        remove_leftovers_below(folder, set(places(folder)))
        remove_free_locks(folder)
        probe = hidden_name(folder / "probe")
        with written(probe):
            pass
        probe.unlink()
