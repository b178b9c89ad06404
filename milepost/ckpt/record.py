"""Checkpoint: the one in-memory form between every layout on disk and every user of a checkpoint."""

import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

FORMAT_VERSION = 2
VERSION = "0.1.0"

LONGEST = 1400  # characters of one refusal

Json = Any  # dict, list, str, int, float, bool or None: what json.dumps takes


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or does not fit. Exit code 3 at the door."""

    def __init__(self, sentence: str) -> None:
        """Names and values of a file are in the sentence: they must not steer the terminal that it is shown on, nor fill it."""
        text = printable(sentence)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-250:]}")


def printable(text: str) -> str:
    """`text` with line breaks, escapes and what else a terminal would obey in the form that Python writes them in."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


@dataclass(kw_only=True)
class Checkpoint:
    """Tensors and JSON values, nothing else, so that `torch.load(weights_only=True)` always suffices to read one.

    `optimizer_state` is torch's own form: {"state": {index: {...}}, "param_groups": [{..., "params", "param_names"}]}.
    """

    # Tensors.
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None = None
    # What the model is, and what turns text into its ids.
    model_type: str
    model_settings: dict[str, Json]
    tokenizer: dict[str, Json] | None = None
    tokenizer_sha256: str | None = None  # of its canonical JSON
    # Where training stands. A step is one optimizer update; a window is one row of BLOCK_SIZE tokens.
    step: int = 0
    epoch: float | None = None
    windows_seen: int = 0
    tokens_seen: int = 0
    schedule: dict[str, Json] = field(default_factory=dict)
    scaler: dict[str, Json] | None = None
    observed_step: int | None = None  # the last step that was evaluated and sampled
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    # Where it comes from.
    hyperparameters: dict[str, Json] = field(default_factory=dict)
    data: dict[str, Json] = field(default_factory=dict)
    runtime: dict[str, Json] = field(default_factory=dict)
    run_id: str | None = None
    parent: dict[str, Json] | None = None
    base: dict[str, Json] | None = (
        None  # of adapters: the sha256 of the weights that they stand beside, and where those came from
    )
    # Given by the store when it is saved. "model" or, of weights that stand beside a base's, "adapters"; then "optimizer".
    parts: list[str] = field(default_factory=lambda: ["model"])
    save_id: str | None = None
    save_number: int | None = None
    saved_at: str | None = None
    written_by: str = f"milepost {VERSION}"
    format_version: int = FORMAT_VERSION
    # Known only in memory.
    path: Path | None = None
    layout: str | None = None
    shared_by: ProcessGroup | None = (
        None  # the processes that each hold a part of its tensors; None: they are whole here
    )
    owned: bool = False  # its tensors are in memory of their own, not mapped from a file: a model may take them
    notes: list[str] = field(default_factory=list)
    edited: dict[str, list[Json]] = field(default_factory=dict)  # setting -> [saved, as a hand has changed it]

    @property
    def adapters_only(self) -> bool:
        """Whether the weights of the base are not among its own."""
        return "adapters" in self.parts


TENSOR_FIELDS = {"model_state", "optimizer_state"}
MEMORY_FIELDS = {"path", "layout", "shared_by", "owned", "notes", "edited"}
TYPES = {
    name: hint for name, hint in typing.get_type_hints(Checkpoint).items() if name not in TENSOR_FIELDS | MEMORY_FIELDS
}
HEADER = 2048  # bytes that a tensor, or a piece of one, takes besides its own: names, checksums, alignment
LARGEST = 2**53  # of a number in the metadata: every program that reads JSON has it exactly
RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # it names the run's folder, so it must not lead out of it


def metadata(record: Checkpoint) -> dict[str, Json]:
    """Everything of a record but its tensors, as JSON values."""
    parts = ["adapters" if record.adapters_only else "model", *["optimizer"] * (record.optimizer_state is not None)]
    values = {name: getattr(record, name) for name in TYPES} | {"parts": parts}
    return values if record.base else {name: value for name, value in values.items() if name != "base"}


def named_tensors(record: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of the record: weights under their names, the optimizer's under parameter index and kind."""
    states = (record.optimizer_state or {"state": {}})["state"]
    moments = {f"{index}.{kind}": value for index, state in states.items() for kind, value in state.items()}
    return record.model_state | {name: value for name, value in moments.items() if isinstance(value, Tensor)}


def bytes_on_disk(record: Checkpoint) -> int:
    """About how many bytes the record takes on disk, never fewer: its tensors, a header for each, and its metadata as often as it is written."""
    headers = HEADER * (record.shared_by.size() if record.shared_by else 1)
    tensors = named_tensors(record).values()  # of one that is shared, `nbytes` are those of all its pieces
    return sum(tensor.nbytes + headers for tensor in tensors) + 4 * len(json.dumps(metadata(record))) + 2**14


def without_optimizer(values: dict[str, Json]) -> dict[str, Json]:
    """The metadata of a checkpoint whose optimizer's file is gone: it only generates."""
    return values | {"parts": [part for part in values["parts"] if part != "optimizer"]}


def note_missing_optimizer(record: Checkpoint, path: Path) -> None:
    """Says that the optimizer's file that was saved at `path` is not there any more."""
    if "optimizer" in record.parts:
        record.notes.append(f"{path}: not found; without it this checkpoint generates but cannot go on exactly")
    record.parts = [part for part in record.parts if part != "optimizer"]


def from_metadata(
    values: Json, *, model_state: dict[str, Tensor], optimizer_state: dict[str, Any] | None, where: str
) -> Checkpoint:
    """The record of `metadata`'s values. Unknown fields are noted, not taken; raises CheckpointError for what is wrong in one."""
    known = check_metadata(values, where)
    unknown = sorted(set(values) - set(known))
    record = Checkpoint(model_state=model_state, optimizer_state=optimizer_state, **known)
    if unknown:
        listed = ", ".join(f"{name!r:.40}" for name in unknown[:10])
        record.notes.append(f"{where}: {len(unknown)} fields that this version does not know were left out: {listed}")
    return record


def check_metadata(values: Json, where: str) -> dict[str, Json]:
    """The known fields of `values`, each of its declared type, numbers finite and not negative; raises CheckpointError naming the field."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: its metadata is {type(values).__name__}, not an object: the file is damaged")
    version = values.get("format_version", 1)
    if isinstance(version, int) and version > FORMAT_VERSION:
        writer = values.get("written_by", "a newer version")
        raise CheckpointError(
            f"{where}: format {version!r:.20} was written by {writer!r:.60}; this is milepost {VERSION}, which reads up to {FORMAT_VERSION}: update it"
        )
    values = migrated(values)
    known = {name: value for name, value in values.items() if name in TYPES}
    for name in ("model_type", "model_settings", "step"):
        if name not in known:
            raise CheckpointError(
                f"{where}: its metadata has no {name}: the file is damaged or was written by something else"
            )
    for name, value in known.items():
        if not _fits(value, TYPES[name]):
            raise CheckpointError(
                f"{where}: {name} is {value!r:.80}, expected {_name_of(TYPES[name])}: the file is damaged"
            )
    _check_values(known, where)
    return known


def migrated(values: dict[str, Json]) -> dict[str, Json]:
    """Metadata of an older format in the present one, one format after the other. What carries no number is the first format's."""
    version = values.get("format_version", 1)
    for step in MIGRATIONS[version - 1 :] if type(version) is int and version > 0 else ():
        values = step(values)
    return values


def _parts_are_named(values: dict[str, Json]) -> dict[str, Json]:
    """1 -> 2: a checkpoint may be without its optimizer; before, every one had it."""
    return {**values, "parts": ["model", "optimizer"], "format_version": 2}


MIGRATIONS = (_parts_are_named,)  # the n-th takes format n to format n + 1


def _check_values(known: dict[str, Json], where: str) -> None:
    """Raises CheckpointError for what is of its type but cannot be."""
    for name in known.keys() - {"tokenizer"}:  # which is large and has a check of its own
        if not _is_text(known[name]):
            raise CheckpointError(
                f"{where}: {name} holds half of a surrogate pair, which no program can print: the file is damaged"
            )
    for name in ("vocab_size", "block_size"):  # every model has them
        size = known["model_settings"].get(name)
        if type(size) is not int or not 0 < size <= LARGEST:
            raise CheckpointError(
                f"{where}: {name} is {size!r:.80}, expected a positive whole number: the file is damaged"
            )
    run_id = known.get("run_id")
    if run_id is not None and not RUN_ID.fullmatch(run_id):
        raise CheckpointError(
            f"{where}: run_id is {run_id!r:.80}, expected letters, digits, `_`, `.` and `-`: the file is damaged"
        )


def _is_text(value: Any) -> bool:
    """Whether every string in nested values is one that can be encoded."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and any("\ud800" <= letter <= "\udfff" for letter in one):
            return False
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
    return True


def _fits(value: Json, hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, bool):
        return False
    if isinstance(value, (int, float)):
        wanted = (int, float) if float in plain else plain
        return isinstance(value, wanted) and 0 <= value <= LARGEST  # false for NaN too
    return isinstance(value, plain)


def _name_of(hint: Any) -> str:
    return str(hint).replace("typing.", "") if typing.get_args(hint) else hint.__name__
