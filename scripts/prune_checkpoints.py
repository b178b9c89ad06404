"""Let go the checkpoints that the policy does not keep, of every run in CHECKPOINT_DIR. Only says so unless DRY_RUN=false.

CHECKPOINT_KEEP_LAST=3 CHECKPOINT_KEEP_EVERY=10000 python3 scripts/prune_checkpoints.py
CHECKPOINT_KEEP_LAST=3 CHECKPOINT_KEEP_EVERY=10000 DRY_RUN=false python3 scripts/prune_checkpoints.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("CHECKPOINT_KEEP_LAST", "CHECKPOINT_KEEP_EVERY", "DRY_RUN", "CHECKPOINT_DIR")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import CheckpointError, Found
from milepost.ckpt.finding import look, scan
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.retention import latest_valid, select_expired
from milepost.ckpt.tensor_listing import all_files, held
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.locks import RunLockedError, hold_run
from milepost.runtime.progress import Log, amount, shown, table, write_stdout


def main(settings: Config, log: Log) -> int:
    """Prunes each run that nobody trains right now, or says what would go; returns the exit code.

    Raises the first OSError or CheckpointError that kept something from going, after the table of what went.
    """
    if settings.checkpoint_keep_last == 0:
        raise ConfigError(
            ["CHECKPOINT_KEEP_LAST=0 keeps all: set how many of each run's newest checkpoints are to stay"]
        )
    folder = Path(settings.checkpoint_dir)
    found = list(scan(folder))
    if not found:
        raise CheckpointError(ckpt.listing(folder))
    for one in found:
        if one.problem:
            log(f"left alone: {one.problem}")
    rows: list[tuple[str, ...]] = []
    freed, deleted, failed = 0, 0, []
    for run_id in sorted({one.run_id for one in found if one.run_id}):
        try:
            with contextlib.nullcontext() if settings.dry_run else hold_run(folder, run_id):
                for action, one, size in pruned(folder, run_id, settings, log):
                    rows.append((action, str(one.step), amount(size, "B"), run_id, shown(one.path)))
                    freed, deleted = freed + size, deleted + (not action.startswith("kept"))
        except RunLockedError as error:
            log(f"left alone: {error}")
        except (OSError, CheckpointError) as error:
            failed.append(error)
    if rows:
        write_stdout(table([("", "step", "frees", "run", "path"), *rows]))
    would = "would be freed; DRY_RUN=false does it" if settings.dry_run else "freed"
    write_stdout(f"{freed:,} bytes {would}" if deleted or failed else "nothing to delete")
    if failed:
        raise failed[0]
    return 0


def pruned(folder: Path, run_id: str, settings: Config, log: Log) -> Iterator[tuple[str, Found, int]]:
    """Yield what is deleted of a run, and the bases that are spared: in words, which, bytes freed; then raise what failed."""
    good, problems = latest_valid(folder, run_id)
    for problem in problems:
        log(problem)
    if good is None:
        log(f"left alone: no checkpoint of run {run_id} is known to be whole")
        return
    policy: dict[str, Any] = {"keep_last": settings.checkpoint_keep_last, "keep_every": settings.checkpoint_keep_every}
    expired = select_expired(folder, run_id=run_id, latest_valid=good, **policy)
    sizes = {one.path: freed_by_removing(one.path) for one in expired.remove}
    sizes |= {one.path: freed_by_stripping(one.path) for one in expired.strip}
    failed: Exception | None = None
    if not settings.dry_run:
        try:
            ckpt.prune(folder, run_id=run_id, latest_valid=good, **policy)
        except (OSError, CheckpointError) as error:
            failed = error
    actions = [("remove" if settings.dry_run else "removed", one) for one in expired.remove]
    actions += [("to model-only", one) for one in expired.strip]
    for action, one in sorted(actions, key=lambda each: each[1].save_order):
        if settings.dry_run or gone(one, stripped=one in expired.strip):
            yield action, one, sizes.get(one.path, one.size)
    for path, adapters in expired.kept.items():
        yield f"kept: the base of {shown(adapters)}", look(path, known_layout(path)), 0
    if failed:
        raise failed


def gone(one: Found, *, stripped: bool) -> bool:
    """Whether it is not there any more; if it was to be `stripped`, whether it is not there in full: a damaged one is left as it is."""
    return not os.path.lexists(one.path) or (stripped and not look(one.path, known_layout(one.path)).resumable)


def freed_by_removing(path: Path) -> int:
    """Bytes of its files that have no second name in best/."""
    return sum(file.stat().st_size for file in all_files(path) if file.stat().st_nlink == 1)


def freed_by_stripping(path: Path) -> int:
    """Bytes of its optimizer, unless its files have second names."""
    file = known_layout(path).optimizer_file(path)
    if any(each.stat().st_nlink > 1 for each in ([file] if file else all_files(path))):
        return 0
    return file.stat().st_size if file else sum(one.size for one in held(path) if one.part == "optimizer")


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
