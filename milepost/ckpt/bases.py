"""Find the bases of saved adapters, which retention keeps: adapters cannot be opened without their base."""

import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.ckpt.finding import folder_of, folders_below, hidden_in, places, scan
from milepost.ckpt.index import Found, Listing, Looks, look, stamps
from milepost.ckpt.layouts import known_layout, layout_of
from milepost.ckpt.manifest import read_json
from milepost.ckpt.names import own_stem
from milepost.ckpt.record import CheckpointError, Json
from milepost.ckpt.tensors import digest
from milepost.files import new_file
from milepost.paths import is_real_file, with_home
from milepost.text.addresses import is_address

LEVELS = 4  # folders above the adapters, and parts of the recorded path, with which a moved base is looked for
NOTE = ".base-{run_id}.json"  # beside a base, about adapters in another folder
OWN_NOTE = re.compile(r"\.base-.*\.json", re.DOTALL)


@dataclass(frozen=True)
class Base:
    """The base that adapters record, and the checkpoint or folder that holds those adapters."""

    sha256: str
    source: str
    step: int | None
    needed_by: Path


def bases_in_use(folder: Path) -> list[Base]:
    """Return every base recorded by adapters in `folder` and below it, where copies may lie, or by a note."""
    looks: Looks = {}
    below = (
        place for place in folders_below(folder, looks=looks) if place == folder or os.access(place, os.R_OK | os.X_OK)
    )
    found = (found for place in below for found in scan(place, looks=looks, pick=Listing.adapters))
    adapters = (found for found in found if "adapters" in found.metadata.get("parts", ()))  # not a folder itself
    named = [_base(found.metadata.get("base"), found.path) for found in adapters]
    notes = (
        place / name
        for place in places(folder, looks=looks)
        for name in hidden_in(place, looks)
        if OWN_NOTE.fullmatch(name)
    )
    named += [_base(values, Path(str(values.get("needed_by")))) for note in notes if (values := _read_note(note))]
    return [base for base in named if base is not None]


def _read_note(note: Path) -> dict[str, Json]:
    try:
        return read_json(note)
    except CheckpointError as error:
        if error.kind == "unreachable":  # then it may name a base
            raise
    return {}


def _base(values: Json, needed_by: Path) -> Base | None:
    if not isinstance(values, dict):
        return None
    step = values.get("step")
    known = step if type(step) is int else None
    return Base(str(values.get("sha256")), with_home(str(values.get("source"))), known, needed_by)


def bases_among(candidates: Iterable[Found], folder: Path) -> dict[Path, Path]:
    """Return the candidates that are the base of saved adapters, each with the path of those adapters.

    A base is identified by its path or, if it was moved, by the sha256 of its weights. The hash is computed only for
    the step that the adapters record; a checkpoint of that step with unreadable weights counts as a base.
    """
    candidates = list(candidates)
    bases = bases_in_use(folder) if candidates else []
    return {found.path: base.needed_by for found in candidates for base in bases if _is_base(found, base)}


def _is_base(found: Found, base: Base) -> bool:
    if os.path.realpath(base.source) == os.path.realpath(found.path):
        return True
    if base.step not in (None, found.step):
        return False
    return _digest_of(found) in (None, base.sha256)


def find_base(base: dict[str, Json], adapters: Path, *, run_id: str | None) -> Path | None:
    """Return the path of the base that adapters record; None if it is not found, or is not a path or an address but a
    name of the hub.

    It is where it was, unless a checkpoint of another step is there now, else at the same place relative to the adapters or to a folder above them, as after moving both,
    else among the checkpoints beside them. A base elsewhere than recorded is identified by the sha256 of its weights.
    """
    source = Path(with_home(str(base.get("source"))))
    if source.is_absolute() and source.exists() and not is_replaced(base):
        return source
    if not (source.is_absolute() or is_address(str(base.get("source")))):
        return None
    tails = [Path(*source.parts[-count:]) for count in range(1, min(LEVELS, len(source.parts) - 1) + 1)]
    moved = [above / tail for above in list(adapters.absolute().parents)[:LEVELS] for tail in tails]
    candidates = [look(path, layout) for path in moved if (layout := layout_of(path))]
    return _recognised(base, [*candidates, *scan(folder_of(adapters, run_id))])


def is_replaced(base: dict[str, Json]) -> bool:
    """Return whether a checkpoint of another step is where the base was, as after a program has saved there again."""
    source = Path(with_home(str(base.get("source"))))
    layout = layout_of(source) if source.is_absolute() else None
    found = look(source, layout) if layout else None
    return found is not None and found.problem is None and base.get("step") not in (None, found.step)


def base_in(base: dict[str, Json], folder: Path) -> Path | None:
    """Return the checkpoint in `folder` that is the base which adapters record, by the sha256 of its weights, or None."""
    return _recognised(base, scan(folder))


def _recognised(base: dict[str, Json], candidates: Iterable[Found]) -> Path | None:
    for found in candidates if base.get("sha256") else ():
        whole = found.problem is None and "adapters" not in found.metadata.get("parts", ())
        if whole and base.get("step") in (None, found.step) and _digest_of(found) == base.get("sha256"):
            return found.path
    return None


def _digest_of(found: Found) -> str | None:
    return _weights_digest(found.path, tuple(stamps(known_layout(found.path).files(found.path))))


@functools.lru_cache(maxsize=64)
def _weights_digest(path: Path, _: Any) -> str | None:
    """Return the sha256 of the checkpoint's weights as adapters record it; None if they are damaged.

    Raise CheckpointError if they do not answer.
    """
    try:
        return digest(known_layout(path).read(path, optimizer=False).model_state)
    except CheckpointError as error:
        if error.kind == "unreachable":
            raise
        return None


def note_use(base: dict[str, Json], *, run_id: str, checkpoint_dir: Path) -> Path | None:
    """Write a note beside the base of adapters, so that retention keeps it; return the note's path.

    Return None if no note is needed: retention never deletes the base. Raise OSError on a write error.
    """
    source = Path(str(base.get("source")))
    if not os.path.exists(source):
        return None
    try:
        found = look(source, known_layout(source))
    except CheckpointError:
        return None
    if found.problem or not (is_real_file(source) if found.run_id is None else own_stem(found)):
        return None
    note = source.with_name(NOTE.format(run_id=run_id))
    if not os.path.lexists(note):
        values = {**base, "source": str(source.resolve()), "needed_by": str(checkpoint_dir.resolve())}
        with new_file(note) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
    return note


def is_beside(note: Path, checkpoint_dir: Path) -> bool:
    """Whether a note lies in the folder of the adapters themselves, which say there what they need once they are saved."""
    return note.parent.resolve() in {place.resolve() for place in places(checkpoint_dir)}
