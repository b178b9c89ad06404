"""Choose the tokenizer for another program's weights: from the file beside them, or by their vocabulary size.

Pure functions over the content that was read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from milepost.ckpt.record import EARLIER, CheckpointError, Json
from milepost.text.meta_pickle import MetaError, chars_of, meta_of
from milepost.text.tokenization.library import FROM_LIBRARY, vocabulary
from milepost.text.tokenizer_json import from_tokenizers_json

GPT2_TOKENS = 50257
GPT2_ROWS = (GPT2_TOKENS, 50304)  # nanoGPT pads the vocabulary to a multiple of 64

Choice = tuple[dict[str, Json] | None, str]


def tokenizer_for(
    vocab_size: int, token_file: Mapping[str, Any] | None = None, *, chars: Sequence[str] | None = None, where: str
) -> Choice:
    """Return the tokenizer as our JSON values, or None, and a note on which one is used and why.

    `token_file` is the content of a tokenizer.json, or what `read_meta` returned. `chars` are the sorted characters of
    the user's text, used if there are `vocab_size` of them. Raise CheckpointError if the file is not a tokenizer or has
    more tokens than the model rows.
    """
    if token_file is not None:
        tokenizer, size = _from_token_file(token_file, vocab_size, where)
        named = f"{size} tokens" if size is not None else "a vocabulary"
        return (
            tokenizer,
            f"{where}: the tokenizer is {tokenizer['kind']} with {named}, from the file beside the weights",
        )
    begin = f"{where}: carries no tokenizer"
    if vocab_size in GPT2_ROWS:
        return {"kind": "gpt2"}, f"{begin}; GPT-2's own is used, because its vocabulary has {vocab_size} rows"
    if chars is not None and len(chars) == vocab_size:
        tokenizer = characters(chars, vocab_size, where)
        return (
            tokenizer,
            f"{begin}; the {vocab_size} different characters of TRAINING_DATA_SOURCE are used, one per row",
        )
    but = f", nor do the {len(chars)} different characters of TRAINING_DATA_SOURCE" if chars is not None else ""
    return None, (
        f"{begin}, and no tokenizer that milepost knows has {vocab_size} tokens{but}; put its tokenizer.json or meta.pkl "
        "beside it, or name the text it was trained on in TRAINING_DATA_SOURCE"
    )


def _from_token_file(values: Mapping[str, Any], vocab_size: int, where: str) -> tuple[dict[str, Json], int | None]:
    """Return the tokenizer and its number of tokens, which is None if it is known only after building it."""
    if not isinstance(values, Mapping):
        problem = f"holds {type(values).__name__}, expected a tokenizer as a JSON object"
        raise CheckpointError(where, problem, kind="not understood")
    if "itos" in values or "stoi" in values:
        tokenizer = characters(_chars_of(values, where), vocab_size, where)
        return tokenizer, len(tokenizer["chars"])
    if is_tokenizers_json(values):
        size = len(vocabulary(values["model"]))
        check_rows(size, vocab_size, where)
        return from_tokenizers_json(values), size
    kind = values.get("token_kind", values.get("kind"))
    if kind == "char":
        tokenizer = characters(values.get("chars"), vocab_size, where)
        return tokenizer, len(tokenizer["chars"])
    if kind in FROM_LIBRARY and isinstance(values.get("tokenizer"), Mapping):
        return {"kind": kind, "tokenizer": dict(values["tokenizer"])}, None
    tokens = {"gpt2": GPT2_TOKENS, "byte": 256}.get(kind) if isinstance(kind, str) else None
    if tokens is None:
        problem = f"is not a tokenizer that milepost knows (kind {_short(kind)})"
        expected = "expected char, byte, bpe, gpt2 or one of the tokenizers library"
        raise CheckpointError(where, f"{problem}, {expected}", kind="not understood")
    check_rows(tokens, vocab_size, where)
    return {"kind": kind}, tokens


def _chars_of(values: Mapping[str, Any], where: str) -> list[str]:
    try:
        return chars_of(values)
    except MetaError as error:
        raise CheckpointError(where, error.problem, error.expected or EARLIER, kind=error.kind) from error


def is_tokenizers_json(values: Mapping[Any, Any]) -> bool:
    """Whether these are the values of a tokenizer.json of the `tokenizers` library."""
    model = values.get("model")
    return isinstance(model, Mapping) and bool(vocabulary(model))


def _short(value: Any) -> str:
    """Return a string for a message, or the type of any other value."""
    return f"{value!r:.80}" if isinstance(value, str) else type(value).__name__


def check_rows(tokens: int, vocab_size: int, where: str) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than the model has rows."""
    if tokens > vocab_size:
        problem = f"has {tokens} tokens, but the model beside it only {vocab_size} rows"
        raise CheckpointError(where, problem, "put the tokenizer there that was saved with it", kind="refused")


def characters(chars: Any, vocab_size: int, where: str) -> dict[str, Json]:
    """Return a char tokenizer of these characters, in the order of their ids; raise CheckpointError."""
    if not isinstance(chars, list | tuple) or not chars:
        problem = f"chars is {_short(chars)}, expected a list of single characters"
        raise CheckpointError(where, problem, kind="not understood")
    check_rows(len(chars), vocab_size, where)
    for char in chars:
        if not isinstance(char, str) or len(char) != 1 or "\ud800" <= char <= "\udfff":
            problem = f"{_short(char)} is among its characters, expected single characters"
            raise CheckpointError(where, problem, kind="not understood")
    if len(set(chars)) != len(chars):
        raise CheckpointError(where, "the file is damaged: a character is there twice", EARLIER, kind="damaged")
    return {"kind": "char", "chars": list(chars)}


def read_meta(data: bytes, *, where: str) -> dict[str, Json]:
    """Return vocab_size, itos and stoi of nanoGPT's meta.pkl without loading any class; raise CheckpointError."""
    try:
        return meta_of(data)
    except MetaError as error:
        remedy = error.expected or (EARLIER if error.kind == "damaged" else None)
        raise CheckpointError(where, error.problem, remedy, kind=error.kind) from error
