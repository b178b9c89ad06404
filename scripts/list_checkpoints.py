"""List the checkpoints of a folder, oldest save first, and what each run began with.

python3 scripts/list_checkpoints.py
CHECKPOINT_PATH=old-checkpoints python3 scripts/list_checkpoints.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = ("CHECKPOINT_DIR", "CHECKPOINT_PATH")
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import CheckpointError, Found
from milepost.ckpt.finding import loss_of
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.runtime.progress import Log, amount, shown, table, tell

HEAD = ("step", "loss", "size", "layout", "run", "saved (UTC)", "resumable", "", "path")


def main(settings: Config, log: Log) -> int:
    """Prints the table, what is wrong with the damaged ones, and the lineage; returns the exit code."""
    folder = chosen_folder(settings)
    try:
        found = ckpt.find(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}): mend its permissions") from error
    if not found:
        raise CheckpointError(ckpt.listing(folder))
    newest, best = ckpt.latest(found), ckpt.best(found)
    tell(table([HEAD, *(row(one, marks(one, newest, best)) for one in found)]))
    for one in found:
        if one.problem:
            tell(f"damaged: {one.problem}")
    if runs := lineage(found):
        tell("\n" + table([("run", "checkpoints", "began with", "changed"), *runs]))
    return 0


def chosen_folder(settings: Config) -> Path:
    """CHECKPOINT_PATH if it is given, which must be a folder of checkpoints then, else CHECKPOINT_DIR."""
    if not settings.is_set("CHECKPOINT_PATH") or settings.checkpoint_path == "latest":
        return Path(settings.checkpoint_dir)
    folder = ckpt.whole_folder(settings.checkpoint_path)
    if folder is None:
        problem = f"CHECKPOINT_PATH={settings.checkpoint_path}: is no folder of checkpoints"
        raise ConfigError([f"{problem}; name one, or look at one checkpoint with scripts/inspect_checkpoint.py"])
    return folder


def row(one: Found, marked: str) -> tuple[str, ...]:
    """The table's line for a checkpoint."""
    if one.problem:
        return "?", "", amount(one.size, "B"), one.layout, "", "", "damaged", "", shown(one.path)
    loss = loss_of(one)
    return (
        str(one.step),
        "" if loss is None else f"{loss:.4f}",
        amount(one.size, "B"),
        one.layout,
        one.run_id or "",
        str(one.metadata.get("saved_at") or "")[:19].replace("T", " "),
        "yes" if one.resumable else "no",
        marked,
        shown(one.path),
    )


def marks(one: Found, newest: Found | None, best: Found | None) -> str:
    """What CHECKPOINT_PATH may call it."""
    return ", ".join(word for word, other in (("latest", newest), ("best", best)) if one is other)


def lineage(found: list[Found]) -> list[tuple[str, ...]]:
    """A line for each run in the order of its first save: how many checkpoints there are, where it began, and what was changed then."""
    runs: dict[str, list[Found]] = {}
    for one in found:
        if one.run_id:
            runs.setdefault(one.run_id, []).append(one)
    return [(run_id, str(len(ones)), *beginning(ones[-1].metadata.get("parent"))) for run_id, ones in runs.items()]


def beginning(parent: dict[str, Any] | None) -> tuple[str, str]:
    """A run's parent in words: its checkpoint, and the settings that were given anew."""
    if parent is None:
        return "fresh weights", ""
    changed = parent.get("changed")
    pairs = changed.items() if isinstance(changed, dict) else ()
    named = [f"{name} {' -> '.join(map(str, values))}" for name, values in pairs if isinstance(values, list)]
    whose = parent.get("run_id") or "other weights"
    return f"{whose} at step {parent.get('step')} ({parent.get('file')})", ", ".join(named)


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
