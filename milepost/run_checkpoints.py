"""The checkpoints of a run: save, put the best step into best/, prune, and try again where the disk refused."""

import contextlib
import errno
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.leftovers import prepare_folder
from milepost.ckpt.record import bytes_on_disk, named_tensors
from milepost.files import check_writable, is_unreachable
from milepost.locks import FolderHeldError
from milepost.paths import is_real_folder
from milepost.run import TRY_INSTEAD, Run, State, check_unchanged, left_by_step, to_record
from milepost.run_files import METRICS, copy_from_fallback, flush_lines, open_run
from milepost.run_mirror import copied_now, copy_again, copy_to_mirror, finish_mirroring, wait_for_rank0
from milepost.runtime import distributed
from milepost.runtime.digests import digests
from milepost.runtime.errors import DeviceFaultError, TrainingError
from milepost.runtime.progress import Metrics, duration, shown

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until a disk that refused a save is asked again
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of a disk that may take a save later
PAUSES = (5, 10, 15, 30, 60, 60, 60, 60)  # seconds between the attempts to save the last step on a full disk: 5 min


def save_checkpoint(run: Run, *, regular: bool, fallback: bool = False) -> None:
    """Save this step: to CHECKPOINT_DIR if `regular`, and to best/ if it is the best so far; in the background if
    CHECKPOINT_ASYNC is set. With `fallback`, save only to CHECKPOINT_FALLBACK_DIR.

    Wait for the previous save first, and raise what it raised.
    """
    run.writer.wait()
    if regular:
        run.saved.step, run.saved.observed_step = run.state.step, run.state.observed_step
        run.saved.failed = run.world.is_rank0  # until the write succeeds
        run.saved.refused = False
    flush_lines(run)  # no checkpoint without its lines
    left = left_by_step(run)
    if run.engine == "fsdp":
        _check_parts(run, left)
    record = to_record(run)
    if run.world.is_rank0 or run.saves_parts:
        left = left if run.engine != "fsdp" or run.saves_parts else digests(named_tensors(record))  # gathered
        run.writer.submit(record, lambda copy: _write(run, copy, left, regular=regular, fallback=fallback))


@contextlib.contextmanager
def save_if_a_process_dies(run: Run) -> Iterator[None]:
    """Save the last complete step if another process dies, on rank 0 and where it holds all weights.

    A process notices the death while it waits for gradients, before the update. Muon also communicates during the
    update; a half-done update is not a step.
    """
    try:
        yield
    except Exception as error:
        complete = run.world.is_rank0 and run.engine == "ddp" and not run.state.updating
        if distributed.lost(error) and complete and run.settings.enable_checkpoints and run.state.step > run.saved.step:
            save_checkpoint(run, regular=True)
            run.writer.wait()
        raise


def _check_parts(run: Run, left: dict[str, int]) -> None:
    """Raise DeviceFaultError in every process if a tensor of one of them is not what the last step left."""
    message = ""
    try:
        check_unchanged(run.tensors(), left, run.state.step)
    except DeviceFaultError as error:
        message = str(error)
    if messages := list(filter(None, run.world.all_gather(message))):
        raise DeviceFaultError(messages[0])


def _write(run: Run, record: Checkpoint, left: dict[str, int], *, regular: bool, fallback: bool) -> None:
    """Write the record, keep it as the best if it is, and delete expired checkpoints. Disk errors are logged and do not
    stop training.

    Raise TrainingError instead of saving NaN or Inf weights, DeviceFaultError instead of saving what is not what the
    step `left`. Where each process saves its own part, rank 0 leads.
    """
    check_unchanged(named_tensors(record), left, record.step)
    if bad := ckpt.not_finite(record):
        raise TrainingError(f"{bad[0]} after step {record.step} is not finite, so nothing was saved; {TRY_INSTEAD}")
    if not run.world.is_rank0:
        ckpt.follow(record)
        return
    with ckpt.leading(record):
        if fallback:
            folder = Path(str(run.settings.checkpoint_fallback_dir))
            if saved := _write_regular(run, record, folder):
                copy_to_mirror(run, saved, folder, step=record.step)
            return
        saved = _write_regular(run, record, Path(run.settings.checkpoint_dir)) if regular else None
        if regular and run.saved.refused:
            return  # best/ is on the same disk: it waits for the next attempt
        _keep_best(run, record, saved=saved)
        run.saved.number = record.save_number or run.saved.number
        if saved:
            copy_to_mirror(run, saved, Path(run.settings.checkpoint_dir), step=record.step)
            _prune(run, record, saved=saved)


def _write_regular(run: Run, record: Checkpoint, folder: Path) -> Path | None:
    """Return the path of the new checkpoint, or None if the disk refused it."""
    with _log_disk_error(run, f"step {record.step} could not be saved", record=record, folder=folder):
        try:
            run.saved.path = ckpt.save(record, folder, after=run.saved.number, **_form(run))
        except OSError as error:
            _note_refusal(run, error, need=bytes_on_disk(record))
            raise
        run.saved.failed, run.saved.attempts = False, 0
        return run.saved.path
    return None


def _note_refusal(run: Run, error: OSError, *, need: int) -> None:
    """Note when to try again, if the error may pass."""
    saved = run.saved
    saved.need, saved.retry_at = need, time.monotonic() + _pause(run)
    saved.attempts += 1
    saved.refused = error.errno in PASSING or _is_away(error)


def _is_away(error: OSError) -> bool:
    return is_unreachable(error) and not isinstance(error, FolderHeldError)


def _pause(run: Run) -> float:
    """Return the seconds until the next attempt: twice as long after each failure."""
    return min(FIRST_PAUSE * 2.0 ** min(run.saved.attempts, 16), LONGEST_PAUSE)


def retry_is_due(run: Run) -> bool:
    """Return whether a save that the disk refused is worth another attempt: its folder takes a file and has room. False
    on all ranks but 0.
    """
    saved = run.saved
    if not (saved.failed and saved.refused) or time.monotonic() < saved.retry_at:
        return False
    saved.retry_at = time.monotonic() + _pause(run)
    folder = Path(run.settings.checkpoint_dir)
    with contextlib.suppress(OSError):
        check_writable(folder)
        return ckpt.free_space_problem(folder, need=saved.need) is None
    return False


def finish_saving(run: Run) -> None:
    """Wait for the save in flight, try to save the last step again if that failed, put the best step into best/, and wait
    for the mirror.
    """
    run.writer.wait()
    flush_lines(run)
    if run.world.broadcast(run.saved.failed and run.settings.checkpoint_fallback_dir is not None):
        save_checkpoint(run, regular=True, fallback=True)
        run.writer.wait()
        if run.world.is_rank0 and not run.saved.failed:
            run.log(f"step {run.state.step} is saved in {shown(str(run.saved.path))} instead")
    for number, pause in enumerate(PAUSES):
        if not run.world.broadcast(run.saved.failed and run.saved.refused):
            break
        if number == 0:
            run.log(
                f"trying again for {duration(sum(PAUSES))}: make room, or bring its folder back or make it writable; Ctrl-C twice gives up"
            )
        run.world.on_rank0(functools.partial(time.sleep, pause))
        save_checkpoint(run, regular=True)
        run.writer.wait()
    copy_best(run)
    finish_mirroring(run)
    wait_for_rank0(run)
    folder = Path(run.settings.checkpoint_dir)
    if run.uploader and run.saved.path and run.saved.path.is_relative_to(folder):
        _prune(run, run.state, saved=run.saved.path)  # what had to stay until it was copied


def _keep_best(run: Run, record: Checkpoint, *, saved: Path | None) -> None:
    """Put the record's best step into best/. An earlier best step that could not be written is retried from its regular
    checkpoint.
    """
    folder, count = Path(run.settings.checkpoint_dir), run.settings.checkpoint_keep_best
    if not _is_pending(run, record):
        return
    with _log_disk_error(run, f"step {record.best_step}, the best so far, could not be saved", record=record):
        if record.best_step != record.step or (not saved and ckpt.saved_best(folder, **_best_of(run, record))):
            copy_best(run, record)
        else:
            ckpt.keep_best(record, folder, saved=saved, count=count, **_form(run))
            run.saved.best_step = record.step


def _prune(run: Run, source: State | Checkpoint, *, saved: Path) -> None:
    """Delete expired checkpoints, except the regular checkpoint of a best step that is not in best/ yet, and what is being
    copied to the mirror.
    """
    if not run.settings.checkpoint_keep_last:
        return
    folder, settings = Path(run.settings.checkpoint_dir), run.settings
    policy = {"keep_last": settings.checkpoint_keep_last, "keep_every": settings.checkpoint_keep_every}
    record = source if isinstance(source, Checkpoint) else None
    with _log_disk_error(run, "expired checkpoints could not be deleted", record=record):
        regular = ckpt.saved_best(folder, **_best_of(run, source)) if _is_pending(run, source) else None
        spare = {*([regular.path] if regular else []), *copied_now(run)}
        ckpt.prune(folder, run_id=run.run_id, latest_valid=saved, spare=spare, **policy)


def copy_best(run: Run, record: Checkpoint | None = None) -> None:
    """Put the best step of the record, or of the run, into best/ from its regular checkpoint, if it is not there; on
    rank 0.
    """
    if not (run.world.is_rank0 and run.best_is_pending):
        return
    best, count = _best_of(run, record or run.state), run.settings.checkpoint_keep_best
    with _log_disk_error(run, f"step {best['step']}, the best so far, could not be saved"):
        if ckpt.keep_saved_best(Path(run.settings.checkpoint_dir), count=count, **best):
            run.saved.best_step = best["step"]


def repair(run: Run, last: Checkpoint) -> None:
    """Restore files that a finished run lacks: its last checkpoint if only the fallback folder has it, metrics that an earlier
    resume had set aside, the best step in best/, its last checkpoint in the mirror.

    Remove what a kill after its last save left.
    """
    copy_from_fallback(run)
    metrics_aside = Metrics(run.folder / METRICS).set_aside.exists()
    if metrics_aside or (
        run.best_is_pending and ckpt.saved_best(Path(run.settings.checkpoint_dir), **_best_of(run, run.state))
    ):
        with contextlib.ExitStack() as held:
            open_run(run, held)
            copy_best(run)
    for folder in filter(is_real_folder, (run.folder, Path(run.settings.checkpoint_dir))):
        with contextlib.suppress(OSError):  # a finished run may lie where nothing can be written
            prepare_folder(folder)
    copy_again(run, last)


def _form(run: Run) -> dict[str, Any]:
    return {"layout": run.layout, "prefix": run.settings.checkpoint_prefix}


def _best_of(run: Run, source: State | Checkpoint) -> dict[str, Any]:
    return {"run_id": run.run_id, "step": source.best_step, "loss": source.best_loss}


def _is_pending(run: Run, source: State | Checkpoint) -> bool:
    """Return whether the source's best step should be in best/ and is not.

    In the background the run may be at a later best already.
    """
    return source.best_step not in (None, run.saved.best_step) and run.settings.checkpoint_keep_best > 0


@contextlib.contextmanager
def _log_disk_error(
    run: Run, what: str, *, record: Checkpoint | None = None, folder: Path | None = None
) -> Iterator[None]:
    """Log why the disk refused a write, and the space that the record needs, instead of raising."""
    try:
        yield
    except (OSError, ckpt.CheckpointError) as error:
        need = bytes_on_disk(record) if record else 0
        why = ckpt.why_not_saved(error, folder or Path(run.settings.checkpoint_dir), need=need)
        line = f"{what} ({why}){'; training continues' if run.state.step < run.end else ''}"
        run.log(line)
        run.log.notices.send("disk", line)
