"""The Python interface: train, load and generate, and what the scripts do with checkpoints.

Settings are keywords, the variables of docs/configuration.md in lower case, with the same checks; the process
environment and .env are not read. train() logs those that have no effect there, generate() refuses them. Paths are
`str` or `PathLike`. A checkpoint is named as CHECKPOINT_PATH names it: a file, a folder, a stem, a glob, "latest",
"best", or an address in a mirror. A `folder` that is not given is the one to which train() saves by default. Errors are
raised: ConfigError, CheckpointError, DataError, DeviceError, TrainingError.
"""

import contextlib
import difflib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import training
from milepost import ckpt, config
from milepost.ckpt import Checkpoint, CheckpointError, Found
from milepost.ckpt.conversion import Converted
from milepost.ckpt.retention import latest_valid
from milepost.cli import processes
from milepost.config import Config, ConfigError
from milepost.locks import RunLockedError, hold_run
from milepost.remote import local_path
from milepost.run import Run, completed
from milepost.runtime.errors import TrainingError
from milepost.runtime.hardware import DeviceError
from milepost.runtime.progress import Log
from milepost.samples import drop_conflicts, sample_texts
from milepost.text.addresses import is_address, masked
from milepost.text.errors import DataError

Name = str | os.PathLike[str]
GENERATE_READS = (
    "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "REPETITION_PENALTY", "STOP", "SAMPLE_SEED", "NUM_SAMPLES", "PROMPT_FILE",
    "RAW_PROMPT", "QUANTIZE", "SPECULATE", "DEVICE", "DEVICE_CHECK", "DTYPE", "UNKNOWN_CHARACTERS", "CHECKPOINT_DIR", "CACHE_GB", "ENV_FILE",
    "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM", "N_HEAD", "TOKENIZER", "TRAINING_DATA_SOURCE", "TEXT_FIELD", "PROMPT_FIELD",
    "ANSWER_FIELD", "DOCUMENT_SEPARATOR",
)  # fmt: skip


def train(**settings: Any) -> Run:
    """Train a model and return its run: `run.model`, `run.tokenizer`, `run.state.step`, `run.state.validation_loss`,
    ...

    `train(resume="auto", enable_checkpoints=True, ...)` resumes as RESUME does. Ctrl-C stops after the step, saves if
    checkpoints are enabled, and returns.
    """
    resolved, log = settings_of(training.READS, **settings), Log()
    with contextlib.closing(log), processes(resolved, log) as world:
        for note in config.no_effect(resolved, "training.py"):
            log(note)
        run, done = training.prepare(resolved, log, world)
        if not done:
            training.train(run)
    return run


def load(checkpoint: Name, *, folder: Name | None = None, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """Return the checkpoint; "latest" and "best" look in `folder`.

    `optimizer=False` leaves the optimizer's tensors unread; `verify=True` compares every byte with its checksum first.
    """
    name = local_path(_path("checkpoint", checkpoint), settings_of(), Log())
    return ckpt.load_named(name, _folder(folder), say=Log(), optimizer=optimizer, verify=verify)


def generate(checkpoint: Checkpoint | Name, prompt: str = "", **settings: Any) -> str:
    """Return a continuation of the prompt, without the prompt; a model of conversations answers it.

    Settings are those of generation: max_new_tokens, temperature, top_k, top_p, stop, sample_seed, device, quantize,
    ...

    Raise ConfigError for another setting, and for one that contradicts the checkpoint.
    """
    resolved, log = settings_of(GENERATE_READS, **settings), Log(io.StringIO())
    if unread := [name for name, value in settings.items() if value is not None and name.upper() not in GENERATE_READS]:
        raise ConfigError([f"{', '.join(unread)}: generate does not use this: leave it out"])
    if resolved.num_samples != 1:
        raise ConfigError(["num_samples: generate returns one text; call it once for each, with another sample_seed"])
    if resolved.is_set("PROMPT_FILE"):
        raise ConfigError(["prompt_file: generate reads no file; pass its text as prompt"])
    if not isinstance(prompt, str):
        raise ConfigError([f"prompt: expected text, not {type(prompt).__name__}"])
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load(checkpoint, folder=resolved.checkpoint_dir, optimizer=False)
    seed = resolved.sample_seed if resolved.sample_seed is not None else int.from_bytes(os.urandom(4), "little")
    record = completed(checkpoint, resolved, log)
    resolved = drop_conflicts(record, resolved, log)
    (text,) = ("".join(pieces) for _, pieces in sample_texts(resolved, record, log, prompt=prompt, seed=seed))
    return text


def find(folder: Name | None = None) -> list[Found]:
    """Return every checkpoint of the folder, of its run folders and of best/, the oldest save first;
    damaged ones have a `problem`.
    """
    return ckpt.find(_folder(folder))


def latest(folder: Name | None = None) -> Path:
    """Return the path of the latest valid checkpoint; raise CheckpointError if no checkpoint is valid."""
    return _resolved("latest", folder)


def best(folder: Name | None = None) -> Path:
    """Return the path of the checkpoint with the lowest validation loss; raise CheckpointError if there is none."""
    return _resolved("best", folder)


def save(checkpoint: Checkpoint, folder: Name | None = None, *, layout: str = "unified") -> Path:
    """Save the checkpoint under the folder's next name and return its path. Nothing is overwritten.

    Raise CheckpointError before writing if what is written could not be loaded again.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise ConfigError([f"checkpoint: expected what load returns, not {type(checkpoint).__name__}"])
    return ckpt.save(checkpoint, _folder(folder), layout=layout)


def convert(checkpoint: Name, layout: str, *, folder: Name | None = None, model_only: bool = False) -> Converted:
    """Write the checkpoint in another layout, to `folder` or beside the source, and prove that nothing was lost.

    A checkpoint of a mirror needs a `folder`.
    """
    if layout not in tuple(ckpt.WRITERS):
        raise ConfigError([f"layout={layout!r}: expected one of {', '.join(ckpt.WRITERS)}"])
    target = None if folder is None else _folder(folder)
    if target is None and is_address(_path("checkpoint", checkpoint)):
        raise ConfigError(["folder: needed for a checkpoint of a mirror, of which only a cache is here"])
    return ckpt.convert(_resolved(checkpoint, None), target, layout=layout, model_only=model_only)


def verify(checkpoint: Name, *, folder: Name | None = None) -> list[str]:
    """Return what is wrong with the checkpoint, a sentence each; empty if every byte agrees with its checksum."""
    return ckpt.verify(_resolved(checkpoint, folder))


def prune(folder: Name | None = None, *, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints of each run, as CHECKPOINT_KEEP_LAST does, and return what was
    deleted.

    Never deleted: best/ and a best step that is not there yet, a run's final checkpoint, a base that adapters need, damaged files, and any file under another
    name than a save gave it. A run that is being trained is left alone. Raise the first error only after pruning the others.
    """
    policy = settings_of(checkpoint_keep_last=keep_last, checkpoint_keep_every=keep_every)
    if policy.checkpoint_keep_last < 1:
        raise ConfigError([f"keep_last={keep_last}: expected at least 1"])
    place, deleted, failed = _folder(folder), [], []
    for run_id in sorted({found.run_id for found in ckpt.find(place) if found.run_id}):
        try:
            deleted += _pruned(place, run_id, policy)
        except RunLockedError as error:
            Log()(f"left alone: {error}")
        except (OSError, CheckpointError) as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return deleted


def _pruned(place: Path, run_id: str, policy: Config) -> list[Path]:
    """Prune a run and return what was deleted: nothing if no checkpoint of it is valid. Raise RunLockedError if a process trains it."""
    with hold_run(place, run_id):
        valid, _ = latest_valid(place, run_id)
        if valid is None:
            return []
        expired = ckpt.prune(
            place,
            run_id=run_id,
            keep_last=policy.checkpoint_keep_last,
            keep_every=policy.checkpoint_keep_every,
            latest_valid=valid,
            spare=[pending] if (pending := ckpt.pending_best(place, run_id)) else [],
        )
    return [found.path for found in expired.remove]


def settings_of(reads: Sequence[str] = (), /, **values: Any) -> Config:
    """Return the settings that keywords name, for a function that `reads` them; None is not set.

    Raise ConfigError listing every unknown name and bad value.
    """
    unknown = [name for name in values if name.upper() not in config.VARIABLES or name != name.lower()]
    problems = []
    for name in unknown:
        close = difflib.get_close_matches(name.upper(), config.VARIABLES, 1)
        hint = f"did you mean {close[0].lower()}?" if close else "docs/configuration.md lists them, here in lower case"
        problems.append(f"{name} is not a setting; {hint}")
    texts: dict[str, str] = {}
    for name in (name for name in values if name not in unknown):
        try:
            texts[name.upper()] = _text(name.upper(), values[name])
        except TypeError as error:
            problems.append(f"{name}: {error}")
    if "ENV_FILE" not in texts:
        texts["PYTHON_DOTENV_DISABLED"] = "1"
    try:
        resolved = config.read(texts, reads=reads, source="argument")
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return resolved


def _text(name: str, value: Any) -> str:
    """Return a value of Python as the text of its variable: a path, a number of numpy or torch, or the strings of a list, which are
    taken as they are. Raise TypeError for anything else, such as a list of paths.
    """
    listed = config.VARIABLES[name].metadata["form"] == "list"
    if listed and isinstance(value, str):
        return config.as_text([value] if value else None)
    if listed and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return config.as_text(value)
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):  # no number, or many
        plain = value.item()
    if plain is not None and not isinstance(plain, str | bool | int | float):
        expected = "text or a list of texts" if listed else "text, a number, a boolean or a path"
        several = "" if listed else "; several values are one text, joined by commas"
        raise TypeError(f"expected {expected}, not {type(value).__name__}{several}")
    return config.as_text(plain)


def _folder(folder: Name | None) -> Path:
    """Return the folder, by default the one to which train() saves by default."""
    if folder is None:
        return Path(settings_of().checkpoint_dir)
    path = _path("folder", folder)
    if is_address(path):
        remedy = "load, generate, verify and convert open one of its checkpoints by its address, such as .../latest"
        raise ConfigError([f"folder={masked(path)}: expected a folder here, not a mirror: {remedy}"])
    return Path(os.path.expanduser(path))


def _resolved(checkpoint: Name, folder: Name | None) -> Path:
    name = local_path(_path("checkpoint", checkpoint), settings_of(), Log())
    return ckpt.resolve(name, _folder(folder), certain=True)[0]


def _path(argument: str, value: Name) -> str:
    """Return a path, or the name of a checkpoint, as text. Raise ConfigError if it is neither."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        found = repr(path) if isinstance(path, str) else type(value).__name__
        raise ConfigError([f"{argument}: expected a path, as text or as a path of Python, not {found}"])
    return path


__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "TrainingError",
    "best",
    "convert",
    "find",
    "generate",
    "latest",
    "load",
    "prune",
    "save",
    "train",
    "verify",
]
