"""Delete the checkpoints that the policy does not keep, of every run in CHECKPOINT_DIR. Only lists them unless
DRY_RUN=false.

CHECKPOINT_KEEP_LAST=3 CHECKPOINT_KEEP_EVERY=10000 python3 scripts/prune_checkpoints.py
CHECKPOINT_KEEP_LAST=3 CHECKPOINT_KEEP_EVERY=10000 DRY_RUN=false python3 scripts/prune_checkpoints.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("CHECKPOINT_KEEP_LAST", "CHECKPOINT_KEEP_EVERY", "DRY_RUN", "PRUNE_OTHERS", "CHECKPOINT_DIR", "FORMAT")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import CheckpointError, Found
from milepost.ckpt.finding import scan
from milepost.ckpt.index import look
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.retention import (
    Expired,
    beginning,
    expired_others,
    latest_valid,
    others,
    prune_others,
    select_expired,
)
from milepost.ckpt.tensor_listing import all_files, held
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.locks import RunLockedError, hold_run
from milepost.remote import folder_here
from milepost.runtime.progress import Log, amount, shown
from milepost.runtime.tables import table
from milepost.screen import stdout_columns, write_json, write_stdout

Row = tuple[str, Found, int]  # what is done, to which checkpoint, the bytes that this frees


def main(settings: Config, log: Log) -> int:
    """Prune each run that no process trains, or list what pruning would delete; return the exit code.

    Raise the first OSError or CheckpointError that prevented a deletion, after the table of what was deleted.
    """
    if settings.checkpoint_keep_last == 0:
        raise ConfigError(
            ["CHECKPOINT_KEEP_LAST=0 keeps all: set how many of each run's newest checkpoints are to stay"]
        )
    folder_here(settings)
    folder = Path(settings.checkpoint_dir)
    found = list(scan(folder))
    if not found:
        raise CheckpointError(ckpt.listing(folder))
    for checkpoint in found:
        if checkpoint.problem:
            log(f"left alone: {checkpoint.problem}")
    prefixes = asked_for(settings.prune_others or "")
    report_others(found, prefixes, log)
    rows: list[Row] = []
    failed: list[Exception] = []
    for pruning in [
        *(pruned(folder, run_id, settings, log) for run_id in sorted({each.run_id for each in found if each.run_id})),
        *(pruned_others(folder, prefix, settings) for prefix in prefixes),
    ]:
        try:
            rows.extend(pruning)
        except RunLockedError as error:
            log(f"left alone: {error}")
        except (OSError, CheckpointError) as error:
            failed.append(error)
    if settings.format == "json":
        write_json(as_json(rows, dry_run=settings.dry_run, failed=failed))
    else:
        print_rows(rows, dry_run=settings.dry_run, failed=bool(failed))
    if failed:
        raise failed[0]
    return 0


def as_json(rows: list[Row], *, dry_run: bool, failed: list[Exception]) -> dict[str, Any]:
    """Return what was or would be done as JSON values."""
    done = [
        {"action": action, "path": one.path, "step": one.step, "run": one.run_id, "bytes": size}
        for action, one, size in rows
    ]
    freed = sum(size for *_, size in rows)
    return {"dry_run": dry_run, "bytes": freed, "checkpoints": done, "errors": list(map(str, failed))}


def print_rows(rows: list[Row], *, dry_run: bool, failed: bool) -> None:
    """Print the table of what was or would be done, and the bytes that this frees."""
    cells = [
        (action, str(one.step), amount(size, "B"), one.run_id or "", shown(one.path)) for action, one, size in rows
    ]
    if cells:
        write_stdout(table([("", "step", "frees", "run", "path"), *cells], columns=stdout_columns()))
    freed, deleted = sum(size for *_, size in rows), any(not action.startswith("kept") for action, *_ in rows)
    would = "would be freed; DRY_RUN=false does it" if dry_run else "freed"
    write_stdout(f"{freed:,} bytes {would}" if deleted or failed else "nothing to delete")


def report_others(found: list[Found], prefixes: list[str], log: Log) -> None:
    """Log how many checkpoints no run saved, by the beginning of their names, but for those of `prefixes`."""
    left = Counter(beginning(each) for each in others(found))
    left = Counter({name: count for name, count in left.items() if name not in prefixes})
    if left:
        groups = ", ".join(f"{shown(name) or '(a number)'}: {count}" for name, count in left.most_common(5))
        more = ", ..." if len(left) > 5 else ""
        numbered = {beginning(each) for each in others(found) if beginning(each) != each.path.name}
        settable = [name for name, _ in left.most_common() if name in numbered and [name] == asked_for(name)]
        way = f"; PRUNE_OTHERS={settable[0]} applies the policy to those names" if settable else ""
        log(f"left alone: {left.total()} of other programs ({groups}{more}){way}")


def policy(settings: Config) -> dict[str, Any]:
    """Return how many of the newest checkpoints stay, and every how many steps a model does."""
    return {"keep_last": settings.checkpoint_keep_last, "keep_every": settings.checkpoint_keep_every}


def asked_for(names: str) -> list[str]:
    """Return the beginnings of names that PRUNE_OTHERS lists."""
    return [name.strip() for name in names.split(",") if name.strip()]


def pruned_others(folder: Path, prefix: str, settings: Config) -> Iterator[Row]:
    """Yield what is deleted of the other programs' checkpoints whose names begin with `prefix`."""
    sizes = {each.path: freed_by_removing(each.path) for each in expired_others(folder, prefix, **policy(settings))}
    act, action = (expired_others, "remove") if settings.dry_run else (prune_others, "removed")
    for checkpoint in act(folder, prefix, **policy(settings)):
        yield action, checkpoint, sizes.get(checkpoint.path, checkpoint.size)


def pruned(folder: Path, run_id: str, settings: Config, log: Log) -> Iterator[Row]:
    """Yield what is deleted of a run, and the bases that stay; then raise the first error.

    Raise RunLockedError if a process trains the run.
    """
    with contextlib.nullcontext() if settings.dry_run else hold_run(folder, run_id):
        if select_expired(folder, run_id=run_id, latest_valid=None, **policy(settings)) == Expired([], []):
            return  # nothing is deleted, so that no weights need be read
        valid, problems = latest_valid(folder, run_id)
        for problem in problems:
            log(problem)
        if valid is None:
            log(f"left alone: no checkpoint of run {run_id} is known to be whole")
            return
        best = ckpt.pending_best(folder, run_id)
        if best:
            log(
                f"left alone: {shown(best)}, the best step of run {run_id}: RESUME=auto copies it to best/, which lacks it"
            )
        yield from pruned_to(valid, folder, run_id, policy(settings) | {"spare": [best] if best else []}, settings)


def pruned_to(valid: Path, folder: Path, run_id: str, how: dict[str, Any], settings: Config) -> Iterator[Row]:
    """Yield what is deleted of a run whose latest valid checkpoint is `valid`, and the bases that stay;
    then raise the first error.
    """
    expired = select_expired(folder, run_id=run_id, latest_valid=valid, **how)
    sizes = {each.path: freed_by_removing(each.path) for each in expired.remove}
    sizes |= {each.path: freed_by_stripping(each.path) for each in expired.strip}
    failed: Exception | None = None
    if not settings.dry_run:
        try:
            ckpt.prune(folder, run_id=run_id, latest_valid=valid, **how)
        except (OSError, CheckpointError) as error:
            failed = error
    actions = [("remove" if settings.dry_run else "removed", each) for each in expired.remove]
    actions += [("to model-only", each) for each in expired.strip]
    for action, checkpoint in sorted(actions, key=lambda row: row[1].save_order):
        if settings.dry_run or gone(checkpoint, stripped=checkpoint in expired.strip):
            yield action, checkpoint, sizes.get(checkpoint.path, checkpoint.size)
    for path, adapters in expired.kept.items():
        yield f"kept: the base of {shown(adapters)}", look(path, known_layout(path)), 0
    if failed:
        raise failed


def gone(found: Found, *, stripped: bool) -> bool:
    """Whether the checkpoint is gone; if it was to be `stripped`, whether its optimizer is.

    A damaged checkpoint is left as it is.
    """
    return not os.path.lexists(found.path) or (stripped and not look(found.path, known_layout(found.path)).resumable)


def freed_by_removing(path: Path) -> int:
    """Return the bytes of its files that have no second name in best/."""
    return sum(file.stat().st_size for file in all_files(path) if file.stat().st_nlink == 1)


def freed_by_stripping(path: Path) -> int:
    """Return the bytes of its optimizer, or 0 if its files have second names."""
    file = known_layout(path).optimizer_file(path)
    if any(each.stat().st_nlink > 1 for each in ([file] if file else all_files(path))):
        return 0
    return file.stat().st_size if file else sum(each.size for each in held(path) if each.part == "optimizer")


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
