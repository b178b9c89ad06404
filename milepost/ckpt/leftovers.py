"""What killed writers left: known by the full form of this program's temporary names, and removed under the folder's lock.

Nothing that a file says decides what is removed. A killed save of several files may have left some of them visible: such a file goes
only if its head is not visible, the head in the hidden folder names its bytes or its save id, and it is part of no checkpoint.
"""

import os
import re
from pathlib import Path

from milepost.ckpt.layouts import LAYOUTS, layout_of
from milepost.files import TEMPORARY, discard, hidden_name, make_folder, written
from milepost.locks import folder_lock
from milepost.paths import is_real_folder

OWN_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<name>.+)-(?P<process>[0-9]{1,10})-[0-9a-f]{8}")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed writers left in `folder`; return it. The caller holds the folder's lock.

    In a run's own folder or in best/ another process may write under the lock of the folder above: what is a living process's stays.
    """
    leftovers = [path for path in folder.glob(f"{TEMPORARY}*") if _is_left_over(path)]
    for path in leftovers:
        for part in _visible_parts(path):
            part.unlink(missing_ok=True)
        discard(path)
    return leftovers


def remove_leftovers_below(folder: Path, places: set[Path]) -> None:
    """`remove_leftovers` of `folder` and of those `places` in it that are no links."""
    for place in {folder, *places}:
        steps = [above for above in (place, *place.parents) if above.is_relative_to(folder) and above != folder]
        if all(map(is_real_folder, steps)):
            remove_leftovers(place)


def _is_left_over(path: Path) -> bool:
    named = OWN_NAME.fullmatch(path.name)
    return named is not None and not path.is_symlink() and not _has_writer(int(named["process"]))


def _has_writer(process: int) -> bool:
    """Whether another process of this number is alive on this machine."""
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
    """The visible files of a save or a removal that was killed half-way, as the head in its hidden folder proves them."""
    named = OWN_NAME.fullmatch(hidden.name)
    if named is None or not is_real_folder(hidden) or os.path.lexists(hidden.parent / named["name"]):
        return []
    head = hidden / named["name"]
    parts = [part for layout in LAYOUTS for part in layout.parts_of(head, hidden.parent)]
    return [part for part in parts if not _is_in_a_checkpoint(part)]


def _is_in_a_checkpoint(part: Path) -> bool:
    layout = layout_of(part)
    return layout_of(part.parent) is not None or (layout is not None and layout.primary_file(part) is not None)


def prepare_folder(folder: Path) -> None:
    """Make the folder and prove that it can be written, so that a run fails before its first step and not at its first save.

    Raises OSError if it cannot, NotImplementedError if its file system knows no locks.
    """
    make_folder(folder)
    with folder_lock(folder):
        remove_leftovers(folder)
        probe = hidden_name(folder / "probe")
        with written(probe):
            pass
        probe.unlink()
