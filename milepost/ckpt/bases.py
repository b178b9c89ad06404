"""Which checkpoints are the base of saved adapters: without it, adapters can never be opened again, so retention leaves it alone."""

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.ckpt.finding import Found, look, places, scan, stamps
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.names import own_stem
from milepost.ckpt.record import CheckpointError, Json
from milepost.ckpt.tensors import digest
from milepost.files import new_file

NOTE = ".base-{run_id}.json"  # beside a base, about adapters in another folder


@dataclass(frozen=True)
class Base:
    """What adapters record about their base, and the checkpoint or the folder that holds those adapters."""

    sha256: str
    source: str
    step: int | None
    needed_by: Path


def bases_in_use(folder: Path) -> list[Base]:
    """Return every base that adapters in `folder`, its run folders and their best/ name, or that a note there names."""
    adapters = (one for one in scan(folder) if "adapters" in one.metadata.get("parts", ()))
    named = [_base(one.metadata.get("base"), one.path) for one in adapters]
    notes = (note for place in places(folder) for note in sorted(place.glob(NOTE.format(run_id="*"))))
    named += [_base(values, Path(str(values.get("needed_by")))) for note in notes if (values := _read_note(note))]
    return [base for base in named if base is not None]


def _read_note(note: Path) -> dict[str, Json]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(note.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def _base(values: Json, needed_by: Path) -> Base | None:
    if not isinstance(values, dict):
        return None
    step = values.get("step")
    known = step if type(step) is int else None
    return Base(str(values.get("sha256")), str(values.get("source")), known, needed_by)


def needed(candidates: Iterable[Found], folder: Path) -> dict[Path, Path]:
    """Return of the candidates those that are a base in use, each with the adapters that need it.

    A base is known by its path, and by the sha256 of its weights if it was moved; that is computed only at the step that the adapters
    name. A checkpoint of that step whose weights cannot be read counts as needed.
    """
    candidates = list(candidates)
    bases = bases_in_use(folder) if candidates else []
    return {one.path: base.needed_by for one in candidates for base in bases if _is_base(one, base)}


def _is_base(one: Found, base: Base) -> bool:
    if os.path.realpath(base.source) == os.path.realpath(one.path):
        return True
    if base.step not in (None, one.step):
        return False
    sha256 = _weights_digest(one.path, tuple(stamps(known_layout(one.path).files(one.path))))
    return sha256 in (None, base.sha256)


@functools.lru_cache(maxsize=64)
def _weights_digest(path: Path, _: Any) -> str | None:
    """The sha256 of the checkpoint's weights as `identity` of a base has it; None if they cannot be read."""
    try:
        return digest(known_layout(path).read(path, optimizer=False).model_state)
    except (CheckpointError, OSError):
        return None


def note_use(base: dict[str, Json], *, run_id: str, checkpoint_dir: Path) -> Path | None:
    """Leave a note beside a base that retention could delete, if it does not look into `checkpoint_dir`; return the note.

    Return None if there is no need: the base is no checkpoint of ours, or lies in `checkpoint_dir`. Raise OSError if it cannot be written.
    """
    source = Path(str(base.get("source")))
    if not os.path.exists(source) or source.parent.resolve() in {each.resolve() for each in places(checkpoint_dir)}:
        return None
    try:
        found = look(source, known_layout(source))
    except CheckpointError:
        return None
    if found.problem or found.run_id is None or own_stem(found) is None:
        return None
    note = source.with_name(NOTE.format(run_id=run_id))
    if not os.path.lexists(note):
        values = {**base, "source": str(source.resolve()), "needed_by": str(checkpoint_dir.resolve())}
        with new_file(note) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
    return note
