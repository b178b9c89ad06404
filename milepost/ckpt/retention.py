"""What changes a folder of checkpoints: save under the next number, keep the best, let the expired go."""

import datetime
import errno
import itertools
import os
import shutil
from pathlib import Path

from milepost.ckpt.bases import needed
from milepost.ckpt.finding import BEST_FOLDER, Expired, Found, expired, find, look, loss_of, scan
from milepost.ckpt.layouts import WRITERS, Layout, known_layout
from milepost.ckpt.leftovers import remove_leftovers_below
from milepost.ckpt.names import PREFIX, free_stem, home_of, ours
from milepost.ckpt.record import LARGEST, Checkpoint, CheckpointError, bytes_on_disk, from_metadata
from milepost.files import make_folder, remove, second_name, sync_folder
from milepost.locks import folder_lock
from milepost.paths import check_inside


def save(
    record: Checkpoint, folder: Path, *, layout: str = "unified", prefix: str = PREFIX, best_only: bool = False
) -> Path:
    """Writes `record` below `folder` under the folder's next save number and a name not taken yet; returns its path.

    `best_only` puts it into best/. Raises OSError if the disk refuses; what the folder held before is untouched then.
    """
    writer = WRITERS[layout]
    with folder_lock(folder):
        place = home_of(record, folder, writer=writer)
        remove_leftovers_below(folder, {folder / BEST_FOLDER, place, place / BEST_FOLDER})
        now = datetime.datetime.now(datetime.UTC)
        numbers = [one.metadata.get("save_number") or 0 for one in find(folder)]
        record.save_number = min(LARGEST, 1 + max(numbers, default=0))  # at the limit, the time decides
        record.saved_at = now.isoformat(timespec="microseconds")
        record.save_id = os.urandom(8).hex()
        stem = free_stem(record, place, writer=writer, now=now, prefix=prefix)
        target = place / BEST_FOLDER if best_only else place
        check_inside(folder, target)
        make_folder(target)
        if free_space_problem(folder, need=bytes_on_disk(record)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return writer.write(record, target, stem)


# ---------------------------------------------------------------------------------------------------------------------
# The best.


def keep_best(
    record: Checkpoint,
    folder: Path,
    *,
    saved: Path | None,
    layout: str = "unified",
    prefix: str = PREFIX,
    count: int = 1,
) -> Path:
    """Puts `record` under best/ and then removes what `count` of its run are better than; `saved` is its ordinary save of this step.

    What is not worse stays: a run that goes on from an earlier step has yet to reach again what it once was.
    """
    place = home_of(record, folder, writer=WRITERS[layout]) / BEST_FOLDER
    check_inside(folder, place)
    place.mkdir(parents=True, exist_ok=True)
    if saved is None:
        kept = save(record, folder, layout=layout, prefix=prefix, best_only=True)
    else:
        with folder_lock(folder):
            kept = second_name(known_layout(saved).files(saved), place)
        kept = known_layout(kept).primary_file(kept) or kept
    for each in (place, place.parent):  # the new name is durable before an earlier one goes
        sync_folder(each)
    with folder_lock(folder):
        for one in _outdone(record, place, folder=folder, count=count):
            remove(known_layout(one.path).files(one.path))
    return kept


def _outdone(record: Checkpoint, place: Path, *, folder: Path, count: int) -> list[Found]:
    """Return the run's checkpoints in best/ that are worse than the record and than `count` of them in all.

    A person's own copy and the base of adapters are not among them.
    """
    own = [one for one in ours(scan_best(place)) if one.run_id == record.run_id is not None]
    own.sort(key=lambda one: (loss_of(one) is None, loss_of(one), one.save_order))
    worse = [one for one in own[count:] if _is_worse(one, record)]
    bases = needed(worse, folder)
    return [one for one in worse if one.path not in bases]


def scan_best(place: Path) -> list[Found]:
    """The checkpoints in a best/ folder."""
    return [one for one in scan(place.parent) if one.path.parent == place]


def _is_worse(one: Found, record: Checkpoint) -> bool:
    """Whether its validation loss is higher than the record's."""
    loss, ours = loss_of(one), record.validation_loss
    return loss is not None and ours is not None and loss > ours


def best_is_kept(folder: Path, *, run_id: str | None, loss: float) -> bool:
    """Return whether a best/ of `folder` holds a checkpoint of the run whose validation loss is `loss` or lower, or unknown."""
    kept = [one for one in scan(folder) if one.path.parent.name == BEST_FOLDER and one.run_id == run_id]
    return any(one.problem is None and not (loss_of(one) or loss) > loss for one in kept)


def saved_best(folder: Path, *, run_id: str | None, step: int, loss: float) -> Found | None:
    """Return the ordinary save of a run's best step; None if there is none, or it was saved before it was evaluated."""
    own = [one for one in scan(folder, bests=False) if one.problem is None and one.run_id == run_id]
    same = [one for one in own if (one.step, loss_of(one)) == (step, loss)]
    return max(same, key=lambda one: (one.resumable, one.save_order), default=None)


def keep_saved_best(folder: Path, *, run_id: str | None, step: int, loss: float, count: int = 1) -> Path | None:
    """Do what `keep_best` does with the ordinary save of a run's best step; return None if there is none."""
    saved = saved_best(folder, run_id=run_id, step=step, loss=loss)
    if saved is None:
        return None
    record = from_metadata(saved.metadata, model_state={}, optimizer_state=None, where=str(saved.path))
    return keep_best(record, folder, saved=saved.path, layout=saved.layout, count=count)


# ---------------------------------------------------------------------------------------------------------------------
# Letting go.


def prune(
    folder: Path, *, run_id: str, keep_last: int, keep_every: int, newest_good: Path | None, spare: Path | None = None
) -> Expired:
    """Delete what the policy says is expired, and return it; `newest_good` is known to be whole and stays, and so does `spare`.

    Raises the first OSError or CheckpointError that came in between, after all the others are gone.
    """
    with folder_lock(folder):
        gone = what_expires(
            folder, run_id=run_id, keep_last=keep_last, keep_every=keep_every, newest_good=newest_good, spare=spare
        )
        failed: list[Exception] = []
        for one in [*gone.remove, *gone.strip]:  # what makes room comes first
            try:
                strip(one.path) if one in gone.strip else remove(known_layout(one.path).files(one.path))
            except (OSError, CheckpointError) as error:
                failed.append(error)
    if failed:
        raise failed[0]
    return gone


def what_expires(
    folder: Path, *, run_id: str, keep_last: int, keep_every: int, newest_good: Path | None, spare: Path | None = None
) -> Expired:
    """Return what `prune` would delete now, and which bases of adapters it spares.

    A checkpoint under another name than its save's is somebody's own copy and stays. One that is linked into the folder belongs to
    another place: through a link its files would be deleted there.
    """
    own = ours(list(scan(folder, bests=False)))
    found = [one for one in own if not any(map(os.path.islink, known_layout(one.path).files(one.path)))]
    gone = expired(
        found, run_id=run_id, keep_last=keep_last, keep_every=keep_every, newest_good=newest_good, spare=spare
    )
    # Without its optimizer a base is still one, unless it gets another name by that.
    at_risk = [*gone.remove, *(one for one in gone.strip if known_layout(one.path).optimizer_file(one.path) is None)]
    kept = needed(at_risk, folder)
    remove, strip = ([one for one in each if one.path not in kept] for each in (gone.remove, gone.strip))
    return Expired(remove=remove, strip=strip, kept=kept)


def strip(path: Path) -> None:
    """Leaves of a checkpoint what it takes to generate from it: the optimizer's file goes, or the whole is written anew without it.

    A damaged file stays as it is: written anew, it would get a checksum that agrees with the damage. The caller holds the folder's lock.
    """
    layout = known_layout(path)
    file = layout.optimizer_file(path)
    if file is not None:
        file.unlink(missing_ok=True)
        sync_folder(file.parent)
    elif not layout.problems(path):
        _write_stripped(path, layout)
        remove(layout.files(path))


def _write_stripped(path: Path, layout: Layout) -> None:
    """Writes what is at `path` once more without its optimizer, under the first free name; once, though a kill comes in between."""
    save_id = look(path, layout).metadata.get("save_id")
    for number in itertools.count(1):
        name = path.name if path.is_dir() else path.stem
        stem = f"{name}_model" + (f"_{number}" if number > 1 else "")
        (target,) = WRITERS[layout.name].targets(path.parent, stem)
        if not os.path.lexists(target):
            WRITERS[layout.name].write(layout.read(path, optimizer=False), path.parent, stem)
            return
        if save_id is not None and look(target, layout).metadata.get("save_id") == save_id:
            return


def free_space_problem(folder: Path, *, need: int) -> str | None:
    """In words, why `need` bytes more do not fit beside `folder`'s files; None if they do."""
    return None if need <= shutil.disk_usage(folder).free else _full(folder, need=need)


def _full(folder: Path, *, need: int) -> str:
    free = shutil.disk_usage(folder).free
    return f"the disk is full: about {need:,} bytes are needed in {folder}, {free:,} are free"


def why_not_saved(error: Exception, folder: Path, *, need: int) -> str:
    """In words, why a save to `folder` failed; for a full disk, the bytes it needed and the bytes that are free."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _full(folder, need=need)
    return f"{error}"
