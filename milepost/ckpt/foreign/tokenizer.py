"""Choose the tokenizer for another program's weights: from the file beside them, or by their vocabulary size.

Pure functions over the content that was read. nanoGPT's meta.pkl is read by an unpickler that allows no class at all.
"""

import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any

from milepost.ckpt.record import EARLIER, CheckpointError, Json
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
        tokenizer = characters(_checked_meta(values, where), vocab_size, where)
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


# nanoGPT's meta.pkl: {"vocab_size": 65, "itos": {0: "\n", ...}, "stoi": {"\n": 0, ...}}.

META_LIMIT = 4 * 2**20  # bytes; all characters of Unicode would take more, those of any text less
OPCODE_LIMIT = 2_000_000
# The opcodes of dicts of strings and small numbers. No tuples: hashing a key of deeply shared tuples would never end.
# None that finds, calls or builds an object.
META_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
}


class _NoClasses(pickle.Unpickler):
    """An unpickler that rejects every class and every reference outside the file."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("asks for an object outside the file")


def read_meta(data: bytes, *, where: str) -> dict[str, Json]:
    """Return vocab_size, itos and stoi of nanoGPT's meta.pkl without loading any class; raise CheckpointError."""
    if len(data) > META_LIMIT:
        problem = f"is larger than {META_LIMIT} bytes, expected nanoGPT's small meta.pkl"
        raise CheckpointError(where, problem, kind="not understood")
    try:
        _check_opcodes(data, where)
        values = _NoClasses(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        problem = f"is not a meta.pkl of nanoGPT, or damaged ({type(error).__name__})"
        raise CheckpointError(where, problem, kind="damaged") from error
    _checked_meta(values, where)
    return {word: values[word] for word in ("vocab_size", "itos", "stoi")}


def _check_opcodes(data: bytes, where: str) -> None:
    """Raise CheckpointError for an opcode, number or memo index that nanoGPT's dicts never need. Executes nothing."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in META_OPCODES:
            asked = f" {argument!r:.60}" if isinstance(argument, str) else ""
            problem = f"asks for more than plain values ({opcode.name}{asked}) and was not opened"
            raise CheckpointError(where, problem, "expected nanoGPT's meta.pkl", kind="refused")
        # The memo is an array: index 2**31 would take 16 GiB.
        large_memo = opcode.name.endswith("PUT") and isinstance(argument, int) and argument > OPCODE_LIMIT
        large_number = isinstance(argument, int) and abs(argument) >= 2**31
        if count >= OPCODE_LIMIT or large_number or large_memo:
            problem = "would take far more memory than its size and was not opened"
            raise CheckpointError(where, problem, "expected nanoGPT's meta.pkl", kind="refused")


def _checked_meta(values: Any, where: str) -> list[str]:
    """Return the characters by id; raise CheckpointError unless `itos` and `stoi` are inverses of each other."""
    itos, stoi, size = (
        values.get(word) if isinstance(values, Mapping) else None for word in ("itos", "stoi", "vocab_size")
    )
    if not isinstance(itos, Mapping) or not isinstance(stoi, Mapping) or type(size) is not int:
        problem = "has no vocab_size, itos and stoi, expected nanoGPT's meta.pkl of characters"
        raise CheckpointError(where, problem, kind="not understood")
    if not len(itos) == len(stoi) == size:
        problem = f"is damaged: vocab_size is {size}, but itos has {len(itos)} and stoi {len(stoi)} entries"
        raise CheckpointError(where, problem, EARLIER, kind="damaged")
    chars = [itos.get(index) for index in range(size)]
    for index, char in enumerate(chars):
        if not isinstance(char, str) or type(stoi.get(char)) is not int or stoi[char] != index:
            problem = f"is damaged: itos and stoi disagree on token {index}"
            raise CheckpointError(where, problem, EARLIER, kind="damaged")
    return [char for char in chars if isinstance(char, str)]
