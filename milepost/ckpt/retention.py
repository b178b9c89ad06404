"""Retention: which checkpoints of a run are expired by a policy, and their deletion."""

import collections
import itertools
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from milepost.ckpt.bases import bases_among
from milepost.ckpt.finding import in_best, linked, scan
from milepost.ckpt.index import Found, Looks, is_unchanged, look
from milepost.ckpt.layouts import WRITERS, Layout, known_layout
from milepost.ckpt.names import own_checkpoints, saved_without_optimizer
from milepost.ckpt.reading_back import check_reachable, check_saved
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.tensors import not_finite
from milepost.files import below, remove, sync_folder
from milepost.locks import folder_lock
from milepost.paths import is_real_file

NUMBER = re.compile(r"[0-9]+(-step=[0-9]+)?(\.[a-z]+)?")  # after `ckpt_`; after Lightning's `epoch=`


@dataclass(frozen=True)
class Expired:
    """The checkpoints that a policy deletes (`remove`) or reduces to their model (`strip`).

    `kept` holds the expired checkpoints that stay as the base of adapters, each with the path of those adapters.
    """

    remove: list[Found]
    strip: list[Found]
    kept: dict[Path, Path] = field(default_factory=dict)


def expired(
    found: Iterable[Found],
    *,
    run_id: str,
    keep_last: int,
    keep_every: int,
    latest_valid: Path | None,
    spare: Collection[Path] = (),
    folder: Path | None = None,
) -> Expired:
    """Return the run's checkpoints that the policy expires, out of all that its `folder` holds. Touches no file.

    The newest `keep_last` stay as they are (0: all do). Of the older ones, those at a multiple of `keep_every`
    optimizer steps (0: none) stay without their optimizer. The final checkpoint, `latest_valid`, `spare`, damaged ones,
    those in best/ and those of other runs stay.
    """
    own = [each for each in found if each.problem is None and each.run_id == run_id]
    own = [checkpoint for checkpoint in own if not in_best(checkpoint, folder)]
    own.sort(key=lambda checkpoint: checkpoint.save_order)
    # By save number: a conversion has the number of its original.
    numbers = {checkpoint.path: checkpoint.metadata.get("save_number") or 0 for checkpoint in own}
    saves = sorted(set(numbers.values()))
    old = saves[:-keep_last] if keep_last else []
    leaving = [checkpoint for checkpoint in own if numbers[checkpoint.path] in old and not checkpoint.is_final]
    leaving = [checkpoint for checkpoint in leaving if checkpoint.path not in (latest_valid, *spare)]
    models = [checkpoint for checkpoint in leaving if keep_every and checkpoint.step % keep_every == 0]
    return Expired(
        remove=[checkpoint for checkpoint in leaving if checkpoint not in models],
        strip=[checkpoint for checkpoint in models if checkpoint.resumable],
    )


def prune(
    folder: Path,
    *,
    run_id: str,
    keep_last: int,
    keep_every: int,
    latest_valid: Path | None,
    spare: Collection[Path] = (),
) -> Expired:
    """Delete the expired checkpoints of a run and return them.

    `latest_valid`, which is known to be intact, and `spare` stay. Raise the first OSError or CheckpointError only
    after deleting all the others.
    """
    with folder_lock(folder):
        if latest_valid is not None:
            check_saved(latest_valid)
        gone = select_expired(
            folder, run_id=run_id, keep_last=keep_last, keep_every=keep_every, latest_valid=latest_valid, spare=spare
        )
        failed: list[Exception] = []
        for checkpoint in [*gone.remove, *gone.strip]:  # deletions first, because stripping may need the room
            try:
                if checkpoint in gone.strip:
                    strip(checkpoint.path)
                else:
                    remove(known_layout(checkpoint.path).files(checkpoint.path))
            except (OSError, CheckpointError) as error:
                failed.append(error)
    if failed:
        raise failed[0]
    return gone


def own_in(folder: Path, *, run_id: str) -> list[Found]:
    """Return the run's checkpoints in `folder` that retention counts, and those of its best/."""
    found = [each for each in scan(folder, pick=lambda listing: listing.of_run(run_id)) if each.run_id == run_id]
    bests = [each for each in found if in_best(each, folder)]
    return own_checkpoints([each for each in found if each not in bests]) + own_checkpoints(bests)


def bytes_taken(found: Iterable[Found]) -> int:
    """Return the bytes that checkpoints take on their disk; a file with several names, as of best/, counts once."""
    sizes = {}
    for path in (file for each in found for file in known_layout(each.path).files(each.path)):
        for file in below(path) if path.is_dir() else [path]:
            status = file.stat()
            sizes[status.st_dev, status.st_ino] = status.st_size if is_real_file(file) else 0
    return sum(sizes.values())


def select_expired(
    folder: Path,
    *,
    run_id: str,
    keep_last: int,
    keep_every: int,
    latest_valid: Path | None,
    spare: Collection[Path] = (),
) -> Expired:
    """Return what `prune` would delete now, without the bases that adapters need.

    Renamed checkpoints are copies made by hand and stay. So do checkpoints that are links, because deleting them would
    delete files elsewhere, and checkpoints that a link in the folder points to. Raise CheckpointError if a checkpoint
    does not answer: what it needs is unknown.
    """
    looks: Looks = {}
    known = list(scan(folder, bests=False, looks=looks, pick=lambda listing: listing.of_run(run_id)))
    check_reachable(known)
    own = own_checkpoints([each for each in known if each.run_id == run_id])
    named = linked(own, folder, looks)
    found = [each for each in own if not any(map(os.path.islink, known_layout(each.path).files(each.path)))]
    found = [each for each in found if each.path not in named]
    gone = expired(
        found,
        run_id=run_id,
        keep_last=keep_last,
        keep_every=keep_every,
        latest_valid=latest_valid,
        spare=spare,
        folder=folder,
    )
    # A base without its optimizer is still a base, unless stripping gives it another name.
    renamed = [found for found in gone.strip if known_layout(found.path).optimizer_file(found.path) is None]
    kept = bases_among([*gone.remove, *renamed], folder)
    remove, strip = (
        [each for each in group if each.path not in kept and is_unchanged(each)] for group in (gone.remove, gone.strip)
    )
    return Expired(remove=remove, strip=strip, kept=kept)


# ---------------------------------------------------------------------------------------------------------------------
# Other programs' checkpoints.


def others(found: Iterable[Found]) -> list[Found]:
    """Return the readable checkpoints that no run saved: other programs' files, and conversions of them."""
    return [each for each in found if each.problem is None and each.run_id is None]


def beginning(found: Found) -> str:
    """Return the name before the number that it ends with: `ckpt_` of `ckpt_1000.pt`; without one, the whole name."""
    number = re.search(f"{NUMBER.pattern}$", found.path.name)
    return found.path.name[: number.start()] if number else found.path.name


def expired_others(folder: Path, prefix: str, *, keep_last: int, keep_every: int) -> list[Found]:
    """Return the files of other programs in `folder`, named `prefix` and a number, that the policy expires.

    They are ordered by the steps recorded inside; a file without a step of its own stays. So do links, files that links
    point to, bases of adapters, and the newest file whose weights can be read.
    """
    own = [found for found in others(scan(folder, bests=False)) if found.step > 0 and _is_named(found, folder, prefix)]
    steps = collections.Counter(found.step for found in own)
    own = sorted((found for found in own if steps[found.step] == 1), key=lambda found: found.step)
    old = [found for found in own[:-keep_last] if not (keep_every and found.step % keep_every == 0)]
    valid, _ = _newest_valid(own) if old else (None, [])
    kept = {valid, *linked(old, folder), *bases_among(old, folder)}
    return [found for found in old if valid and found.path not in kept]


def _is_named(found: Found, folder: Path, prefix: str) -> bool:
    """Whether it is a single file in `folder` whose name is `prefix`, a number and a suffix."""
    path = found.path
    single = path.parent == folder and is_real_file(path) and known_layout(path).files(path) == [path]
    return single and path.name.startswith(prefix) and NUMBER.fullmatch(path.name[len(prefix) :]) is not None


def prune_others(folder: Path, prefix: str, *, keep_last: int, keep_every: int) -> list[Found]:
    """Delete what `expired_others` returns, and return it."""
    with folder_lock(folder):
        gone = expired_others(folder, prefix, keep_last=keep_last, keep_every=keep_every)
        for found in gone:
            remove([found.path])
    return gone


# ---------------------------------------------------------------------------------------------------------------------


def strip(path: Path) -> None:
    """Remove the optimizer from a checkpoint: delete its file, or rewrite the checkpoint without it.

    The caller holds the folder's lock. Leave a damaged checkpoint alone: a rewrite would give the damage a valid
    checksum.
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
    """Write the checkpoint without its optimizer under the first free name, unless an interrupted call did."""
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


def latest_valid(folder: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """Return the run's newest checkpoint outside best/ that is intact, has finite weights and can be resumed, and what is
    wrong with newer ones.

    A damaged or lost optimizer counts, because a resume would take an older checkpoint instead. A person's copy does not
    count: its owner may delete it.
    """
    own = own_checkpoints([each for each in scan(folder, bests=False) if each.run_id == run_id])
    return _newest_valid(sorted(own, key=lambda found: found.save_order))


def _newest_valid(oldest_first: list[Found]) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, or the newest with valid weights if none can be resumed."""
    problems, without_optimizer = [], None
    for found in reversed(oldest_first):
        try:
            weights = known_layout(found.path).read(found.path, verify=True).model_state
        except CheckpointError as error:
            if error.kind == "unreachable":
                raise
            problems.append(str(error))
            continue
        if bad := not_finite(weights):
            problems.append(f"{found.path}: NaN or Inf in {bad[0]}")
        elif not _lost_optimizer(found):
            return found.path, problems
        else:
            problems.append(f"{found.path}: holds no optimizer state, so an older checkpoint that does stays too")
            without_optimizer = without_optimizer or found.path
    return without_optimizer, problems


def _lost_optimizer(found: Found) -> bool:
    """Whether the checkpoint of an unfinished run lacks the optimizer's state that its save wrote."""
    as_saved = found.resumable or found.is_final or saved_without_optimizer(found)
    return found.run_id is not None and not as_saved
