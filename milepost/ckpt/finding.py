"""Find checkpoints in a folder: list them, choose the latest or best, resolve CHECKPOINT_PATH. Changes no file."""

import difflib
import fnmatch
import functools
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from milepost.ckpt.layouts import LAYOUTS, Layout, layout_of
from milepost.ckpt.record import CheckpointError, Json, Kind
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
    for found in sorted(scan(folder), key=lambda found: (found.resumable, found.path.parent.name != BEST_FOLDER)):
        by_save[found.metadata.get("save_id") or str(found.path)] = found
    return sorted(by_save.values(), key=lambda found: found.save_order)


def scan(folder: Path, *, bests: bool = True) -> Iterator[Found]:
    """Yield every checkpoint in `folder` under each of its names, or `folder` itself if it is a checkpoint.

    Skip best/ if not `bests`.
    """
    if (whole := layout_of(folder)) is not None:
        yield look(folder, whole)
        return
    for place in places(folder):
        if not bests and place.name == BEST_FOLDER:
            continue
        seen = set()
        for path in sorted(_entries(place, required=place == folder)):
            layout = None if path.name.startswith(".") else layout_of(path)
            primary = layout.primary_file(path) if layout else None
            # In a run folder accept only layouts that are written into run folders: any folder may lie beside
            # checkpoints.
            # What programs call their one newest file is a checkpoint there too: checkpoints/<name>/latest.pt.
            named = path.name in NEWEST_NAMES and place.parent == folder
            inside = layout is not None and (place in (folder, folder / BEST_FOLDER) or bool(layout.run_stem) or named)
            if layout and primary and inside and primary not in seen:
                seen.add(primary)
                yield look(primary, layout)


def places(folder: Path) -> Iterator[Path]:
    """Yield the folders that hold the checkpoints of `folder`: itself, its run folders, and the best/ of each.

    Links are not followed, because what is found here may be pruned.
    """
    if not os.path.isdir(folder):
        return
    runs = [path for path in sorted(folder.iterdir()) if is_real_folder(path) and not path.name.startswith(".")]
    for place in (folder, *(path for path in runs if path.name != BEST_FOLDER and layout_of(path) is None)):
        yield place
        if is_real_folder(place / BEST_FOLDER):
            yield place / BEST_FOLDER


def _entries(place: Path, *, required: bool) -> list[Path]:
    """Return the entries of `place`; none if it is not `required` and cannot be listed, such as lost+found."""
    try:
        return list(place.iterdir())
    except OSError:
        if required:
            raise
        return []


def look(path: Path, layout: Layout) -> Found:
    """Return the checkpoint at `path` with its metadata or its problem; its tensors stay unread."""
    return _look(path, layout, tuple(stamps(layout.files(path))))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=SEEN)
def _look(path: Path, layout: Layout, stamps: tuple[tuple[int, ...], ...]) -> Found:
    size = sum(stamp[1] for stamp in stamps)
    try:
        metadata = {name: value for name, value in layout.read_metadata(path).items() if name != "tokenizer"}
        return Found(path, metadata, layout=layout.name, size=size)
    except CheckpointError as error:
        return Found(path, {}, str(error), layout=layout.name, size=size)


def stamps(files: Iterable[Path]) -> Iterator[tuple[int, ...]]:
    """Yield inode, size in bytes and modification time of each file, and of each file inside each folder."""
    for file in files:
        for path in sorted(file.rglob("*")) if file.is_dir() else [file]:
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


def loss_of(found: Found) -> float | None:
    """Return the validation loss of the checkpoint; None if it was not evaluated at its step."""
    return found.metadata.get("validation_loss")


def due(step: int, interval: int, *, last: int) -> bool:
    """Whether an action is due after `step`: every `interval` optimizer steps (0: never) and after the `last` step."""
    return step == last or (interval > 0 and step % interval == 0)


def folder_of(path: Path, run_id: str | None) -> Path:
    """Return the checkpoint folder that holds the checkpoint at `path`: the folder above best/ and the run folder."""
    folder = path.parent
    for own in (BEST_FOLDER, run_id):
        folder = folder.parent if folder.name == own else folder
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Resolve what the user named.


def resolve(name: str, folder: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint that CHECKPOINT_PATH names, and notes about the choice.

    `name` is `latest` or `best` (of `folder`), a file, a checkpoint folder or a file in one, the common stem of several
    files, a folder of checkpoints, or a glob (the shell does not expand one in an assignment). Raise CheckpointError
    listing what exists otherwise.
    """
    if name in ("latest", "best"):
        return _choose(folder, by=best if name == "best" else latest)
    path = Path(os.path.expanduser(name))
    if not os.path.lexists(path):
        if primary := _with_stem(path):
            return primary, []
        if glob.has_magic(name):
            return _choose_by_step(name, folder)
    if not os.path.exists(path):
        close = difflib.get_close_matches(path.name, ["latest", "best"], n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}? " if close else "name a single checkpoint here; " if "," in name else ""
        raise not_found(name, _nearest(path, folder), hint=hint)
    if whole := _containing(path):
        return whole, [f"{path} is part of {whole}, which is used"]
    layout = layout_of(path)
    if os.path.isdir(path) and layout is None:
        return _choose(path, by=latest)
    return (layout.primary_file(path) if layout else None) or path, []


def not_found(name: Path | str, folder: Path, *, hint: str = "") -> CheckpointError:
    """Return the error for a checkpoint `name` that does not exist; `folder` is where a similar one may be."""
    return CheckpointError(name, "Checkpoint not found", f"{hint}{listing(folder)}", kind="not found")


def whole_folder(name: str) -> Path | None:
    """Return the folder of checkpoints that CHECKPOINT_PATH names; None if it names a single checkpoint."""
    path = Path(os.path.expanduser(name))
    return path if os.path.isdir(path) and layout_of(path) is None and _containing(path) is None else None


def _with_stem(path: Path) -> Path | None:
    """Return the checkpoint of several files whose names begin with `path`, which may carry a suffix."""
    stem = path.with_suffix("") if path.suffix in (".pt", ".safetensors") else path
    for suffix in (layout.suffixes[-1] for layout in LAYOUTS if len(layout.suffixes) > 1):
        file = stem.with_name(stem.name + suffix)
        if os.path.isfile(file) and (layout := layout_of(file)):
            return layout.primary_file(file)
    return None


def _containing(path: Path) -> Path | None:
    """Return the checkpoint folder that has `path` as one of its files or subfolders."""
    for above in list(path.parents)[:2]:
        layout, place = layout_of(above), path.relative_to(above).as_posix()
        if layout and any(
            fnmatch.fnmatchcase(place, member) or member.startswith(f"{place}/") for member in layout.members
        ):
            return above
    return None


def _nearest(path: Path, folder: Path) -> Path:
    """Return the folder to list when `path` does not exist."""
    return path.parent if os.path.isdir(path.parent) else folder


def _choose(folder: Path, *, by: Callable[[list[Found]], Found | None]) -> tuple[Path, list[str]]:
    found = _find_or_raise(folder)
    notes = _problems(found)
    chosen = by(found)
    if chosen is None:
        remedy = "; ".join(notes or [listing(folder)])
        raise CheckpointError(folder, "no checkpoint can be read", remedy, kind="damaged" if notes else "not found")
    return chosen.path, [*notes, f"taking {chosen.path}"]


def _find_or_raise(folder: Path) -> list[Found]:
    """Return `find(folder)`; raise CheckpointError instead of OSError."""
    try:
        return find(folder)
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise CheckpointError(folder, problem, "check its permissions", kind="not found") from error


def _problems(found: list[Found], *, limit: int = 3) -> list[str]:
    """Return a note for each of the first `limit` unreadable checkpoints, and the number of the others."""
    notes = [f"skipped: {checkpoint.problem}" for checkpoint in found if checkpoint.problem]
    return notes if len(notes) <= limit else [*notes[:limit], f"(and {len(notes) - limit} more damaged)"]


def _matching(pattern: str) -> list[Found]:
    """Return every checkpoint of which the glob matches at least one file."""
    names = sorted(glob.glob(os.path.expanduser(pattern)))
    layouts = {path: layout for name in names if (layout := layout_of(path := Path(name)))}
    primaries = {primary: layout for path, layout in layouts.items() if (primary := layout.primary_file(path))}
    return [look(primary, layout) for primary, layout in primaries.items()]


def _choose_by_step(pattern: str, folder: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint of the highest step that the glob matches."""
    matches = _matching(pattern)
    notes = _problems(matches)
    readable = [checkpoint for checkpoint in matches if checkpoint.problem is None]
    if not readable:
        remedy = "; ".join(notes or [listing(_nearest(Path(os.path.expanduser(pattern)), folder))])
        kind: Kind = "damaged" if notes else "not found"
        problem = "no matching checkpoint can be read" if matches else "matches no checkpoint"
        raise CheckpointError(pattern, problem, remedy, kind=kind)
    chosen = max(readable, key=lambda found: (found.step, found.save_order, found.resumable))
    return chosen.path, [*notes, f"{pattern} matches {len(matches)}: taking {chosen.path}"]


def several(names: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Return the checkpoints that CHECKPOINT_PATH names where many are allowed, each once, and notes about the choice.

    `names` is what `resolve` takes, or several of them joined by commas, in this order. A glob stands for all its
    matches and a folder for all its checkpoints, oldest save first; their damaged checkpoints are skipped with a note.
    Raise CheckpointError if a named checkpoint does not exist, or a folder or glob yields no checkpoint.
    """
    paths: list[Path] = []
    notes: list[str] = []
    for name in [names] if os.path.lexists(names) else names.split(","):
        found = _all_of(name)
        readable = [checkpoint.path for checkpoint in found if checkpoint.problem is None]
        if readable:
            paths, notes = [*paths, *readable], [*notes, *_problems(found)]
        else:  # a single checkpoint, or nothing readable: then `resolve` raises
            path, new_notes = resolve(name, folder)
            paths, notes = [*paths, path], [*notes, *new_notes]
    return list(dict.fromkeys(paths)), notes


def _all_of(name: str) -> list[Found]:
    """Return the checkpoints of a folder or a glob, oldest save first; an empty list if `name` is neither."""
    if folder := whole_folder(name):
        return _find_or_raise(folder)
    many = glob.has_magic(name) and not os.path.lexists(os.path.expanduser(name))
    return sorted(_matching(name), key=lambda found: found.save_order) if many else []


def listing(folder: Path, *, limit: int = 8) -> str:
    """Return a sentence on the checkpoints of `folder`, newest first, for a message."""
    if not os.path.isdir(folder):
        return f"there is no folder {folder}; was ENABLE_CHECKPOINTS=true set when training?"
    try:
        found = reversed(find(folder))
    except OSError as error:
        return f"{folder} cannot be listed ({error.strerror})"
    names = [str(each.path.relative_to(folder)) + (" (damaged)" if each.problem else "") for each in found]
    if not names:
        return f"{folder} holds no checkpoint; was ENABLE_CHECKPOINTS=true set when training?"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {', '.join(names[:limit])}{more}"
