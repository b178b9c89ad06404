"""Save a checkpoint under the next save number of its folder, and keep the best ones in best/."""

import contextlib
import datetime
import errno
import os
import shutil
import stat
from pathlib import Path

from milepost.ckpt.bases import bases_among
from milepost.ckpt.finding import BEST_FOLDER, Found, find, in_best, linked, loss_of, scan
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.leftovers import remove_leftovers_below
from milepost.ckpt.names import PREFIX, free_stem, own_checkpoints, target_folder
from milepost.ckpt.record import LARGEST, Checkpoint, CheckpointError, bytes_on_disk, from_metadata
from milepost.ckpt.validate import validate
from milepost.files import link_or_copy, make_folder, remove, sync_folder
from milepost.locks import folder_lock
from milepost.paths import check_inside


def save(
    record: Checkpoint, folder: Path, *, layout: str = "unified", prefix: str = PREFIX, best_only: bool = False
) -> Path:
    """Write `record` below `folder` under the next save number and a free name; return its path.

    `best_only` writes it into best/. Raise CheckpointError if what is written could not be loaded again, OSError on a write
    error; the folder is then as it was before.
    """
    if layout not in WRITERS:
        raise CheckpointError(f"layout {layout!r}: expected one of {', '.join(WRITERS)}", kind="refused")
    validate(record)
    writer = WRITERS[layout]
    with folder_lock(folder):
        place = target_folder(record, folder, writer=writer)
        remove_leftovers_below(folder, _places(record, folder))
        now = datetime.datetime.now(datetime.UTC)
        numbers = [checkpoint.metadata.get("save_number") or 0 for checkpoint in find(folder)]
        record.save_number = min(LARGEST, 1 + max(numbers, default=0))  # at the limit, the time decides
        record.saved_at = now.isoformat(timespec="microseconds")
        record.save_id = os.urandom(8).hex()
        stem = free_stem(record, place, writer=writer, now=now, prefix=prefix)
        target = place / BEST_FOLDER if best_only else place
        check_inside(folder, target)
        _make_place(target, folder)
        if free_space_problem(folder, need=bytes_on_disk(record)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return writer.write(record, target, stem)


def free_space_problem(folder: Path, *, need: int) -> str | None:
    """Return a sentence if fewer than `need` bytes are free on the disk of `folder`; None otherwise."""
    return None if need <= shutil.disk_usage(folder).free else _disk_full(folder, need=need)


def _disk_full(folder: Path, *, need: int) -> str:
    free = shutil.disk_usage(folder).free
    if need <= free and _inodes_used_up(folder):
        return f"no inodes are left in {folder}, though {free:,} bytes are free: delete small files that are not needed"
    reserved = ", but not for this user: there may be a quota" if need <= free else ""
    return f"the disk is full: about {need:,} bytes are needed in {folder}, {free:,} are free{reserved}"


def _inodes_used_up(folder: Path) -> bool:
    """Whether the file system counts inodes and has none left for this user. Windows counts none."""
    if not hasattr(os, "statvfs"):
        return False
    status = os.statvfs(folder)
    return status.f_files > 0 and status.f_favail == 0


def why_not_saved(error: Exception, folder: Path, *, need: int) -> str:
    """Return a sentence on why a save to `folder` failed; for lack of space, with the bytes needed and what to do."""
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC:
        return _disk_full(folder, need=need)
    if code == errno.EDQUOT:
        return (
            f"the disk quota is used up: about {need:,} bytes are needed in {folder}; delete files, or have it raised"
        )
    if code == errno.EFBIG:
        limit = "the file system or the limit of this process (ulimit -f) allows no file of that size"
        return f"the file is too large: about {need:,} bytes are needed in {folder}, and {limit}"
    return f"{error}"


# ---------------------------------------------------------------------------------------------------------------------
# The best checkpoints.


def keep_best(
    record: Checkpoint,
    folder: Path,
    *,
    saved: Path | None,
    layout: str = "unified",
    prefix: str = PREFIX,
    count: int = 1,
) -> Path:
    """Put `record` into best/, then delete the run's worse checkpoints there beyond `count`; return the new path.

    `saved` is the ordinary save of this step: best/ gets a hard link or a copy of it. Checkpoints of equal loss stay: a
    run resumed from an earlier step may still need them.
    """
    place = target_folder(record, folder, writer=WRITERS[layout]) / BEST_FOLDER
    check_inside(folder, place)
    _make_place(place, folder)
    if saved is None:
        kept = save(record, folder, layout=layout, prefix=prefix, best_only=True)
    else:
        with folder_lock(folder):
            kept = link_or_copy(known_layout(saved).files(saved), place)
        kept = known_layout(kept).primary_file(kept) or kept
    for changed in (place, place.parent):  # the new name is durable before an older checkpoint is deleted
        sync_folder(changed)
    with folder_lock(folder):
        for checkpoint in _outdone(record, folder, count=count):
            remove(known_layout(checkpoint.path).files(checkpoint.path))
    return kept


def _places(record: Checkpoint, folder: Path) -> set[Path]:
    """Return where a run saves in `folder`, in any layout: an interrupted run may resume in another."""
    places = {folder, folder / (record.run_id or "run")}
    return places | {place / BEST_FOLDER for place in places}


def _make_place(place: Path, folder: Path) -> None:
    """Create a folder of checkpoints below `folder`. Whoever may write in `folder` may write in its best/."""
    missing = not place.exists()
    make_folder(place)
    if missing and place.parent == folder:
        with contextlib.suppress(OSError):
            place.chmod(stat.S_IMODE(folder.stat().st_mode))


def _outdone(record: Checkpoint, folder: Path, *, count: int) -> list[Found]:
    """Return the run's checkpoints in best/, of all layouts, that are worse than the record and than the `count` best.

    Two saves of one step count once. Copies made by hand, the bases of adapters and what a link names stay.
    """
    found = [each for each in scan(folder) if in_best(each, folder)]
    own = [found for found in own_checkpoints(found) if found.run_id == record.run_id is not None]
    own.sort(key=lambda found: (loss_of(found) is None, loss_of(found), found.save_order))
    best = list(dict.fromkeys((found.step, loss_of(found)) for found in own))[:count]
    worse = [found for found in own if (found.step, loss_of(found)) not in best and _is_worse(found, record)]
    kept = {*bases_among(worse, folder), *linked(worse, folder)}
    return [found for found in worse if found.path not in kept]


def _is_worse(found: Found, record: Checkpoint) -> bool:
    """Whether its validation loss is higher than the record's."""
    loss, new_loss = loss_of(found), record.validation_loss
    return loss is not None and new_loss is not None and loss > new_loss


def best_is_kept(folder: Path, *, run_id: str | None, loss: float) -> bool:
    """Whether a best/ of `folder` holds a checkpoint of the run whose validation loss is at most `loss`, or unknown."""
    kept = [found for found in scan(folder) if in_best(found, folder) and found.run_id == run_id]
    return any(found.problem is None and not (loss_of(found) or loss) > loss for found in kept)


def saved_best(folder: Path, *, run_id: str | None, step: int, loss: float) -> Found | None:
    """Return the ordinary save of a run's best step; None if there is none or it was saved before evaluation."""
    own = [found for found in scan(folder, bests=False) if found.problem is None and found.run_id == run_id]
    same = [found for found in own if (found.step, loss_of(found)) == (step, loss)]
    return max(same, key=lambda found: (found.resumable, found.save_order), default=None)


def keep_saved_best(folder: Path, *, run_id: str | None, step: int, loss: float, count: int = 1) -> Path | None:
    """Call `keep_best` with the ordinary save of a run's best step; return None if there is none."""
    saved = saved_best(folder, run_id=run_id, step=step, loss=loss)
    if saved is None:
        return None
    record = from_metadata(saved.metadata, model_state={}, optimizer_state=None, where=str(saved.path))
    return keep_best(record, folder, saved=saved.path, layout=saved.layout, count=count)
