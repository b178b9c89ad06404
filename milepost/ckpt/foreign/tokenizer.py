"""Which tokenizer goes with another program's weights: by the file beside them, or by the number of their rows.

Pure functions over what was read. nanoGPT's meta.pkl is a pickle, and is read by an unpickler that allows no class at all.
"""

import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any

from milepost.ckpt.record import CheckpointError, Json

GPT2_TOKENS = 50257
GPT2_ROWS = (GPT2_TOKENS, 50304)  # nanoGPT pads the vocabulary to a multiple of 64

Choice = tuple[dict[str, Json] | None, str]


def tokenizer_for(
    vocab_size: int, token_file: Mapping[str, Any] | None = None, *, chars: Sequence[str] | None = None, where: str
) -> Choice:
    """The tokenizer as our JSON values, or None, and a note on which was taken and why.

    `token_file` is what a tokenizer.json held, or `read_meta` returned; `chars` are the sorted characters of the text that the user
    named, taken if their number is right. Raises CheckpointError for a file that is no tokenizer, or has more tokens than rows.
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
        return {"kind": "gpt2"}, f"{begin}; GPT-2's own is taken, because its vocabulary has {vocab_size} rows"
    if chars is not None and len(chars) == vocab_size:
        kept = characters(chars, vocab_size, where)
        return kept, f"{begin}; the {vocab_size} different characters of TRAINING_DATA_SOURCE are taken, one a row"
    but = f", nor do the {len(chars)} different characters of TRAINING_DATA_SOURCE" if chars is not None else ""
    return None, (
        f"{begin}, and no tokenizer that milepost knows has {vocab_size} tokens{but}; put its tokenizer.json or meta.pkl "
        "beside it, or name the text it was trained on in TRAINING_DATA_SOURCE"
    )


def _from_token_file(values: Mapping[str, Any], vocab_size: int, where: str) -> tuple[dict[str, Json], int | None]:
    """The tokenizer and its number of tokens; None where only building it would tell."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: holds {type(values).__name__}, expected a tokenizer as a JSON object")
    if "itos" in values or "stoi" in values:
        kept = characters(_checked_meta(values, where), vocab_size, where)
        return kept, len(kept["chars"])
    if is_tokenizers_json(values):
        size = len(values["model"]["vocab"])
        check_rows(size, vocab_size, where)
        return {"kind": "bpe", "tokenizer": dict(values)}, size
    kind = values.get("token_kind", values.get("kind"))
    if kind == "char":
        kept = characters(values.get("chars"), vocab_size, where)
        return kept, len(kept["chars"])
    if kind == "bpe" and isinstance(values.get("tokenizer"), Mapping):
        return {"kind": "bpe", "tokenizer": dict(values["tokenizer"])}, None
    tokens = {"gpt2": GPT2_TOKENS, "byte": 256}.get(kind) if isinstance(kind, str) else None
    if tokens is None:
        raise CheckpointError(
            f"{where}: is no tokenizer that milepost knows (kind {_short(kind)}), expected char, byte, bpe, gpt2 or one of the tokenizers library"
        )
    check_rows(tokens, vocab_size, where)
    return {"kind": kind}, tokens


def is_tokenizers_json(values: Mapping[Any, Any]) -> bool:
    """Whether these are what the `tokenizers` library writes."""
    model = values.get("model")
    return isinstance(model, Mapping) and isinstance(model.get("vocab"), Mapping)


def _short(value: Any) -> str:
    """`value` for a message: a text, or of what type it is instead."""
    return f"{value!r:.80}" if isinstance(value, str) else type(value).__name__


def check_rows(tokens: int, vocab_size: int, where: str) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than the model has rows."""
    if tokens > vocab_size:
        raise CheckpointError(
            f"{where}: has {tokens} tokens, but the model beside it only {vocab_size} rows: put the one there that was saved with it"
        )


def characters(chars: Any, vocab_size: int, where: str) -> dict[str, Json]:
    """A char tokenizer of these characters, the n-th for row n."""
    if not isinstance(chars, list | tuple) or not chars:
        raise CheckpointError(f"{where}: chars is {_short(chars)}, expected a list of single characters")
    check_rows(len(chars), vocab_size, where)
    for char in chars:
        if not isinstance(char, str) or len(char) != 1 or "\ud800" <= char <= "\udfff":
            raise CheckpointError(f"{where}: {_short(char)} is among its characters, expected single characters")
    if len(set(chars)) != len(chars):
        raise CheckpointError(f"{where}: a character is there twice, expected different ones: the file is damaged")
    return {"kind": "char", "chars": list(chars)}


# nanoGPT's meta.pkl: {"vocab_size": 65, "itos": {0: "\n", ...}, "stoi": {"\n": 0, ...}}.

META_LIMIT = 4 * 2**20  # bytes; all characters of Unicode would take more, those of any text less
OPCODE_LIMIT = 2_000_000
# What dicts of strings and small numbers are made of. No tuples: a key that holds itself twice, forty times over, would be hashed
# for ever. Nothing that finds, calls or builds an object.
META_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
}


class _NoClasses(pickle.Unpickler):
    """An unpickler that finds no class and no object of another program."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("asks for an object outside the file")


def read_meta(data: bytes, *, where: str) -> dict[str, Json]:
    """vocab_size, itos and stoi of nanoGPT's meta.pkl, without any class of Python's. Raises CheckpointError for anything else."""
    if len(data) > META_LIMIT:
        raise CheckpointError(f"{where}: is larger than {META_LIMIT} bytes, expected nanoGPT's small meta.pkl")
    try:
        _check_opcodes(data, where)
        values = _NoClasses(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{where}: is no meta.pkl of nanoGPT's, or damaged ({type(error).__name__})") from error
    _checked_meta(values, where)
    return {word: values[word] for word in ("vocab_size", "itos", "stoi")}


def _check_opcodes(data: bytes, where: str) -> None:
    """Raises CheckpointError for an opcode, a number or a memory cell that nanoGPT's dicts never need; runs none of them."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in META_OPCODES:
            asked = f" {argument!r:.60}" if isinstance(argument, str) else ""
            raise CheckpointError(
                f"{where}: asks for more than plain values ({opcode.name}{asked}) and was not opened: expected nanoGPT's meta.pkl"
            )
        # The memo is an array: one cell of number 2**31 would take 16 GiB.
        if (
            count >= OPCODE_LIMIT
            or (isinstance(argument, int) and abs(argument) >= 2**31)
            or _is_far_cell(opcode, argument)
        ):
            raise CheckpointError(f"{where}: is larger inside than out and was not opened: expected nanoGPT's meta.pkl")


def _is_far_cell(opcode: pickletools.OpcodeInfo, argument: Any) -> bool:
    return opcode.name.endswith("PUT") and argument > OPCODE_LIMIT


def _checked_meta(values: Any, where: str) -> list[str]:
    """The characters by id, if `itos` and `stoi` are each other's inverse; raises CheckpointError otherwise."""
    itos, stoi, size = (
        values.get(word) if isinstance(values, Mapping) else None for word in ("itos", "stoi", "vocab_size")
    )
    if not isinstance(itos, Mapping) or not isinstance(stoi, Mapping) or type(size) is not int:
        raise CheckpointError(f"{where}: has no vocab_size, itos and stoi, expected nanoGPT's meta.pkl of characters")
    if not len(itos) == len(stoi) == size:
        raise CheckpointError(
            f"{where}: vocab_size is {size}, but itos has {len(itos)} and stoi {len(stoi)} entries: it is damaged"
        )
    chars = [itos.get(index) for index in range(size)]
    for index, char in enumerate(chars):
        if not isinstance(char, str) or type(stoi.get(char)) is not int or stoi[char] != index:
            raise CheckpointError(f"{where}: itos and stoi disagree on token {index}: it is damaged")
    return [char for char in chars if isinstance(char, str)]
