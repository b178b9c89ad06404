"""What must hold before anything older is deleted: the new checkpoint can be read back, and every other one answers."""

from collections.abc import Iterable
from pathlib import Path

from milepost.ckpt.index import Found, look
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import CheckpointError


def check_saved(path: Path) -> None:
    """Raise CheckpointError if the checkpoint that was just saved at `path` cannot be read back: its end, its manifest."""
    if (found := look(path, known_layout(path))).problem:
        raise _nothing_deleted(found)


def check_reachable(found: Iterable[Found]) -> None:
    """Raise CheckpointError if a checkpoint does not answer: what it needs, such as a base, is unknown."""
    for each in found:
        if each.kind == "unreachable":
            raise _nothing_deleted(each)


def _nothing_deleted(found: Found) -> CheckpointError:
    return CheckpointError(f"{found.problem}; nothing older was deleted", kind=found.kind or "unspecified")
