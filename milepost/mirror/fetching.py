"""Bring a checkpoint and the files of its run back from a store: written under hidden names, compared, then revealed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from milepost.ckpt.finding import BEST_FOLDER
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import CheckpointError
from milepost.files import content_of, make_folder, new_folder, new_group, replace_content
from milepost.locks import folder_lock
from milepost.mirror.contents import CHECKPOINTS, EARLIER, LATEST, MANIFEST, RUN, Part, Save, newest_first
from milepost.mirror.retrying import attempted
from milepost.mirror.store import Store, StoreError
from milepost.mirror.uploading import read_save
from milepost.paths import check_inside

Say = Callable[[str], object]
Pause = Callable[[float], None]
GROWING = ("metrics.jsonl", "training.log")
LATEST_LIMIT = 2**16  # bytes


def runs_in(store: Store, run_id: str = "", *, pause: Pause) -> dict[str, list[str]]:
    """Return the manifests in the store by run, the newest save first: of all runs, or of one. Raise StoreError."""
    names = attempted(lambda: store.names(run_id), pause=pause)
    # It only hastens what the listing says too.
    with contextlib.suppress(StoreError, ValueError, TypeError, KeyError, RecursionError):
        names.append(str(json.loads(store.read(LATEST, limit=LATEST_LIMIT))["manifest"]))
    return {run: manifests for run, manifests in newest_first(names).items() if run_id in ("", run)}


def readable(store: Store, manifests: list[str], *, say: Say, pause: Pause, gone: Say | None = None) -> Iterator[Save]:
    """Yield the saves of these manifests; report those that are damaged to `say`, those that are missing to `gone`, by default
    `say`, and skip them. Raise StoreError.
    """
    for manifest in manifests:
        try:
            yield attempted(lambda manifest=manifest: read_save(store, manifest), pause=pause)  # type: ignore[misc]
        except CheckpointError as error:
            say(f"skipped: {error}")
        except StoreError as error:
            if error.kind != "missing":
                raise
            (gone or say)(f"skipped: {error}")


def fetch(store: Store, save: Save, folder: Path, *, best: bool = False, pause: Pause) -> Path:
    """Write the checkpoint of a save below `folder`, into best/ if `best`; return its path, also if it is there already.

    Raise CheckpointError if it is damaged or incomplete in the store, or was deleted there ("not found"), StoreError if the
    store does not answer, OSError if the disk here refuses it.
    """
    place = PurePosixPath(save.checkpoint)
    if best and place.parent.name != BEST_FOLDER:
        place = place.parent / BEST_FOLDER / place.name
    target = folder / place
    check_inside(folder, target.parent)
    make_folder(target.parent)
    with folder_lock(folder):
        if not os.path.lexists(target):
            try:
                _write(store, save, target, pause=pause)
            except CheckpointError:
                check_not_deleted(store, save, pause=pause)
                raise
    return target


def check_not_deleted(store: Store, save: Save, *, pause: Pause) -> None:
    """Raise CheckpointError if the manifest of a save is missing: it was deleted, so nothing of the save is damaged."""
    try:
        attempted(lambda: store.size(save.manifest), pause=pause)
    except StoreError as error:
        if error.kind != "missing":
            raise
        where = f"{store.shown}/{save.checkpoint}"
        raise CheckpointError(where, "was deleted from the mirror", "choose a newer one", kind="not found") from error


def _write(store: Store, save: Save, target: Path, *, pause: Pause) -> None:
    """Write the files of a checkpoint; they appear together when each of them is proved."""
    own = PurePosixPath(CHECKPOINTS) / save.checkpoint
    inside = {part: PurePosixPath(part.place) for part in save.checkpoint_parts}
    if all(own in place.parents for place in inside.values()):
        with new_folder(target) as hidden:
            for part, place in inside.items():
                _get(store, part, hidden / place.relative_to(own), pause=pause)
            _prove(hidden, store, save)
        return
    names = {part: place.name for part, place in inside.items() if place.parent == own.parent}
    if len(names) < len(inside) or own.name not in names.values():
        raise CheckpointError(store.shown, f"{save.manifest} names files of no checkpoint", EARLIER, kind="damaged")
    ordered = [part.place.rpartition("/")[2] for part in save.checkpoint_parts]
    with new_group(target.parent, ordered) as hidden:
        for part, name in names.items():
            _get(store, part, hidden / name, pause=pause)
        _prove(hidden / own.name, store, save)


def _get(store: Store, part: Part, target: Path, *, pause: Pause) -> None:
    """Write an object into a file; raise CheckpointError if it is missing or not what the manifest says."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        entry = attempted(lambda: store.get(part.object, target), pause=pause)
    except StoreError as error:
        if error.kind != "missing":
            raise
        raise CheckpointError(str(error), kind="damaged") from error
    if (entry["size"], entry["sha256"]) != (part.size, part.sha256):
        problem = f"has {entry['size']} bytes, {part.size} were sent" if entry["size"] != part.size else "is altered"
        raise CheckpointError(f"{store.shown}/{part.object}", problem, EARLIER, kind="damaged")


def _prove(checkpoint: Path, store: Store, save: Save) -> None:
    """Raise CheckpointError unless the checkpoint is whole and is the one of the manifest."""
    layout = known_layout(checkpoint)
    problems = layout.problems(checkpoint)
    if not problems and layout.read_metadata(checkpoint).get("save_id") != save.metadata.get("save_id"):
        problems = [CheckpointError(f"{store.shown}/{save.manifest}", "is of another save", EARLIER, kind="damaged")]
    for problem in problems:
        raise problem


def fetch_run(store: Store, save: Save, run_folder: Path, *, say: Say, pause: Pause) -> None:
    """Write the files of a save's run where they are missing, and those that grow where the mirror has more lines."""
    make_folder(run_folder)
    for part in save.run_parts:
        place = PurePosixPath(part.place).relative_to(RUN)
        path = run_folder / place
        check_inside(run_folder, path.parent)
        here = content_of(path) if os.path.lexists(path) else None
        if here is not None and (place.name not in GROWING or len(here) >= part.size):
            continue
        try:
            data = content(store, part, pause=pause)
        except CheckpointError as error:
            say(f"skipped: {error}")
            continue
        if here is None or data.startswith(here):
            make_folder(path.parent)
            replace_content(path, data)


def content(store: Store, part: Part, *, pause: Pause) -> bytes:
    """Return the content of a small object; raise CheckpointError if it is missing or not what the manifest says, StoreError."""
    try:
        data = attempted(lambda: store.read(part.object, limit=part.size), pause=pause)
    except StoreError as error:
        if error.kind == "passing":
            raise
        raise CheckpointError(str(error), kind="damaged") from error
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise CheckpointError(f"{store.shown}/{part.object}", "is altered", EARLIER, kind="damaged")
    return data


def fetch_bests(store: Store, save: Save, folder: Path, *, say: Say, pause: Pause) -> None:
    """Write into best/ the checkpoints that were there when `save` was made; report those that are missing.

    The save itself is left out: a resumed run puts its best step into best/ if it is not there.
    """
    manifests = [f"{save.run_id}/{name}/{MANIFEST}" for name in save.bests if name != save.name]
    for best in readable(store, manifests, say=say, pause=pause):
        try:
            fetch(store, best, folder, best=True, pause=pause)
        except CheckpointError as error:
            say(f"skipped: {error}")
