"""nanoGPT's meta.pkl: {"vocab_size": 65, "itos": {0: "\\n", ...}, "stoi": {"\\n": 0, ...}}, read without running anything.

Each opcode is checked before an unpickler that allows no class at all sees the file (karpathy/nanoGPT data/shakespeare_char/prepare.py).
"""

import io
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any, Literal

META = "meta.pkl"
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
EXPECTED = "expected nanoGPT's meta.pkl"


class MetaError(ValueError):
    """A file is not nanoGPT's meta.pkl. `kind` is one of those of CheckpointError."""

    def __init__(
        self, problem: str, expected: str | None = None, *, kind: Literal["damaged", "not understood", "refused"]
    ) -> None:
        self.problem, self.expected, self.kind = problem, expected, kind
        super().__init__(f"{problem}: {expected}" if expected else problem)


class _NoClasses(pickle.Unpickler):
    """An unpickler that rejects every class and every reference outside the file."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("asks for an object outside the file")


def meta_of(data: bytes) -> dict[str, Any]:
    """Return vocab_size, itos and stoi of nanoGPT's meta.pkl without loading any class. Raise MetaError."""
    if len(data) > META_LIMIT:
        problem = f"is larger than {META_LIMIT} bytes, expected nanoGPT's small meta.pkl"
        raise MetaError(problem, kind="not understood")
    try:
        _check_opcodes(data)
        values = _NoClasses(io.BytesIO(data)).load()
    except MetaError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        problem = f"is not a meta.pkl of nanoGPT, or damaged ({type(error).__name__})"
        raise MetaError(problem, kind="damaged") from error
    chars_of(values)
    return {word: values[word] for word in ("vocab_size", "itos", "stoi")}


def _check_opcodes(data: bytes) -> None:
    """Raise MetaError for an opcode, number or memo index that nanoGPT's dicts never need. Executes nothing."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in META_OPCODES:
            asked = f" {argument!r:.60}" if isinstance(argument, str) else ""
            problem = f"asks for more than plain values ({opcode.name}{asked}) and was not opened"
            raise MetaError(problem, EXPECTED, kind="refused")
        # The memo is an array: index 2**31 would take 16 GiB.
        large_memo = opcode.name.endswith("PUT") and isinstance(argument, int) and argument > OPCODE_LIMIT
        large_number = isinstance(argument, int) and abs(argument) >= 2**31
        if count >= OPCODE_LIMIT or large_number or large_memo:
            problem = "would take far more memory than its size and was not opened"
            raise MetaError(problem, EXPECTED, kind="refused")


def chars_of(values: Any) -> list[str]:
    """Return the characters by id. Raise MetaError unless `itos` and `stoi` are inverses of each other."""
    itos, stoi, size = (
        values.get(word) if isinstance(values, Mapping) else None for word in ("itos", "stoi", "vocab_size")
    )
    if not isinstance(itos, Mapping) or not isinstance(stoi, Mapping) or type(size) is not int:
        problem = "has no vocab_size, itos and stoi, expected nanoGPT's meta.pkl of characters"
        raise MetaError(problem, kind="not understood")
    if not len(itos) == len(stoi) == size:
        problem = f"is damaged: vocab_size is {size}, but itos has {len(itos)} and stoi {len(stoi)} entries"
        raise MetaError(problem, kind="damaged")
    chars = [itos.get(index) for index in range(size)]
    for index, char in enumerate(chars):
        if not isinstance(char, str) or type(stoi.get(char)) is not int or stoi[char] != index:
            raise MetaError(f"is damaged: itos and stoi disagree on token {index}", kind="damaged")
    return [char for char in chars if isinstance(char, str)]
