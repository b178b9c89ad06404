"""Checkpoint: the in-memory record between every layout on disk and every user of a checkpoint; CheckpointError."""

import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from milepost.lazy import Tensor
from milepost.paths import with_home, without_home
from milepost.screen import harmless
from milepost.text.addresses import masked
from milepost.text.sources import with_places

if typing.TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMAT_VERSION = 2
VERSION = "0.1.0"

LONGEST = 1400  # characters of an error

Json = Any  # dict, list, str, int, float, bool or None: what json.dumps takes


Kind = Literal["damaged", "not found", "not understood", "lacking", "refused", "unreachable", "unspecified"]

EARLIER = "take an earlier checkpoint"  # the remedy for damage


class CheckpointError(Exception):
    """A checkpoint that cannot be used: which, why, and what to do next. Exit code 3.

    `kind` is one of
    - "damaged": its bytes are not those that were written;
    - "not found": there is no such checkpoint or file;
    - "not understood": it is of an unknown format, or another program's that cannot be translated;
    - "lacking": a part that is needed is missing, such as a manifest or a base;
    - "unreachable": its folder or server did not answer, so that nothing is known of its bytes;
    - "refused": it is intact, but does not fit what is asked for, or is unsafe to open.
    """

    def __init__(
        self, path: Path | str, problem: str | None = None, remedy: str | None = None, *, kind: Kind = "unspecified"
    ) -> None:
        """Compose `{path}: {problem}: {remedy}`; a single sentence, without a problem, is taken as it is."""
        self.path = None if problem is None else Path(path)
        self.problem, self.remedy, self.kind = problem, remedy, kind
        sentence = ": ".join(str(part) for part in (path, problem, remedy) if part)
        super().__init__(_shortened(harmless(sentence, one_line=True)))


def _shortened(text: str) -> str:
    """Keep beginning and end of a long sentence: names and values from a file must not fill the screen."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-250:]}"


@dataclass(kw_only=True, repr=False)
class Checkpoint:
    """Tensors and JSON values, nothing else, so that `torch.load(weights_only=True)` always suffices to read one.

    `optimizer_state` is torch's own form: {"state": {index: {...}}, "param_groups": [{..., "params", "param_names"}]}.
    """

    # Tensors.
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None = None
    # Model and tokenizer.
    model_type: str
    model_settings: dict[str, Json]
    tokenizer: dict[str, Json] | None = None
    tokenizer_sha256: str | None = None  # of its canonical JSON
    # Progress of training. A step is one optimizer update; a window is a sequence of BLOCK_SIZE tokens.
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
    # Provenance.
    hyperparameters: dict[str, Json] = field(default_factory=dict)
    data: dict[str, Json] = field(default_factory=dict)
    runtime: dict[str, Json] = field(default_factory=dict)
    run_id: str | None = None
    parent: dict[str, Json] | None = None
    base: dict[str, Json] | None = None  # of adapters: the sha256 and the source of the weights that they adapt
    # Of another program's checkpoint: the values that no field here takes and, once converted, the file it came from.
    imported: dict[str, Json] | None = None
    # Set when the record is saved. "model", or "adapters" for adapters without their base; then "optimizer".
    parts: list[str] = field(default_factory=lambda: ["model"])
    save_id: str | None = None
    save_number: int | None = None
    saved_at: str | None = None
    written_by: str = f"milepost {VERSION}"
    format_version: int = FORMAT_VERSION
    # Known only in memory.
    path: Path | None = None
    layout: str | None = None
    shared_by: "ProcessGroup | None" = (
        None  # the processes that each hold a part of the tensors; None: this one holds all
    )
    owned: bool = False  # the tensors are in memory of their own, not mapped from a file: a model may take them
    notes: list[str] = field(default_factory=list)
    edited: dict[str, list[Json]] = field(default_factory=dict)  # setting -> [saved value, value edited by hand]
    left_out: list[str] = field(default_factory=list)  # parts of the files that this record does not hold

    @property
    def adapters_only(self) -> bool:
        """Whether the record holds adapters without the weights of their base."""
        return "adapters" in self.parts

    def __repr__(self) -> str:
        """Return one line, without tensors."""
        parameters = sum(tensor.numel() for tensor in self.model_state.values())
        optimizer = "with" if self.optimizer_state else "without"
        where = f" from {self.path}" if self.path else ""
        return f"<Checkpoint: {self.model_type} at step {self.step}, {parameters:,} parameters, {optimizer} optimizer state{where}>"


TENSOR_FIELDS = {"model_state", "optimizer_state"}
MEMORY_FIELDS = {"path", "layout", "shared_by", "owned", "notes", "edited", "left_out"}
OPTIONAL = ("base", "imported")  # fields of the metadata that are written only if they are set
TYPES = {
    name: hint
    for name, hint in typing.get_type_hints(Checkpoint, localns={"ProcessGroup": object}).items()
    if name not in TENSOR_FIELDS | MEMORY_FIELDS
}
TEXTS = (  # where a record names its texts
    *(("data", name) for name in ("source", "validation_source")),
    *(("hyperparameters", name) for name in ("TRAINING_DATA_SOURCE", "VALIDATION_DATA")),
)
PATHS = (*TEXTS, ("base", "source"))  # where it names files of the machine that trained it
HEADER = 2048  # bytes that a tensor, or a piece of one, takes besides its own: names, checksums, alignment
LARGEST = 2**53  # of a number in the metadata: every program that reads JSON has it exactly
RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # it names the run's folder, so it must not lead out of it


def metadata(record: Checkpoint) -> dict[str, Json]:
    """Return everything of a record but its tensors, as JSON values."""
    parts = ["adapters" if record.adapters_only else "model", *["optimizer"] * (record.optimizer_state is not None)]
    values = {name: getattr(record, name) for name in TYPES} | {"parts": parts}
    values = _changed(without_secrets(values), PATHS, functools.partial(with_places, change=without_home))
    return {name: value for name, value in values.items() if value or name not in OPTIONAL}


def without_secrets(values: dict[str, Json]) -> dict[str, Json]:
    """Return metadata in which the address of the text is masked: earlier versions stored its password and query."""
    return _changed(values, TEXTS, masked)


def _changed(
    values: dict[str, Json], places: Iterable[tuple[str, str]], change: Callable[[str], str]
) -> dict[str, Json]:
    """Return metadata with `change` applied to the text at each place, a field and a key in it."""
    for name, key in places:
        source = (values.get(name) or {}).get(key)
        if isinstance(source, str) and change(source) != source:
            values = values | {name: values[name] | {key: change(source)}}
    return values


def named_tensors(record: Checkpoint) -> dict[str, Tensor]:
    """Return every tensor of the record: weights by name, the optimizer's by `{parameter index}.{kind}`."""
    states = (record.optimizer_state or {"state": {}})["state"]
    moments = {f"{index}.{kind}": value for index, state in states.items() for kind, value in state.items()}
    return record.model_state | {name: value for name, value in moments.items() if isinstance(value, Tensor)}


def bytes_on_disk(record: Checkpoint) -> int:
    """Return an upper estimate of the bytes on disk: tensors, their headers, and the metadata four times."""
    headers = HEADER * (record.shared_by.size() if record.shared_by else 1)
    tensors = named_tensors(record).values()  # a shared tensor's `nbytes` count all its pieces
    return sum(tensor.nbytes + headers for tensor in tensors) + 4 * len(json.dumps(metadata(record))) + 2**14


def without_optimizer(values: dict[str, Json]) -> dict[str, Json]:
    """Return the metadata of a checkpoint whose optimizer file was deleted: it still generates."""
    return values | {"parts": [part for part in values["parts"] if part != "optimizer"]}


def note_missing_optimizer(record: Checkpoint, path: Path) -> None:
    """Note in `record` that the optimizer file saved at `path` is gone."""
    if "optimizer" in record.parts:
        record.notes.append(f"{path}: not found; without it this checkpoint generates but cannot resume bit-exactly")
    record.parts = [part for part in record.parts if part != "optimizer"]


def from_metadata(
    values: Json, *, model_state: dict[str, Tensor], optimizer_state: dict[str, Any] | None, where: str
) -> Checkpoint:
    """Return the record described by `values`, as `metadata` returns them. Unknown fields are left out with a note.

    Raises CheckpointError for a field that is missing or wrong; `where` is the file they come from.
    """
    known = _changed(check_metadata(values, where), PATHS, functools.partial(with_places, change=with_home))
    unknown = sorted(set(values) - set(known))
    record = Checkpoint(model_state=model_state, optimizer_state=optimizer_state, **known)
    if unknown:
        listed = ", ".join(f"{name!r:.40}" for name in unknown[:10])
        record.notes.append(f"{where}: {len(unknown)} fields that this version does not know were left out: {listed}")
        record.left_out.append(f"fields that this version does not know ({listed})")
    return record


def check_metadata(values: Json, where: str) -> dict[str, Json]:
    """Return the known fields of `values`, each of its declared type, numbers finite and not negative.

    Raises CheckpointError naming the field that is missing or wrong, or the newer version that wrote it.
    """
    if not isinstance(values, dict):
        raise _damaged(where, f"its metadata is {type(values).__name__}, not an object")
    version = values.get("format_version", 1)
    if isinstance(version, int) and version > FORMAT_VERSION:
        writer = values.get("written_by", "a newer version")
        problem = f"format {version!r:.20} was written by {writer!r:.60}"
        remedy = f"update milepost: this is {VERSION}, which reads formats up to {FORMAT_VERSION}"
        raise CheckpointError(where, problem, remedy, kind="not understood")
    values = migrated(values)
    known = {name: value for name, value in values.items() if name in TYPES}
    for name in ("model_type", "model_settings", "step"):
        if name not in known:
            problem = f"its metadata has no {name}: it is damaged, or another program wrote it"
            raise CheckpointError(where, problem, EARLIER, kind="damaged")
    for name, value in known.items():
        if not _fits(value, TYPES[name]):
            raise _damaged(where, f"{name} is {value!r:.80}, expected {_name_of(TYPES[name])}")
    _check_values(known, where)
    return known


def _damaged(where: str, problem: str) -> CheckpointError:
    return CheckpointError(where, f"the file is damaged: {problem}", EARLIER, kind="damaged")


def migrated(values: dict[str, Json]) -> dict[str, Json]:
    """Return the metadata of an older format in the present format. Metadata without a number is of format 1."""
    version = values.get("format_version", 1)
    for step in MIGRATIONS[version - 1 :] if type(version) is int and version > 0 else ():
        values = step(values)
    return values


def _name_the_parts(values: dict[str, Json]) -> dict[str, Json]:
    """1 -> 2: a checkpoint may lack its optimizer; in format 1, every checkpoint had one."""
    return {**values, "parts": ["model", "optimizer"], "format_version": 2}


MIGRATIONS = (_name_the_parts,)  # the n-th converts format n to format n + 1


def _check_values(known: dict[str, Json], where: str) -> None:
    """Raise CheckpointError for a value of the right type that is impossible."""
    values = {name: value for name, value in known.items() if name != "tokenizer"}  # it is large and has its own check
    for name in () if _encodes(values) else values:
        if not _is_text(values[name]):
            raise _damaged(where, f"{name} holds half of a surrogate pair, which no program can print")
    for name in ("vocab_size", "block_size"):  # every model has them
        size = known["model_settings"].get(name)
        if type(size) is not int or not 0 < size <= LARGEST:
            raise _damaged(where, f"{name} is {size!r:.80}, expected a positive whole number")
    run_id = known.get("run_id")
    if run_id is not None and not RUN_ID.fullmatch(run_id):
        raise _damaged(where, f"run_id is {run_id!r:.80}, expected letters, digits, `_`, `.` and `-`")


def _encodes(values: dict[str, Any]) -> bool:
    """Whether the values are JSON text that can be encoded: much faster than to look at each string."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


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


@functools.cache
def _classes(hint: Any) -> tuple[type, ...]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(option) or option for option in options)


def _fits(value: Json, hint: Any) -> bool:
    plain = _classes(hint)
    if isinstance(value, bool):
        return False
    if isinstance(value, (int, float)):
        allowed = (int, float) if float in plain else plain
        return isinstance(value, allowed) and 0 <= value <= LARGEST  # false for NaN too
    return isinstance(value, plain)


def _name_of(hint: Any) -> str:
    return str(hint).replace("typing.", "") if typing.get_args(hint) else hint.__name__
