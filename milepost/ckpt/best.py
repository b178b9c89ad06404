"""best/: the checkpoints of a run with the lowest validation losses, as hard links or copies of its regular checkpoints."""

from pathlib import Path

from milepost.ckpt.bases import bases_among
from milepost.ckpt.finding import BEST_FOLDER, linked, loss_of, scan
from milepost.ckpt.index import Found, Looks, is_unchanged
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.names import PREFIX, own_checkpoints, target_folder
from milepost.ckpt.reading_back import check_reachable, check_saved
from milepost.ckpt.record import Checkpoint, from_metadata
from milepost.ckpt.saving import make_place, save
from milepost.files import link_or_copy, remove, sync_folder
from milepost.locks import folder_lock
from milepost.paths import check_inside


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
    make_place(place, folder)
    if saved is None:
        kept = save(record, folder, layout=layout, prefix=prefix, best_only=True)
    else:
        with folder_lock(folder):
            kept = link_or_copy(known_layout(saved).files(saved), place)
        kept = known_layout(kept).primary_file(kept) or kept
    for changed in (place, place.parent):  # the new name is durable before an older checkpoint is deleted
        sync_folder(changed)
    with folder_lock(folder):
        check_saved(kept)
        for checkpoint in _superseded(record, folder, count=count):
            remove(known_layout(checkpoint.path).files(checkpoint.path))
    return kept


def _superseded(record: Checkpoint, folder: Path, *, count: int) -> list[Found]:
    """Return the run's checkpoints in best/, of all layouts, that are worse than the record and than the `count` best.

    Two saves of one step count once. Copies made by hand, the bases of adapters and what a link names stay.
    """
    looks: Looks = {}
    known = list(scan(folder, regular=False, looks=looks, pick=lambda listing: listing.of_run(record.run_id)))
    check_reachable(known)
    own = own_checkpoints([each for each in known if each.run_id == record.run_id is not None])
    own.sort(key=lambda found: (loss_of(found) is None, loss_of(found), found.save_order))
    best = list(dict.fromkeys((found.step, loss_of(found)) for found in own))[:count]
    worse = [found for found in own if (found.step, loss_of(found)) not in best and _is_worse(found, record)]
    kept = {*bases_among(worse, folder), *linked(worse, folder, looks)}
    return [found for found in worse if found.path not in kept and is_unchanged(found)]


def _is_worse(found: Found, record: Checkpoint) -> bool:
    """Whether its validation loss is higher than the record's."""
    loss, new_loss = loss_of(found), record.validation_loss
    return loss is not None and new_loss is not None and loss > new_loss


def best_is_kept(folder: Path, *, run_id: str | None, loss: float) -> bool:
    """Whether a best/ of `folder` holds a checkpoint of the run whose validation loss is at most `loss`, or unknown."""
    kept = [found for found in scan(folder, regular=False) if found.run_id == run_id]
    return any(found.problem is None and not (loss_of(found) or loss) > loss for found in kept)


def saved_best(folder: Path, *, run_id: str | None, step: int, loss: float) -> Found | None:
    """Return the ordinary save of a run's best step; None if there is none or it was saved before evaluation."""
    known = scan(folder, bests=False, looks={}, pick=lambda listing: listing.of_run(run_id))
    own = [found for found in known if found.problem is None and found.run_id == run_id]
    same = [found for found in own if (found.step, loss_of(found)) == (step, loss)]
    return max(same, key=lambda found: (found.resumable, found.save_order), default=None)


def pending_best(folder: Path, run_id: str) -> Path | None:
    """Return the ordinary save of the run's best step, if a kill or a full disk kept that step out of best/; else None.

    A resume puts it there, so that retention must not delete it before.
    """
    own = [found for found in scan(folder) if found.run_id == run_id]
    newest = max(own, key=lambda found: found.save_order, default=None)
    values = newest.metadata if newest else {}
    step, loss = values.get("best_step"), values.get("best_loss")
    wanted = values.get("hyperparameters", {}).get("CHECKPOINT_KEEP_BEST", 0) > 0
    if not wanted or step is None or loss is None or best_is_kept(folder, run_id=run_id, loss=loss):
        return None
    saved = saved_best(folder, run_id=run_id, step=step, loss=loss)
    return saved.path if saved else None


def keep_saved_best(folder: Path, *, run_id: str | None, step: int, loss: float, count: int = 1) -> Path | None:
    """Call `keep_best` with the ordinary save of a run's best step; return None if there is none."""
    saved = saved_best(folder, run_id=run_id, step=step, loss=loss)
    if saved is None:
        return None
    record = from_metadata(saved.metadata, model_state={}, optimizer_state=None, where=str(saved.path))
    return keep_best(record, folder, saved=saved.path, layout=saved.layout, count=count)
