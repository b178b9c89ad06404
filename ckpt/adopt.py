"""Another program's file -> a record: its weights and words as `foreign` understands them, its tokenizer from beside it.

What the layouts that are only read have in common.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt import archive, foreign
from ckpt.foreign.tokenizer import META_LIMIT, read_meta, tokenizer_for
from ckpt.record import Checkpoint, CheckpointError, Json, metadata
from ckpt.sidecar import is_regular, read_json

CONFIG, TOKENIZER, META = "config.json", "tokenizer.json", "meta.pkl"


def adopted(path: Path, content: Mapping[Any, Any], *, layout: str, optimizer: bool = True) -> Checkpoint:
    """The record of what was loaded from `path`, a file or a folder. Raises CheckpointError if anything of it cannot be translated.

    Without a tokenizer of its own it takes tokenizer.json or meta.pkl beside it, or GPT-2's if the rows fit; else it has none.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if is_regular(folder / CONFIG) else None
    meant = foreign.understood(content, config, where=str(path), optimizer=optimizer)
    beside = _token_file(folder)
    tokenizer, note = tokenizer_for(
        meant.model_settings["vocab_size"], _read_token_file(beside), where=str(beside or path)
    )
    return Checkpoint(
        model_state=meant.model_state,
        optimizer_state=meant.optimizer_state,
        model_type=meant.model_type,
        model_settings=meant.model_settings,
        tokenizer=tokenizer,
        step=meant.step,
        epoch=meant.epoch,
        validation_loss=meant.validation_loss,
        parts=["model", *(["optimizer"] if meant.optimizer_state else [])],
        written_by=f"another program ({layout})",
        path=path,
        layout=layout,
        notes=[*meant.notes, *([note] if tokenizer else [])],
    )


def _token_file(folder: Path) -> Path | None:
    """The file beside the weights that says what the tokenizer is; None if there is none."""
    return next((folder / name for name in (TOKENIZER, META) if is_regular(folder / name)), None)


def _read_token_file(path: Path | None) -> Mapping[str, Json] | None:
    if path is None or path.name == TOKENIZER:
        return read_json(path) if path else None
    try:
        with open(path, "rb") as file:
            return read_meta(file.read(META_LIMIT + 1), where=str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def with_chars(record: Checkpoint, chars: list[str]) -> Checkpoint:
    """The record with `chars`, the sorted characters of the training text, for its tokenizer; raises CheckpointError if they do not fit."""
    rows = record.model_settings["vocab_size"]
    record.tokenizer, note = tokenizer_for(rows, chars=chars, where=str(record.path))
    if record.tokenizer is None:
        raise CheckpointError(note)
    record.notes.append(note)
    return record


# ---------------------------------------------------------------------------------------------------------------------
# The verbs of a layout that is one path, and those of one torch archive of another program.


def home(path: Path) -> Path | None:
    """The path under which it is listed: its own."""
    return path


def files(path: Path) -> list[Path]:
    """What it consists of: the one file or folder."""
    return [path]


def optimizer_file(path: Path) -> Path | None:
    """None: the optimizer's state, if any, is in the same file."""
    return None


def verify_file(path: Path) -> list[str]:
    """What is wrong with the file's bytes, one sentence each; empty if every member agrees with its CRC-32."""
    return archive.verify(path)


def peek(path: Path, *, layout: str) -> dict[str, Json]:
    """The metadata alone; the tensors are mapped, not read."""
    return metadata(read(path, layout=layout))


def read(path: Path, *, layout: str, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the archive at `path`; raises CheckpointError in one sentence."""
    problems = verify_file(path) if verify else []
    if problems:
        raise CheckpointError(problems[0])
    content, _ = archive.load(path)
    return adopted(path, content, layout=layout, optimizer=optimizer)
