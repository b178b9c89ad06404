"""Which checkpoint RESUME selects, and whether the settings fit it."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost import ckpt, config
from milepost.ckpt import Checkpoint
from milepost.ckpt.finding import folder_of, twins
from milepost.ckpt.ordering import exact_first, in_order
from milepost.ckpt.record import from_metadata
from milepost.ckpt.rivals import ambiguity, rivals
from milepost.config import Config, ConfigError
from milepost.config.variables import DATA_VARIABLES
from milepost.remote import local_path
from milepost.resume import changes, fixed_for_resume, naming_the_text, saved_settings
from milepost.run import completed
from milepost.run.same_text import text_differences
from milepost.run_mirror import bring_from_mirror
from milepost.runtime.progress import Log, command_line, shown


def find_record(settings: Config, log: Log) -> Checkpoint | None:
    """Return the latest valid checkpoint that RESUME selects, with the same model, data and tokenizer; None if the
    folder has none.

    Log and skip damaged checkpoints. Raise ConfigError listing the differences if no checkpoint fits, or the steps of
    the run if it lacks RESUME_STEP; CheckpointError if all are damaged.
    """
    if settings.resume != "auto":
        named = _named(settings, log)
        log_init_from(named, settings, log)
        return named
    folder = Path(settings.checkpoint_dir)

    def has_same(found: ckpt.Found) -> bool:
        return not _changes(found, settings)

    bring_from_mirror(settings, log, fits=lambda found: not _contradictions(found, settings), has_same=has_same)
    found = ckpt.find(folder)
    if settings.checkpoint_fallback_dir:
        found = in_order(found, ckpt.find(Path(settings.checkpoint_fallback_dir)))
    readable = _readable(found, log)
    if settings.resume_step is None or not readable:
        record = newest_fitting(exact_first(readable, has_same), settings, log)
        refuse_rivals(record, readable, settings)
        log_passed_over(record, readable, settings, log)
    else:
        # Take the step from the run that RESUME=auto without RESUME_STEP would resume, never from another run.
        newest = newest_fitting(exact_first(readable, has_same), settings, log, verify=False)
        if newest:
            log_passed_over(newest, readable, settings, log)
            log(f"RESUME=auto takes step {settings.resume_step} of run {newest.run_id}, the newest run that fits")
        record = _of_step(newest, readable, folder, settings, log) if newest else None
    if record is None and found:
        weights = "RESUME=never INIT_FROM=latest starts a new run from the latest weights that are whole"
        raise ckpt.CheckpointError(
            f"no checkpoint in {folder} can be read; {weights}, RESUME=never alone one from nothing, beside them"
        )
    return record


def _named(settings: Config, log: Log) -> Checkpoint:
    """Return the checkpoint that RESUME names, or that of RESUME_STEP of the same run. Raise as `find_record` does."""
    name, folder = local_path(settings.resume, settings, log, step=settings.resume_step), Path(settings.checkpoint_dir)
    if settings.resume_step is None:
        return check_fits(ckpt.load_named(name, folder, say=log, verify=True, certain=True), settings, log)
    named = ckpt.load_named(name, folder, say=log, optimizer=False, certain=True)
    path = named.path or folder
    if named.step == settings.resume_step:
        return check_fits(ckpt.load(path, verify=True), settings, log)
    folder = folder_of(path, named.run_id)
    return _of_step(named, _readable(ckpt.find(folder), log), folder, settings, log)


def _readable(found: list[ckpt.Found], log: Log) -> list[ckpt.Found]:
    """Return the checkpoints without a problem, newest first; log the others. Raise CheckpointError if one does not
    answer.
    """
    for checkpoint in found:
        if checkpoint.problem:
            _skip(checkpoint.problem, checkpoint.kind, log)
    return [checkpoint for checkpoint in reversed(found) if not checkpoint.problem]


def _skip(problem: str, kind: str | None, log: Log) -> None:
    """Log that a checkpoint is skipped. Raise CheckpointError if it did not answer: an older one would lose steps."""
    if kind == "unreachable":
        remedy = "RESUME=<path of another checkpoint> resumes from that one"
        raise ckpt.CheckpointError(f"{problem}; {remedy}", kind="unreachable")
    log(f"skipped: {problem}")


def _of_step(record: Checkpoint, readable: list[ckpt.Found], folder: Path, settings: Config, log: Log) -> Checkpoint:
    """Return the checkpoint of RESUME_STEP of the record's run.

    Raise ConfigError listing the steps of that run, and other runs with this step, if the run lacks it; CheckpointError
    if every checkpoint of the step is damaged.
    """
    step, run_id = settings.resume_step, record.run_id
    same_step = [found for found in readable if found.step == step]
    own = [found for found in same_step if found.run_id == run_id is not None]
    if own and (valid := newest_fitting(exact_first(own), settings, log)):
        return valid
    if own:
        problem = f"step {step} of run {run_id} in {folder} is damaged"
        raise ckpt.CheckpointError(f"{problem}: set another RESUME_STEP; {_steps_of(record, readable)}")
    problem = f"RESUME_STEP={step}: not found in {folder}: {_steps_of(record, readable)}"
    others = sorted({str(found.run_id or found.path) for found in same_step})
    elsewhere = f"; another run has step {step} ({', '.join(others[:5])})" if others else ""
    raise ConfigError([f"{problem}{elsewhere}: set a step of this run, or name the checkpoint in RESUME"])


def _steps_of(record: Checkpoint, readable: list[ckpt.Found]) -> str:
    """Describe which steps of the record's run can be read, for a message."""
    if record.run_id is None:
        return f"{record.path} is at step {record.step} and records no run, so no other step is known to belong to it"
    steps = sorted({found.step for found in readable if found.run_id == record.run_id})
    return f"run {record.run_id} has the steps {', '.join(map(str, steps)) or record.step}"


def log_init_from(record: Checkpoint, settings: Config, log: Log) -> None:
    """Log that INIT_FROM names no weights of a run that is resumed, unless it may name the base of its adapters."""
    if not settings.init_from or record.adapters_only:
        return
    began = f"from {record.parent.get('file') or 'other weights'}" if record.parent else "with random weights"
    elsewhere = "another CHECKPOINT_DIR, or " if settings.resume == "auto" else ""
    run = f"run {record.run_id}" if record.run_id else shown(record.path or "")
    log(
        f"INIT_FROM is not used: RESUME={config.public(settings, 'RESUME')} resumes {run}, which began {began}; "
        f"{elsewhere}RESUME=never{',' * bool(elsewhere)} starts a new run from it"
    )


def log_passed_over(record: Checkpoint | None, readable: list[ckpt.Found], settings: Config, log: Log) -> None:
    """Log what RESUME=auto passes over when it takes the record: INIT_FROM, and newer checkpoints in `readable`, which
    is in order, newest first.
    """
    if record is None:
        return
    log_init_from(record, settings, log)
    newer = list(itertools.takewhile(lambda found: found.path != record.path, readable))
    own = next((found for found in newer if found.run_id == record.run_id and not found.resumable), None)
    if own and "optimizer" in record.parts:
        lacking = f"{shown(own.path)}, step {own.step}, holds no optimizer state"
        log(
            f"{lacking}: taking step {record.step}, from which the run resumes bit-exactly; name the file in RESUME to take it"
        )
    others = [found for found in newer if found.run_id not in (None, record.run_id) and _differs(found, settings)]
    if others and not changes(settings, record, new_schedule=False):
        values = ", ".join(f"{name}={before}" for name, (before, _) in _changes(others[0], settings).items())
        newest = f"{shown(others[0].path)}, of run {others[0].run_id} with {values}, is newer"
        log(
            f"taking run {record.run_id}, which has the settings that are set; {newest}: name the file in RESUME to take it"
        )


def _differs(found: ckpt.Found, settings: Config) -> bool:
    """Return whether the checkpoint would be resumed with these settings, as a child run."""
    return not _contradictions(found, settings) and bool(_changes(found, settings))


def newest_fitting(
    candidates: list[ckpt.Found], settings: Config, log: Log, *, verify: bool = True
) -> Checkpoint | None:
    """Return the first of `candidates` that is valid and fits, or None if all are damaged.

    Raise ConfigError if the valid ones do not fit.
    """
    misfits = []
    for candidate in candidates:
        for path in _names_of(candidate):
            try:
                return check_fits(ckpt.load(path, verify=verify), settings, log)
            except ckpt.CheckpointError as error:
                _skip(str(error), error.kind, log)
            except ConfigError as error:
                misfits.append(error)
                break
    if misfits:
        raise misfits[0]
    return None


def _names_of(found: ckpt.Found) -> Iterator[Path]:
    """Yield the path of a checkpoint and then, if it cannot be used, those of its copies."""
    yield found.path
    yield from (other.path for other in twins(found, folder_of(found.path, found.run_id)))


def refuse_rivals(record: Checkpoint | None, readable: list[ckpt.Found], settings: Config) -> None:
    """Raise ConfigError naming the checkpoints that fit as well as the record, if nothing records which is newer."""
    chosen = next((found for found in readable if record and found.path == record.path), None)
    others = rivals(chosen, readable) if chosen else []
    if chosen and (others := [found for found in others if _fits(found, settings)]):
        problem = ambiguity(chosen, others)
        raise ConfigError([f"RESUME=auto: {problem}: name the checkpoint in RESUME, or its folder in CHECKPOINT_DIR"])


def _fits(found: ckpt.Found, settings: Config) -> bool:
    try:
        return newest_fitting([found], settings, Log(io.StringIO()), verify=False) is not None
    except ConfigError:
        return False


def _contradictions(found: ckpt.Found, settings: Config) -> list[Any]:
    """Return the settings that a checkpoint contradicts, as far as its metadata tells."""
    return config.contradictions(settings, fixed_for_resume(_without_tensors(found), settings))


def _changes(found: ckpt.Found, settings: Config) -> dict[str, Any]:
    """Return what `changes` does, as far as the checkpoint's metadata tells."""
    return changes(settings, _without_tensors(found), new_schedule=False)


def _without_tensors(found: ckpt.Found) -> Checkpoint:
    return from_metadata(found.metadata, model_state={}, optimizer_state=None, where=str(found.path))


def check_fits(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """Return the record.

    Raise ConfigError listing the differences if its model, data or tokenizer is not the requested one.
    """
    differences = [
        f"{name} is {requested!r}, the checkpoint has {saved!r}"
        for name, requested, saved in config.contradictions(settings, fixed_for_resume(record, settings))
    ]
    wanted = config.from_saved(settings, saved_settings(record))
    asked = f"RESUME={config.public(settings, 'RESUME')}"
    check_text_named(record, settings, asked)
    if "sha256" not in record.data and not differences:
        for note in record.notes:
            log(note)
        return completed(record, settings, log)  # it resumes as a child run
    with naming_the_text(wanted):
        other_text, other_validation = text_differences(record, wanted, log)
    remedy = "undo these changes, choose another CHECKPOINT_DIR, or set RESUME=never"
    if other_text:
        named = ("TRAINING_DATA_SOURCE", "RUNS_DIR", *filter(settings.is_set, DATA_VARIABLES))
        child = {"CHECKPOINT_PATH": record.path, "MODE": "resume"} | {
            name: config.public(wanted, name) for name in named
        }
        command = command_line(config.ROOT / "scripts" / "load_checkpoint.py", **child)
        remedy += f"; to train further on this text, as a run of its own: {command}"
    differences += other_text + other_validation
    if differences:
        raise ConfigError([f"{asked}: cannot resume {record.path}: {'; '.join(differences)}: {remedy}"])
    return record


def check_text_named(record: Checkpoint, settings: Config, asked: str) -> None:
    """Raise ConfigError if the record knows no training text and the user names none: the default is another one."""
    if "sha256" not in record.data and not settings.is_set("TRAINING_DATA_SOURCE"):
        problem = f"{record.path} does not record its training text, since another program wrote it"
        raise ConfigError([f"{asked}: {problem}: set TRAINING_DATA_SOURCE to the text to train on"])
