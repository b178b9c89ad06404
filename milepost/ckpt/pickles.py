"""Read a pickle by its opcodes: build its plain values and tensors without ever running anything that it names.

One walk counts, checks and builds, so that nothing is built from bytes that were understood differently when they were checked.
"""

import collections
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Opcodes, and parts if nothing in it were shared. Weights and moments of GPT-2 take 30,000, a 50,000-piece BPE vocabulary 500,000.
LIMIT = 2_000_000
DEEPEST = 500  # values in each other; hashing a key that is nested far deeper overflows the C stack
EQUAL_HASHES = 100  # keys of one dictionary whose hashes collide: a file of a million such keys would never be built
PLAIN_KEY = 2**60  # integers below it have hashes of their own
WORDS_LIMIT, WORD_LIMIT = 20_000, 200  # strings that are kept of a file, and characters of one
CALL = 10  # parts that the result of a call counts for: an empty OrderedDict takes more memory than ten numbers
CONTAINER = 4  # parts that a list or dictionary counts for besides its own opcode, empty or not
LETTERS = 16  # of a text that count for one part

# What the metadata of torch.distributed.checkpoint asks for.
METADATA = re.compile(
    r"torch\.distributed\.checkpoint\.metadata (Metadata|MetadataIndex|TensorStorageMetadata|TensorProperties|ChunkStorageMetadata"
    r"|_MEM_FORMAT_ENCODING)|torch\.distributed\.checkpoint\.filesystem _StorageInfo|torch\.serialization _get_layout"
    r"|torch (Size|b?float\d+|int\d+)"
)

# The opcodes that torch's unpickler takes, but for sets, which no file may ask for in any other way either.
PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
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


class Forbidden(ValueError):
    """The pickle names objects that are not permitted; `names` has them, sorted."""

    def __init__(self, names: set[str]) -> None:
        self.names = sorted(names)
        super().__init__(", ".join(self.names))


@dataclass(frozen=True, slots=True)
class Call:
    """A permitted name that a pickle may call with a tuple of arguments."""

    function: Callable[..., Any]


def built(pickled: bytes, names: Mapping[str, Any], *, reference: Callable[[Any], Any]) -> Any:
    """The value of a pickle that asks for nothing but `names` ("module name" -> a Call or a value).

    `reference` gives the value of a persistent id. Raises Forbidden if it names anything else, ValueError or another exception of
    pickletools or of a Call if it is damaged, holds itself, or would be larger than LIMIT.
    """
    machine, forbidden = _Machine(names, reference), set()
    try:
        for name, argument in _opcodes(pickled):
            if name in ("GLOBAL", "INST") and argument not in names:
                forbidden.add(argument.replace(" ", "."))
            elif not forbidden:
                machine.step(name, argument)
    except Exception:
        if not forbidden:
            raise
    if forbidden:
        raise Forbidden(forbidden)
    return machine.result()


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
    """A value on the stack.

    `parts`: how many it would be if nothing in it were shared; `depth`: of values in each other; `open`: more may be added to it.
    """

    value: Any
    parts: int = 1
    depth: int = 0
    open: bool = False


# Shared, so that a pickle of millions of them takes no more memory than their places on the stack.
CONSTANTS = {"NONE": _Value(None), "NEWTRUE": _Value(True), "NEWFALSE": _Value(False), "EMPTY_TUPLE": _Value(())}


class _Machine:
    """Builds a pickle's value and adds up its parts.

    Without the count a tuple that holds the previous one twice, fifty times over, is hashed forever as a key, or printed forever in
    an error. Each value on the stack is used once, and a value fetched from the memo counts anew with all its parts, so that `parts`
    bounds everything that can be walked. Nothing is added to a value after it was fetched: it cannot grow uncounted, nor hold itself.
    """

    def __init__(self, names: Mapping[str, Any], reference: Callable[[Any], Any]) -> None:
        self.names, self.reference = names, reference
        self.stack: list[_Value] = []
        self.marked: list[list[_Value]] = []  # the stacks below each MARK
        self.memo: dict[int, _Value] = {}
        self.hashes: collections.Counter[tuple[int, int]] = collections.Counter()
        self.parts = 0

    def result(self) -> Any:
        """The only value left on the stack at the end."""
        if len(self.stack) != 1 or self.marked:
            raise ValueError("it does not end with one value")
        return self.stack[0].value

    def step(self, name: str, argument: Any) -> None:
        """Takes one opcode; raises ValueError or IndexError or KeyError for what no sound pickle of a checkpoint has."""
        self.parts += 1
        if name in PLAIN:
            self.stack.append(_Value(argument, 1 + (len(argument) // LETTERS if isinstance(argument, str) else 0)))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in KEPT:
            self.memo[argument] = self.stack[-1]
        elif name in FETCHED:
            self._fetch(self.memo[argument])
        elif name in EMPTY:
            self.parts += CONTAINER
            self.stack.append(_Value(EMPTY[name](), open=True))
        elif name == "GLOBAL":
            self.stack.append(_Value(self.names[argument]))
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in CALLS:
            self._call()
        elif name in JOINED:
            self._join(name)
        elif name in ADDED:
            self._add(name)
        elif name not in IGNORED:
            raise ValueError(f"it has the opcode {name}")
        if self.parts > LIMIT:
            raise ValueError(f"it would have more than {LIMIT} parts")

    def _fetch(self, value: _Value) -> None:
        value.open = False
        self.parts += value.parts
        self.stack.append(value)

    def _taken(self, count: int | None) -> list[_Value]:
        """The last `count` values, or all since MARK, which come off the stack."""
        if count is None:
            taken, self.stack = self.stack, self.marked.pop()
            return taken
        taken = self.stack[-count:]
        if len(taken) != count:
            raise ValueError("it takes more values than it has")
        del self.stack[-count:]
        return taken

    def _push(self, value: Any, inside: list[_Value], *, parts: int = 1, open: bool = False) -> None:
        depth = 1 + max((each.depth for each in inside), default=0)
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
        self.stack.append(_Value(value, parts + sum(each.parts for each in inside), depth, open))

    def _join(self, name: str) -> None:
        inside = self._taken(JOINED[name])
        if name == "BINPERSID":
            self._push(self.reference(inside[0].value), inside)
        else:
            self._push(tuple(each.value for each in inside), inside)

    def _call(self) -> None:
        function, arguments = self._taken(2)
        if type(function.value) is not Call:
            raise ValueError("it calls what is no function")
        if type(arguments.value) is not tuple:
            raise ValueError("it calls a function without a tuple of arguments")
        self.parts += CALL
        self._push(function.value.function(*arguments.value), [arguments], parts=CALL, open=True)

    def _add(self, name: str) -> None:
        inside, target = self._taken(ADDED[name]), self.stack[-1]
        if not target.open:
            raise ValueError("something in it holds itself")
        target.depth = max(target.depth, *(1 + each.depth for each in inside), 0)
        if target.depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
        target.parts += sum(each.parts for each in inside)
        values = [each.value for each in inside]
        if name.startswith("APPEND") and type(target.value) is list:
            target.value.extend(values)
        elif name.startswith("SETITEM") and isinstance(target.value, dict) and len(values) % 2 == 0:
            for key, value in zip(values[::2], values[1::2], strict=True):
                self._set(target.value, key, value)
        elif (
            name != "BUILD" or type(target.value) is not collections.OrderedDict
        ):  # whose attributes are of no use here
            raise ValueError(f"it adds to {type(target.value).__name__} what that cannot hold")

    def _set(self, values: dict[Any, Any], key: Any, value: Any) -> None:
        """Sets an item, unless too many keys of the dictionary share its hash."""
        if type(key) is not str and not (type(key) is int and abs(key) < PLAIN_KEY):
            hashed = id(values), hash(key)
            self.hashes[hashed] += 1
            if self.hashes[hashed] > EQUAL_HASHES:
                raise ValueError("the keys of a dictionary in it collide")
        values[key] = value
