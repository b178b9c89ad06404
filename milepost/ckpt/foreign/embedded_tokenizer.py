"""The tokenizer inside another program's file, under whatever word it stands there.

Pure functions over what was read. Only what names its tokens, or is a tokenizer known by its name, counts: a number of tokens never does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from milepost.ckpt.foreign.keys import CONFIGS, short
from milepost.ckpt.foreign.tokenizer import GPT2_TOKENS, Choice, characters, check_rows, is_tokenizers_json
from milepost.ckpt.manifest import parse_json
from milepost.ckpt.record import CheckpointError, Json

TOKENIZERS = ("tokenizer", "tokenizer_state", "tokenizer_config", "meta")  # where a tokenizer's own words stand
# A list or text of tokens in the order of their ids, or a dictionary from id to token or from token to id.
VOCABULARIES = (
    *("chars", "characters", "alphabet", "vocab", "vocabulary", "itos", "stoi"),
    *(f"{one}{to}{other}" for to in ("_to_", "2") for one, other in (("char", "idx"), ("idx", "char"), ("char", "id"),
      ("id", "char"), ("char", "int"), ("int", "char"), ("char", "ix"), ("ix", "char"), ("token", "id"), ("id", "token"))),
)  # fmt: skip
KINDS = ("token_kind", "tokenizer_kind", "tokenizer_type", "tokenizer_name", "tokenizer")
OWN_KINDS = ("kind", "type", "name")  # where nothing but a tokenizer can be meant
KNOWN = {"gpt2": GPT2_TOKENS, "byte": 256}
UNSAID = {
    "char",
    "character",
    "characters",
    "char_level",
    "bpe",
    "custom",
}  # a kind that leaves the tokens to another word


def tokenizer_inside(contents: Sequence[Mapping[Any, Any]], vocab_size: int, *, where: str) -> Choice:
    """The tokenizer in any of `contents`, the dictionaries of one checkpoint, and a note; None and why not, "" if nothing is there.

    What is there and cannot be understood keeps nobody from opening the weights; it is told, and nothing else is taken in its place.
    """
    try:
        places = [each for content in contents for each in _places(content)]
        found = [each for place, own in places for each in _in(place, own, vocab_size)]
        distinct = [each for number, each in enumerate(found) if each not in found[:number]]
        if len(distinct) > 1:
            raise CheckpointError(f"it holds {len(distinct)} tokenizers that are not the same")
        unknown = [words for place, own in places for words in _kinds(place, own) if words[1].lower() not in UNSAID]
        if unknown and not distinct:
            word, kind = unknown[0]
            raise CheckpointError(f"its {word} is {short(kind)}, expected its tokens, or gpt2 or byte")
    except (CheckpointError, RecursionError) as error:
        return None, f"{where}: the tokenizer inside cannot be used: {error}"
    if not distinct:
        return None, ""
    (tokenizer,) = distinct
    count = f" with {len(tokenizer['chars'])} tokens" if tokenizer["kind"] == "char" else ""
    return tokenizer, f"{where}: the tokenizer is {tokenizer['kind']}{count}, from inside the file"


def _places(content: Mapping[Any, Any]) -> Iterator[tuple[Mapping[Any, Any], bool]]:
    """The dictionaries in which a tokenizer's words may stand, and whether they are a tokenizer's own."""
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
    """`value` if it is a dictionary or the JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return parse_json(value.encode(errors="replace"), "its tokenizer")
    return value if isinstance(value, Mapping) else None


def _in(place: Mapping[Any, Any], own: bool, vocab_size: int) -> Iterator[dict[str, Json]]:
    """The tokenizers that one dictionary names, of which there should be one."""
    if own and is_tokenizers_json(place):
        check_rows(len(place["model"]["vocab"]), vocab_size, "it")
        yield {"kind": "bpe", "tokenizer": _as_json(place)}
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
    """The words that say of what kind the tokenizer is, and what they say."""
    for word in (*KINDS, *(OWN_KINDS if own else ())):
        kind = place.get(word)
        if isinstance(kind, str) and not kind.lstrip().startswith("{"):
            yield word, kind


def _as_json(values: Mapping[Any, Any]) -> dict[str, Json]:
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"it is no JSON ({error})") from error


def _in_order(value: Mapping[Any, Any] | Sequence[Any], word: str) -> list[Any]:
    """The tokens by id, of a dictionary in either direction. Raises CheckpointError if the ids are not 0, 1, 2, ..."""
    if not isinstance(value, Mapping):
        return list(value)
    by_id = {_id(key): token for key, token in value.items()}
    if not all(isinstance(token, str) for token in value.values()):
        by_id = {_id(number): token for token, number in value.items()}
    if None in by_id or len(by_id) != len(value) or by_id.keys() != set(range(len(by_id))):
        raise CheckpointError(f"its {word} does not number its tokens from 0 without a gap")
    return [by_id[number] for number in range(len(by_id))]


def _id(value: Any) -> int | None:
    """A token's number, which JSON writes as text where it is a key."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 9:
        return int(value)
    return value if type(value) is int else None
