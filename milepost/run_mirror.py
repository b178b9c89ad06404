"""The mirror of a run's checkpoints: opened at the start, given each new checkpoint, awaited at the end, read by a resume."""

import contextlib
import itertools
import time
from collections.abc import Callable, Collection
from pathlib import Path

from milepost import ckpt, config
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.config import Config, ConfigError
from milepost.files import below, make_folder
from milepost.mirror import (
    Helper,
    Lease,
    Mirrored,
    Sharing,
    Store,
    StoreError,
    Uploader,
    attempted,
    fetch,
    fetch_bests,
    fetch_run,
    holding,
    opened,
    readable,
    runs_in,
)
from milepost.mirror.contents import MANIFEST, Save, save_name, save_number
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


def open_mirror(run: Run, held: contextlib.ExitStack) -> None:
    """Take the run in its mirror, if it has one, for this process, and give it its uploader; on rank 0.

    Raise RunHeldElsewhereError if another process trains the run, ConfigError if the store refuses what a mirror needs.
    """
    leased = _leased(run, held)
    if leased is None:
        return
    known, there = leased
    if run.saves_parts and run.world.size > 1:
        run.sharing = Sharing(run.world.board, size=run.world.size)
        known.ask = run.sharing.ask
    _upload_to(run, known)
    if there is not None:
        _copy_resumed(run, there)


def _copy_resumed(run: Run, there: list[str]) -> None:
    """Let the checkpoint that the run resumes from be copied, if its manifest is not `there`: the next may be hours away."""
    settings, path = run.settings, run.saved.resumed
    folders = [Path(place) for place in (settings.checkpoint_dir, settings.checkpoint_fallback_dir) if place]
    folder = next((folder for folder in folders if path and path.is_relative_to(folder)), None)
    if path is None or folder is None:
        return
    manifest = f"{run.run_id}/{save_name(ckpt.known_layout(path).read_metadata(path))}/{MANIFEST}"
    if manifest not in there:
        copy_to_mirror(run, path, folder, step=run.state.step)


def copy_again(run: Run, last: Checkpoint) -> None:
    """Copy the last checkpoint of a finished run to its mirror, if that lacks it, and report how it ended; on rank 0.

    Raise as `open_mirror` does.
    """
    store = check_mirror(run.settings) if run.settings.enable_checkpoints else None
    folder = Path(run.settings.checkpoint_dir)
    if store is None or last.save_id is None or last.path is None or not last.path.is_relative_to(folder):
        return
    manifest = f"{run.run_id}/{save_name(vars(last))}/{MANIFEST}"
    try:
        if manifest in attempted(store.names, pause=time.sleep):
            return
    except StoreError as error:
        if error.kind != "passing":
            raise _refused(run.settings, error) from error
        run.log(
            f"warning: the mirror could not be read ({error}), so it may lack the last checkpoint: try again when it answers"
        )
        run.saved.not_mirrored = 1
        return
    with contextlib.ExitStack() as held:
        if leased := _leased(run, held):
            _upload_to(run, leased[0])
            copy_to_mirror(run, last.path, folder, step=last.step)
            finish_mirroring(run)


def _leased(run: Run, held: contextlib.ExitStack) -> tuple[Mirrored, list[str] | None] | None:
    """Return the run in its mirror, taken for this process, and its manifests there, None if the mirror does not answer;
    None if the run has no mirror. Raise as `open_mirror` does.
    """
    # Connections of their own, so that no large upload delays a beat.
    settings, store, beside = run.settings, check_mirror(run.settings), check_mirror(run.settings)
    if store is None or beside is None:
        return None
    lease = Lease(beside, run.run_id, say=run.log)
    held.callback(lease.release)
    there = None
    try:
        attempted(lease.hold, pause=time.sleep)
        # Newer saves than the one resumed may lie only there, after RESUME_STEP: the next are numbered above them.
        there = runs_in(store, run.run_id, pause=time.sleep).get(run.run_id, [])
        run.saved.number = max([run.saved.number, *map(save_number, there[:1])])
    except StoreError as error:
        if error.kind != "passing":
            raise _refused(settings, error) from error
        run.log(
            f"warning: the mirror does not answer ({error}); until it does, nothing keeps another machine from training this run"
        )
    kept = f", the last {settings.mirror_keep_last} kept there" if settings.mirror_keep_last else ""
    run.log(f"mirror: each checkpoint is copied to {store.shown}{kept}; this is {lease.owner}")
    return Mirrored(store, run.run_id, run.folder, Path(settings.checkpoint_dir), guard=lease.hold), there


def _upload_to(run: Run, known: Mirrored) -> None:
    def warn(line: str) -> None:
        run.log.notices.send("mirror", line)

    run.uploader = Uploader(known, keep_last=run.settings.mirror_keep_last, say=run.log, warn=warn, rate=_rate(run))


def help_mirroring(run: Run, held: contextlib.ExitStack) -> None:
    """On another rank than 0 that writes a part of each checkpoint: copy that part to the mirror when rank 0 asks for it."""
    store = check_mirror(run.settings) if run.settings.enable_checkpoints else None
    if store is not None and run.saves_parts and not run.world.is_rank0:
        known = Mirrored(store, run.run_id, run.folder, Path(run.settings.checkpoint_dir))
        run.helper = Helper(run.world.board, known, rank=run.world.rank, rate=_rate(run))
        held.callback(run.helper.leave)


def _rate(run: Run) -> float:
    """Return the bytes per second that a process may send to the mirror."""
    return run.settings.mirror_mb_s * 1e6 / (run.world.size if run.saves_parts else 1)


def _refused(settings: Config, error: StoreError) -> ConfigError:
    shown_address = config.public(settings, "CHECKPOINT_MIRROR")
    return ConfigError([f"CHECKPOINT_MIRROR={shown_address}: {error}; without CHECKPOINT_MIRROR no copies are made"])


def copy_to_mirror(run: Run, saved: Path, folder: Path, *, step: int) -> None:
    """Let a new checkpoint below `folder` be copied to the mirror, if there is one."""
    if run.uploader is not None:
        run.uploader.submit(saved, folder, step=step)


def copied_now(run: Run) -> set[Path]:
    """Return the checkpoints that must stay on the disk until they are in the mirror."""
    return run.uploader.in_use() if run.uploader else set()


def behind_mirror(run: Run) -> str:
    """Return how many checkpoints are not in the mirror yet, for the progress line; empty if there are none."""
    return str((run.uploader and run.uploader.behind) or "")


def finish_mirroring(run: Run) -> None:
    """Wait until the last checkpoint is in the mirror, and report how it ended. A second signal ends the process."""
    if run.uploader is None:
        return
    if waiting := run.uploader.in_use():
        run.log(
            f"{_not_mirrored(len(waiting))}{_size(waiting)}: waiting for the upload; press Ctrl-C twice not to wait"
        )
    run.saved.not_mirrored = run.uploader.finish()
    if run.sharing is not None:
        run.sharing.close()
    skipped = run.uploader.skipped
    passed = f"; {skipped} earlier checkpoints were passed over, because newer ones were there first" if skipped else ""
    if missing := run.saved.not_mirrored:
        line = _not_mirrored(missing)
        run.log(f"{line}, for the reason above: the same command with RESUME=auto copies what is missing{passed}")
        run.log.notices.send("mirror", line)
    elif run.uploader.newest:
        run.log(f"mirrored: {run.uploader.newest}{passed}")


def wait_for_rank0(run: Run) -> None:
    """On another rank than 0: wait until rank 0 needs no more help with the mirror."""
    if run.helper is not None:
        run.helper.finish()


def _size(checkpoints: Collection[Path]) -> str:
    """Return in words how many bytes checkpoints have; empty if one of them is gone."""
    try:
        files = [file for path in checkpoints for file in (path, *(below(path) if path.is_dir() else ()))]
        return f" ({amount(sum(file.stat().st_size for file in files if file.is_file()), 'B')})"
    except OSError:
        return ""


def _not_mirrored(count: int) -> str:
    return f"{count} checkpoint{'s' * (count != 1)} not yet mirrored"


# ---------------------------------------------------------------------------------------------------------------------
# Resume.


def bring_from_mirror(settings: Config, log: Log, *, fits: Fits, has_same: Fits) -> None:
    """Bring the newest valid checkpoint of the mirror that `fits` to CHECKPOINT_DIR, or that of RESUME_STEP, with the files of
    its run, unless the run's checkpoint there or in CHECKPOINT_FALLBACK_DIR is as new, or has that step. Runs that have the
    same settings, by `has_same`, come first.

    Report what is damaged. Raise ConfigError if the mirror is missing, or refuses and no checkpoint is here; CheckpointError if
    it does not answer and no checkpoint is here; OSError if the disk here refuses the checkpoint.
    """
    store = check_mirror(settings)
    if store is None:
        return
    folder = Path(settings.checkpoint_dir)
    folders = filter(Path.is_dir, {folder, Path(settings.checkpoint_fallback_dir or folder)})
    here = [found for place in folders for found in ckpt.find(place) if found.problem is None]
    try:
        _bring(store, settings, log, fits, has_same, here)
    except StoreError as error:
        if error.kind == "missing" or (error.kind == "refused" and not here):
            raise _refused(settings, error) from error
        if not here:
            remedy = "try again when it answers; without CHECKPOINT_MIRROR a new run starts"
            raise CheckpointError(
                f"the mirror could not be read ({error}), and {folder} is empty: {remedy}", kind="unreachable"
            ) from error
        log(f"warning: the mirror could not be read ({error}); it may hold newer checkpoints than {shown(folder)}")


def _bring(store: Store, settings: Config, log: Log, fits: Fits, has_same: Fits, here: list[ckpt.Found]) -> None:
    listed = runs_in(store, pause=time.sleep)
    saves = {run: readable(store, names, say=log, pause=time.sleep) for run, names in listed.items()}
    newest = [save for own in saves.values() if (save := next(own, None))]
    if not newest:
        log(f"the mirror {store.shown} holds no checkpoint that can be read")

    def rank(save: Save) -> tuple[bool, str]:
        return has_same(save.found), save.found.metadata.get("saved_at") or ""

    for first in sorted(newest, key=rank, reverse=True):
        if not fits(first.found):
            log(f"skipped: run {first.run_id} of the mirror has other settings")
            continue
        own = [found for found in here if found.run_id == first.run_id]
        if not _is_wanted(first.found, own, settings):
            return
        # Nobody else trains the run from here on. A run that saves nothing needs no lease, and may have no right to write.
        alone = (
            holding(Lease(opened(store.address), first.run_id, say=log))  # a connection of its own for the beats
            if settings.enable_checkpoints
            else contextlib.nullcontext()
        )
        with alone:
            later = [
                name
                for name in runs_in(store, pause=time.sleep).get(first.run_id, [])  # a store may list late
                if name not in listed[first.run_id]
            ]
            newer = readable(store, later, say=log, pause=time.sleep)
            for save in itertools.chain(newer, [first], saves[first.run_id]):
                if not _is_wanted(save.found, own, settings):
                    return
                if settings.resume_step in (None, save.found.step) and _brought(store, save, settings, log):
                    return


def _is_wanted(found: ckpt.Found, own: Collection[ckpt.Found], settings: Config) -> bool:
    """Whether a resume needs a checkpoint of the mirror, or an older one there, beside those of its run that are here."""
    if settings.resume_step is not None:
        return all(here.step != settings.resume_step for here in own)
    return all(here.save_order < found.save_order for here in own)


def _brought(store: Store, save: Save, settings: Config, log: Log) -> bool:
    """Write a save into CHECKPOINT_DIR and RUNS_DIR, its checkpoint last; return whether it is whole."""
    folder, run_folder = Path(settings.checkpoint_dir), Path(settings.runs_dir) / save.run_id
    make_folder(folder)
    try:
        fetch_run(store, save, run_folder, say=log, pause=time.sleep)
        path = _checkpoint(store, save, folder, log)
    except CheckpointError as error:
        log(f"skipped: {error}")
        return False
    log(f"from the mirror: {shown(path)} ({amount(save.size, 'B')})")
    return True


def _checkpoint(store: Store, save: Save, folder: Path, log: Log) -> Path:
    """Write the checkpoint of a save into `folder`, those of its best/ first; return its path. Raise as `fetch` does."""
    try:
        fetch_bests(store, save, folder, say=log, pause=time.sleep)
        return fetch(store, save, folder, pause=time.sleep)
    except OSError as error:
        why = ckpt.why_not_saved(error, folder, need=save.size)
        remedy = "mend this, or set another CHECKPOINT_DIR"
        raise OSError(f"step {save.found.step} could not be brought from the mirror ({why}): {remedy}") from error
