"""Copy a checkpoint and the files of its run to a store, the manifest last; then delete what has expired there."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from milepost.ckpt.bases import bases_in_use
from milepost.ckpt.finding import scan
from milepost.ckpt.index import Found, look
from milepost.ckpt.layouts import Layout, known_layout
from milepost.ckpt.manifest import JSON_LIMIT, sha256
from milepost.ckpt.record import CheckpointError
from milepost.files import below, content_of
from milepost.mirror.contents import (
    CHECKPOINTS,
    LATEST,
    RUN,
    Part,
    Save,
    as_bytes,
    expired,
    is_plain,
    newest_first,
    objects_to_delete,
    parsed,
    save_name,
    without_tokenizer,
)
from milepost.mirror.store import Store, StoreError
from milepost.paths import is_real_file

RUN_FILES = ("metrics.jsonl", "run.json", "config.env", "training.log")
SAMPLES = "samples"


# From the name of a save and its files by rank and place -> what waits for those of other ranks.
Ask = Callable[[str, Mapping[int, Mapping[str, Path]], Callable[[int], None]], Callable[[], dict[str, Part]]]


@dataclass
class Mirrored:
    """The saves of a run that are known to be whole in a store, by name."""

    store: Store
    run_id: str
    run_folder: Path
    checkpoints: Path  # CHECKPOINT_DIR: what is in its best/ stays in the store, wherever a save itself was written
    saves: dict[str, Save] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)  # the newest of each file of the run, by its place
    sent: dict[str, dict[str, Part]] = field(
        default_factory=dict
    )  # files of the run, by save, of attempts that broke off
    looked_up: bool = False  # whether `saves` has those of earlier processes
    guard: Callable[[], None] = lambda: None  # raises if another process has taken over the run
    ask: Ask = lambda *_: dict  # asks other processes to copy their files; returns what waits for their parts


class GoneError(Exception):
    """A checkpoint was deleted from the disk before it was copied."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: was deleted before it was copied")


class UnfitNameError(Exception):
    """A file has a name that a mirror does not bring back."""


@dataclass(frozen=True)
class Sending:
    """How objects are sent: `attempt` repeats, `moved` is called with the bytes of each part that has arrived, and `piece`
    bounds what is sent between two of these calls (0: any).
    """

    attempt: Callable[[Callable[[], object]], object]
    moved: Callable[[int], None]
    piece: int = 0


def upload(known: Mirrored, checkpoint: Path, folder: Path, sending: Sending) -> Save:
    """Copy the checkpoint, which lies below `folder`, its run's files and at last the manifest; return the save.

    Raise StoreError if the store refuses it, RunLockedError if another process has taken over the run, GoneError if the
    checkpoint is gone, UnfitNameError for a name that not every system has, OSError or CheckpointError if it cannot be read.
    """
    if not os.path.lexists(checkpoint):
        raise GoneError(checkpoint)
    layout = known_layout(checkpoint)
    found = look(checkpoint, layout)
    if found.problem:
        raise CheckpointError(found.problem, kind=found.kind or "unspecified")
    name = save_name(found.metadata)
    places = {f"{CHECKPOINTS}/{path.relative_to(folder).as_posix()}": path for path in _files(layout, checkpoint)}
    if unfit := [place for place in places if not is_plain(place)]:
        raise UnfitNameError(
            f"{folder}: {unfit[0].partition('/')[2]!r} is no name on every system: rename it without : \\ and control characters"
        )
    parts = _upload_files(known, layout, places, name, sending)
    parts += _upload_run(known, name, sending)
    save = Save(
        run_id=known.run_id,
        name=name,
        checkpoint=checkpoint.relative_to(folder).as_posix(),
        layout=found.layout,
        metadata=without_tokenizer(found.metadata),
        bests=_bests(known, name, folder),
        parts=tuple(parts),
    )
    sending.attempt(known.guard)
    _put(known, save.manifest, as_bytes(save), sending)
    _put(known, LATEST, json.dumps({"manifest": save.manifest}).encode(), sending)
    known.saves[name] = save
    known.parts = {part.place: part for part in save.run_parts}
    known.sent.pop(name, None)
    return save


def _files(layout: Layout, checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint: side by side, or those in its folder that belong to it."""
    if not checkpoint.is_dir():
        return layout.files(checkpoint)
    return sorted(file for file in below(checkpoint) if is_real_file(file) and layout.owns(checkpoint, file))


def _upload_files(
    known: Mirrored, layout: Layout, places: Mapping[str, Path], name: str, sending: Sending
) -> list[Part]:
    """Copy the files of a checkpoint, given by their places; those that another process wrote are copied there if it can."""
    by_rank: dict[int, dict[str, Path]] = {}
    for place, path in places.items():
        by_rank.setdefault(layout.rank_of(path), {})[place] = path
    wait = known.ask(name, by_rank, sending.moved)
    done = {place: upload_file(known, path, place, name, sending) for place, path in by_rank.get(0, {}).items()}
    done |= wait()
    return [done.get(place) or upload_file(known, path, place, name, sending) for place, path in places.items()]


def upload_file(known: Mirrored, path: Path, place: str, name: str, sending: Sending) -> Part:
    """Copy a file into the folder of a save. Raise GoneError if it is gone, StoreError, CheckpointError or OSError."""
    try:
        part = Part(place, f"{known.run_id}/{name}/{place}", path.stat().st_size, sha256(path))
        _put(known, part.object, path, sending)
    except (CheckpointError, FileNotFoundError, StoreError) as error:
        if not os.path.lexists(path):
            raise GoneError(path) from error
        raise
    return part


def _upload_run(known: Mirrored, name: str, sending: Sending) -> list[Part]:
    """Copy the files of the run that have changed; return all of them as parts.

    What an earlier attempt sent stays as it is, though the file has grown since: its manifest may be there, unheard of.
    """
    sent = known.sent.setdefault(name, {})
    for path in (*(known.run_folder / file for file in RUN_FILES), *sorted((known.run_folder / SAMPLES).glob("*.txt"))):
        if not path.is_file():
            continue
        place = f"{RUN}/{path.relative_to(known.run_folder).as_posix()}"
        if place in sent:
            continue
        content = content_of(path)
        part, digest = known.parts.get(place), hashlib.sha256(content).hexdigest()
        if part is None or part.sha256 != digest:
            part = Part(place, f"{known.run_id}/{name}/{place}", len(content), digest)
            _put(known, part.object, content, sending)
        sent[place] = part
    return list(sent.values())


def _put(known: Mirrored, name: str, source: Path | bytes, sending: Sending) -> None:
    """Write an object and compare its size with what was sent."""
    expected = len(source) if isinstance(source, bytes) else source.stat().st_size

    def put() -> None:
        known.store.put(name, source, moved=sending.moved, piece=sending.piece)
        if (size := known.store.size(name)) != expected:
            raise StoreError(f"{known.store.shown}/{name}", f"has {size} bytes instead of {expected}", "passing")

    sending.attempt(put)


def _own_bests(known: Mirrored) -> list[Found]:
    """Return the run's checkpoints in best/."""
    found = scan(known.checkpoints, regular=False)
    return [each for each in found if each.problem is None and each.run_id == known.run_id]


def _bests(known: Mirrored, name: str, folder: Path) -> tuple[str, ...]:
    """Return the names of the run's saves that are in best/ now, and where that may not answer, those that were there before."""
    here = {save_name(found.metadata) for found in _own_bests(known) if found.metadata.get("save_id")}
    if known.saves and (not here or folder != known.checkpoints):
        here.update(max(known.saves.values(), key=lambda save: save.found.save_order).bests)
    return tuple(sorted(here & {name, *known.saves}))


def bests_to_upload(known: Mirrored, *, besides: Path) -> list[Path]:
    """Return the run's checkpoints in best/ that the mirror lacks and that are not the checkpoint `besides` either."""
    save = look(besides, known_layout(besides)).metadata.get("save_id") if os.path.lexists(besides) else None
    named = [found for found in _own_bests(known) if found.metadata.get("save_id") not in (None, save)]
    return [found.path for found in named if save_name(found.metadata) not in known.saves]


# ---------------------------------------------------------------------------------------------------------------------


def look_up(known: Mirrored) -> list[str]:
    """Read the manifests of the run into `known`; return what is wrong with those that cannot be read. Raise StoreError."""
    problems = []
    for manifest in newest_first(known.store.names()).get(known.run_id, []):
        try:
            if (name := manifest.split("/")[1]) not in known.saves:
                known.saves[name] = read_save(known.store, manifest)
        except CheckpointError as error:
            problems.append(str(error))
    if known.saves and not known.parts:
        newest = max(known.saves.values(), key=lambda save: save.found.save_order)
        known.parts = {part.place: part for part in newest.run_parts}
    known.looked_up = True
    return problems


def read_save(store: Store, manifest: str) -> Save:
    """Return the save of a manifest; raise StoreError, or CheckpointError if it is damaged."""
    where = f"{store.shown}/{manifest}"
    save = parsed(store.read(manifest, limit=JSON_LIMIT), where)
    if save.manifest != manifest:
        raise CheckpointError(where, "is the manifest of another save", kind="damaged")
    return save


def prune(known: Mirrored, *, keep_last: int) -> list[Save]:
    """Delete the run's saves that have expired in the store; return them. Raise StoreError, or CheckpointError if a
    manifest cannot be read: what it names is unknown then, so nothing is deleted.

    While CHECKPOINT_DIR is away, nothing is either: adapters there may need a base.
    """
    if not known.checkpoints.is_dir() or not expired(list(known.saves.values()), keep_last=keep_last):
        return []
    if problems := look_up(known):
        raise CheckpointError(problems[0])
    needed = bases_of(known)
    gone = expired(list(known.saves.values()), keep_last=keep_last, needed=needed)
    kept = [save for save in known.saves.values() if save not in gone]
    for name in objects_to_delete(gone, kept):
        known.store.delete(name)
    for save in gone:
        del known.saves[save.name]
    return gone


def bases_of(known: Mirrored) -> set[str]:
    """Return the names of the run's saves that may be the base of adapters, here or in the store: those of the same step
    or file name. The weights are not compared, which would take a download.
    """
    used = [(base.source, base.step) for base in bases_in_use(known.checkpoints)]
    for run_id, manifests in newest_first(known.store.names()).items():
        if run_id != known.run_id and (base := read_save(known.store, manifests[0]).metadata.get("base")):
            used.append((str(base.get("source")), base.get("step")))
    steps, files = {step for _, step in used}, {PurePosixPath(source).name for source, _ in used}
    return {
        save.name
        for save in known.saves.values()
        if save.found.step in steps or PurePosixPath(save.checkpoint).name in files
    }
