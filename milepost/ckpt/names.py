"""Names of checkpoints: choose a free one at a save, and recognise the names that a save gave."""

import datetime
import itertools
import os
import re
from collections.abc import Collection
from pathlib import Path

from milepost.ckpt.exports import Export
from milepost.ckpt.finding import BEST_FOLDER
from milepost.ckpt.index import Found
from milepost.ckpt.layouts import WRITERS, Layout
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, metadata

PREFIX = "checkpoint"
ENDS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")  # of files with weights
STAMP = "%m%d%Y_%H%M%S"
STAMPED = re.compile(r"([0-9]{8}_[0-9]{6})(_model(?:_[0-9]+)?)?")  # the end of a name: its time, what `strip` appends
NUMBERED = re.compile(r"(_([2-9]|[1-9][0-9]{1,2}))?")  # the end of a numbered name
LATEST_STAMP = datetime.timedelta(hours=1)  # after the save; later seconds are used when a name is taken


def target_folder(record: Checkpoint, folder: Path, *, writer: Layout | Export) -> Path:
    """Return the folder that a layout writes to: `folder`, or its run folder if names repeat between runs."""
    return folder / (record.run_id or "run") if writer.run_stem else folder


def free_stem(
    record: Checkpoint, place: Path, *, writer: Layout | Export, now: datetime.datetime, prefix: str = PREFIX
) -> str:
    """Return the first free name `{prefix}_{model}_{source}[_{weights}]_step{N}_{MMDDYYYY_HHMMSS}` from `now` on.

    A name is free if neither `place` nor its best/ has it, so that a checkpoint in one can be linked into the other.
    The names of other layouts, `step_000100`, continue with `_2`, `_3` and so on.
    """
    for number in range(10**6):
        if writer.run_stem:
            stem = _run_stem(writer.run_stem, record.step, prefix) + (f"_{number + 1}" if number else "")
        else:
            stamp = (now + datetime.timedelta(seconds=number)).strftime(STAMP)
            stem = "_".join([*_words(metadata(record), prefix), f"step{record.step:04d}", stamp])
        if not _is_taken(place, stem, writer):
            return stem
    raise CheckpointError(place, f"has no free name for step {record.step}", "move files away", kind="refused")


def free_copy(place: Path, stem: str, *, writer: Layout | Export) -> str:
    """Return `stem`, or the first of `{stem}_2`, `{stem}_3` and so on that neither `place` nor its best/ has."""
    names = (f"{stem}_{number}" if number > 1 else stem for number in itertools.count(1))
    return next(name for name in names if not _is_taken(place, name, writer))


def only_stem(place: Path, stem: str, *, writer: Layout | Export) -> str:
    """Return `stem`; raise CheckpointError if `place` has a checkpoint of that name."""
    if taken := [path for path in writer.targets(place, stem) if os.path.lexists(path)]:
        raise CheckpointError(taken[0], "exists already, and nothing is replaced", "set another name", kind="refused")
    return stem


def plain_stem(path: Path, layout: Layout) -> str:
    """Return the name of the checkpoint at `path` without what its layout and other programs put at the end of a file's
    name.
    """
    stem = layout.stem(path)
    end = "" if path.is_dir() else Path(stem).suffix
    return (stem.removesuffix(end) if end in ENDS else stem).lstrip(".") or "checkpoint"


def _is_taken(place: Path, stem: str, writer: Layout | Export) -> bool:
    return any(
        os.path.lexists(path) for parent in (place, place / BEST_FOLDER) for path in writer.targets(parent, stem)
    )


def _run_stem(pattern: str, step: int, prefix: str) -> str:
    begin = "" if prefix == PREFIX or "{prefix}" in pattern else f"{prefix}_"
    return begin + pattern.format(step=step, prefix=prefix)


def _words(values: dict[str, Json], prefix: str) -> list[str]:
    """Return the words of a name before its step, from a record's metadata."""
    words = [prefix, file_word(values["model_type"]), file_word(str(values.get("data", {}).get("name") or "text"))]
    settings = values.get("hyperparameters", {})
    pretrained = str(settings.get("PRETRAINED") or "").partition("@")[0] or str(settings.get("GPT2_MODEL_NAME") or "")
    weights = re.sub(r"[^a-z0-9]", "", pretrained.rstrip("/").split("/")[-1].lower())[:40]
    return [*words, weights] if weights else words


def file_word(text: str) -> str:
    """Return `text` as a word for a file name: characters in [a-z0-9_], at most 40."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "text"


# ---------------------------------------------------------------------------------------------------------------------
# Recognise names that a save gave.


def own_checkpoints(found: Collection[Found]) -> list[Found]:
    """Return the readable checkpoints that retention may delete: those under exactly the name of their save.

    Any other name belongs to the user: a copy, a renamed file, a folder with other files in it. If two names hold the
    same save, one is a copy under a name that a save could have given; both stay, because they cannot be told apart.
    The exception is an interrupted `strip`: the full checkpoint, and the same without its optimizer.
    """
    readable = [checkpoint for checkpoint in found if checkpoint.problem is None]
    stems = {each.path: stem for each in readable if (stem := own_stem(each)) is not None}
    saves: dict[Json, list[Found]] = {}
    for checkpoint in found:
        if checkpoint.path in stems:
            saves.setdefault(checkpoint.metadata.get("save_id") or str(checkpoint.path), []).append(checkpoint)
    unique = [names for names in saves.values() if len(names) == 1 or _is_half_stripped(names, stems)]
    return [checkpoint for names in unique for checkpoint in names]


def _is_half_stripped(names: list[Found], stems: dict[Path, str]) -> bool:
    """Whether the two are a checkpoint and its copy from an interrupted `strip`."""
    same_stem = len({stems[found.path] for found in names}) == 1
    return len(names) == 2 and same_stem and len({found.resumable for found in names}) == 2


def own_stem(found: Found) -> str | None:
    """Return the stem of the name that the checkpoint's save gave it; None if it has any other name.

    Prefix, model, source, step and time are compared with the metadata. A stripped checkpoint has the stem of its
    original.
    """
    writer = WRITERS.get(found.layout)
    if writer is None or writer.holds_other_files(found.path):
        return None
    ends = [path.name.removeprefix("@") for path in writer.targets(Path(), "@")]
    stems = [found.path.name.removesuffix(end) for end in ends if found.path.name.endswith(end)]
    match = _numbered_stem if writer.run_stem else _stamped_stem
    return next((own for stem in stems if (own := match(found, stem, writer.run_stem)) is not None), None)


def has_form_of_save(path: Path) -> bool:
    """Whether the name of `path` has the form of those that saves give, as far as it tells without metadata."""
    for writer in WRITERS.values():
        form = re.sub(r"\\{step[^}]*\\}", "[0-9]{4,}", re.escape(writer.run_stem)).replace(r"\{prefix\}", ".+")
        pattern = f"(.+_)?{form}{NUMBERED.pattern}" if form else rf".+_step[0-9]{{4,}}_{STAMPED.pattern}"
        ends = [target.name.removeprefix("@") for target in writer.targets(Path(), "@")]
        if any(re.fullmatch(pattern + re.escape(end), path.name) for end in ends):
            return True
    return False


def _prefix_of(found: Found) -> str:
    return str(found.metadata.get("hyperparameters", {}).get("CHECKPOINT_PREFIX", PREFIX))


def _numbered_stem(found: Found, stem: str, pattern: str) -> str | None:
    """Match `step_000100`, `step_000100_2` and so on, in the run folder or its best/."""
    place = found.path.parent.parent if found.path.parent.name == BEST_FOLDER else found.path.parent
    first = _run_stem(pattern, found.step, _prefix_of(found))
    known = place.name == (found.run_id or "run") and stem.startswith(first)
    return stem if known and NUMBERED.fullmatch(stem[len(first) :]) else None


def saved_without_optimizer(found: Found) -> bool:
    """Whether its save already left the optimizer out, so that `strip` never applies."""
    return found.metadata.get("hyperparameters", {}).get("CHECKPOINT_MODEL_ONLY") is True


def _stamped_stem(found: Found, stem: str, _: str) -> str | None:
    """Match `checkpoint_gpt2_letters_step0100_11102025_120000`, with `_model` appended if `strip` rewrote it."""
    begin = "_".join([*_words(found.metadata, _prefix_of(found)), f"step{found.step:04d}", ""])
    match = STAMPED.fullmatch(stem[len(begin) :]) if stem.startswith(begin) else None
    if match is None or (match[2] and (found.resumable or saved_without_optimizer(found))):
        return None
    try:
        saved = datetime.datetime.fromisoformat(found.metadata.get("saved_at") or "").replace(
            tzinfo=None, microsecond=0
        )
        waited = datetime.datetime.strptime(match[1], STAMP) - saved
    except ValueError:
        return None
    return begin + match[1] if datetime.timedelta(0) <= waited <= LATEST_STAMP else None
