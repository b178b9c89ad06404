"""How the names of checkpoints are given at a save, and how they are known again as the program's own."""

import datetime
import fnmatch
import os
import re
from collections.abc import Collection
from pathlib import Path

from milepost.ckpt.exports import Export
from milepost.ckpt.finding import BEST_FOLDER, Found
from milepost.ckpt.layouts import WRITERS, Layout
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, metadata

PREFIX = "checkpoint"
STAMP = "%m%d%Y_%H%M%S"
STAMPED = re.compile(r"([0-9]{8}_[0-9]{6})(_model(?:_[0-9]+)?)?")  # how a name ends: its second, what `strip` appends
NUMBERED = re.compile(r"(_([2-9]|[1-9][0-9]{1,2}))?")  # how a layout's own name ends
LATEST_STAMP = datetime.timedelta(hours=1)  # after the save, for a name whose second was taken


def home_of(record: Checkpoint, folder: Path, *, writer: Layout | Export) -> Path:
    """Where a layout puts a record: in `folder`, or in the run's own folder there if its names repeat from run to run."""
    return folder / (record.run_id or "run") if writer.run_stem else folder


def free_stem(
    record: Checkpoint, place: Path, *, writer: Layout | Export, now: datetime.datetime, prefix: str = PREFIX
) -> str:
    """`{prefix}_{model}_{source}[_{weights}]_step{N}_{MMDDYYYY_HHMMSS}` at the first second from `now` whose name is free.

    Free means: in `place` and in its best/, so that what is saved in one can have a second name in the other. A layout's own
    `step_000100` is followed by `_2`, `_3` and so on.
    """
    for number in range(10**6):
        if writer.run_stem:
            stem = _run_stem(writer.run_stem, record.step, prefix) + (f"_{number + 1}" if number else "")
        else:
            stamp = (now + datetime.timedelta(seconds=number)).strftime(STAMP)
            stem = "_".join([*_words(metadata(record), prefix), f"step{record.step:04d}", stamp])
        names = [path for each in (place, place / BEST_FOLDER) for path in writer.targets(each, stem)]
        if not any(map(os.path.lexists, names)):
            return stem
    raise CheckpointError(f"{place} has no free name for step {record.step}")


def _run_stem(pattern: str, step: int, prefix: str) -> str:
    begin = "" if prefix == PREFIX or "{prefix}" in pattern else f"{prefix}_"
    return begin + pattern.format(step=step, prefix=prefix)


def _words(values: dict[str, Json], prefix: str) -> list[str]:
    """The words of a name before its step, from a record's metadata."""
    words = [prefix, file_word(values["model_type"]), file_word(str(values.get("data", {}).get("name") or "text"))]
    pretrained = str(values.get("hyperparameters", {}).get("GPT2_MODEL_NAME") or "").rstrip("/").split("/")[-1]
    weights = re.sub(r"[^a-z0-9]", "", pretrained.lower())[:40]
    return [*words, weights] if weights else words


def file_word(text: str) -> str:
    """`text` in [a-z0-9_], at most 40 characters, for a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "text"


# ---------------------------------------------------------------------------------------------------------------------
# Which names are the program's own.


def ours(found: Collection[Found]) -> list[Found]:
    """Return the readable checkpoints that retention may touch: those under exactly the name that their save gave them.

    Every other name is a person's: a copy, a renamed file, anything with a word more. Leave alone a folder with somebody's files in it
    too. If two names hold the same save, one is a copy under a name that a save could have: leave both, because which is which can
    only be told from the original. The exception is what an interrupted `strip` leaves: the whole, and the same without its optimizer.
    """
    stems = {one.path: stem for one in found if one.problem is None and (stem := own_stem(one)) is not None}
    saves: dict[Json, list[Found]] = {}
    for one in found:
        if one.path in stems:
            saves.setdefault(one.metadata.get("save_id") or str(one.path), []).append(one)
    plain = [names for names in saves.values() if len(names) == 1 or _is_half_stripped(names, stems)]
    return [one for names in plain for one in names]


def _is_half_stripped(names: list[Found], stems: dict[Path, str]) -> bool:
    """Whether the two are a checkpoint and what `strip` has made of it so far."""
    return (
        len(names) == 2 and len({stems[one.path] for one in names}) == 1 and len({one.resumable for one in names}) == 2
    )


def own_stem(one: Found) -> str | None:
    """Return the stem of the save's name, or None if the name is not exactly one that the checkpoint's own save gives.

    Prefix, model, source, step and time are compared with the metadata. What `strip` wrote has the stem of what it was made from.
    """
    writer = WRITERS.get(one.layout)
    if writer is None or _holds_other_files(one.path, writer):
        return None
    ends = [path.name.removeprefix("@") for path in writer.targets(Path(), "@")]
    stems = [one.path.name.removesuffix(end) for end in ends if one.path.name.endswith(end)]
    match = _numbered_stem if writer.run_stem else _stamped_stem
    return next((own for stem in stems if (own := match(one, stem, writer.run_stem)) is not None), None)


def _holds_other_files(path: Path, layout: Layout) -> bool:
    """Whether the checkpoint is a folder that holds a file which no save puts there."""
    if not path.is_dir():
        return False
    files = (each for each in path.rglob("*") if not each.is_dir() and not each.name.startswith("."))  # no .DS_Store
    names = (each.relative_to(path).as_posix() for each in files)
    return any(not any(fnmatch.fnmatchcase(name, member) for member in layout.members) for name in names)


def _prefix_of(one: Found) -> str:
    return str(one.metadata.get("hyperparameters", {}).get("CHECKPOINT_PREFIX", PREFIX))


def _numbered_stem(one: Found, stem: str, pattern: str) -> str | None:
    """Match `step_000100`, `step_000100_2` and so on, in the run's own folder or in its best/."""
    place = one.path.parent.parent if one.path.parent.name == BEST_FOLDER else one.path.parent
    first = _run_stem(pattern, one.step, _prefix_of(one))
    known = place.name == (one.run_id or "run") and stem.startswith(first)
    return stem if known and NUMBERED.fullmatch(stem[len(first) :]) else None


def _saved_without_optimizer(one: Found) -> bool:
    """Whether its save already left the optimizer out, so that `strip` never had anything to do."""
    return one.metadata.get("hyperparameters", {}).get("CHECKPOINT_MODEL_ONLY") is True


def _stamped_stem(one: Found, stem: str, _: str) -> str | None:
    """Match `checkpoint_gpt2_letters_step0100_11102025_120000`, with `_model` at the end if it is without an optimizer."""
    begin = "_".join([*_words(one.metadata, _prefix_of(one)), f"step{one.step:04d}", ""])
    match = STAMPED.fullmatch(stem[len(begin) :]) if stem.startswith(begin) else None
    if match is None or (match[2] and (one.resumable or _saved_without_optimizer(one))):
        return None
    try:
        saved = datetime.datetime.fromisoformat(one.metadata.get("saved_at") or "").replace(tzinfo=None, microsecond=0)
        waited = datetime.datetime.strptime(match[1], STAMP) - saved
    except ValueError:
        return None
    return begin + match[1] if datetime.timedelta(0) <= waited <= LATEST_STAMP else None
