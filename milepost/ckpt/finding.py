"""What a folder of checkpoints holds: find, latest, best, which one is meant, which save is due and which are expired. Changes nothing."""

import difflib
import fnmatch
import functools
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from milepost.ckpt.layouts import LAYOUTS, Layout, layout_of
from milepost.ckpt.record import CheckpointError, Json
from milepost.paths import is_real_folder

BEST_FOLDER = "best"
SEEN = 4096  # checkpoints whose metadata is remembered, so that a save every step does not open every file again


@dataclass(frozen=True)
class Found:
    """A checkpoint seen in a folder: its metadata without tensors and tokenizer, or the problem that keeps it from being read."""

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
        """The run that saved it; None for another program's, or a damaged one."""
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
        """Sorts from oldest to newest; what carries no save number (another program's) ranks below everything that does."""
        return self.metadata.get("save_number") or 0, self.metadata.get("saved_at") or "", self.step


def find(folder: Path) -> list[Found]:
    """Every checkpoint of `folder`, of the runs' own folders in it and of their `best/`, oldest save first, damaged ones before them.

    Of two names for one save the fuller is taken, and the one outside best/. Dot-names are never seen. Raises OSError if a folder
    cannot be listed.
    """
    found: dict[str, Found] = {}
    for one in sorted(scan(folder), key=lambda one: (one.resumable, one.path.parent.name != BEST_FOLDER)):
        found[one.metadata.get("save_id") or str(one.path)] = one
    return sorted(found.values(), key=lambda one: one.save_order)


def scan(folder: Path, *, bests: bool = True) -> Iterator[Found]:
    """Every checkpoint of `folder` under each of its names, or it alone if it is one; without `best/` if not `bests`."""
    if (whole := layout_of(folder)) is not None:
        yield look(folder, whole)
        return
    for place in places(folder):
        if not bests and place.name == BEST_FOLDER:
            continue
        seen = set()
        for path in sorted(_entries(place, required=place == folder)):
            layout = None if path.name.startswith(".") else layout_of(path)
            home = layout.primary_file(path) if layout else None
            # In a run's own folder only what is written there: any folder may lie beside checkpoints.
            inside = layout is not None and (place in (folder, folder / BEST_FOLDER) or bool(layout.run_stem))
            if layout and home and inside and home not in seen:
                seen.add(home)
                yield look(home, layout)


def places(folder: Path) -> Iterator[Path]:
    """Yield the folders in which the checkpoints of `folder` lie: it, those of runs, and the best/ of each. Links are not followed:
    what is found here may be pruned.
    """
    if not os.path.isdir(folder):
        return
    runs = [path for path in sorted(folder.iterdir()) if is_real_folder(path) and not path.name.startswith(".")]
    for place in (folder, *(path for path in runs if path.name != BEST_FOLDER and layout_of(path) is None)):
        yield place
        if is_real_folder(place / BEST_FOLDER):
            yield place / BEST_FOLDER


def _entries(place: Path, *, required: bool) -> list[Path]:
    """What lies in `place`; nothing if it cannot be listed and is not `required`, like the lost+found of a file system."""
    try:
        return list(place.iterdir())
    except OSError:
        if required:
            raise
        return []


def look(path: Path, layout: Layout) -> Found:
    """The checkpoint at `path` without its tensors."""
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
    """What changes when one of the files, or one in such a folder, does: inode, bytes, time."""
    for file in files:
        for path in sorted(file.rglob("*")) if file.is_dir() else [file]:
            try:
                status = path.stat()
            except OSError:
                continue
            if not path.is_dir():
                yield status.st_ino, status.st_size, status.st_mtime_ns


def latest(found: list[Found]) -> Found | None:
    """The readable checkpoint with the highest save number; ties go to the later `saved_at`, then to what can go on.

    (A conversion keeps both, and may have left the optimizer out.)
    """
    readable = [one for one in found if one.problem is None]
    return max(readable, key=lambda one: (one.save_order, one.resumable), default=None)


def best(found: list[Found]) -> Found | None:
    """The checkpoint with the lowest validation loss of the run that `latest` belongs to."""
    newest = latest(found)
    if newest is None:
        return None
    rivals = [one for one in found if one.problem is None and one.run_id == newest.run_id and loss_of(one) is not None]
    return min(rivals, key=lambda one: (loss_of(one), one.save_order, not one.resumable), default=newest)


def loss_of(one: Found) -> float | None:
    """Its validation loss, if it was measured at its step."""
    return one.metadata.get("validation_loss")


def due(step: int, interval: int, *, last: int) -> bool:
    """Whether something done every `interval` optimizer steps (0: only at the end) is due after `step` of `last` steps."""
    return step == last or (interval > 0 and step % interval == 0)


@dataclass(frozen=True)
class Expired:
    """What a policy deletes: `remove` altogether, `strip` of the optimizer's state. `kept` are those it spares, with what needs them."""

    remove: list[Found]
    strip: list[Found]
    kept: dict[Path, Path] = field(default_factory=dict)


def expired(
    found: Iterable[Found], *, run_id: str, keep_last: int, keep_every: int, newest_good: Path | None, spare: Path | None = None
) -> Expired:  # fmt: skip
    """Which checkpoints of the run the policy lets go, given everything that its folder holds.

    The newest `keep_last` stay as they are (0: all do). Of those before them, the ones whose step is a multiple of `keep_every`
    optimizer steps (0: none) stay to generate from. The run's final one stays, and so do `newest_good`, `spare`, what is damaged, what
    is in best/, and every other run's.
    """
    own = [one for one in found if one.problem is None and one.run_id == run_id and one.path.parent.name != BEST_FOLDER]
    own.sort(key=lambda one: one.save_order)
    # By save number, because a conversion has that of what it was made from.
    saves = sorted({one.metadata.get("save_number") or 0 for one in own})
    old = saves[:-keep_last] if keep_last else []
    leaving = [one for one in own if (one.metadata.get("save_number") or 0) in old]
    leaving = [one for one in leaving if not one.is_final and one.path not in (newest_good, spare)]
    stays = [one for one in leaving if keep_every and one.step % keep_every == 0]
    return Expired(remove=[one for one in leaving if one not in stays], strip=[one for one in stays if one.resumable])


def folder_of(path: Path, run_id: str | None) -> Path:
    """The folder of checkpoints that the one at `path` lies in: above best/ and above the run's own folder."""
    folder = path.parent
    for own in (BEST_FOLDER, run_id):
        folder = folder.parent if folder.name == own else folder
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Which one is meant.


def resolve(wish: str, folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint that CHECKPOINT_PATH means, and what to tell about the choice.

    `latest` and `best` look in `folder`; else a file, a checkpoint that is a folder or a file of one, a stem of several files, a
    folder of checkpoints, or a glob (the shell does not expand one in an assignment). Raises CheckpointError listing what is there
    if nothing fits.
    """
    if wish in ("latest", "best"):
        return _choose(folder, by=best if wish == "best" else latest)
    path = Path(os.path.expanduser(wish))
    if not os.path.lexists(path):
        if whole := _of_stem(path):
            return whole, []
        if glob.has_magic(wish):
            return _choose_by_step(wish, folder)
    if not os.path.exists(path):
        meant = difflib.get_close_matches(path.name, ["latest", "best"], n=1, cutoff=0.7)
        hint = f" Did you mean {meant[0]}?" if meant else " Only one can be opened here." if "," in wish else ""
        raise CheckpointError(f"Checkpoint not found: {wish}.{hint} {listing(_nearest(path, folder))}")
    if around := _around(path):
        return around, [f"{path} is a part of {around}, which is taken"]
    layout = layout_of(path)
    if os.path.isdir(path) and layout is None:
        return _choose(path, by=latest)
    return (layout.primary_file(path) if layout else None) or path, []


def whole_folder(wish: str) -> Path | None:
    """The folder of checkpoints that CHECKPOINT_PATH names; None where it means one checkpoint."""
    path = Path(os.path.expanduser(wish))
    return path if os.path.isdir(path) and layout_of(path) is None and _around(path) is None else None


def _of_stem(path: Path) -> Path | None:
    """The checkpoint of several files whose names begin with `path`, given with or without a suffix of its own."""
    stem = path.with_suffix("") if path.suffix in (".pt", ".safetensors") else path
    for suffix in (layout.suffixes[-1] for layout in LAYOUTS if len(layout.suffixes) > 1):
        file = stem.with_name(stem.name + suffix)
        if os.path.isfile(file) and (layout := layout_of(file)):
            return layout.primary_file(file)
    return None


def _around(path: Path) -> Path | None:
    """The checkpoint that is a folder and has `path` as one of its files, or as a folder of some."""
    for above in list(path.parents)[:2]:
        layout, place = layout_of(above), path.relative_to(above).as_posix()
        if layout and any(
            fnmatch.fnmatchcase(place, member) or member.startswith(f"{place}/") for member in layout.members
        ):
            return above
    return None


def _nearest(path: Path, folder: Path) -> Path:
    """The folder whose content helps somebody who asked for `path`."""
    return path.parent if os.path.isdir(path.parent) else folder


def _choose(folder: Path, *, by: Callable[[list[Found]], Found | None]) -> tuple[Path, list[str]]:
    found = _listed(folder)
    notes = _problems(found)
    chosen = by(found)
    if chosen is None:
        raise CheckpointError(f"No checkpoint can be read in {folder}. " + "; ".join(notes or [listing(folder)]))
    return chosen.path, [*notes, f"taking {chosen.path}"]


def _listed(folder: Path) -> list[Found]:
    """`find`, with a folder that cannot be listed told in one sentence."""
    try:
        return find(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}): mend its permissions") from error


def _problems(found: list[Found], *, limit: int = 3) -> list[str]:
    """What is wrong with the damaged ones, the first few of them."""
    notes = [f"skipped: {one.problem}" for one in found if one.problem]
    return notes if len(notes) <= limit else [*notes[:limit], f"(and {len(notes) - limit} more damaged)"]


def _matching(wish: str) -> list[Found]:
    """Every checkpoint that a glob matches, one by any of its files."""
    pattern = os.path.expanduser(wish)
    layouts = {path: layout for name in sorted(glob.glob(pattern)) if (layout := layout_of(path := Path(name)))}
    homes = {home: layout for path, layout in layouts.items() if (home := layout.primary_file(path))}
    return [look(home, layout) for home, layout in homes.items()]


def _choose_by_step(wish: str, folder: Path) -> tuple[Path, list[str]]:
    """Of what a glob matches, the highest step."""
    matches = _matching(wish)
    notes = _problems(matches)
    readable = [one for one in matches if one.problem is None]
    if not readable:
        seen = "; ".join(notes or [listing(_nearest(Path(os.path.expanduser(wish)), folder))])
        raise CheckpointError(f"Checkpoint not found: nothing matches {wish}. {seen}")
    chosen = max(readable, key=lambda one: (one.step, one.save_order, one.resumable))
    return chosen.path, [*notes, f"{wish} matches {len(matches)}: taking {chosen.path}"]


def several(wish: str, folder: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that CHECKPOINT_PATH means where many are looked at, each once, and what to tell about the choice.

    `wish` is what `resolve` takes, or several of that joined by commas, in the order given. A glob means all that it matches and a
    folder of checkpoints all that it holds, oldest save first. Damaged ones among many are skipped with a note. Raises CheckpointError
    if one that was named is not there, or a folder or glob comes to none.
    """
    paths: list[Path] = []
    notes: list[str] = []
    for part in [wish] if os.path.lexists(wish) else wish.split(","):
        found = _all_of(part)
        readable = [one.path for one in found if one.problem is None]
        if readable:
            paths, notes = [*paths, *readable], [*notes, *_problems(found)]
        else:  # it means one, or there is none, which is told as if one had been meant
            path, said = resolve(part, folder)
            paths, notes = [*paths, path], [*notes, *said]
    return list(dict.fromkeys(paths)), notes


def _all_of(wish: str) -> list[Found]:
    """What a folder of checkpoints holds or a glob matches, oldest save first; nothing if `wish` is neither."""
    if whole := whole_folder(wish):
        return _listed(whole)
    many = glob.has_magic(wish) and not os.path.lexists(os.path.expanduser(wish))
    return sorted(_matching(wish), key=lambda one: one.save_order) if many else []


def listing(folder: Path, *, limit: int = 8) -> str:
    """One sentence on what `folder` holds, newest first, for a message."""
    if not os.path.isdir(folder):
        return f"There is no folder {folder}; was ENABLE_CHECKPOINTS=true set when training?"
    try:
        found = reversed(find(folder))
    except OSError as error:
        return f"{folder} cannot be listed ({error.strerror})"
    names = [str(one.path.relative_to(folder)) + (" (damaged)" if one.problem else "") for one in found]
    if not names:
        return f"{folder} holds no checkpoint; was ENABLE_CHECKPOINTS=true set when training?"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {', '.join(names[:limit])}{more}"
