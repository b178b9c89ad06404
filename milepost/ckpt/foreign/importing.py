"""Another program's file -> a record: its weights and words as `foreign` understands them, its tokenizer from beside it.

What the layouts that are only read have in common.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt import foreign
from milepost.ckpt.foreign.tokenizer import META_LIMIT, Choice, read_meta, tokenizer_for
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, metadata

CONFIG, TOKENIZER, META = "config.json", "tokenizer.json", "meta.pkl"


def adopted(
    path: Path, content: Mapping[Any, Any], *, layout: str, optimizer: bool = True, whole: bool = True
) -> Checkpoint:
    """The record of what was loaded from `path`, a file or a folder. Raises CheckpointError if anything of it cannot be translated.

    Without a tokenizer of its own it takes tokenizer.json or meta.pkl beside it, or GPT-2's if the rows fit; else it has none.
    If not `whole`, only its metadata is of use.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if is_regular(folder / CONFIG) else None
    meant = foreign.understood(content, config, where=str(path), optimizer=optimizer, whole=whole)
    tokenizer, note = tokenizer_beside(path, meant.model_settings["vocab_size"])
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


def adopted_metadata(path: Path, content: Mapping[Any, Any], *, layout: str) -> dict[str, Json]:
    """The metadata of what was loaded, the tensors mapped and left unread, but for the few rows that tell whether a head is tied."""
    return metadata(adopted(path, content, layout=layout, whole=False))


def tokenizer_beside(path: Path, vocab_size: int) -> Choice:
    """What `tokenizer_for` says of the weights at `path`, a file or a folder, by tokenizer.json or meta.pkl beside them."""
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in (TOKENIZER, META) if is_regular(folder / name)), None)
    return tokenizer_for(vocab_size, _read_token_file(file), where=str(file or path))


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
