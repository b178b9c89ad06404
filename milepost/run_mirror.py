"""The mirror of a run's checkpoints: opened at the start, given each new checkpoint, awaited at the end, read by a resume."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from milepost import ckpt, config
from milepost.ckpt import CheckpointError
from milepost.config import Config, ConfigError
from milepost.files import make_folder
from milepost.mirror import (
    Mirrored,
    Store,
    StoreError,
    Uploader,
    fetch,
    fetch_bests,
    fetch_run,
    opened,
    readable,
    runs_in,
)
from milepost.mirror.contents import Save
from milepost.run import Run
from milepost.runtime.progress import Log, amount, shown

Fits = Callable[[ckpt.Found], bool]


def check_mirror(settings: Config) -> Store | None:
    """Return the store of the mirror, None if there is none; raise ConfigError if it cannot be one or lacks a package."""
    if settings.checkpoint_mirror is None:
        return None
    try:
        return opened(settings.checkpoint_mirror)
    except (ValueError, ImportError) as error:
        raise ConfigError([f"CHECKPOINT_MIRROR={config.public(settings, 'CHECKPOINT_MIRROR')}: {error}"]) from error


def open_mirror(run: Run) -> None:
    """Give the run its uploader, on rank 0, if it has a mirror and saves checkpoints."""
    store = check_mirror(run.settings) if run.settings.enable_checkpoints else None
    if store is None:
        return
    known = Mirrored(store, run.run_id, run.folder)
    run.uploader = Uploader(known, keep_last=run.settings.mirror_keep_last, say=run.log)
    kept = f", the last {run.settings.mirror_keep_last} kept there" if run.settings.mirror_keep_last else ""
    run.log(f"mirror: each checkpoint is copied to {store.shown}{kept}")


def copy_to_mirror(run: Run, saved: Path, folder: Path, *, step: int) -> None:
    """Let a new checkpoint below `folder` be copied to the mirror, if there is one."""
    if run.uploader is not None:
        run.uploader.submit(saved, folder, step=step)


def copied_now(run: Run) -> set[Path]:
    """Return the checkpoints that must stay on the disk until they are in the mirror."""
    return run.uploader.in_use() if run.uploader else set()


def finish_mirroring(run: Run) -> None:
    """Wait until the last checkpoint is in the mirror, and report how it ended. A second signal ends the process."""
    if run.uploader is None:
        return
    if waiting := run.uploader.in_use():
        size = sum(path.stat().st_size for path in waiting if path.is_file())
        run.log(f"waiting for the mirror{f' ({amount(size, chr(66))})' if size else ''}; Ctrl-C twice ends without it")
    run.saved.not_mirrored = run.uploader.finish()
    skipped = run.uploader.skipped
    passed = f"; {skipped} earlier checkpoints were passed over, because newer ones were there first" if skipped else ""
    if missing := run.saved.not_mirrored:
        line = f"{missing} checkpoint{'s' * (missing > 1)} not yet mirrored"
        run.log(f"{line}, for the reason above{passed}")
        run.log.notices.send("mirror", line)
    elif run.uploader.newest:
        run.log(f"mirrored: {run.uploader.newest}{passed}")


# ---------------------------------------------------------------------------------------------------------------------
# Resume.


def bring_from_mirror(settings: Config, log: Log, *, fits: Fits) -> None:
    """Bring the newest valid checkpoint of the mirror that `fits` to CHECKPOINT_DIR, with the files of its run, unless
    the run's checkpoint there is as new.

    Report what is damaged. Raise CheckpointError if the mirror does not answer and no checkpoint is here.
    """
    store = check_mirror(settings)
    if store is None:
        return
    folder = Path(settings.checkpoint_dir)
    here = [found for found in ckpt.find(folder) if found.problem is None] if folder.is_dir() else []
    try:
        _bring(store, settings, log, fits, here)
    except StoreError as error:
        if not here:
            remedy = "try again when it answers; without CHECKPOINT_MIRROR a new run starts"
            raise CheckpointError(
                f"the mirror could not be read ({error}), and {folder} is empty: {remedy}", kind="unreachable"
            ) from error
        log(f"warning: the mirror could not be read ({error}); it may hold newer checkpoints than {shown(folder)}")


def _bring(store: Store, settings: Config, log: Log, fits: Fits, here: list[ckpt.Found]) -> None:
    saves = {
        run: readable(store, names, say=log, pause=time.sleep)
        for run, names in runs_in(store, pause=time.sleep).items()
    }
    newest = [save for own in saves.values() if (save := next(own, None))]
    if not newest:
        log(f"the mirror {store.shown} holds no checkpoint that can be read")
    for first in sorted(newest, key=lambda save: save.found.metadata.get("saved_at") or "", reverse=True):
        if not fits(first.found):
            log(f"skipped: run {first.run_id} of the mirror has other settings")
            continue
        last = max((found.save_order for found in here if found.run_id == first.run_id), default=None)
        for save in itertools.chain([first], saves[first.run_id]):
            if last is not None and save.found.save_order <= last:
                return
            if settings.resume_step in (None, save.found.step) and _brought(store, save, settings, log):
                return


def _brought(store: Store, save: Save, settings: Config, log: Log) -> bool:
    """Write a save into CHECKPOINT_DIR and RUNS_DIR, its checkpoint last; return whether it is whole."""
    folder, run_folder = Path(settings.checkpoint_dir), Path(settings.runs_dir) / save.run_id
    make_folder(folder)
    try:
        fetch_run(store, save, run_folder, say=log, pause=time.sleep)
        fetch_bests(store, save, folder, say=log, pause=time.sleep)
        path = fetch(store, save, folder, pause=time.sleep)
    except CheckpointError as error:
        log(f"skipped: {error}")
        return False
    log(f"from the mirror: {shown(path)} ({amount(save.size, 'B')})")
    return True
