"""What each folder holds, kept in memory: a second listing reads only the checkpoints that have changed since.

A save lists its folder, so without this its cost would grow with the checkpoints that are there. An entry has changed
if its inode, size in bytes or modification time has, or that of any file in it.
"""

import contextlib
import functools
import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.ckpt.layouts import LAYOUTS, Layout, layout_of
from milepost.ckpt.record import CheckpointError, Json, Kind
from milepost.files import Entry, entries_with_made, steadily
from milepost.paths import is_real_folder

FOLDERS = 4096  # that are remembered
SEVERAL = [layout for layout in LAYOUTS if len(layout.suffixes) > 1]
Stamp = tuple[Any, ...]
FOLDER: Stamp = ("a folder that is no checkpoint",)


@dataclass(frozen=True)
class Found:
    """A checkpoint found in a folder: its metadata without tensors and tokenizer, or the problem with reading it."""

    path: Path
    metadata: dict[str, Json]
    problem: str | None = None
    layout: str = field(default="", compare=False)
    size: int = field(default=0, compare=False)  # bytes of all its files
    kind: Kind | None = field(default=None, compare=False)  # of the problem

    @property
    def step(self) -> int:
        """Optimizer steps done, as recorded inside; 0 for a damaged file."""
        return self.metadata.get("step", 0)

    @property
    def run_id(self) -> str | None:
        """The run that saved it; None for a damaged checkpoint or another program's."""
        return self.metadata.get("run_id")

    @property
    def resumable(self) -> bool:
        """Whether it holds the optimizer's state."""
        return "optimizer" in self.metadata.get("parts", ())

    @property
    def is_final(self) -> bool:
        """Whether its run was planned to end there."""
        return self.step > 0 and self.step == self.metadata.get("hyperparameters", {}).get("TRAINING_STEPS")

    @property
    def save_order(self) -> tuple[int, str, int]:
        """Sort key from oldest to newest; checkpoints without a save number (other programs') come first."""
        return self.metadata.get("save_number") or 0, self.metadata.get("saved_at") or "", self.step


def look(path: Path, layout: Layout) -> Found:
    """Return the checkpoint at `path` with its metadata or its problem; its tensors stay unread."""
    size = sum(stamp[1] for stamp in stamps(layout.files(path)))
    try:
        metadata = {name: value for name, value in layout.read_metadata(path).items() if name != "tokenizer"}
        return Found(path, metadata, layout=layout.name, size=size)
    except CheckpointError as error:
        return Found(path, {}, str(error), layout=layout.name, size=size, kind=error.kind)


def is_unchanged(found: Found) -> bool:
    """Whether the checkpoint still holds what it held when it was found. Ask before deleting it."""
    layout = layout_of(found.path)
    return layout is not None and look(found.path, layout) == found


def stamps(paths: Iterable[Path | str]) -> Iterator[Stamp]:
    """Yield inode, size in bytes and modification time of each file, and of each file inside each folder.

    Links to folders inside a folder are not followed.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            if os.path.isdir(path):
                yield from _stamps_inside(path)
            else:
                status = os.stat(path)
                yield status.st_ino, status.st_size, status.st_mtime_ns


def _stamps_inside(folder: Path | str) -> Iterator[Stamp]:
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            yield from _stamps_inside(entry.path)
        elif not os.path.isdir(entry.path):
            yield from stamps([entry.path])


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """What a folder held when it was last looked at. Hidden names are left out."""

    whole: Layout | None = None  # of the folder itself, if it is a checkpoint
    found: dict[str, Found] = field(default_factory=dict)  # by the checkpoint's name, sorted
    folders: list[str] = field(default_factory=list)  # that are no checkpoints, sorted, without links
    mixed: list[str] = field(default_factory=list)  # checkpoints that are folders, no links, and hold other files too
    _stamps: dict[str, Stamp] = field(default_factory=dict)  # by name; the first element is the identity
    _parts: dict[str, tuple[str, Layout]] = field(default_factory=dict)  # by name: its checkpoint's name and layout
    _unread: set[str] = field(default_factory=set)  # what could not be read, and may be readable at the next look
    _shared: dict[str, Json] = field(default_factory=dict)  # metadata that is equal in many, such as a run's settings


# What one operation has seen of each folder. It lists a folder once, however often it asks, and reads again what it is
# about to delete; the next operation begins with an empty one.
Looks = dict[Path, Listing]


@functools.lru_cache(maxsize=FOLDERS)
def _last_listing(folder: Path) -> list[Listing]:
    return [Listing()]


def look_into(folder: Path, *, whole: Layout | None = None, looks: Looks | None = None) -> Listing:
    """Return what `folder` holds; `whole` is its own layout, if it is a checkpoint itself.

    With `looks`, a file with a known name and inode is taken as it was, so that no file is looked at that was seen before,
    and a folder that is in `looks` is not listed again. Raise OSError if the folder cannot be listed.
    """
    if looks is not None and folder in looks and looks[folder].whole is whole:
        return looks[folder]
    last = _last_listing(folder)
    known = last[0] if last[0].whole is whole else Listing(whole)
    present, changed = steadily(lambda: _present(folder, known, fresh=looks is None))
    changed |= known._unread
    if changed:
        known = _updated(folder, known, present, changed | _beside(changed))
        last[0] = known
    if looks is not None:
        looks[folder] = known
    return known


def _present(folder: Path, known: Listing, *, fresh: bool) -> tuple[dict[str, Stamp], set[str]]:
    """Return the stamp of each entry, and the names of those that came, went or changed."""
    present: dict[str, Stamp] = {}
    changed = set()
    with os.scandir(folder) as listed:
        for entry in entries_with_made(folder, listed):
            name = entry.name
            if name[0] == ".":
                continue
            before = known._stamps.get(name)
            if before is not None and not fresh and before[0] == _identity(entry):
                present[name] = before
                continue
            present[name] = stamp = _stamp(entry, known._parts)
            # A folder that is no checkpoint may become one.
            if stamp != before or (stamp is FOLDER and _may_be_checkpoint(folder / name)):
                changed.add(name)
    if len(present) != len(known._stamps) or changed:
        changed |= known._stamps.keys() - present.keys()
    return present, changed


def _may_be_checkpoint(path: Path) -> bool:
    try:
        return layout_of(path) is not None
    except CheckpointError:  # it does not answer
        return True


def _identity(entry: Entry) -> Any:
    """Return the inode, which costs nothing; of a folder also its time, which changes with the names in it."""
    with contextlib.suppress(OSError):  # a link to itself, or nothing any more
        if entry.is_dir():
            return entry.inode(), entry.stat().st_mtime_ns
    return entry.inode()


def _stamp(entry: Entry, parts: Container[str]) -> Stamp:
    """Return the identity, and inode, size and time of the file or of each file in the folder.

    Of a folder that is none of the `parts` of a known checkpoint, return `FOLDER`.
    """
    with contextlib.suppress(OSError):  # a link to nothing
        if entry.is_dir():
            return _folder_stamp(entry.path) if entry.name in parts else FOLDER
        status = entry.stat()
        return entry.inode(), status.st_ino, status.st_size, status.st_mtime_ns
    return (entry.inode(),)


def _folder_stamp(path: Path | str) -> Stamp:
    with contextlib.suppress(OSError):
        return (os.lstat(path).st_ino, os.stat(path).st_mtime_ns), *stamps([path])
    return FOLDER


def _beside(names: Iterable[str]) -> set[str]:
    """Return the names that files of one checkpoint have beside each of `names`, in layouts of several files."""
    paths = [Path(name) for name in names]
    return {layout.locate(path, suffix).name for path in paths for layout in SEVERAL for suffix in layout.suffixes}


def _updated(folder: Path, known: Listing, present: dict[str, Stamp], changed: set[str]) -> Listing:
    """Return the listing with the `changed` entries read again. `known` stays: another thread may be reading it."""
    parts = {name: part for name, part in known._parts.items() if name not in changed}
    gone = changed | {known._parts[name][0] for name in changed & known._parts.keys()}
    read: dict[str, Found] = {}
    shared = dict(known._shared)
    for name in sorted(changed & present.keys()):
        path = folder / name
        try:
            layout = layout_of(path)
        except CheckpointError as error:  # it does not answer
            read[name] = Found(path, {}, str(error), kind=error.kind)
            continue
        primary = layout.primary_file(path) if layout else None
        if path.is_dir():
            present[name] = _folder_stamp(path) if primary else FOLDER
        if layout and primary:
            parts[name] = primary.name, layout
            if primary.name not in read:
                read[primary.name] = _sharing(look(primary, layout), shared)
    found = {name: found for name, found in known.found.items() if name not in gone} | read
    mixed = {name for name in changed & parts.keys() if _is_mixed(folder / name, parts[name][1])}
    return Listing(
        whole=known.whole,
        found=dict(sorted(found.items())),
        folders=sorted(name for name, stamp in present.items() if stamp is FOLDER and is_real_folder(folder / name)),
        mixed=sorted(mixed.union(known.mixed) - (changed - mixed)),
        _stamps=present,
        _parts=parts,
        _unread={name for name, each in found.items() if each.problem},
        _shared=shared,
    )


def _is_mixed(path: Path, layout: Layout) -> bool:
    return is_real_folder(path) and layout.holds_other_files(path)


def _sharing(found: Found, shared: dict[str, Json]) -> Found:
    """Return it with each object in its metadata taken from `shared`, by its JSON, so that a run's settings are held once."""
    for name, value in found.metadata.items():
        if isinstance(value, dict):
            found.metadata[name] = shared.setdefault(json.dumps(value), value)
    return found
