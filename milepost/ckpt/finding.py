"""Find checkpoints in a folder: list them, choose the latest or the best. Changes no file."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from milepost.ckpt.index import Found, Listing, Looks, Pick, look, look_into
from milepost.ckpt.layouts import LAYOUTS, known_layout, layout_of
from milepost.ckpt.record import CheckpointError
from milepost.files import if_it_answers, steadily
from milepost.locks import FOLDER_LOCK
from milepost.paths import is_real_folder

BEST_FOLDER = "best"
NEWEST_NAMES = ("latest.pt", "final.pt", "ckpt.pt")  # of other programs, which keep one folder for each model
IN_RUN_FOLDERS = [layout.name for layout in LAYOUTS if layout.run_stem]


def find(folder: Path) -> list[Found]:
    """Return the checkpoints in `folder`, its run folders and their best/: damaged ones first, then oldest save first.

    A save with two names is listed once: with its optimizer rather than without, outside best/ rather than inside.
    Hidden names are ignored. Raise OSError if `folder` cannot be listed.
    """
    by_save: dict[str, Found] = {}
    for found in sorted(scan(folder), key=lambda found: (found.resumable, not in_best(found, folder))):
        by_save[found.metadata.get("save_id") or str(found.path)] = found
    return sorted(by_save.values(), key=lambda found: found.save_order)


def twins(found: Found, folder: Path) -> Iterator[Found]:
    """Yield the other readable names of the same save in `folder`, of which `find` lists one: in best/, and a person's
    copies. A copy may be whole where `found` is damaged. Hard links of its file are left out: they share the damage.
    """
    save_id = found.metadata.get("save_id")
    for other in scan(folder) if save_id else ():
        same = other.path == found.path or (other.path.is_file() and _is_linked(other.path, found.path))
        if other.metadata.get("save_id") == save_id and not same:
            yield other


def _is_linked(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


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


def folders_below(folder: Path, *, looks: Looks | None = None) -> Iterator[Path]:
    """Yield `folder` and the folders below it, from the top down, without the parts of checkpoints and without the
    checkpoints that hold nothing else. `looks` is that of `look_into`.
    """
    yield folder
    whole = layout_of(folder)
    with contextlib.suppress(OSError):  # such as lost+found
        inside = look_into(folder, whole=whole, looks=looks)
        for name in sorted([*inside.folders, *inside.mixed]):
            if not (whole is not None and whole.owns(folder, folder / name)):
                yield from folders_below(folder / name, looks=looks)


def scan(
    folder: Path, *, regular: bool = True, bests: bool = True, looks: Looks | None = None, pick: Pick = Listing.all
) -> Iterator[Found]:
    """Yield every checkpoint in `folder` under each of its names, after `folder` itself if it is a checkpoint too.

    Skip those outside best/ if not `regular`, and those inside if not `bests`. With `looks`, take the metadata of a file
    that was seen before and has kept its name and inode as it was then: this costs a save little in a full folder. `pick`
    chooses from each listing, so that a save does not look at every checkpoint of other runs.
    """
    whole = layout_of(folder)
    if whole is not None and regular:
        yield look(folder, whole)
    if not os.path.isdir(folder):
        return
    inside = look_into(folder, whole=whole, looks=looks)
    found = pick(inside) if regular else []
    for place in _inner_places(folder, inside):
        if bests if place.name == BEST_FOLDER else regular:
            with if_it_answers():  # lost+found does not
                here = pick(look_into(place, whole=layout_of(place), looks=looks))
                found += [each for each in here if place == folder / BEST_FOLDER or not _is_stray(each, folder)]
    yield from (each for each in found if whole is None or not whole.owns(folder, each.path))


def highest_number(folder: Path) -> int:
    """Return the highest save number in `folder`, its run folders and their best/; 0 if there is none."""
    whole, looks = layout_of(folder), Looks()
    numbers = [0 if whole is None else look(folder, whole).metadata.get("save_number") or 0]
    for place in places(folder, looks=looks):
        with if_it_answers():
            numbers.append(look_into(place, whole=layout_of(place), looks=looks).highest)
    return max(numbers)


def _is_stray(found: Found, folder: Path) -> bool:
    """Whether a checkpoint in a run folder of `folder` was not saved there: any folder may lie beside checkpoints.

    What programs call their one newest file is a checkpoint there too: checkpoints/<name>/latest.pt.
    """
    named = found.path.name in NEWEST_NAMES and found.path.parent.parent == folder
    return not (named or found.layout in IN_RUN_FOLDERS or found.kind == "unreachable")


def orphans(folder: Path) -> list[Found]:
    """Return the files that belong to a checkpoint whose other file is missing: an optimizer's without its model's, for
    instance.

    `find` leaves them out, because a save that was killed may leave such a file.
    """
    files = [place / name for place in places(folder) for name in sorted(names_in(place)) if name[0] != "."]
    free = (path for path in files if containing(path) is None)
    return [found for path in free if (found := orphan(path)) is not None]


def orphan(path: Path) -> Found | None:
    """Return the file as a checkpoint with a problem, if it belongs to a checkpoint whose other file is missing."""
    layout, remedy = layout_of(path), None
    if layout is None:
        several = (layout for layout in LAYOUTS if len(layout.suffixes) > 1 and path.name.endswith(layout.suffixes))
        layout = next((layout for layout in several if layout.primary_file(path) is None), None)
    elif layout.primary_file(path) is not None:
        return None
    elif (found := look(path, layout)).problem:
        return found
    else:
        remedy = "put it there, or name the file itself to open it without"
    if layout is None or path.is_dir():
        return None
    problem = f"is part of a checkpoint, and {layout.missing(path)} is missing"
    error = CheckpointError(path, problem, remedy, kind="lacking")
    size = path.stat().st_size if path.is_file() else 0
    return Found(path, {}, str(error), layout=layout.name, size=size, kind=error.kind)


def places(folder: Path, *, looks: Looks | None = None) -> Iterator[Path]:
    """Yield the folders that hold the checkpoints of `folder`: itself, its run folders, and the best/ of each.

    Links are not followed, because what is found here may be pruned. `looks` is that of `look_into`.
    """
    if os.path.isdir(folder):
        yield folder
        yield from _inner_places(folder, look_into(folder, whole=layout_of(folder), looks=looks))


def _inner_places(folder: Path, inside: Listing) -> Iterator[Path]:
    runs = [folder / name for name in inside.folders if name != BEST_FOLDER]
    for place in (folder, *(path for path in runs if not (inside.whole and inside.whole.owns(folder, path)))):
        if place != folder:
            yield place
        if is_real_folder(place / BEST_FOLDER):
            yield place / BEST_FOLDER


def linked(found: Iterable[Found], folder: Path, looks: Looks | None = None) -> set[Path]:
    """Return the paths of the checkpoints that a link in `folder`, its run folders or a best/ points to.

    Such a link is a user's name for a checkpoint, as a copy is.
    """
    looks = {} if looks is None else looks
    targets = {os.path.realpath(link) for place in places(folder, looks=looks) for link in _links_in(place)}
    files = {each.path: known_layout(each.path).files(each.path) for each in found} if targets else {}
    return {path for path, own in files.items() if targets.intersection(map(os.path.realpath, own))}


def _links_in(place: Path) -> list[Path]:
    with if_it_answers():  # looked for at this moment: a user's link protects
        return [place / name for name in look_into(place, whole=layout_of(place), looks={}).links]
    return []


def hidden_in(place: Path, looks: Looks) -> list[str]:
    """Return the names in `place` that begin with a dot, sorted, as `names_in` does. `looks` is that of `look_into`."""
    with if_it_answers():
        return sorted(look_into(place, whole=layout_of(place), looks=looks).hidden)
    return []


def names_in(place: Path) -> list[str]:
    """Return the names in `place`; none if it may not be listed. Raise OSError if it does not answer."""
    with if_it_answers():
        return steadily(lambda: os.listdir(place))
    return []


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

    A folder of checkpoints may be called best itself: then the folder above it is another one, or none.
    """
    folder = path.parent
    if folder.name == BEST_FOLDER and _is_best_of(folder.parent, run_id):
        folder = folder.parent
    return folder.parent if folder.name == run_id else folder


def _is_best_of(above: Path, run_id: str | None) -> bool:
    """Whether best/ in `above` holds the best of that folder: the run was saved there too, or only `above` has a lock."""
    if above.name == run_id:
        return True
    try:
        if any(found.run_id == run_id for found in scan(above, bests=False)):
            return True
    except OSError:  # it cannot be listed, so nothing was saved there
        return False
    return os.path.lexists(above / FOLDER_LOCK) and not os.path.lexists(above / BEST_FOLDER / FOLDER_LOCK)


def containing(path: Path) -> Path | None:
    """Return the checkpoint folder that has `path` as one of its files or subfolders."""
    for above in list(path.parents)[:2]:
        layout = layout_of(above)
        if layout and layout.owns(above, path):
            return above
    return None
