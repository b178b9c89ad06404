"""Write checkpoints in another layout or as another program has them, and prove that nothing was lost.

CHECKPOINT_PATH=latest CONVERT_TO=huggingface OUTPUT=to-share CHECKPOINT_MODEL_ONLY=true python3 scripts/convert_checkpoint.py
CHECKPOINT_PATH=latest CONVERT_TO=gguf GGUF_TYPE=q8_0 python3 scripts/convert_checkpoint.py
CHECKPOINT_PATH=checkpoints CONVERT_TO=separated OUTPUT=new-checkpoints python3 scripts/convert_checkpoint.py
CHECKPOINT_PATH='old/*/latest.pt' CONVERT_TO=unified OUTPUT=new python3 scripts/convert_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "CONVERT_TO", "OUTPUT", "CHECKPOINT_LAYOUT if not CONVERT_TO", "CHECKPOINT_MODEL_ONLY", "CHECKPOINT_PREFIX", "CHECKPOINT_DIR", "CACHE_GB", "GGUF_TYPE",
    "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "PROMPT_FIELD", "ANSWER_FIELD", "TOKENIZER", "N_HEAD",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, Found, Selection
from milepost.ckpt.conversion import LOST_TOKENIZER, Converted, Exported, file_identity, is_imported, left_out_before
from milepost.ckpt.exports import Export
from milepost.ckpt.finding import in_best, scan
from milepost.ckpt.layouts import Layout, known_layout
from milepost.ckpt.names import ENDS, plain_stem
from milepost.cli import guarded, naming_output
from milepost.config import Config, ConfigError
from milepost.places import base_folder
from milepost.remote import is_remote, local
from milepost.run import names_complete_tokenizer, with_heads, with_tokenizer
from milepost.runtime.progress import Log, shown
from milepost.runtime.tables import table
from milepost.screen import stdout_columns, write_stdout

BAD = 3
FILE_ENDS = (*ENDS, ".gguf")  # OUTPUT with such an end is a file
DOES_NOT_COUNT = "it does not count as converted, and stays as it is"
NAME_ONE = "set TRAINING_DATA_SOURCE to the text it was trained on, or TOKENIZER=byte or gpt2, and convert it again"


@dataclass(frozen=True)
class Job:
    """A checkpoint to convert, and where to: a folder (None: beside it) and a name (None: its own)."""

    found: Found
    folder: Path | None
    stem: str | None = None
    in_best: bool = False
    best_too: bool = False


@dataclass
class Report:
    """The outcome of every job: a row of old and new path, and the losses, each with its reason."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def add(self, old: Path, outcome: Path | str, losses: list[str]) -> None:
        """Add the outcome of a job: the new path, or why there is none."""
        self.rows.append((shown(old), shown(outcome) if isinstance(outcome, Path) else f"({outcome})"))
        self.losses += losses


def main(settings: Config, log: Log) -> int:
    """Convert or export what CHECKPOINT_PATH names; return the exit code, 3 if anything was left out or lost."""
    mirrored = is_remote(settings)
    if mirrored and settings.output is None and settings.convert_to not in ckpt.EXPORTS:
        raise ConfigError(["OUTPUT: a checkpoint of a mirror is converted to a folder here; set OUTPUT to its name"])
    settings = local(settings, log, every=True)
    selection = ckpt.select(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in selection.notes:
        log(note)
    to = writer(settings)
    jobs = list(planned(selection, to, settings, flat=mirrored))
    report = Report()
    try:
        for job in jobs:
            do(job, to, report, settings, log, alone=selection.is_single)
    finally:
        if not selection.is_single and report.rows:
            write_stdout("\n" + table([("old", "new"), *report.rows], columns=stdout_columns()))
    for loss in report.losses:
        log(loss)
    if settings.convert_to not in ckpt.EXPORTS:
        finish(selection, report, settings)
    return BAD if report.losses else 0


def finish(selection: Selection, report: Report, settings: Config) -> None:
    """Print the last line: whether the conversion is complete, and where the result is."""
    words = [] if report.losses else ["Conversion complete!"]
    if not selection.is_single:
        failed = sum(found.problem is not None for found in selection.found)
        words += [f"{failed} of {len(selection.found)} cannot be read."] if failed else []
        words += [f"Check {shown(Path(settings.output))}"] if settings.output else []
    if words:
        write_stdout(" ".join(words))


def writer(settings: Config) -> Layout | Export:
    """Return the layout or export to write. Raise ConfigError if an export needs a package that is not installed."""
    name = settings.convert_to or settings.checkpoint_layout
    if name not in ckpt.EXPORTS:
        return ckpt.WRITERS[name]
    to = ckpt.exporter(name, gguf_type=settings.gguf_type)
    for package in to.needs:
        if importlib.util.find_spec(package) is None:
            raise ConfigError([f"CONVERT_TO={to.name} needs the package {package}: pip install {package}"])
    return to


def completed(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """Return the record with the number of heads, and with the tokenizer if the settings name one, where it lacks them."""
    record = with_heads(record, settings)
    return with_tokenizer(record, settings, log) if names_tokenizer(settings) else record


def names_tokenizer(settings: Config) -> bool:
    """Return whether the settings name a tokenizer for checkpoints that have none."""
    return names_complete_tokenizer(settings) or settings.is_set("TRAINING_DATA_SOURCE")


# ---------------------------------------------------------------------------------------------------------------------
# What to write where.


def planned(selection: Selection, to: Layout | Export, settings: Config, *, flat: bool) -> Iterator[Job]:
    """Yield a job for each checkpoint. Below OUTPUT its folder is the same as below the folder above all of them, or if
    `flat` none, since each checkpoint of a mirror has a folder of its own in the cache.

    Raise ConfigError for an OUTPUT that does not fit.
    """
    folder, stem = output(selection, to, settings)
    if selection.is_single or stem or folder is None:
        yield from (Job(found, folder, stem) for found in selection.found)
        return
    in_bests: dict[Path, set[Any]] = {}
    for found in selection.found:
        place = Path() if flat else selection.place(found)
        is_best = in_best(found, selection.root / place)
        if place not in in_bests:
            in_bests[place] = saves_in_best(selection.root / place) if selection.whole else set()
        best_too = not is_best and found.metadata.get("save_id") in in_bests[place]
        yield Job(found, folder / place, in_best=is_best, best_too=best_too)


def saves_in_best(folder: Path) -> set[Any]:
    """Return the save ids of the checkpoints in a best/ of `folder`."""
    return {found.metadata["save_id"] for found in scan(folder, regular=False) if found.metadata.get("save_id")}


def output(selection: Selection, to: Layout | Export, settings: Config) -> tuple[Path | None, str | None]:
    """Return the folder to write to, None for beside each checkpoint, and the name if OUTPUT is that of a file."""
    exports = settings.convert_to in ckpt.EXPORTS
    if settings.output is None:
        if selection.whole and not exports:
            problem = f"a whole folder ({selection.whole}) is converted to a new one; set OUTPUT to its name"
            raise ConfigError([f"OUTPUT: {problem}"])
        return (base_folder() / "exports" if exports else None), None
    path = Path(settings.output)
    folder, stem = (path.parent, file_stem(path, to, selection)) if is_file_name(path) else (path, None)
    if selection.whole and path.resolve().is_relative_to(selection.whole.resolve()):
        raise ConfigError([f"OUTPUT={path}: lies in {selection.whole}, which stays untouched; name another folder"])
    if exports and folder.resolve().is_relative_to(Path(settings.checkpoint_dir).resolve()):
        raise ConfigError([f"OUTPUT={path}: lies in the folder of checkpoints, and an export is not one; name another"])
    return folder, stem


def is_file_name(path: Path) -> bool:
    """Whether OUTPUT names a file rather than a folder."""
    return path.suffix in FILE_ENDS and not path.is_dir()


def file_stem(path: Path, to: Layout | Export, selection: Selection) -> str:
    """Return the name for `to.write` that makes the file `path`, or of several files those that begin so."""
    if len(selection.found) > 1:
        problem = f"is the name of one file, and CHECKPOINT_PATH names {len(selection.found)} checkpoints"
        raise ConfigError([f"OUTPUT={path}: {problem}; name a folder"])
    ends = sorted((target.name.removeprefix("@") for target in to.targets(Path(), "@")), key=len, reverse=True)
    if any(ends) and [path] == to.targets(path.parent, path.name):
        return path.name
    if whole := [end for end in ends if end and path.name.endswith(end)]:
        return path.name.removesuffix(whole[0])
    if path.suffix in {Path(f"x{end}").suffix for end in ends}:
        return path.stem
    kind = f"a file whose name ends with {' or '.join(ends)}" if any(ends) else "a folder"
    raise ConfigError([f"OUTPUT={path}: {to.name} is {kind}; name such a file, or the folder to write it to"])


# ---------------------------------------------------------------------------------------------------------------------
# One checkpoint.


def do(job: Job, to: Layout | Export, report: Report, settings: Config, log: Log, *, alone: bool) -> None:
    """Convert or export a checkpoint and add the outcome to the report. Raise CheckpointError if it is the only one."""
    old = job.found.path
    if why := why_not_needed(job, to.name, settings, alone=alone) if isinstance(to, Layout) else None:
        log(f"{shown(old)} {why}")
        report.add(old, why, [])
        return
    if isinstance(to, Layout) and not alone and (before := done_before(job, to.name, settings, log)):
        why = f"is in {shown(before.path.parent)} already"
        log(f"{shown(old)} {why}")
        report.add(old, why, losses_of(before.path, left_out_before(before.metadata), has_tokenizer(before)))
        return
    try:
        with naming_output(job.folder or old.parent):
            new, losses = convert(job, to, settings, log) if isinstance(to, Layout) else export(job, to, settings, log)
        report.add(old, new, losses)
    except CheckpointError as error:
        if alone:
            raise
        report.add(old, f"skipped: {job.found.kind or error.kind}", [f"skipped: {error}"])


def why_not_needed(job: Job, layout: str, settings: Config, *, alone: bool) -> str | None:
    """Return why a checkpoint needs no conversion, or None. Raise ConfigError if it is the only one."""
    if job.folder is None and not settings.checkpoint_model_only and job.found.layout == layout:
        variable = "CONVERT_TO" if settings.convert_to else "CHECKPOINT_LAYOUT"
        if alone:
            problem = f"{variable}={layout}: {job.found.path} is laid out so already"
            raise ConfigError([f"{problem}; set another, or OUTPUT to a folder for a copy"])
        return "is laid out so already"
    return None


def done_before(job: Job, layout: str, settings: Config, log: Log) -> Found | None:
    """Return what an earlier conversion of the checkpoint wrote to OUTPUT, if it holds all that is asked for now.

    Log and pass over a damaged one.
    """
    if job.folder is None or job.stem or job.found.problem or not job.folder.is_dir():
        return None
    wanted = (*identity(job.found)[:-1], layout)
    asked = set(job.found.metadata.get("parts", ())) - ({"optimizer"} if settings.checkpoint_model_only else set())
    there = ckpt.find(job.folder)
    stem = plain_stem(job.found.path, known_layout(job.found.path))
    for found in there:
        if found.problem and found.path.name.startswith(stem):
            log(f"{found.problem}; {DOES_NOT_COUNT}")
    earlier = [found for found in there if not found.problem and identity(found) == wanted]
    whole = [found for found in earlier if asked <= set(found.metadata.get("parts", ())) and is_valid(found, log)]
    best = max(whole, key=has_tokenizer, default=None)
    return best if best and (has_tokenizer(best) or not names_tokenizer(settings)) else None


def is_valid(found: Found, log: Log) -> bool:
    """Return whether every byte agrees with its checksum; log what does not."""
    problems = ckpt.verify(found.path)
    if problems:
        log(f"{problems[0]}; {DOES_NOT_COUNT}")
    return not problems


def has_tokenizer(found: Found) -> bool:
    """Return whether the checkpoint holds its tokenizer, which `Found` leaves out."""
    return known_layout(found.path).read_metadata(found.path).get("tokenizer") is not None


def identity(found: Found) -> tuple[Any, ...]:
    """Return the values of a save that a conversion keeps, and its layout."""
    values = found.metadata
    if is_imported(values):
        file = {**file_identity(found.path), **(values.get("imported") or {})}
        return file["file"], file["bytes"], file["modified_at"], found.layout
    return *(values.get(name) for name in ("run_id", "save_number", "step", "saved_at")), found.layout


def convert(job: Job, to: Layout, settings: Config, log: Log) -> tuple[Path, list[str]]:
    """Convert a checkpoint to another layout; return its path and what was lost."""
    done = ckpt.convert(
        job.found.path, job.folder, layout=to.name, model_only=settings.checkpoint_model_only, prefix=prefix(settings), stem=job.stem,
        in_best=job.in_best, best_too=job.best_too, complete=lambda record: completed(record, settings, log),
    )  # fmt: skip
    print_converted(done, to, settings, log)
    return done.target, losses_of(done.target, done.left_out, done.has_tokenizer)


def losses_of(target: Path, left_out: list[str], has_tokenizer: bool) -> list[str]:
    """Return a sentence on each thing that a conversion does not hold."""
    losses = [f"{shown(target)} lacks what no layout holds: {', '.join(left_out)}"] if left_out else []
    known = has_tokenizer or LOST_TOKENIZER in left_out  # no setting replaces one that is not read
    return losses + ([] if known else [f"{shown(target)} is written without a tokenizer: {NAME_ONE}"])


def prefix(settings: Config) -> str | None:
    """Return the prefix of new names if it was set; None keeps the names."""
    return settings.checkpoint_prefix if settings.is_set("CHECKPOINT_PREFIX") else None


def print_converted(done: Converted, to: Layout, settings: Config, log: Log) -> None:
    """Print the paths of a conversion, its proof and its bytes."""
    for note in done.notes:
        log(note)
    size = "Model-only size" if settings.checkpoint_model_only else "New size"
    write_stdout(f"Converted: {shown(done.source)} -> {shown(done.target)}")
    answers = f"logits equal: {' x '.join(map(str, done.logits))}" if done.logits else "adapters alone have no logits"
    equal = f"{answers}; fields of metadata equal: {done.fields}"
    write_stdout(f"  tensors equal: {done.tensors}, sha256 {done.sha256}; {equal}")
    write_stdout(f"  Original size: {done.bytes_before / 1e6:,.2f} MB ({done.bytes_before:,} bytes)")
    write_stdout(f"  {size}: {done.bytes_after / 1e6:,.2f} MB ({done.bytes_after:,} bytes)")
    if (done.layout_before, to.name) == ("unified", "separated"):
        write_stdout("  Unified checkpoint split into separated format!")


def export(job: Job, to: Export, settings: Config, log: Log) -> tuple[Path, list[str]]:
    """Export a checkpoint for another program; return the path, and what was lost: nothing, because it is refused."""
    assert job.folder is not None
    done = ckpt.export(
        job.found.path, job.folder, to=to, prefix=prefix(settings), stem=job.stem,
        complete=lambda record: completed(record, settings, log),
    )  # fmt: skip
    print_exported(done, to, log)
    return done.target, []


def print_exported(done: Exported, to: Export, log: Log) -> None:
    """Print the paths of an export, its proof, its bytes and the command that runs it."""
    for note in done.notes:
        log(note)
    proof, shape = done.proof, " x ".join(map(str, done.proof.logits))
    why = f": {proof.remark}" if proof.remark else ""
    write_stdout(f"Exported: {shown(done.source)} -> {shown(done.target)}")
    write_stdout(f"  tensors equal: {proof.tensors}, sha256 {proof.sha256}")
    apart = f"differ by at most {proof.difference:.2g}, of a standard deviation of {proof.spread:.2g}{why}"
    write_stdout(f"  logits ({shape}) {apart}" if shape else "  adapters alone have no logits")
    write_stdout(f"  Size: {done.bytes_after / 1e6:,.2f} MB ({done.bytes_after:,} bytes)")
    write_stdout(f"next: {to.how(done.target)}")


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
