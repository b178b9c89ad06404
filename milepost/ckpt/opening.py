"""Open a checkpoint by its path, or by a name that selects one of several."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import Checkpoint, CheckpointError, named_tensors
from milepost.ckpt.resolving import not_found, resolve, stand_ins
from milepost.ckpt.tensors import bring_in_tensors


def load(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """Return the record at `path`, in any layout; raise CheckpointError.

    `optimizer=False` leaves the optimizer's tensors unread; `verify=True` checks every byte against its checksum first.
    """
    if not os.path.exists(path):
        raise not_found(path, path.parent)
    record = known_layout(path).read(path, optimizer=optimizer, verify=verify)
    bring_in_tensors(named_tensors(record).values(), path)
    return record


def load_named(
    name: str,
    folder: Path,
    *,
    say: Callable[[str], object],
    optimizer: bool = True,
    verify: bool = False,
    certain: bool = False,
) -> Checkpoint:
    """Return the record that `name` selects as `resolve` does; `say` gets a line on each choice.

    Where `name` leaves a choice (latest, best, a folder, a glob), a checkpoint that cannot be used is skipped and the
    next one is taken, unless `certain` and it only does not answer. Raise the first CheckpointError if none can be used.
    """
    chosen, notes = resolve(name, folder, certain=certain)
    for note in notes:
        say(note)
    problems: list[CheckpointError] = []
    for path in itertools.chain([chosen], stand_ins(name, chosen, folder)):
        if problems:
            say(f"skipped: {problems[-1]}")
            say(f"taking {path}")
        try:
            return load(path, optimizer=optimizer, verify=verify)
        except CheckpointError as error:
            if certain and error.kind == "unreachable":  # an older one would lose steps
                raise
            problems.append(error)
    raise problems[0]
