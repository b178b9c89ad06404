"""What changes a folder of checkpoints: save under the next number, keep the best, let the expired go."""

import datetime
import errno
import itertools
import os
import re
import shutil
from pathlib import Path

from milepost.ckpt.exports import Export
from milepost.ckpt.finding import BEST_FOLDER, Expired, Found, expired, find, look, loss_of, scan
from milepost.ckpt.layouts import WRITERS, Layout, known_layout
from milepost.ckpt.record import LARGEST, Checkpoint, CheckpointError, bytes_on_disk
from milepost.files import make_folder, remove, remove_leftovers, second_name, sync_folder
from milepost.locks import folder_lock

PREFIX = "checkpoint"
# What every name given by `free_stem` has: the step and the second of the save, or the step alone in six digits at the end.
GIVEN_NAME = re.compile(r"_step\d{4,}_\d{8}_\d{6}|_\d{6,}(_\d+)?(\.safetensors)?$")


def save(
    record: Checkpoint, folder: Path, *, layout: str = "unified", prefix: str = PREFIX, best_only: bool = False
) -> Path:
    """Writes `record` below `folder` under the folder's next save number and a name not taken yet; returns its path.

    `best_only` puts it into best/. Raises OSError if the disk refuses; what the folder held before is untouched then.
    """
    writer = WRITERS[layout]
    with folder_lock(folder):
        place = home_of(record, folder, writer=writer)
        for each in {folder, folder / BEST_FOLDER, place, place / BEST_FOLDER}:
            remove_leftovers(each)
        now = datetime.datetime.now(datetime.UTC)
        numbers = [one.metadata.get("save_number") or 0 for one in find(folder)]
        record.save_number = min(LARGEST, 1 + max(numbers, default=0))  # at the limit, the time decides
        record.saved_at = now.isoformat(timespec="microseconds")
        record.save_id = os.urandom(8).hex()
        stem = free_stem(record, place, writer=writer, now=now, prefix=prefix)
        target = place / BEST_FOLDER if best_only else place
        make_folder(target)
        if free_space_problem(folder, need=bytes_on_disk(record)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return writer.write(record, target, stem)


def home_of(record: Checkpoint, folder: Path, *, writer: Layout | Export) -> Path:
    """Where a layout puts a record: in `folder`, or in the run's own folder there if its names repeat from run to run."""
    return folder / (record.run_id or "run") if writer.run_stem else folder


def free_stem(
    record: Checkpoint, place: Path, *, writer: Layout | Export, now: datetime.datetime, prefix: str = PREFIX
) -> str:
    """`{prefix}_{model}_{source}[_{weights}]_step{N}_{MMDDYYYY_HHMMSS}` at the first second from `now` whose name is free.

    Free means: in `place` and in its best/, so that what is saved in one can have a second name in the other. A layout's own
    `step_000100` is followed by `_2`, `_3` and so on.
    """
    for number in range(10**6):
        if writer.run_stem:
            begin = "" if prefix == PREFIX or "{prefix}" in writer.run_stem else f"{prefix}_"
            stem = (
                begin + writer.run_stem.format(step=record.step, prefix=prefix) + (f"_{number + 1}" if number else "")
            )
        else:
            stamp = (now + datetime.timedelta(seconds=number)).strftime("%m%d%Y_%H%M%S")
            stem = "_".join([*_words(record, prefix), f"step{record.step:04d}", stamp])
        names = [path for each in (place, place / BEST_FOLDER) for path in writer.targets(each, stem)]
        if not any(map(os.path.lexists, names)):
            return stem
    raise CheckpointError(f"{place} has no free name for step {record.step}")


def _words(record: Checkpoint, prefix: str) -> list[str]:
    words = [prefix, file_word(record.model_type), file_word(str(record.data.get("name") or "text"))]
    pretrained = str(record.hyperparameters.get("GPT2_MODEL_NAME") or "").rstrip("/").split("/")[-1]
    weights = re.sub(r"[^a-z0-9]", "", pretrained.lower())[:40]
    return [*words, weights] if weights else words


def file_word(text: str) -> str:
    """`text` in [a-z0-9_], at most 40 characters, for a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "text"


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
        for one in _outdone(record, place, count=count):
            remove(known_layout(one.path).files(one.path))
    return kept


def _outdone(record: Checkpoint, place: Path, *, count: int) -> list[Found]:
    """Of the run's in best/, those worse than the record and than `count` of them in all."""
    own = [one for one in scan_best(place) if one.run_id == record.run_id is not None and one.problem is None]
    own.sort(key=lambda one: (loss_of(one) is None, loss_of(one), one.save_order))
    return [one for one in own[count:] if _is_worse(one, record)]


def scan_best(place: Path) -> list[Found]:
    """The checkpoints in a best/ folder."""
    return [one for one in scan(place.parent) if one.path.parent == place]


def _is_worse(one: Found, record: Checkpoint) -> bool:
    """Whether its validation loss is higher than the record's."""
    loss, ours = loss_of(one), record.validation_loss
    return loss is not None and ours is not None and loss > ours


def best_is_kept(folder: Path, record: Checkpoint) -> bool:
    """Whether a best/ of `folder` holds one of the record's run that is at least as good."""
    kept = [one for one in scan(folder) if one.path.parent.name == BEST_FOLDER and one.run_id == record.run_id]
    return any(one.problem is None and not _is_worse(one, record) for one in kept)


# ---------------------------------------------------------------------------------------------------------------------
# Letting go.


def prune(folder: Path, *, run_id: str, keep_last: int, keep_every: int, newest_good: Path | None) -> Expired:
    """Lets go what the policy says is expired, and returns it; `newest_good` is known to be whole and stays.

    Raises the first OSError or CheckpointError that came in between, after all the others are gone.
    """
    with folder_lock(folder):
        gone = what_expires(folder, run_id=run_id, keep_last=keep_last, keep_every=keep_every, newest_good=newest_good)
        failed: list[Exception] = []
        for one in [*gone.remove, *gone.strip]:  # what makes room comes first
            try:
                strip(one.path) if one in gone.strip else remove(known_layout(one.path).files(one.path))
            except (OSError, CheckpointError) as error:
                failed.append(error)
    if failed:
        raise failed[0]
    return gone


def what_expires(folder: Path, *, run_id: str, keep_last: int, keep_every: int, newest_good: Path | None) -> Expired:
    """What `prune` would let go now.

    What was given another name than a save has is somebody's own copy and stays. What is linked into the folder is another place's:
    through a link its files would go there.
    """
    ours = [one for one in scan(folder, bests=False) if GIVEN_NAME.search(one.path.name)]
    found = [one for one in ours if not any(map(os.path.islink, known_layout(one.path).files(one.path)))]
    return expired(found, run_id=run_id, keep_last=keep_last, keep_every=keep_every, newest_good=newest_good)


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
