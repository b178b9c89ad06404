"""Import another program's checkpoint as a record: weights and config translated, tokenizer from inside or beside it.

Shared by the layouts that are only read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt import foreign
from milepost.ckpt.foreign.embedded_tokenizer import tokenizer_inside
from milepost.ckpt.foreign.other_values import other_values
from milepost.ckpt.foreign.tokenizer import Choice, read_meta, tokenizer_for
from milepost.ckpt.manifest import is_regular, read_json, unreadable
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, metadata
from milepost.files import open_steadily
from milepost.text.meta_pickle import META, META_LIMIT

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# Files of tokenizers that are not read: no GPT-2 has one of them.
UNREAD = ("tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
RATE = "learning_rate"  # key of `imported`: the rate in use at the record's step
IN_CONFIG = 'put it in config.json beside the file: {"n_head": 6}'
UNUSED = "optimizer"  # key of `imported`: why the optimizer's state cannot be used


def adopted(
    path: Path, content: Mapping[Any, Any], *, layout: str, optimizer: bool = True, whole: bool = True
) -> Checkpoint:
    """Return the record of the content loaded from `path`, a file or a folder; raise CheckpointError.

    The tokenizer is the one inside the file, else tokenizer.json or meta.pkl beside it, else GPT-2's if the rows match,
    else None. If not `whole`, only the metadata is usable.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if is_regular(folder / CONFIG) else None
    meant = foreign.understood(content, config, where=str(path), optimizer=optimizer, whole=whole)
    tokenizer, note = _tokenizer_of(path, [content, config or {}], meant.model_settings["vocab_size"])
    record = Checkpoint(
        model_state=meant.model_state,
        optimizer_state=meant.optimizer_state,
        model_type=meant.model_type,
        model_settings=meant.model_settings,
        tokenizer=tokenizer,
        step=meant.step,
        epoch=meant.epoch,
        validation_loss=meant.validation_loss,
        hyperparameters=meant.hyperparameters,
        schedule=meant.schedule,
        base=meant.base,
        parts=["adapters" if meant.adapters_only else "model", *(["optimizer"] if meant.optimizer_state else [])],
        written_by=f"another program ({layout})",
        path=path,
        layout=layout,
        notes=[*meant.notes, *([note] if note else [])],
    )
    values, record.left_out = other_values(
        content, record, beside={CONFIG: config} if config else {}, optimizer=optimizer
    )
    record.imported = imported(values, rate=meant.rate, unused=meant.unused)
    return record


def imported(values: dict[str, Json], *, rate: float | None, unused: str | None) -> dict[str, Json] | None:
    """Return the field `imported` of a record: the values that have no other field, the rate in use, and why an
    optimizer's state is not used; None if there is nothing.
    """
    fields = {"values": values, RATE: rate, UNUSED: unused}
    return {name: value for name, value in fields.items() if value} or None


def rate_in_use(record: Checkpoint) -> float | None:
    """Return the learning rate at the record's step that another program recorded, else its peak; None if there is none."""
    rates = ((record.imported or {}).get(RATE), record.hyperparameters.get("LEARNING_RATE"))
    return next((float(rate) for rate in rates if isinstance(rate, int | float) and 0 < rate < 1e9), None)


def adopted_metadata(path: Path, content: Mapping[Any, Any], *, layout: str) -> dict[str, Json]:
    """Return the metadata of the loaded content; reads only the rows that show whether the head is tied."""
    return metadata(adopted(path, content, layout=layout, whole=False))


def _tokenizer_of(path: Path, contents: list[Mapping[Any, Any]], vocab_size: int) -> Choice:
    """Return the tokenizer inside the file, else the one beside it, and a note; the note is empty if there is none."""
    tokenizer, note = tokenizer_inside(contents, vocab_size, where=str(path))
    if tokenizer or (note and _token_file(path) is None):
        return tokenizer, note
    return tokenizer_beside(path, vocab_size)


def _token_file(path: Path, names: tuple[str, ...] = (TOKENIZER, META)) -> Path | None:
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in names if is_regular(folder / name)), None)


def tokenizer_beside(path: Path, vocab_size: int) -> Choice:
    """Return `tokenizer_for` the weights at `path` with the tokenizer.json or meta.pkl beside them.

    The note is empty if there is none, and names a file that is not read: in its place nothing is guessed.
    """
    file = _token_file(path)
    if file is None and (unread := _token_file(path, UNREAD)):
        how = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        return None, f"{unread}: this kind of tokenizer is not read; transformers may write {TOKENIZER} from it: {how}"
    tokenizer, note = tokenizer_for(vocab_size, _read_token_file(file), where=str(file or path))
    return tokenizer, note if tokenizer else ""


def _read_token_file(path: Path | None) -> Mapping[str, Json] | None:
    if path is None or path.name == TOKENIZER:
        return read_json(path) if path else None
    try:
        with open_steadily(path) as file:
            return read_meta(file.read(META_LIMIT + 1), where=str(path))
    except OSError as error:
        raise unreadable(path, error) from error


def lacks_n_head(values: Mapping[str, Json]) -> bool:
    """Whether these metadata are of another program's GPT-2 that records no n_head, which the weights do not show."""
    settings = values.get("model_settings") or {}
    return values.get("save_id") is None and values.get("model_type") == "gpt2" and "n_head" not in settings


def n_head_problem(record: Checkpoint, *, remedy: str = IN_CONFIG) -> CheckpointError:
    """Return the error of a record that lacks n_head."""
    return CheckpointError(str(record.path), "has no n_head, which shapes do not determine", remedy, kind="lacking")


def with_n_head(record: Checkpoint, n_head: int) -> Checkpoint:
    """Return a record that lacks n_head with this one; raise CheckpointError if it does not fit the weights."""
    width = record.model_settings["n_embd"]
    if width % n_head:
        problem = f"n_head is set to {n_head}, which does not divide n_embd={width}"
        raise CheckpointError(str(record.path), problem, "set a number of heads that divides it", kind="refused")
    record.model_settings = {**record.model_settings, "n_head": n_head}
    record.notes.append(f"{record.path}: records no n_head; {n_head} is used, as set")
    return record


def with_chars(record: Checkpoint, chars: list[str]) -> Checkpoint:
    """Return the record with a tokenizer of `chars`, the sorted characters of the user's text.

    Raise CheckpointError unless their number is the model's vocabulary size.
    """
    rows = record.model_settings["vocab_size"]
    record.tokenizer, note = tokenizer_for(rows, chars=chars, where=str(record.path))
    if record.tokenizer is None:
        raise CheckpointError(str(record.path), note.removeprefix(f"{record.path}: "), kind="refused")
    record.notes.append(note)
    return record


def with_kind(record: Checkpoint, kind: str) -> Checkpoint:
    """Return the record with the tokenizer `byte` or `gpt2`; raise CheckpointError if it has too many tokens."""
    rows = record.model_settings["vocab_size"]
    record.tokenizer, _ = tokenizer_for(rows, {"kind": kind}, where=f"{record.path}: TOKENIZER={kind}")
    record.notes.append(f"{record.path}: carries no tokenizer; {kind} is used, as set")
    return record
