"""Find the tokenizer inside another program's checkpoint, under any of the names in use.

Pure functions over the content that was read. A tokenizer counts if its tokens or its known name are there; a
vocabulary size never does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from milepost.ckpt.foreign.keys import CONFIGS, short
from milepost.ckpt.foreign.tokenizer import GPT2_TOKENS, Choice, characters, check_rows, is_tokenizers_json
from milepost.ckpt.manifest import parse_json
from milepost.ckpt.record import CheckpointError, Json
from milepost.text.tokenization.library import vocabulary
from milepost.text.tokenizer_json import from_tokenizers_json

TOKENIZERS = ("tokenizer", "tokenizer_state", "tokenizer_config", "meta")  # keys of a tokenizer's own dictionary
# A list or text of tokens in the order of their ids, or a dictionary from id to token or from token to id.
VOCABULARIES = (
    *("chars", "characters", "alphabet", "vocab", "vocabulary", "itos", "stoi"),
    *(f"{one}{to}{other}" for to in ("_to_", "2") for one, other in (("char", "idx"), ("idx", "char"), ("char", "id"),
      ("id", "char"), ("char", "int"), ("int", "char"), ("char", "ix"), ("ix", "char"), ("token", "id"), ("id", "token"))),
)  # fmt: skip
KINDS = ("token_kind", "tokenizer_kind", "tokenizer_type", "tokenizer_name", "tokenizer")
OWN_KINDS = ("kind", "type", "name")  # in a tokenizer's own dictionary
KNOWN = {"gpt2": GPT2_TOKENS, "byte": 256}
WITHOUT_TOKENS = {
    "char",
    "character",
    "characters",
    "char_level",
    "bpe",
    "custom",
}  # kinds whose tokens are under another key


def tokenizer_inside(contents: Sequence[Mapping[Any, Any]], vocab_size: int, *, where: str) -> Choice:
    """Return the tokenizer in `contents`, the dictionaries of one checkpoint, and a note; None and "" if there is none.

    A tokenizer that cannot be understood does not stop the weights from loading: return None and a note with the
    reason. Nothing is used in its place.
    """
    try:
        places = [place for content in contents for place in _places(content)]
        found = [tokenizer for place, own in places for tokenizer in _in(place, own, vocab_size)]
        distinct = [tokenizer for number, tokenizer in enumerate(found) if tokenizer not in found[:number]]
        if len(distinct) > 1:
            raise CheckpointError("it", f"holds {len(distinct)} different tokenizers", kind="not understood")
        kinds = [pair for place, own in places for pair in _kinds(place, own)]
        unknown = [(word, kind) for word, kind in kinds if kind.lower() not in WITHOUT_TOKENS]
        if unknown and not distinct:
            word, kind = unknown[0]
            problem = f"is {short(kind)}, expected its tokens, or gpt2 or byte"
            raise CheckpointError(f"its {word}", problem, kind="not understood")
    except (CheckpointError, RecursionError) as error:
        return None, f"{where}: the tokenizer inside cannot be used: {error}"
    if not distinct:
        return None, ""
    (tokenizer,) = distinct
    count = f" with {len(tokenizer['chars'])} tokens" if tokenizer["kind"] == "char" else ""
    return tokenizer, f"{where}: the tokenizer is {tokenizer['kind']}{count}, from inside the file"


def _places(content: Mapping[Any, Any]) -> Iterator[tuple[Mapping[Any, Any], bool]]:
    """Yield the dictionaries that may hold a tokenizer, and whether each is a tokenizer's own."""
    yield content, False
    for word in (*TOKENIZERS, *CONFIGS):
        inner = _as_dictionary(content.get(word))
        if inner is None:
            continue
        yield inner, word in TOKENIZERS
        for deeper in TOKENIZERS:
            if (innermost := _as_dictionary(inner.get(deeper))) is not None:
                yield innermost, True


def _as_dictionary(value: Any) -> Mapping[Any, Any] | None:
    """Return `value` if it is a dictionary or the JSON text of one, else None."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return parse_json(value.encode(errors="replace"), "its tokenizer")
    return value if isinstance(value, Mapping) else None


def _in(place: Mapping[Any, Any], own: bool, vocab_size: int) -> Iterator[dict[str, Json]]:
    """Yield the tokenizers in a dictionary; there should be only one."""
    if own and is_tokenizers_json(place):
        check_rows(len(vocabulary(place["model"])), vocab_size, "it")
        yield from_tokenizers_json(_as_json(place))
        return
    for word in VOCABULARIES:
        value = place.get(word)
        if isinstance(value, Mapping | list | tuple) or (isinstance(value, str) and word == "chars"):
            yield characters(_in_order(value, word), vocab_size, f"its {word}")
    for word, kind in _kinds(place, own):
        if kind.lower() in KNOWN:
            check_rows(KNOWN[kind.lower()], vocab_size, f"its {word} {kind}")
            yield {"kind": kind.lower()}


def _kinds(place: Mapping[Any, Any], own: bool) -> Iterator[tuple[str, str]]:
    """Yield the keys that name the kind of the tokenizer, and their values."""
    for word in (*KINDS, *(OWN_KINDS if own else ())):
        kind = place.get(word)
        if isinstance(kind, str) and not kind.lstrip().startswith("{"):
            yield word, kind


def _as_json(values: Mapping[Any, Any]) -> dict[str, Json]:
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError("it", f"is not JSON ({error})", kind="not understood") from error


def _in_order(value: Mapping[Any, Any] | Sequence[Any], word: str) -> list[Any]:
    """Return the tokens by id, from a dictionary in either direction; raise CheckpointError if an id is missing."""
    if not isinstance(value, Mapping):
        return list(value)
    by_id = {_id(key): token for key, token in value.items()}
    if not all(isinstance(token, str) for token in value.values()):
        by_id = {_id(number): token for token, number in value.items()}
    if None in by_id or len(by_id) != len(value) or by_id.keys() != set(range(len(by_id))):
        problem = "does not number its tokens from 0 without a gap"
        raise CheckpointError(f"its {word}", problem, kind="not understood")
    return [by_id[number] for number in range(len(by_id))]


def _id(value: Any) -> int | None:
    """Return a token id, which JSON writes as text where it is a key; None if it is not one."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 9:
        return int(value)
    return value if type(value) is int else None
