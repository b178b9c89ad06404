"""What a pickle would do, told by its opcodes without doing any of it: which objects it asks for, its strings, how large it would be."""

import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Opcodes, and parts if nothing in it were shared. Weights and moments of GPT-2 take 30,000, a 50,000-piece BPE vocabulary 500,000.
LIMIT = 2_000_000
WORDS_LIMIT, WORD_LIMIT = 20_000, 200  # strings that are kept of a file, and characters of one
CALL = 10  # parts that the result of a call counts for: an empty OrderedDict takes more memory than ten numbers
LETTERS = 16  # of a text that count for one part

# What a pickle of tensors by name asks for. torch's own list for weights_only is longer: it has bytearray and the tensor
# classes, by which a file of a few hundred bytes claims as much memory as it likes.
ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device|b?float\d+|[A-Z]\w*Storage)"
)

# What the metadata of torch.distributed.checkpoint asks for.
METADATA = re.compile(
    r"torch\.distributed\.checkpoint\.metadata (Metadata|MetadataIndex|TensorStorageMetadata|TensorProperties|ChunkStorageMetadata"
    r"|_MEM_FORMAT_ENCODING)|torch\.distributed\.checkpoint\.filesystem _StorageInfo|torch\.serialization _get_layout"
    r"|torch (Size|b?float\d+|int\d+)"
)

# The opcodes that torch's unpickler takes, but for sets, which no file may ask for in any other way either.
PLAIN = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "EMPTY_TUPLE"),
    *("BINUNICODE", "SHORT_BINSTRING"),
}
EMPTY = {"EMPTY_LIST", "EMPTY_DICT"}
FETCHED, KEPT = {"BINGET", "LONG_BINGET"}, {"BINPUT", "LONG_BINPUT"}
CALLS = {"REDUCE", "NEWOBJ"}
JOINED = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "TUPLE": None,
    "BINPERSID": 1,
}  # of so many values, or of those since MARK
ADDED = {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "BUILD": 1}  # to the value below them
IGNORED = {"PROTO", "STOP"}


def asked_for(pickled: bytes) -> list[str]:
    """What the pickle asks for beyond tensors and plain values, sorted.

    Raises ValueError or another exception of pickletools if it is damaged, holds itself, or would be larger than LIMIT.
    """
    machine, foreign = _Machine(), set()
    try:
        for name, argument in _opcodes(pickled):
            if name in ("GLOBAL", "INST") and not ALLOWED.fullmatch(argument):
                foreign.add(argument.replace(" ", "."))
            elif not foreign:
                machine.step(name, argument)
    except Exception:
        if not foreign:
            raise
    return sorted(foreign)


def foreign(pickled: bytes, allowed: re.Pattern[str]) -> list[str]:
    """What a pickle that is never opened here would ask for besides what `allowed` matches, sorted; raises as pickletools does."""
    asked = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        wanted = str(argument)
        if opcode.name in ("GLOBAL", "INST") and not allowed.fullmatch(wanted):
            asked.add(wanted.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL" or opcode.name.startswith(
            "EXT"
        ):  # by a name that only running it would tell
            asked.add(opcode.name)
    return sorted(asked)


def words(pickled: bytes) -> frozenset[str]:
    """The first WORDS_LIMIT different strings of it, but for long ones; raises as `asked_for` does."""
    found: set[str] = set()
    for _, argument in _opcodes(pickled):
        if isinstance(argument, str) and len(argument) <= WORD_LIMIT and len(found) < WORDS_LIMIT:
            found.add(argument)
    return frozenset(found)


def _opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if count >= LIMIT:
            raise ValueError(f"it has more than {LIMIT} opcodes")
        yield opcode.name, argument


@dataclass(slots=True)
class _Value:
    """A value on the stack: of how many parts it would be if nothing in it were shared, and whether more may be added to it."""

    parts: int
    open: bool = False


LEAF, FUNCTION = _Value(1), _Value(1)


class _Machine:
    """Adds up what a pickle would make.

    Without it a tuple that holds the one before twice, fifty times over, is hashed for ever as a key, or printed for ever in torch's
    error. Each value on the stack is used once, and one fetched from the memo counts anew with all its parts, so that `parts` bounds
    everything that can be walked. Nothing is added to a value after it was fetched: it cannot grow uncounted, nor hold itself.
    """

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.marked: list[list[_Value]] = []  # the stacks below each MARK
        self.memo: dict[int, _Value] = {}
        self.parts = 0

    def step(self, name: str, argument: Any) -> None:
        """Takes one opcode; raises ValueError or IndexError or KeyError for what no sound pickle of a checkpoint has."""
        self.parts += 1
        if name in PLAIN:
            long = isinstance(argument, str) and len(argument) >= LETTERS
            self.stack.append(_Value(1 + len(argument) // LETTERS) if long else LEAF)
        elif name in KEPT:
            self.memo[argument] = self.stack[-1]
        elif name in FETCHED:
            value = self.memo[argument]
            value.open = False
            self.parts += value.parts
            self.stack.append(value)
        elif name in EMPTY:
            self.stack.append(_Value(1, open=True))
        elif name == "GLOBAL":
            self.stack.append(FUNCTION)
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in CALLS:
            self._call()
        elif name in JOINED:
            parts = self._taken(JOINED[name])  # which puts another stack in the place of this one
            self.stack.append(_Value(1 + parts))
        elif name in ADDED:
            self._add(self._taken(ADDED[name]))
        elif name not in IGNORED:
            raise ValueError(f"it has the opcode {name}")
        if self.parts > LIMIT:
            raise ValueError(f"it would have more than {LIMIT} parts")

    def _taken(self, count: int | None) -> int:
        """The parts of the last `count` values, or of all since MARK, which come off the stack."""
        if count is None:
            taken, self.stack = self.stack, self.marked.pop()
        else:
            taken = [self.stack.pop() for _ in range(count)]
        return sum(value.parts for value in taken)

    def _call(self) -> None:
        parts = self._taken(1)
        if self.stack.pop() is not FUNCTION:  # torch would print it in its error
            raise ValueError("it calls what is no function")
        self.parts += CALL
        self.stack.append(_Value(CALL + parts, open=True))

    def _add(self, parts: int) -> None:
        if not self.stack[-1].open:
            raise ValueError("something in it holds itself")
        self.stack[-1].parts += parts
