"""The values of another program's checkpoint that no field of a record takes: settings, schedulers, loops, counters.

A record carries them along as plain JSON, so that a conversion keeps them. Pure functions; nothing in a file is trusted.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from milepost.ckpt.foreign.embedded_tokenizer import TOKENIZERS, VOCABULARIES
from milepost.ckpt.foreign.keys import WEIGHTS, weights_of
from milepost.ckpt.record import LARGEST, Checkpoint, Json
from milepost.lazy import Tensor

MOST_LEVELS = 16  # of nested dicts and lists
MOST_VALUES = 10_000  # in one key
MOST_BYTES = 2**18  # of all keys as JSON


class _NotPlain(Exception):
    """A value that JSON cannot hold, or too many values."""


def other_values(
    content: Mapping[Any, Any], record: Checkpoint, *, beside: Mapping[str, Json], optimizer: bool
) -> tuple[dict[str, Json], list[str]]:
    """Return the values of `content` that `record`, translated from it, has no field for, and the keys that JSON cannot hold.

    `beside` is the content of files beside it. An optimizer state that the record did not take is such a key, unless it was not
    asked for (`optimizer=False`).
    """
    left = [*_beside_the_record(content, record, optimizer=optimizer), *beside.items()]
    kept, left_out = plain_values((key, value) for key, value in left if not _is_optimizer(key, value))
    return kept, left_out + [key for key, value in left if _is_optimizer(key, value)]


def plain_values(values: Iterable[tuple[Any, Any]]) -> tuple[dict[str, Json], list[str]]:
    """Return the values as JSON by name, and the names of those that JSON cannot hold or that are too large together."""
    kept: dict[str, Json] = {}
    left_out: list[str] = []
    room = MOST_BYTES
    for key, value in values:
        name = f"{key}"
        try:
            plain = _plain(value, left=[MOST_VALUES])
            room -= len(json.dumps(plain))
            if room < 0 or not 0 < len(name) <= 200 or not name.isprintable():
                raise _NotPlain
            kept[name] = plain
        except (_NotPlain, ValueError):
            left_out.append(f"{name!r:.80}".strip("'"))
    return kept, left_out


def _beside_the_record(content: Mapping[Any, Any], record: Checkpoint, *, optimizer: bool) -> Iterator[tuple[Any, Any]]:
    """Yield the keys that hold neither the weights, nor what the record took: its optimizer state and its tokenizer."""
    weights = {
        key
        for key in (*WEIGHTS, weights_of(content, where="", whole=False)[0])
        if isinstance(content.get(key), Mapping)
    }
    for key, value in content.items() if weights else ():  # else it is a bare state dict
        taken = _is_optimizer(key, value) and (record.optimizer_state is not None or not optimizer or _is_empty(value))
        tokenizer = record.tokenizer is not None and key in (*TOKENIZERS, *VOCABULARIES)
        if key not in weights and not taken and not tokenizer:
            yield key, value


def _is_optimizer(key: Any, value: Any) -> bool:
    """Whether the key is one of the names that programs give to an optimizer's state, and the value may be one."""
    named = isinstance(key, str) and (key.startswith("optim") or key in ("opt", "opt_state"))
    return named and not isinstance(value, str | int | float)


def _is_empty(optimizer: Any) -> bool:
    """Whether an optimizer's value holds no state: null, a list of such, or a state without moments."""
    if isinstance(optimizer, list | tuple):
        return all(map(_is_empty, optimizer))
    return optimizer is None or (isinstance(optimizer, Mapping) and not optimizer.get("state"))


def _plain(value: Any, *, left: list[int], depth: int = 0) -> Json:
    """Return `value` as JSON holds it; `left` counts the values that may still come. Raise _NotPlain."""
    left[0] -= 1
    if depth > MOST_LEVELS or left[0] < 0:
        raise _NotPlain
    if isinstance(value, Mapping):
        pairs = [(_name(name), _plain(item, left=left, depth=depth + 1)) for name, item in value.items()]
        if len(dict(pairs)) < len(pairs):
            raise _NotPlain
        return dict(pairs)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, left=left, depth=depth + 1) for item in value]
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> Json:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is a ValueError
        return value
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) <= LARGEST):
        return value
    raise _NotPlain


def _name(value: Any) -> str:
    if not isinstance(value, str | int | float | bool | None):
        raise _NotPlain
    name = str(value)
    name.encode()
    return name
