"""Resolve what a user names: the latest or the best checkpoint, a file, a stem, a folder, a glob. Changes no file."""

import contextlib
import difflib
import glob
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from milepost.ckpt.finding import (
    best,
    containing,
    find,
    folders_below,
    latest,
    loss_of,
    lowest_loss,
    names_in,
    orphan,
    orphans,
    scan,
    twins,
)  # fmt: skip
from milepost.ckpt.index import Found, look
from milepost.ckpt.layouts import LAYOUTS, layout_of
from milepost.ckpt.manifest import is_regular, read_json, unreadable
from milepost.ckpt.record import CheckpointError, Kind
from milepost.ckpt.rivals import ambiguity, rivals
from milepost.files import is_unreachable

NONE_SAVED = "; was ENABLE_CHECKPOINTS=true set when training?"
LOOKED_AT = 200  # folders looked at for a hint: a misspelt path may lie in a home folder
ADAPTER_CONFIG = "adapter_config.json"  # of peft
OPEN_ADAPTER = (
    "open the checkpoint that it was exported from, or merge it into its base with peft (merge_and_unload, "
    "save_pretrained)"
)
FUSE_ADAPTER = "fuse it into its model there (mlx_lm.fuse), and open the folder that this writes"


def resolve(name: str, folder: Path, *, certain: bool = False) -> tuple[Path, list[str]]:
    """Return the checkpoint that CHECKPOINT_PATH names, and notes about the choice.

    `name` is `latest` or `best` (of `folder`), a file, a checkpoint folder or a file in one, the common stem of several
    files, a folder of checkpoints, or a glob (the shell does not expand one in an assignment). Raise CheckpointError
    listing what exists otherwise, and if `certain` also where nothing records which of several is newer; else that is
    one of the notes.
    """
    if name in ("latest", "best"):
        return _choose(folder, by=best if name == "best" else latest, certain=certain)
    path = Path(os.path.expanduser(name))
    if not os.path.lexists(path):
        if primary := _with_stem(path):
            return primary, []
        if glob.has_magic(name):
            return _choose_by_step(name, folder, certain=certain)
    if not os.path.exists(path):
        if "," in name:
            raise CheckpointError(name, "not a single checkpoint", "name one of them here", kind="not found")
        close = difflib.get_close_matches(path.name, ["latest", "best"], n=1, cutoff=0.7)
        raise not_found(name, _nearest(path, folder), hint=f"did you mean {close[0]}? " if close else "")
    if whole := containing(path):
        return whole, [f"{path} is part of {whole}, which is used"]
    layout = layout_of(path)
    if os.path.isdir(path) and layout is None:
        return _choose(path, by=latest, certain=certain)
    return (layout.primary_file(path) if layout else None) or path, _others_inside(path)


def _others_inside(path: Path, *, limit: int = 3) -> list[str]:
    """Return a note if the checkpoint at `path` is a folder that holds other checkpoints too."""
    others = [found.path.name for found in find(path) if found.path != path] if os.path.isdir(path) else []
    more = f" and {len(others) - limit} more" if len(others) > limit else ""
    listed = f"{', '.join(others[:limit])}{more}"
    return (
        [f"{path} is a checkpoint, and is used; the checkpoints in it have names of their own ({listed})"]
        if others
        else []
    )


def stand_ins(name: str, chosen: Path, folder: Path) -> Iterator[Path]:
    """Yield what `resolve(name, folder)` would choose if `chosen`, which it chose, could not be used: the next best.

    Yield nothing if `name` names a single checkpoint. Copies of `chosen` come first, then others of its run.
    """
    place = folder if name in ("latest", "best") else whole_folder(name)
    matches = glob.has_magic(name) and not os.path.lexists(os.path.expanduser(name))
    found = find(place) if place else _matching(name) if matches else []
    first = next((each for each in found if each.path == chosen), None)
    own = first.run_id if first else None
    others = [each for each in found if each.problem is None and each.path != chosen]

    def rank(each: Found) -> tuple[Any, ...]:
        step = (each.step,) if matches and not place else ()
        loss = loss_of(each) if name == "best" else None
        order = (*step, each.save_order, each.resumable)
        return each.run_id == own, -math.inf if loss is None else -loss, *order

    if first and place:
        yield from (each.path for each in twins(first, place))
    yield from (each.path for each in sorted(others, key=rank, reverse=True))


def not_found(name: Path | str, folder: Path, *, hint: str = "") -> CheckpointError:
    """Return the error for a checkpoint `name` that does not exist; `folder` is where a similar one may be."""
    return CheckpointError(name, "Checkpoint not found", f"{hint}{listing(folder)}", kind="not found")


def whole_folder(name: str) -> Path | None:
    """Return the folder of checkpoints that CHECKPOINT_PATH names; None if it names a single checkpoint."""
    path = Path(os.path.expanduser(name))
    return path if os.path.isdir(path) and layout_of(path) is None and containing(path) is None else None


def _with_stem(path: Path) -> Path | None:
    """Return the checkpoint of several files whose names begin with `path`, which may carry a suffix."""
    stem = path.with_suffix("") if path.suffix in (".pt", ".safetensors") else path
    for suffix in (layout.suffixes[-1] for layout in LAYOUTS if len(layout.suffixes) > 1):
        file = stem.with_name(stem.name + suffix)
        if os.path.isfile(file) and (layout := layout_of(file)):
            return layout.primary_file(file)
    return None


def _nearest(path: Path, folder: Path) -> Path:
    """Return the folder to list when `path` does not exist."""
    return path.parent if os.path.isdir(path.parent) else folder


def _choose(folder: Path, *, by: Callable[[list[Found]], Found | None], certain: bool) -> tuple[Path, list[str]]:
    found = _find_or_raise(folder)
    if certain:
        check_answers(found)
    notes = _problems(found)
    chosen = by(found)
    if chosen is not None and by is best:
        notes += _better_elsewhere(chosen, found)
    if chosen is None:
        remedy = "; ".join(notes or [listing(folder)])
        raise CheckpointError(folder, "no checkpoint can be read", remedy, kind="damaged" if notes else "not found")
    if by is best:  # within a folder the loss decides
        found = [each for each in found if each.path.parent != chosen.path.parent or loss_of(each) == loss_of(chosen)]
    return chosen.path, [*notes, f"taking {chosen.path}", *_doubt(chosen, found, folder, certain=certain)]


def check_answers(found: list[Found]) -> None:
    """Raise CheckpointError if a checkpoint does not answer: it may be the newest."""
    if away := next((each for each in found if each.kind == "unreachable"), None):
        raise CheckpointError(f"{away.problem}; name another checkpoint itself to use it", kind="unreachable")


def _doubt(chosen: Found, found: list[Found], where: Path | str, *, certain: bool) -> list[str]:
    """Return a note if nothing records that `chosen` is the newest of `found`; raise CheckpointError if `certain`."""
    others = rivals(chosen, found)
    if others and certain:
        problem = ambiguity(chosen, others)
        raise CheckpointError(where, problem, "name the checkpoint itself", kind="refused")
    return [f"{ambiguity(chosen, others)}; name another checkpoint itself to choose it"] if others else []


def _better_elsewhere(chosen: Found, found: list[Found]) -> list[str]:
    """Return a note if another run has a checkpoint of lower loss than `chosen`, the best of the newest run."""
    lowest, loss = lowest_loss(found), loss_of(chosen)
    if lowest is None or lowest.run_id == chosen.run_id or (loss is not None and loss <= (loss_of(lowest) or 0)):
        return []
    own = "no validation loss" if loss is None else f"validation loss {loss:.4f}"
    other = f"{lowest.path} of run {lowest.run_id or '(not recorded)'} has {loss_of(lowest):.4f}"
    return [f"best is the best of the newest run, {chosen.run_id or '(not recorded)'}, with {own}; {other}"]


def _find_or_raise(folder: Path) -> list[Found]:
    """Return `find(folder)`; raise CheckpointError instead of OSError."""
    try:
        return find(folder)
    except OSError as error:
        if is_unreachable(error):
            raise unreadable(folder, error) from error
        problem = f"cannot be listed ({error.strerror})"
        raise CheckpointError(folder, problem, "check its permissions", kind="not found") from error


def _problems(found: list[Found], *, limit: int = 3) -> list[str]:
    """Return a note for each of the first `limit` unreadable checkpoints, and the number of the others."""
    notes = [f"skipped: {checkpoint.problem}" for checkpoint in found if checkpoint.problem]
    return notes if len(notes) <= limit else [*notes[:limit], f"(and {len(notes) - limit} more that cannot be read)"]


def _matching(pattern: str) -> list[Found]:
    """Return every checkpoint of which the glob matches at least one file."""
    names = sorted(glob.glob(os.path.expanduser(pattern)))
    layouts = {path: layout for name in names if (layout := layout_of(path := Path(name)))}
    primaries = {layout.primary_file(path) or path: layout for path, layout in layouts.items()}
    whole = [look(primary, layout) for primary, layout in primaries.items()]
    return whole + [found for name in names if (found := orphan(Path(name))) and found.path not in primaries]


def _choose_by_step(pattern: str, folder: Path, *, certain: bool) -> tuple[Path, list[str]]:
    """Return the checkpoint of the highest step that the glob matches."""
    matches = _matching(pattern)
    notes = _problems(matches)
    readable = [checkpoint for checkpoint in matches if checkpoint.problem is None]
    if not readable:
        remedy = "; ".join(notes or [listing(_nearest(Path(os.path.expanduser(pattern)), folder))])
        kind: Kind = "damaged" if notes else "not found"
        problem = "no matching checkpoint can be read" if matches else "matches no checkpoint"
        raise CheckpointError(pattern, problem, remedy, kind=kind)
    chosen = max(readable, key=lambda found: (found.step, found.save_order, found.resumable))
    notes.append(f"{pattern} matches {len(matches)}: taking {chosen.path}")
    same_step = [found for found in readable if found.step == chosen.step]
    return chosen.path, [*notes, *_doubt(chosen, same_step, pattern, certain=certain)]


def several(names: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Return the checkpoints that CHECKPOINT_PATH names where many are allowed, each once, and notes about the choice.

    `names` is what `resolve` takes, or several of them joined by commas, in this order. A glob stands for all its
    matches and a folder for all its checkpoints, oldest save first; their damaged checkpoints are skipped with a note.
    Raise CheckpointError if a named checkpoint does not exist, or a folder or glob yields no checkpoint.
    """
    paths: list[Path] = []
    notes: list[str] = []
    for name in [names] if os.path.lexists(names) else names.split(","):
        found = _all_of(name)
        readable = [checkpoint.path for checkpoint in found if checkpoint.problem is None]
        if readable:
            paths, notes = [*paths, *readable], [*notes, *_problems(found)]
        else:  # a single checkpoint, or nothing readable: then `resolve` raises
            path, new_notes = resolve(name, folder)
            paths, notes = [*paths, path], [*notes, *new_notes]
    return list(dict.fromkeys(paths)), notes


def _all_of(name: str) -> list[Found]:
    """Return the checkpoints of a folder or a glob, oldest save first; an empty list if `name` is neither."""
    if folder := whole_folder(name):
        return _find_or_raise(folder)
    many = glob.has_magic(name) and not os.path.lexists(os.path.expanduser(name))
    return sorted(_matching(name), key=lambda found: found.save_order) if many else []


def listing(folder: Path, *, limit: int = 8) -> str:
    """Return a sentence on the checkpoints of `folder`, newest first, for a message."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            return f"{folder} is no folder: name the folder that holds the checkpoints"
        return f"there is no folder {folder}{NONE_SAVED}"
    try:
        found = reversed(find(folder))
    except OSError as error:
        return f"{folder} cannot be listed ({error.strerror})"
    names = [str(each.path.relative_to(folder)) + (f" ({each.kind})" if each.problem else "") for each in found]
    if not names:
        return f"{folder} holds no checkpoint{_held_instead(folder)}"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {', '.join(names[:limit])}{more}"


def _holds_any(place: Path) -> bool:
    """Whether a checkpoint is in the folder, as far as it can be listed."""
    with contextlib.suppress(OSError):
        return any(True for _ in scan(place))
    return False


def _is_mlx_adapter(folder: Path) -> bool:
    """Whether the adapter in the folder is one of MLX-LM, whose config has the same name as that of peft."""
    with contextlib.suppress(CheckpointError):
        return "fine_tune_type" in read_json(folder / ADAPTER_CONFIG)
    return False


def _held_instead(folder: Path, *, limit: int = 3) -> str:
    """Return the end of a sentence on a folder without checkpoints: what else is in it that may have been meant."""
    if is_regular(folder / ADAPTER_CONFIG):
        program, remedy = ("MLX-LM", FUSE_ADAPTER) if _is_mlx_adapter(folder) else ("peft", OPEN_ADAPTER)
        return f", but an adapter of {program} ({ADAPTER_CONFIG}): {remedy}"
    if incomplete := orphans(folder):
        return f", but {'; '.join(str(found.problem) for found in incomplete[:limit])}"
    below = [place for place in itertools.islice(folders_below(folder), 1, LOOKED_AT) if _holds_any(place)]
    if below:
        more = f" and {len(below) - limit} more" if len(below) > limit else ""
        return f"; folders below it do: {', '.join(map(str, below[:limit]))}{more}; name one of them"
    names = sorted(name for name in names_in(folder) if name[0] != ".")
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    others = f" (it holds {', '.join(names[:limit])}{more})" if names else ""
    return f"{others}{NONE_SAVED}"
