"""Convert a checkpoint to another layout, or export it, and prove that nothing was lost."""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from milepost.ckpt.exports import Export
from milepost.ckpt.exports.common import Proof, not_the_same
from milepost.ckpt.finding import BEST_FOLDER, folder_of
from milepost.ckpt.index import Found
from milepost.ckpt.layouts import WRITERS, Layout, known_layout
from milepost.ckpt.leftovers import remove_leftovers_below
from milepost.ckpt.names import PREFIX, free_copy, free_stem, only_stem, own_stem, plain_stem, target_folder
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, bytes_on_disk, metadata
from milepost.ckpt.restore import logits
from milepost.ckpt.saved_tokenizer import build_tokenizer
from milepost.ckpt.saving import free_space_problem
from milepost.ckpt.tensor_listing import all_files, labelled
from milepost.ckpt.tensors import digest, not_finite
from milepost.files import link_or_copy, remove
from milepost.locks import FOLDER_LOCK, folder_lock
from milepost.paths import check_inside, is_real_folder

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
LOST_TOKENIZER = "its tokenizer, which cannot be rebuilt"
LEFT_OUT = "left_out"  # key of `imported`: the parts of the source that no layout holds
HEADROOM = 2**20  # bytes of a checkpoint besides its tensors: metadata and tokenizer


@dataclass(frozen=True)
class Converted:
    """The result of a conversion, and what was equal after reading it back from the disk."""

    source: Path
    target: Path
    layout_before: str
    tensors: int
    sha256: str  # over all tensors, equal in both
    logits: tuple[int, ...]  # the shape of the logits that were equal; () for adapters without a base
    fields: int  # compared: of the metadata, and the optimizer's groups
    bytes_before: int
    bytes_after: int
    notes: list[str]
    has_tokenizer: bool  # without one the target generates nothing
    left_out: list[str]  # parts of the source that the target does not hold, beside what was not asked for


def convert(
    source: Path,
    folder: Path | None = None,
    *,
    layout: str,
    model_only: bool = False,
    prefix: str | None = None,
    stem: str | None = None,
    in_best: bool = False,
    best_too: bool = False,
    complete: Callable[[Checkpoint], Checkpoint] = lambda record: record,
) -> Converted:
    """Write the checkpoint at `source` in another `layout` to `folder` (None: beside it), and prove that nothing was
    lost.

    Step, run, lineage, save number and time stay, everything but the save id; `source` is untouched and no file is
    replaced. The name stays too, unless `stem` or the `prefix` of a new one is set (`_stem`). `in_best` writes into
    best/, `best_too` adds a second name there. `complete` may add a tokenizer to a record that has none. Raises
    CheckpointError if the source is damaged or was edited by hand, the layout cannot hold it, or the result differs;
    OSError if the disk fails. Nothing new is left then.
    """
    record = _prepared(complete(_opened(source, optimizer=not model_only)), source)
    if folder is None:
        folder, in_best = origin(record, source)
    name = _Name(source, stem, prefix)
    target = _written(record, folder, writer=WRITERS[layout], name=name, in_best=in_best)
    try:
        sha256, shape, fields = _proof(record, target)
    except BaseException:
        with folder_lock(folder):
            remove(WRITERS[layout].files(target))
        raise
    if best_too:
        with folder_lock(folder):
            check_inside(folder, target.parent / BEST_FOLDER)
            (target.parent / BEST_FOLDER).mkdir(exist_ok=True)
            link_or_copy(WRITERS[layout].files(target), target.parent / BEST_FOLDER)
    return Converted(
        source=source, target=target, layout_before=record.layout or "", tensors=len(labelled(record)), sha256=sha256,
        logits=shape, fields=fields, bytes_before=size_of(source), bytes_after=size_of(target), notes=record.notes,
        has_tokenizer=record.tokenizer is not None, left_out=record.left_out,
    )  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """The result of an export and its proof."""

    source: Path
    target: Path
    proof: Proof
    bytes_before: int
    bytes_after: int
    notes: list[str]


def export(
    source: Path,
    folder: Path,
    *,
    to: Export,
    prefix: str | None = None,
    stem: str | None = None,
    complete: Callable[[Checkpoint], Checkpoint] = lambda record: record,
) -> Exported:
    """Write the model of the checkpoint at `source` into `folder` for another program, and prove that nothing was lost.

    Raises as `convert` does; nothing new is left then.
    """
    record = complete(_opened(source, optimizer=to.trains))
    target = _written(record, folder, writer=to, name=_Name(source, stem, prefix), in_best=False)
    try:
        proof = to.proof(record, target)
    except BaseException:
        with folder_lock(folder):
            remove([target])
        raise
    after = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in after)
    return Exported(source, target, proof, size_of(source), size, record.notes)


def _opened(source: Path, *, optimizer: bool) -> Checkpoint:
    """Return the record at `source`, verified, with a note of NaN or Inf; another program's with the file it is in."""
    record = known_layout(source).read(source, optimizer=optimizer, verify=True)
    _refuse_edited(record)
    if is_imported(metadata(record)) and "file" not in (record.imported or {}):
        record.imported = {**file_identity(source), **(record.imported or {})}
    if bad := not_finite(record.model_state):
        record.notes.append(f"{source}: {bad[0]} holds NaN or infinity, and so does the converted checkpoint")
    return record


def _prepared(record: Checkpoint, source: Path) -> Checkpoint:
    """Return the record as the conversion is to hold it: with its tokenizer's sha256, as a save of ours has it, and with
    what was left out, so that a later call can report it again.
    """
    if record.tokenizer is not None and is_imported(metadata(record)):
        try:
            record.tokenizer_sha256 = build_tokenizer(record).digest
        except CheckpointError as error:
            record.notes.append(f"{error}")
            record.left_out.append(LOST_TOKENIZER)
            record.tokenizer = None
    if record.tokenizer is None:
        record.notes.append(f"{source}: has no tokenizer, so the converted checkpoint has none either")
    if record.left_out:
        record.imported = (record.imported or {}) | {LEFT_OUT: list(record.left_out)}
    return record


def left_out_before(values: Json) -> list[str]:
    """Return what a conversion left out of the checkpoint with these metadata."""
    listed = (values.get("imported") or {}).get(LEFT_OUT)
    return [part for part in listed if isinstance(part, str)] if isinstance(listed, list) else []


def _refuse_edited(record: Checkpoint) -> None:
    """Refuse an edited checkpoint: its conversion would pass for the run that was saved."""
    if record.edited:
        edits = ", ".join(
            f"{name} {json.dumps(saved):.40} -> {json.dumps(now):.40}" for name, (saved, now) in record.edited.items()
        )
        problem = f"was edited since it was saved ({edits}), and a conversion must equal what was saved"
        remedy = "set it back in its config.json, or resume from it as it is"
        raise CheckpointError(record.path or "checkpoint", problem, remedy, kind="refused")


class _Name(NamedTuple):
    """Which name a conversion gives: `stem` if it is set, else by the name of `source` and `prefix`."""

    source: Path
    stem: str | None
    prefix: str | None


def _written(record: Checkpoint, folder: Path, *, writer: Layout | Export, name: _Name, in_best: bool) -> Path:
    """Write the record below `folder`."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if problem := free_space_problem(folder, need=bytes_on_disk(record) + HEADROOM):
            raise OSError(errno.ENOSPC, problem)
        return _written_into(record, folder, writer=writer, name=name, in_best=in_best)
    except BaseException:
        if made:
            _unmake(folder)
        raise


def _unmake(folder: Path) -> None:
    """Delete a folder that was created in vain, and the empty folders in it; files of another process stay."""
    inner = sorted((path for path in folder.rglob("*") if is_real_folder(path)), reverse=True)
    with contextlib.suppress(OSError):
        for place in inner:
            place.rmdir()
        if [path.name for path in folder.iterdir()] == [FOLDER_LOCK]:
            (folder / FOLDER_LOCK).unlink()
        folder.rmdir()


def _written_into(record: Checkpoint, folder: Path, *, writer: Layout | Export, name: _Name, in_best: bool) -> Path:
    with folder_lock(folder):
        place = folder if name.stem else target_folder(record, folder, writer=writer)
        remove_leftovers_below(folder, {folder / BEST_FOLDER, place, place / BEST_FOLDER})
        target = place / BEST_FOLDER if in_best else place
        check_inside(folder, target)
        target.mkdir(parents=True, exist_ok=True)
        stem = _stem(record, place, writer=writer, name=name)
        new = dataclasses.replace(record, save_id=os.urandom(8).hex())  # a checkpoint of its own, not another name
        return writer.write(new, target, stem)


def _stem(record: Checkpoint, place: Path, *, writer: Layout | Export, name: _Name) -> str:
    """Return the name to write under, which no checkpoint in `place` has.

    A name that a save gave is made again from the record, so that retention recognises it, and so is the name in a layout with
    documented names. Any other name is a person's or another program's and stays, with `_2`, `_3` where it is taken.
    """
    if name.stem:
        return only_stem(place, name.stem, writer=writer)
    source = known_layout(name.source)
    if writer.run_stem or name.prefix or own_stem(Found(name.source, metadata(record), layout=source.name)):
        prefix = name.prefix or _prefix(record)
        return free_stem(record, place, writer=writer, now=_moment(record), prefix=prefix)
    return free_copy(place, plain_stem(name.source, source), writer=writer)


def _prefix(record: Checkpoint) -> str:
    """Return the prefix of its run's names, unless it could lead out of the folder."""
    saved = record.hyperparameters.get("CHECKPOINT_PREFIX")
    return saved if isinstance(saved, str) and PLAIN.fullmatch(saved) else PREFIX


def origin(record: Checkpoint, path: Path) -> tuple[Path, bool]:
    """Return the folder of checkpoints above `path`, and whether `path` is in a best/."""
    folder = folder_of(path, record.run_id)
    return folder, path.parent.name == BEST_FOLDER and path.parent != folder


def size_of(path: Path) -> int:
    """Return the bytes of all files of the checkpoint at `path`."""
    return sum(file.stat().st_size for file in all_files(path))


def is_imported(values: Json) -> bool:
    """Whether metadata is that of another program's checkpoint, or of a conversion of it."""
    return str(values.get("written_by")).startswith("another program")


def file_identity(path: Path) -> dict[str, Json]:
    """Return name, bytes and time of change, in UTC, of the checkpoint at `path`: other programs record no save."""
    newest = max(file.stat().st_mtime for file in all_files(path))
    changed = datetime.datetime.fromtimestamp(newest, datetime.UTC).isoformat(timespec="microseconds")
    return {"file": path.name, "bytes": size_of(path), "modified_at": changed}


def _moment(record: Checkpoint) -> datetime.datetime:
    """Return the time of its save, so that its name stays the same."""
    try:
        return datetime.datetime.fromisoformat(record.saved_at or "")
    except ValueError:
        return datetime.datetime.now(datetime.UTC)


def _proof(record: Checkpoint, target: Path) -> tuple[str, tuple[int, ...], int]:
    """Read `target` back; return the hash over all tensors, the shape of the logits and the number of fields that are
    equal.

    Raises CheckpointError if anything differs.
    """
    again = known_layout(target).read(target, verify=True)
    before, after = digest(labelled(record)), digest(labelled(again))
    if before != after:
        raise not_the_same(target, "tensors", record, f"sha256 {after}, not {before}")
    fields, read = _fields(record), _fields(again)
    if other := [name for name in fields | read if fields.get(name) != read.get(name)]:
        raise not_the_same(target, f"fields {', '.join(other)}", record)
    if record.adapters_only:  # without their base there are no logits
        return after, (), len(fields)
    old, new = logits(record), logits(again)
    if old.shape != new.shape or old.numpy().tobytes() != new.numpy().tobytes():
        raise not_the_same(target, "logits", record)
    return after, tuple(new.shape), len(fields)


def _fields(record: Checkpoint) -> dict[str, Json]:
    """Return metadata and optimizer groups as JSON values, without the save id, which a conversion replaces."""
    groups = record.optimizer_state["param_groups"] if record.optimizer_state else None
    values = metadata(record) | {"param_groups": groups}
    del values["save_id"]
    return json.loads(json.dumps(values, skipkeys=True, default=repr))
