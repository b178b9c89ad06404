"""List the checkpoints of a folder, oldest save first, and the checkpoint that each run began with.

python3 scripts/list_checkpoints.py
CHECKPOINT_PATH=old-checkpoints python3 scripts/list_checkpoints.py
CHECKPOINT_DIR=s3://bucket/run python3 scripts/list_checkpoints.py
SORT=loss RUN='20260718*' FORMAT=json python3 scripts/list_checkpoints.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("CHECKPOINT_DIR", "CHECKPOINT_PATH", "RUN", "SORT", "FORMAT")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import CheckpointError, Found
from milepost.ckpt.finding import find_below, loss_of, scan
from milepost.ckpt.foreign.importing import lacks_n_head
from milepost.ckpt.rivals import ambiguity, rivals
from milepost.ckpt.selection import is_run
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.paths import with_home
from milepost.remote import listing
from milepost.runtime.progress import Log, amount, shown
from milepost.runtime.tables import is_wider, table, without_common
from milepost.screen import stdout_columns, write_json, write_stdout

HEADER = ("step", "loss", "size", "layout", "resumable", "saved (UTC)", "run", "path", "")
FIXED = 5  # columns of the table of runs that are always there


@dataclass(frozen=True)
class Listed:
    """A folder of checkpoints, or a mirror: its path or address and what it holds."""

    folder: Path | str
    found: list[Found]
    newest: list[Found]  # has latest and best: of a mirror, into which several machines may save, the newest run
    orphans: Sequence[Found] = ()
    below: Sequence[Path] = ()  # folders with more


def main(settings: Config, log: Log) -> int:
    """Print the checkpoints, the problems of damaged ones, where each run began,
    and the bases that adapters need; return the exit code.
    """
    place = mirrored(settings) or in_folder(chosen_folder(settings))
    found = place.found
    named = {
        "latest": ckpt.latest(place.newest),
        "best": ckpt.best(place.newest),
        "lowest loss": ckpt.lowest_loss(found),
    }
    if named["lowest loss"] is named["best"]:
        del named["lowest loss"]
    wanted = in_order(of_runs(place, settings), settings.sort)
    if settings.format == "json":
        write_json(as_json(place, wanted, named))
    else:
        write_stdout("\n".join(lines(place, wanted, named)))
    return 0


def in_folder(folder: Path) -> Listed:
    """Return what a folder of this disk holds. Raise CheckpointError if that is nothing, or it cannot be listed."""
    try:
        found = ckpt.find(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}): check its permissions") from error
    if not found:
        raise CheckpointError(ckpt.listing(folder))
    return Listed(folder, found, found, ckpt.orphans(folder), folders_with_more(folder))


def mirrored(settings: Config) -> Listed | None:
    """Return what the mirror holds that CHECKPOINT_PATH or CHECKPOINT_DIR names by its address; None if neither does."""
    listed = listing(settings)
    if listed is None:
        return None
    address, found = listed
    return Listed(address, found, [each for each in found if each.run_id == found[-1].run_id])


def of_runs(place: Listed, settings: Config) -> list[Found]:
    """Return the checkpoints of the runs that RUN names, all if it is not set. Raise ConfigError if there are none."""
    if not settings.is_set("RUN"):
        return place.found
    newest = ckpt.latest(place.newest)
    latest = (newest.run_id or "") if newest else ""
    names = [latest if name == "latest" else name for name in map(str.strip, settings.run.split(",")) if name]
    chosen = [each for each in place.found if any(is_run(each.run_id or "", name) for name in names)]
    if not chosen:
        runs = ", ".join(sorted({each.run_id for each in place.found if each.run_id})) or "none"
        raise ConfigError([f"RUN={settings.run}: no checkpoint here is of such a run; runs: {runs}"])
    return chosen


def in_order(found: list[Found], order: str) -> list[Found]:
    """Return the checkpoints in the order of SORT; those without the figure come first."""
    if order == "saved":
        return found

    figures: dict[str, Callable[[Found], Any]] = {
        "step": lambda each: None if each.problem else each.step,
        "loss": lambda each: None if each.problem or loss_of(each) is None else -loss_of(each),  # type: ignore[operator]
        "size": lambda each: each.size,
        "name": lambda each: each.path.name,
    }
    figure = figures[order]
    known = [each for each in found if figure(each) is not None]
    return [each for each in found if figure(each) is None] + sorted(known, key=figure)


def lines(place: Listed, found: list[Found], named: dict[str, Found | None]) -> Iterator[str]:
    """Yield the parts of the list as text."""
    columns = stdout_columns()
    rows = [HEADER, *(row(checkpoint, marks(checkpoint, named)) for checkpoint in found)]
    if is_wider(rows, columns):
        rows, common = without_common(rows, ("layout", "resumable"))
        if common:
            yield f"all {len(found)}: {common}"
    yield table(rows, columns=columns)
    for checkpoint in [*found, *place.orphans]:
        if checkpoint.problem:
            yield f"{checkpoint.kind}: {checkpoint.problem}"
    if guess := doubt(named["latest"], place.newest):
        yield guess
    if place.below:
        yield f"more checkpoints below, which CHECKPOINT_PATH lists: {', '.join(map(shown, place.below))}"
    if runs := lineage(found):
        rows = [("run", "checkpoints", "size", "began with", "changed", "settings that differ", "note"), *runs]
        used = [at for at in range(len(rows[0])) if at < FIXED or any(row[at] for row in runs)]
        yield "\n" + table([tuple(row[at] for at in used) for row in rows], columns=columns)
    if needed := bases(place, found):
        yield "\n" + table([("adapters of run", "need base", ""), *needed], columns=columns)


def doubt(latest: Found | None, found: list[Found]) -> str:
    """Return why the latest checkpoint is a guess, or an empty text."""
    others = rivals(latest, found) if latest else []
    return f"{ambiguity(latest, others)}; `latest` is a guess" if latest and others else ""


def as_json(place: Listed, found: list[Found], named: dict[str, Found | None]) -> dict[str, Any]:
    """Return the list as JSON values; docs/checkpoints.md describes the fields."""
    differs = told_apart(found)
    runs = [
        {
            "run": run_id,
            "checkpoints": len(own),
            "bytes": total(own),
            "parent": own[-1].metadata.get("parent"),
            "differs": differs.get(run_id, ""),
            "note": note(own),
        }
        for run_id, own in by_run(found).items()
    ]
    needed = [{"run": run_id, "base": source, "state": state} for run_id, source, state in bases(place, found)]
    return {
        "folder": place.folder,
        "checkpoints": [entry(each, marks(each, named), place) for each in found],
        "orphans": [entry(each, "", place) for each in place.orphans],
        "below": place.below,
        "guess": doubt(named["latest"], place.newest) or None,
        "runs": runs,
        "bases": needed,
    }


def entry(checkpoint: Found, names: str, place: Listed) -> dict[str, Any]:
    """Return a checkpoint as JSON values."""
    ok = not checkpoint.problem
    return {
        "path": f"{place.folder}/{checkpoint.path}" if isinstance(place.folder, str) else checkpoint.path,
        "step": checkpoint.step if ok else None,
        "loss": loss_of(checkpoint) if ok else None,
        "bytes": checkpoint.size,
        "layout": checkpoint.layout,
        "run": checkpoint.run_id,
        "saved_at": checkpoint.metadata.get("saved_at"),
        "resumable": ok and checkpoint.resumable,
        "marks": names.split(", ") if names else [],
        "kind": None if ok else str(checkpoint.kind),
        "problem": checkpoint.problem or None,
    }


def chosen_folder(settings: Config) -> Path:
    """Return CHECKPOINT_PATH if it is set, else CHECKPOINT_DIR.

    Raise ConfigError if it is not a folder of checkpoints.
    """
    if not settings.is_set("CHECKPOINT_PATH") or settings.checkpoint_path == "latest":
        return Path(settings.checkpoint_dir)
    folder = ckpt.whole_folder(settings.checkpoint_path)
    if folder is None:
        problem = f"CHECKPOINT_PATH={settings.checkpoint_path}: is not a folder of checkpoints"
        raise ConfigError([f"{problem}; set a folder, or show a single checkpoint with scripts/inspect_checkpoint.py"])
    return folder


def row(checkpoint: Found, names: str) -> tuple[str, ...]:
    """Return the table row of a checkpoint."""
    if checkpoint.problem:
        size, kind = amount(checkpoint.size, "B"), str(checkpoint.kind)
        return "?", "", size, checkpoint.layout, kind, "", "", shown(checkpoint.path), ""
    loss = loss_of(checkpoint)
    return (
        str(checkpoint.step),
        "" if loss is None else f"{loss:.4f}",
        amount(checkpoint.size, "B"),
        checkpoint.layout,
        "yes" if checkpoint.resumable else "no",
        str(checkpoint.metadata.get("saved_at") or "")[:19].replace("T", " "),
        checkpoint.run_id or "",
        shown(checkpoint.path),
        names,
    )


def marks(checkpoint: Found, named: dict[str, Found | None]) -> str:
    """Return the words for the checkpoint: `latest`, `best` (of the latest run),
    `lowest loss` of all runs if it is another; `lacks n_head` if it opens only with N_HEAD.
    """
    words = [word for word, other in named.items() if checkpoint is other]
    lacking = checkpoint.problem is None and lacks_n_head(checkpoint.metadata)
    return ", ".join([*words, *(["lacks n_head"] if lacking else [])])


def folders_with_more(folder: Path) -> list[Path]:
    """Return the folders below `folder` with checkpoints that are not its own."""
    own = {found.path for found in [*scan(folder), *ckpt.orphans(folder)]}
    return list(dict.fromkeys(found.path.parent for found in find_below(folder) if found.path not in own))


def lineage(found: list[Found]) -> list[tuple[str, ...]]:
    """Return a row per run, in the order of the list: its checkpoints and their size, where it began,
    the settings changed then, those in which runs from the same beginnings differ, and the note on it.
    """
    differs = told_apart(found)
    return [
        (run_id, str(len(own)), amount(total(own), "B"), *beginning(own[-1].metadata.get("parent")),
         differs.get(run_id, ""), note(own) or "")
        for run_id, own in by_run(found).items()
    ]  # fmt: skip


def told_apart(found: list[Found]) -> dict[str, str]:
    """Return the settings in which the runs without a parent differ; those of a child are what changed."""
    latest = {run_id: own[-1].metadata for run_id, own in by_run(found).items()}
    return config.labels({n: each.get("hyperparameters") or {} for n, each in latest.items() if not each.get("parent")})


def note(own: list[Found]) -> str | None:
    """Return the note on a run, RUN_NOTE of its latest checkpoint."""
    text = (own[-1].metadata.get("hyperparameters") or {}).get("RUN_NOTE")
    return text if isinstance(text, str) else None


def by_run(found: list[Found]) -> dict[str, list[Found]]:
    """Return the checkpoints of each run."""
    runs: dict[str, list[Found]] = {}
    for checkpoint in found:
        if checkpoint.run_id:
            runs.setdefault(checkpoint.run_id, []).append(checkpoint)
    return runs


def total(found: list[Found]) -> int:
    """Return the bytes of the checkpoints."""
    return sum(each.size for each in found)


def bases(place: Listed, found: list[Found]) -> list[tuple[str, ...]]:
    """Return a row per run and base of saved adapters: the base, and whether it is found."""
    rows: dict[tuple[str, str], str] = {}
    for checkpoint in found:
        base = checkpoint.metadata.get("base")
        if isinstance(base, dict) and "adapters" in checkpoint.metadata.get("parts", ()):
            key = checkpoint.run_id or "", with_home(str(base.get("source")))
            if key not in rows or rows[key] == "missing":
                rows[key] = state_of_base(base, checkpoint, place)
    return [(run_id, shown(source), state) for (run_id, source), state in rows.items()]


def state_of_base(base: dict[str, Any], adapters: Found, place: Listed) -> str:
    """Return whether the base of adapters is found: where it was, elsewhere, or not;
    a name of the hub is not looked up.
    """
    source = with_home(str(base.get("source")))
    if not Path(source).is_absolute():
        return "on the hub"
    if isinstance(place.folder, str):
        held = any(each.path.name == Path(source).name and each.step == base.get("step") for each in place.found)
        return "found" if held else "missing"
    path = ckpt.find_base(base, adapters.path, run_id=adapters.run_id)
    if path is None:
        return "missing"
    return "found" if str(path) == source else f"found in {shown(path)}"


def beginning(parent: dict[str, Any] | None) -> tuple[str, str]:
    """Describe a run's parent: its checkpoint, and the settings that changed."""
    if parent is None:
        return "fresh weights", ""
    changed = parent.get("changed")
    pairs = changed.items() if isinstance(changed, dict) else ()
    changes = [f"{name} {' -> '.join(map(as_set, values))}" for name, values in pairs if isinstance(values, list)]
    origin = parent.get("run_id") or "other weights"
    return f"{origin} at step {parent.get('step')} ({parent.get('file')})", ", ".join(changes)


def as_set(value: Any) -> str:
    """Return the value as a variable would be set to it."""
    return value if isinstance(value, str) else "(not set)" if value is None else json.dumps(value)


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
