"""The checkpoints that are named where many are allowed: a list, the matches of a glob, everything below a folder; and the runs."""

import fnmatch
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from milepost.ckpt.finding import containing, find_below, folder_of
from milepost.ckpt.index import Found, look
from milepost.ckpt.layouts import known_layout, layout_of
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.resolving import listing, resolve, whole_folder


@dataclass(frozen=True)
class Selection:
    """The selected checkpoints, each once, and notes about the choice. Unreadable checkpoints are among them."""

    found: list[Found]
    root: Path  # the folder above all of them, as far down as the names agree
    notes: list[str]
    whole: Path | None = None  # the folder, if a whole folder was named
    is_single: bool = False  # whether one checkpoint was named, rather than a folder, a glob or a list

    def place(self, found: Found) -> Path:
        """Return the folder of checkpoints that holds `found`, relative to the root."""
        return _home(found).relative_to(self.root)


def select(names: str, folder: Path) -> Selection:
    """Return the checkpoints that `names` stands for: whatever `resolve` takes, or several names joined by commas.

    A folder stands for every checkpoint in it and below it, a glob for everything that it matches. Raise
    CheckpointError if a name stands for no checkpoint.
    """
    listed = [names] if os.path.lexists(names) else [name for name in names.split(",") if name] or [names]
    parts = [_select_one(name, folder) for name in listed]
    if len(parts) == 1:
        return parts[0]
    found = list({found.path: found for part in parts for found in part.found}.values())
    return Selection(found, _above([part.root for part in parts]), [note for part in parts for note in part.notes])


def _select_one(name: str, folder: Path) -> Selection:
    if whole := whole_folder(name):
        found = list(_below(whole))
        if not found:
            raise CheckpointError(listing(whole))
        return Selection(found, _above([whole]), [], whole=whole)
    if glob.has_magic(name) and not os.path.lexists(os.path.expanduser(name)) and (found := list(_matches(name))):
        return Selection(found, _above([_fixed_part(name), *map(_home, found)]), [])
    path, notes = resolve(name, folder)
    found = [look(path, known_layout(path))]
    return Selection(found, _home(found[0]), notes, is_single=True)


def _below(folder: Path) -> Iterator[Found]:
    try:
        yield from find_below(folder)
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise CheckpointError(folder, problem, "check its permissions", kind="not found") from error


def _matches(pattern: str) -> Iterator[Found]:
    """Yield the checkpoints that the glob matches, also by one of their files,
    and those below the folders that it matches.
    """
    seen = set()
    for name in sorted(glob.glob(os.path.expanduser(pattern))):
        path = containing(Path(name)) or Path(name)
        layout = layout_of(path)
        below = [look(layout.primary_file(path) or path, layout)] if layout else []
        for found in list(_below(path)) if layout is None and path.is_dir() else below:
            if found.path not in seen:
                seen.add(found.path)
                yield found


def _home(found: Found) -> Path:
    return Path(os.path.abspath(folder_of(found.path, found.run_id)))


def _fixed_part(pattern: str) -> Path:
    """Return the folder that every match of the glob lies in."""
    parts = Path(os.path.expanduser(pattern)).parent.parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:fixed])


def _above(folders: list[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))


def is_run(run_id: str, requested: str) -> bool:
    """Return whether a part of RUN means this run: its name, or the beginning or a glob of its whole id."""
    patterns = (requested, f"*-{glob.escape(requested)}-????")
    return run_id.startswith(requested) or any(fnmatch.fnmatchcase(run_id, pattern) for pattern in patterns)
