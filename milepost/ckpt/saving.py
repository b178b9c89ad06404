"""Save a checkpoint under the next save number of its folder, and say why the disk refused one."""

import contextlib
import datetime
import errno
import os
import stat
from pathlib import Path

from milepost.ckpt.finding import BEST_FOLDER, highest_number
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.leftovers import remove_leftovers_below
from milepost.ckpt.names import PREFIX, free_stem, target_folder
from milepost.ckpt.record import LARGEST, Checkpoint, CheckpointError, bytes_on_disk
from milepost.ckpt.validate import validate
from milepost.files import free_space, in_words, lacks, link_or_copy, make_folder
from milepost.locks import folder_lock
from milepost.paths import check_inside

LACKS = "file_system_lacks"  # in a record's `runtime`: under which conditions its files were written


def save(
    record: Checkpoint,
    folder: Path,
    *,
    layout: str = "unified",
    prefix: str = PREFIX,
    best_only: bool = False,
    after: int = 0,
) -> Path:
    """Write `record` below `folder` under the next save number and a free name; return its path.

    `best_only` writes it into best/. The number is higher than `after`, the last one of its run in another folder. Raise
    CheckpointError if what is written could not be loaded again, OSError on a write error; the folder is then as it was
    before.
    """
    if layout not in tuple(WRITERS):
        raise CheckpointError(f"layout {layout!r}: expected one of {', '.join(WRITERS)}", kind="refused")
    validate(record)
    writer = WRITERS[layout]
    with folder_lock(folder):
        place = target_folder(record, folder, writer=writer)
        remove_leftovers_below(folder, _places(record, folder))
        now = datetime.datetime.now(datetime.UTC)
        record.save_number = min(LARGEST, 1 + max(after, highest_number(folder)))  # at the limit, the time decides
        record.saved_at = now.isoformat(timespec="microseconds")
        record.save_id = os.urandom(8).hex()
        if lacking := lacks(folder):
            record.runtime = {**record.runtime, LACKS: sorted(lacking)}
        stem = free_stem(record, place, writer=writer, now=now, prefix=prefix)
        target = place / BEST_FOLDER if best_only else place
        check_inside(folder, target)
        make_place(target, folder)
        if free_space_problem(folder, need=bytes_on_disk(record)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return writer.write(record, target, stem)


def copy_into(path: Path, folder: Path, *, run_id: str) -> Path | None:
    """Copy a saved checkpoint of the run from another folder below `folder` under its own name; return the new path, or
    None if that name is taken. Raise OSError on a write error; the folder is then as it was before.
    """
    layout = known_layout(path)
    files = layout.files(path)
    place = folder / run_id if layout.run_stem else folder
    with folder_lock(folder):
        check_inside(folder, place)
        make_place(place, folder)
        if any(os.path.lexists(place / file.name) for file in files):
            return None
        return link_or_copy(files, place)


def free_space_problem(folder: Path, *, need: int) -> str | None:
    """Return a sentence if fewer than `need` bytes are free on the disk of `folder`; None otherwise, or if that is
    unknown.
    """
    free = free_space(folder)
    return None if free is None or need <= free else _disk_full(folder, need=need)


def _disk_full(folder: Path, *, need: int) -> str:
    free = free_space(folder)
    if free is None:
        return f"the disk is full: about {need:,} bytes are needed in {folder}, which does not report its free space"
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
    if code == errno.EROFS:
        return (
            f"the file system of {folder} is read-only now, as after an error of its disk (dmesg shows it): make it writable, "
            "or mount another one there"
        )
    if code == errno.EFBIG:
        limit = "the file system or the limit of this process (ulimit -f) allows no file of that size"
        return f"the file is too large: about {need:,} bytes are needed in {folder}, and {limit}"
    return in_words(error)


def _places(record: Checkpoint, folder: Path) -> set[Path]:
    """Return where a run saves in `folder`, in any layout: an interrupted run may resume in another."""
    places = {folder, folder / (record.run_id or "run")}
    return places | {place / BEST_FOLDER for place in places}


def make_place(place: Path, folder: Path) -> None:
    """Create a folder of checkpoints below `folder`. Whoever may write in `folder` may write in its best/."""
    missing = not place.exists()
    make_folder(place)
    if missing and place.parent == folder:
        with contextlib.suppress(OSError):
            place.chmod(stat.S_IMODE(folder.stat().st_mode))
