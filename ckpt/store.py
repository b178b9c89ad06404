"""What a folder of checkpoints holds: find, latest, best, save under the next number, keep the best, and which save is due."""

import datetime
import errno
import glob
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt.files import folder_lock, new_file, remove_leftovers, sync_folder
from ckpt.layouts import WRITERS, Layout, layout_of
from ckpt.record import Checkpoint, CheckpointError, Json

BEST_FOLDER = "best"


@dataclass(frozen=True)
class Found:
    """A checkpoint seen in a folder: its metadata without tensors, or the problem that keeps it from being read."""

    path: Path
    metadata: dict[str, Json]
    problem: str | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done, as recorded inside; 0 for a damaged file."""
        return self.metadata.get("step", 0)

    @property
    def save_order(self) -> tuple[int, str, int]:
        """Sorts from oldest to newest; what carries no save number (another program's) ranks below everything that does."""
        return self.metadata.get("save_number") or 0, self.metadata.get("saved_at") or "", self.step


def find(folder: Path) -> list[Found]:
    """Every checkpoint of `folder` and of its `best/`, oldest save first, damaged ones too (they come first). Dot-names are never seen.

    Raises OSError if a folder cannot be listed.
    """
    places = [place for place in (folder / BEST_FOLDER, folder) if os.path.isdir(place)]
    found: dict[str, Found] = {}
    for path in sorted(path for place in places for path in place.iterdir()):
        layout = None if path.name.startswith(".") or path.name == BEST_FOLDER else layout_of(path)
        if layout is None:
            continue
        one = _look(path, layout)
        save_id = one.metadata.get("save_id") or str(path)
        if save_id not in found or path.parent == folder:  # best/ may hold a second name of the same save
            found[save_id] = one
    return sorted(found.values(), key=lambda one: one.save_order)


def _look(path: Path, layout: Layout) -> Found:
    try:
        return Found(path, layout.peek(path))
    except CheckpointError as error:
        return Found(path, {}, str(error))


def latest(found: list[Found]) -> Found | None:
    """The readable checkpoint with the highest save number; ties go to the later `saved_at`."""
    readable = [one for one in found if one.problem is None]
    return max(readable, key=lambda one: one.save_order, default=None)


def best(found: list[Found]) -> Found | None:
    """The checkpoint with the lowest validation loss of the run that `latest` belongs to."""
    newest = latest(found)
    if newest is None:
        return None
    run_id = newest.metadata.get("run_id")
    rivals = [
        one
        for one in found
        if one.problem is None
        and one.metadata.get("run_id") == run_id
        and one.metadata.get("validation_loss") is not None
    ]
    return min(rivals, key=lambda one: (one.metadata["validation_loss"], one.save_order), default=newest)


def due(step: int, interval: int, *, last: int) -> bool:
    """Whether something done every `interval` optimizer steps (0: only at the end) is due after `step` of `last` steps."""
    return step == last or (interval > 0 and step % interval == 0)


def resolve(wish: str, folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint that CHECKPOINT_PATH means, and what to tell about the choice.

    `latest` and `best` look in `folder`; else a file, a checkpoint that is a folder, a folder of checkpoints, or a glob
    (the shell does not expand one in an assignment). Raises CheckpointError listing what is there if nothing fits.
    """
    if wish in ("latest", "best"):
        return _choose(folder, by=best if wish == "best" else latest)
    path = Path(os.path.expanduser(wish))
    if not os.path.lexists(path) and glob.has_magic(wish):
        return _choose_by_step(
            [_look(Path(name), layout) for name in sorted(glob.glob(str(path))) if (layout := layout_of(Path(name)))],
            wish,
            folder,
        )
    if not os.path.exists(path):
        raise CheckpointError(f"Checkpoint not found: {wish}. {listing(_nearest(path, folder))}")
    if os.path.isdir(path) and layout_of(path) is None:
        return _choose(path, by=latest)
    return path, []


def _nearest(path: Path, folder: Path) -> Path:
    """The folder whose content helps somebody who asked for `path`."""
    return path.parent if os.path.isdir(path.parent) else folder


def _choose(folder: Path, *, by: Callable[[list[Found]], Found | None]) -> tuple[Path, list[str]]:
    try:
        found = find(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}): mend its permissions") from error
    notes = _problems(found)
    chosen = by(found)
    if chosen is None:
        raise CheckpointError(f"No checkpoint can be read in {folder}. " + "; ".join(notes or [listing(folder)]))
    return chosen.path, [*notes, f"taking {chosen.path}"]


def _problems(found: list[Found], *, limit: int = 3) -> list[str]:
    """What is wrong with the damaged ones, the first few of them."""
    notes = [f"skipped: {one.problem}" for one in found if one.problem]
    return notes if len(notes) <= limit else [*notes[:limit], f"(and {len(notes) - limit} more damaged)"]


def _choose_by_step(matches: list[Found], wish: str, folder: Path) -> tuple[Path, list[str]]:
    notes = _problems(matches)
    readable = [one for one in matches if one.problem is None]
    if not readable:
        raise CheckpointError(
            f"Checkpoint not found: nothing matches {wish}. "
            + "; ".join(notes or [listing(_nearest(Path(os.path.expanduser(wish)), folder))])
        )
    chosen = max(readable, key=lambda one: (one.step, one.save_order))
    return chosen.path, [*notes, f"{wish} matches {len(matches)}: taking {chosen.path}"]


def listing(folder: Path, *, limit: int = 8) -> str:
    """One sentence on what `folder` holds, newest first, for a message."""
    if not os.path.isdir(folder):
        return f"There is no folder {folder}; was ENABLE_CHECKPOINTS=true set when training?"
    try:
        names = [one.path.name + (" (damaged)" if one.problem else "") for one in reversed(find(folder))]
    except OSError as error:
        return f"{folder} cannot be listed ({error.strerror})"
    if not names:
        return f"{folder} holds no checkpoint; was ENABLE_CHECKPOINTS=true set when training?"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {', '.join(names[:limit])}{more}"


def save(record: Checkpoint, folder: Path, *, layout: str = "unified", place: str = "") -> Path:
    """Writes `record` into `folder/place` under the folder's next save number and a name not taken yet; returns the path.

    Raises OSError if the disk refuses; what the folder held before is untouched then.
    """
    writer = WRITERS[layout]
    with folder_lock(folder):
        for each in (folder, folder / BEST_FOLDER):
            remove_leftovers(each)
        now = datetime.datetime.now(datetime.UTC)
        record.save_number = 1 + max((one.metadata.get("save_number") or 0 for one in find(folder)), default=0)
        record.saved_at = now.isoformat(timespec="microseconds")
        record.save_id = os.urandom(8).hex()
        return writer.write(record, folder / place, free_stem(record, folder, writer=writer, now=now))


def free_stem(record: Checkpoint, folder: Path, *, writer: Layout, now: datetime.datetime) -> str:
    """`checkpoint_{model}_{source}[_{weights}]_step{N}_{MMDDYYYY_HHMMSS}` at the first second from `now` whose name is free.

    Free means: in `folder` and in its `best/`, so that what is saved in one can have a second name in the other.
    """
    parts = ["checkpoint", file_word(record.model_type), file_word(str(record.data.get("name") or "text"))]
    pretrained = str(record.hyperparameters.get("GPT2_MODEL_NAME") or "").rstrip("/").split("/")[-1]
    if weights := re.sub(r"[^a-z0-9]", "", pretrained.lower())[:40]:
        parts.append(weights)
    for second in range(10**6):
        stamp = (now + datetime.timedelta(seconds=second)).strftime("%m%d%Y_%H%M%S")
        stem = "_".join([*parts, f"step{record.step:04d}", stamp])
        if not any(os.path.lexists(writer.target(place, stem)) for place in (folder, folder / BEST_FOLDER)):
            return stem
    raise CheckpointError(f"{folder} has no free name for step {record.step}")


def file_word(text: str) -> str:
    """`text` in [a-z0-9_], at most 40 characters, for a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "text"


def keep_best(record: Checkpoint, folder: Path, *, saved: Path | None, layout: str = "unified") -> Path:
    """Puts `record` under `best/` and then removes what it is better than; `saved` is its ordinary save of this step, if any.

    What is not worse stays: a run that goes on from an earlier step has yet to reach again what it once was.
    """
    place = folder / BEST_FOLDER
    place.mkdir(exist_ok=True)
    worse = [one.path for one in find(place) if _is_worse(one, record)]
    if saved is None:
        kept = save(record, folder, layout=layout, place=BEST_FOLDER)
    else:
        with folder_lock(folder):
            kept = _second_name(saved, place / saved.name)
    for each in (place, folder):  # the new name is durable before the earlier one goes
        sync_folder(each)
    for path in worse:
        if path != kept:
            path.unlink(missing_ok=True)
    return kept


def _is_worse(one: Found, record: Checkpoint) -> bool:
    """Whether `one` is of the same run and its validation loss is higher."""
    loss, ours = one.metadata.get("validation_loss"), record.validation_loss
    same_run = record.run_id is not None and one.metadata.get("run_id") == record.run_id
    return same_run and one.problem is None and loss is not None and ours is not None and loss > ours


def best_is_kept(folder: Path, record: Checkpoint) -> bool:
    """Whether `best/` holds one of the record's run that is at least as good."""
    kept = [one for one in find(folder / BEST_FOLDER) if one.metadata.get("run_id") == record.run_id]
    return any(one.problem is None and not _is_worse(one, record) for one in kept)


def _second_name(saved: Path, path: Path) -> Path:
    """A second name for the same bytes where the file system can, else a copy. The caller holds the folder's lock."""
    try:
        os.link(saved, path)
    except OSError:
        with new_file(path) as file, open(saved, "rb") as source:
            shutil.copyfileobj(source, file)
    return path


def why_not_saved(error: OSError, folder: Path, *, need: int) -> str:
    """In words, why a save to `folder` failed; for a full disk, the bytes it needed and the bytes that are free."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full: about {need:,} bytes are needed in {folder}, {shutil.disk_usage(folder).free:,} are free"
    return f"{error}"
