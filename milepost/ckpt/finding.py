"""Find checkpoints in a folder: list them, choose the latest or the best. Changes no file."""

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from milepost.ckpt.layouts import LAYOUTS, Layout, known_layout, layout_of
from milepost.ckpt.record import CheckpointError, Json, Kind
from milepost.files import below as files_below
from milepost.files import entries as entries_of
from milepost.locks import FOLDER_LOCK
from milepost.paths import is_real_folder

BEST_FOLDER = "best"
NEWEST_NAMES = ("latest.pt", "final.pt", "ckpt.pt")  # of other programs, which keep one folder for each model
SEEN = 4096  # checkpoints whose metadata is cached, so that frequent saves do not reopen every file


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


def find(folder: Path) -> list[Found]:
    """Return the checkpoints in `folder`, its run folders and their best/: damaged ones first, then oldest save first.

    A save with two names is listed once: with its optimizer rather than without, outside best/ rather than inside.
    Hidden names are ignored. Raise OSError if `folder` cannot be listed.
    """
    by_save: dict[str, Found] = {}
    for found in sorted(scan(folder), key=lambda found: (found.resumable, not in_best(found, folder))):
        by_save[found.metadata.get("save_id") or str(found.path)] = found
    return sorted(by_save.values(), key=lambda found: found.save_order)


def in_best(found: Found, folder: Path | None) -> bool:
    """Whether the checkpoint lies in a best/ inside the checkpoint folder `folder`, which may itself be called best."""
    place = found.path.parent
    return place.name == BEST_FOLDER and (folder is None or os.path.abspath(place) != os.path.abspath(folder))


def find_below(folder: Path) -> Iterator[Found]:
    """Yield what `find` returns for `folder` and for every folder below it, each checkpoint once.

    Links and hidden folders are not followed. Raise OSError if `folder` cannot be listed.
    """
    seen: set[Path] = set()
    for place in folders_below(folder):
        if place != folder and not os.access(place, os.R_OK | os.X_OK):
            continue
        here = [*find(place), *orphans(place)]
        yield from (found for found in here if found.path not in seen)
        seen |= {found.path for found in (*here, *scan(place))}


def folders_below(folder: Path) -> Iterator[Path]:
    """Yield `folder` and the folders below it, from the top down, without the parts of checkpoints."""
    yield folder
    whole = layout_of(folder)
    for path in sorted(entries(folder, required=False)):
        part = path.name.startswith(".") or (whole is not None and whole.owns(folder, path))
        if is_real_folder(path) and not part:
            yield from folders_below(path)


def scan(folder: Path, *, bests: bool = True) -> Iterator[Found]:
    """Yield every checkpoint in `folder` under each of its names, after `folder` itself if it is a checkpoint too.

    Skip best/ if not `bests`.
    """
    whole = layout_of(folder)
    if whole is not None:
        yield look(folder, whole)
    for place in places(folder):
        if not bests and place.name == BEST_FOLDER and place != folder:
            continue
        seen = set()
        for path in sorted(entries(place, required=place == folder)):
            part = path.name.startswith(".") or (whole is not None and whole.owns(folder, path))
            layout = None if part else layout_of(path)
            primary = layout.primary_file(path) if layout else None
            # In a run folder accept only layouts that are written into run folders: any folder may lie beside
            # checkpoints.
            # What programs call their one newest file is a checkpoint there too: checkpoints/<name>/latest.pt.
            named = path.name in NEWEST_NAMES and place.parent == folder
            inside = layout is not None and (place in (folder, folder / BEST_FOLDER) or bool(layout.run_stem) or named)
            if layout and primary and inside and primary not in seen:
                seen.add(primary)
                yield look(primary, layout)


def orphans(folder: Path) -> list[Found]:
    """Return the files that belong to a checkpoint whose other file is missing: an optimizer's without its model's, for
    instance.

    `find` leaves them out, because a save that was killed may leave such a file.
    """
    files = [path for place in places(folder) for path in sorted(entries(place, required=False))]
    free = (path for path in files if not path.name.startswith(".") and containing(path) is None)
    return [found for path in free if (found := orphan(path)) is not None]


def orphan(path: Path) -> Found | None:
    """Return the file as a checkpoint with a problem, if it belongs to a checkpoint whose other file is missing."""
    layout = layout_of(path)
    if layout is not None:
        return look(path, layout) if layout.primary_file(path) is None else None
    several = (layout for layout in LAYOUTS if len(layout.suffixes) > 1 and path.name.endswith(layout.suffixes))
    layout = next((layout for layout in several if layout.primary_file(path) is None), None)
    if layout is None or path.is_dir():
        return None
    error = CheckpointError(
        path, f"is part of a checkpoint, and {layout.stem(path)}{layout.suffixes[-1]} is missing", kind="lacking"
    )
    return Found(
        path, {}, str(error), layout=layout.name, size=path.stat().st_size if path.is_file() else 0, kind=error.kind
    )


def places(folder: Path) -> Iterator[Path]:
    """Yield the folders that hold the checkpoints of `folder`: itself, its run folders, and the best/ of each.

    Links are not followed, because what is found here may be pruned.
    """
    if not os.path.isdir(folder):
        return
    whole = layout_of(folder)
    runs = [path for path in sorted(entries_of(folder)) if is_real_folder(path) and not path.name.startswith(".")]
    runs = [path for path in runs if whole is None or not whole.owns(folder, path)]
    for place in (folder, *(path for path in runs if path.name != BEST_FOLDER and layout_of(path) is None)):
        yield place
        if is_real_folder(place / BEST_FOLDER):
            yield place / BEST_FOLDER


def linked(found: Iterable[Found], folder: Path) -> set[Path]:
    """Return the paths of the checkpoints that a link in `folder`, its run folders or a best/ points to.

    Such a link is a user's name for a checkpoint, as a copy is.
    """
    links = (path for place in places(folder) for path in entries(place, required=False) if path.is_symlink())
    targets = {os.path.realpath(link) for link in links}
    files = {each.path: known_layout(each.path).files(each.path) for each in found} if targets else {}
    return {path for path, own in files.items() if targets.intersection(map(os.path.realpath, own))}


def entries(place: Path, *, required: bool) -> list[Path]:
    """Return the entries of `place`; none if it is not `required` and cannot be listed, such as lost+found."""
    try:
        return entries_of(place)
    except OSError:
        if required:
            raise
        return []


def look(path: Path, layout: Layout) -> Found:
    """Return the checkpoint at `path` with its metadata or its problem; its tensors stay unread."""
    stamped = tuple(stamps(layout.files(path)))
    try:
        return _look(path, layout, stamped)  # type: ignore[arg-type]
    except CheckpointError as error:  # it may answer the next time
        return Found(path, {}, str(error), layout=layout.name, size=sum(stamp[1] for stamp in stamped), kind=error.kind)


@functools.lru_cache(maxsize=SEEN)
def _look(path: Path, layout: Layout, stamps: tuple[tuple[int, ...], ...]) -> Found:
    size = sum(stamp[1] for stamp in stamps)
    try:
        metadata = {name: value for name, value in layout.read_metadata(path).items() if name != "tokenizer"}
        return Found(path, metadata, layout=layout.name, size=size)
    except CheckpointError as error:
        if error.kind in ("unreachable", "lacking"):  # not for the cache: neither depends on these stamps alone
            raise
        return Found(path, {}, str(error), layout=layout.name, size=size, kind=error.kind)


def stamps(files: Iterable[Path]) -> Iterator[tuple[int, ...]]:
    """Yield inode, size in bytes and modification time of each file, and of each file inside each folder."""
    for file in files:
        for path in sorted(files_below(file)) if file.is_dir() else [file]:
            try:
                status = path.stat()
            except OSError:
                continue
            if not path.is_dir():
                yield status.st_ino, status.st_size, status.st_mtime_ns


def latest(found: list[Found]) -> Found | None:
    """Return the readable checkpoint with the highest save number; None if no checkpoint is readable.

    Ties go to the later `saved_at`, then to the resumable checkpoint: a conversion keeps number and time, and may drop
    the optimizer.
    """
    readable = [checkpoint for checkpoint in found if checkpoint.problem is None]
    return max(readable, key=lambda checkpoint: (checkpoint.save_order, checkpoint.resumable), default=None)


def best(found: list[Found]) -> Found | None:
    """Return the checkpoint with the lowest validation loss in the run of the latest; without losses, the latest."""
    newest = latest(found)
    if newest is None:
        return None
    same_run = [each for each in found if each.problem is None and each.run_id == newest.run_id]
    evaluated = [checkpoint for checkpoint in same_run if loss_of(checkpoint) is not None]
    return min(evaluated, key=lambda each: (loss_of(each), each.save_order, not each.resumable), default=newest)


def lowest_loss(found: list[Found]) -> Found | None:
    """Return the checkpoint with the lowest validation loss of all runs; None if none was evaluated."""
    evaluated = [checkpoint for checkpoint in found if checkpoint.problem is None and loss_of(checkpoint) is not None]
    return min(evaluated, key=lambda each: (loss_of(each), each.save_order, not each.resumable), default=None)


def loss_of(found: Found) -> float | None:
    """Return the validation loss of the checkpoint; None if it was not evaluated at its step."""
    return found.metadata.get("validation_loss")


def due(step: int, interval: int, *, last: int) -> bool:
    """Whether an action is due after `step`: every `interval` optimizer steps (0: never) and after the `last` step."""
    return step == last or (interval > 0 and step % interval == 0)


def folder_of(path: Path, run_id: str | None) -> Path:
    """Return the checkpoint folder that holds the checkpoint at `path`: the folder above best/ and the run folder.

    A folder of checkpoints may be called best itself: then the folder above it was never one.
    """
    folder = path.parent
    if folder.name == BEST_FOLDER and (folder.parent.name == run_id or _was_saved_into(folder.parent)):
        folder = folder.parent
    return folder.parent if folder.name == run_id else folder


def _was_saved_into(folder: Path) -> bool:
    """Whether `folder` is one of checkpoints: it has a lock, or a checkpoint outside best/."""
    try:
        return os.path.lexists(folder / FOLDER_LOCK) or any(True for _ in scan(folder, bests=False))
    except OSError:  # it cannot be listed, so nothing was saved there
        return False


def containing(path: Path) -> Path | None:
    """Return the checkpoint folder that has `path` as one of its files or subfolders."""
    for above in list(path.parents)[:2]:
        layout = layout_of(above)
        if layout and layout.owns(above, path):
            return above
    return None
