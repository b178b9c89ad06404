"""What each folder holds, kept in memory: a second listing reads only the checkpoints that have changed since.

Without this, the cost of a save would grow with the checkpoints that are there. An entry has changed if its inode, size
in bytes or modification time has, or that of any file in it. Where the system reports changes, an operation that is part
of a save does not even list the folder: it looks at the names that changed since the last one, and the folders.
"""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.ckpt.layouts import LAYOUTS, Layout, layout_of
from milepost.ckpt.record import CheckpointError, Json, Kind
from milepost.files import Entry, MadeEntry, Watch, entries_with_made, steadily
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

    def __fspath__(self) -> str:
        return str(self.path)

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
    """What a folder held when it was last looked at. It is never changed: another thread may be reading it."""

    whole: Layout | None = None  # of the folder itself, if it is a checkpoint
    highest: int = 0  # save number
    folders: list[str] = field(default_factory=list)  # that are no checkpoints, sorted, without links
    mixed: list[str] = field(default_factory=list)  # checkpoints that are folders, no links, and hold other files too
    hidden: frozenset[str] = frozenset()  # names that begin with a dot, which are none of the others
    links: frozenset[str] = frozenset()
    _found: dict[str, Found] = field(default_factory=dict)  # by the checkpoint's name
    _of_runs: dict[str | None, dict[str, Found]] = field(default_factory=dict)  # the same by run, then by name
    _adapters: dict[str, Found] = field(default_factory=dict)
    _stamps: dict[str, Stamp] = field(default_factory=dict)  # by name; the first element is the identity
    _folders: frozenset[str] = frozenset()  # names of all folders, and of links to folders
    _parts: dict[str, tuple[str, Layout]] = field(default_factory=dict)  # by name: its checkpoint's name and layout
    _unread: dict[str, Found] = field(default_factory=dict)  # what may be readable at the next look
    _shared: dict[str, Json] = field(default_factory=dict)  # metadata that is equal in many, such as a run's settings

    def all(self) -> list[Found]:
        """Return every checkpoint, sorted by name."""
        return _sorted(self._found)

    def of_run(self, run_id: str | None) -> list[Found]:
        """Return the checkpoints of a run, and those that cannot be read, whose run is unknown; sorted by name."""
        return _sorted(self._of_runs.get(run_id, {}) | self._unread)

    def adapters(self) -> list[Found]:
        """Return the checkpoints that hold adapters, sorted by name."""
        return _sorted(self._adapters)


def _sorted(found: dict[str, Found]) -> list[Found]:
    return [found[name] for name in sorted(found)]


Pick = Callable[[Listing], list[Found]]  # one of its methods, or a function that calls one
# What one operation has seen of each folder. It lists a folder once, however often it asks, and reads again what it is
# about to delete; the next operation begins with an empty one.
Looks = dict[Path, Listing]


class _Known:
    """What is kept of a folder from look to look."""

    def __init__(self) -> None:
        self.listing = Listing()
        self.guard = threading.Lock()  # a change is reported once
        self.watch: Watch | None = None
        self.is_watchable = True  # until it is tried
        self.included: set[str] = set()  # the folders in it that are watched, too: those that are checkpoints
        self.unreported: set[str] = set()  # the names that must be looked at each time: other folders, and links

    def changed(self, folder: Path) -> set[str] | None:
        """Return the names that may have changed since the last call; None if the folder must be listed."""
        names = self.watch.changed() if self.watch is not None else None
        if names is not None:
            return names | self.unreported
        self.watch, self.included = None, set()
        if self.is_watchable:
            try:
                self.watch = Watch(folder)
            except OSError:
                self.is_watchable = not os.path.isdir(folder)  # it may come later
        return None

    def note(self, listing: Listing, looked_at: set[str] | None) -> None:
        """Keep the listing, and have its folders watched. Those that were looked at may be other folders now."""
        again = self.included.intersection(looked_at or ())
        self.included -= again
        if self.watch is not None and (again or listing is not self.listing):
            plain = {*listing.folders, *listing.links}
            new = listing._folders.difference(plain, self.included)
            self.included.update(name for name in new if self.watch.include(name))
            self.unreported = {name for name in plain if name[0] != "."} | listing._folders - self.included
        self.listing = listing


@functools.lru_cache(maxsize=FOLDERS)
def _last_listing(folder: Path) -> _Known:
    return _Known()


def look_into(folder: Path, *, whole: Layout | None = None, looks: Looks | None = None) -> Listing:
    """Return what `folder` holds; `whole` is its own layout, if it is a checkpoint itself.

    With `looks`, a file with a known name and inode is taken as it was, so that no file is looked at that was seen before,
    and a folder that is in `looks` is not listed again. Raise OSError if the folder cannot be listed.
    """
    if looks is not None and folder in looks and looks[folder].whole is whole:
        return looks[folder]
    known = _last_listing(folder)
    with known.guard:
        fits = known.listing.whole is whole
        try:
            names = known.changed(folder) if looks is not None else None
            before, names = (known.listing, names) if fits else (Listing(whole), None)
            known.note(_looked(folder, before, names, fresh=looks is None), names)
        except BaseException:
            known.watch = None  # the names that it reported have not been looked at
            raise
    if looks is not None:
        looks[folder] = known.listing
    return known.listing


def _looked(folder: Path, before: Listing, names: set[str] | None, *, fresh: bool) -> Listing:
    """Return the listing after looking at these names, or at everything if `names` is None."""
    now = steadily(lambda: _present(folder, before, names, fresh=fresh))
    changed = now.changed | before._unread.keys()
    if not changed and (now.hidden, now.links, now.folders) == (before.hidden, before.links, before._folders):
        return before
    return _updated(folder, before, now, changed | _beside(changed))


@dataclass
class _Present:
    """The names that a folder holds."""

    stamps: dict[str, Stamp] = field(default_factory=dict)  # of the names that were looked at
    hidden: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)  # those that came, went or changed, without hidden ones
    gone: set[str] = field(default_factory=set)


def _present(folder: Path, known: Listing, names: set[str] | None, *, fresh: bool) -> _Present:
    """Look at these names, or at everything if `names` is None."""
    if names is None:
        now = _Present()
        with os.scandir(folder) as listed:
            for entry in entries_with_made(folder, listed):
                _note(entry, now, known, fresh=fresh)
        now.gone = known._stamps.keys() - now.stamps.keys()
    else:
        now = _Present({}, *(set(each - names) for each in (known.hidden, known.links, known._folders)))
        for name in names:
            if os.path.lexists(path := folder / name):
                _note(MadeEntry(path), now, known, fresh=True)
        now.gone = {name for name in names if name in known._stamps and name not in now.stamps}
    now.changed |= now.gone | {name for name in now.links ^ known.links if name[0] != "."}
    return now


def _note(entry: Entry, now: _Present, known: Listing, *, fresh: bool) -> None:
    """Note what is needed of an entry; unless `fresh`, a name with a known identity is taken as it was."""
    name = entry.name
    if entry.is_symlink():
        now.links.add(name)
    if name[0] == ".":
        now.hidden.add(name)
        return
    before = known._stamps.get(name)
    if before is not None and not fresh and before[0] == _identity(entry):
        now.stamps[name] = before
        if name in known._folders:
            now.folders.add(name)
        return
    now.stamps[name] = stamp = _stamp(entry, known._parts)
    if stamp is FOLDER or isinstance(stamp[0], tuple):
        now.folders.add(name)
    # A folder that is no checkpoint may become one.
    if stamp != before or (stamp is FOLDER and _may_be_checkpoint(Path(entry.path))):
        now.changed.add(name)


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


def _updated(folder: Path, known: Listing, now: _Present, changed: set[str]) -> Listing:
    """Return the listing with the `changed` entries read again. `known` stays: another thread may be reading it."""
    parts, stamps = known._parts.copy(), known._stamps.copy()
    stamps.update(now.stamps)
    for name in now.gone:
        del stamps[name]
    gone = changed | {part[0] for name in changed if (part := parts.pop(name, None))}
    read: dict[str, Found] = {}
    shared = known._shared.copy()
    for name in sorted(changed):
        if name not in stamps:
            continue
        path = folder / name
        try:
            layout = layout_of(path)
        except CheckpointError as error:  # it does not answer
            read[name] = Found(path, {}, str(error), kind=error.kind)
            continue
        primary = layout.primary_file(path) if layout else None
        if path.is_dir():
            stamps[name] = _folder_stamp(path) if primary else FOLDER
        if layout and primary:
            parts[name] = primary.name, layout
            if primary.name not in read:
                read[primary.name] = _sharing(look(primary, layout), shared)
    holds_other = functools.partial(_holds_other_files, folder, parts)
    return Listing(
        whole=known.whole,
        folders=_with(
            known.folders, changed, lambda name: stamps.get(name) is FOLDER and is_real_folder(folder / name)
        ),
        mixed=_with(known.mixed, changed, holds_other),
        hidden=frozenset(now.hidden),
        links=frozenset(now.links),
        _stamps=stamps,
        _folders=frozenset(now.folders),
        _parts=parts,
        _shared=shared,
        **_grouped(known, gone, read),
    )


def _with(names: list[str], changed: set[str], holds: Callable[[str], bool]) -> list[str]:
    """Return the names sorted, with those that changed only if it `holds` of them."""
    return sorted({*names} - changed | {name for name in changed if holds(name)})


def _holds_other_files(folder: Path, parts: dict[str, tuple[str, Layout]], name: str) -> bool:
    return name in parts and is_real_folder(folder / name) and parts[name][1].holds_other_files(folder / name)


def _grouped(known: Listing, gone: set[str], read: dict[str, Found]) -> dict[str, Any]:
    """Return the fields of a listing that hold its checkpoints: without the names that are `gone`, and with the `read`."""
    found, runs = known._found.copy(), known._of_runs.copy()
    adapters, unread = known._adapters.copy(), known._unread.copy()
    left = {name: found.pop(name) for name in gone | read.keys() if name in found}
    for run_id in {each.run_id for each in (*left.values(), *read.values())}:
        runs[run_id] = runs.get(run_id, {}).copy()
    for name, each in left.items():
        del runs[each.run_id][name]
        adapters.pop(name, None)
        unread.pop(name, None)
    for name, each in read.items():
        found[name] = runs[each.run_id][name] = each
        if "adapters" in each.metadata.get("parts", ()):
            adapters[name] = each
        if each.problem:
            unread[name] = each
    was_highest = any(_number(each) == known.highest for each in left.values())
    numbers = map(_number, found.values() if was_highest else read.values())
    highest = max((*numbers, 0 if was_highest else known.highest), default=0)
    return {"highest": highest, "_found": found, "_of_runs": runs, "_adapters": adapters, "_unread": unread}


def _number(found: Found) -> int:
    return found.metadata.get("save_number") or 0


def _sharing(found: Found, shared: dict[str, Json]) -> Found:
    """Return it with each object in its metadata taken from `shared`, by its JSON, so that a run's settings are held once."""
    for name, value in found.metadata.items():
        if isinstance(value, dict):
            found.metadata[name] = shared.setdefault(json.dumps(value), value)
    return found
