"""Interpret the opcodes of a pickle: build its plain values and tensors without running anything that it names.

A single pass counts, checks and builds, so that the values are built from exactly the opcodes that were checked. Of
another program's pickle, objects of any class are read as plain values too: see plain_objects.py.
"""

import collections
import encodings.ascii
import encodings.latin_1
import encodings.raw_unicode_escape  # noqa: F401  (pickletools decodes with these: no pickle causes an import)
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from milepost.ckpt import plain_objects

# Limit of opcodes, and of parts with shared values counted each time. GPT-2 with AdamW takes 30,000, a 50,000-token BPE
# 500,000.
LIMIT = 2_000_000
DEEPEST = 500  # nesting levels; hashing a key nested far deeper overflows the C stack
EQUAL_HASHES = 100  # colliding keys per dictionary: a million of them would take forever to insert
PLAIN_KEY = 2**60  # smaller integers have distinct hashes
STRINGS_LIMIT, LENGTH_LIMIT = 20_000, 200  # strings returned per file, and characters of a string
CALL = 10  # parts that a call counts: an empty OrderedDict takes more memory than ten numbers
CONTAINER = 4  # parts that a list or dictionary counts besides its own opcode
LETTERS = 16  # characters of a string that count as a part

# Names in the metadata of torch.distributed.checkpoint.
METADATA = re.compile(
    r"torch\.distributed\.checkpoint\.metadata (Metadata|MetadataIndex|TensorStorageMetadata|TensorProperties|ChunkStorageMetadata"
    r"|_MEM_FORMAT_ENCODING)|torch\.distributed\.checkpoint\.filesystem _StorageInfo|torch\.serialization _get_layout"
    r"|torch (Size|b?float\d+|int\d+)"
)

# The opcodes of torch's weights-only unpickler, except sets.
PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
GETS, PUTS = {"BINGET", "LONG_BINGET"}, {"BINPUT", "LONG_BINPUT"}
CALLS = {"REDUCE", "NEWOBJ"}
JOINED = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "TUPLE": None,
    "BINPERSID": 1,
}  # number of values that are joined; None: all since MARK
ADDED = {
    "APPEND": 1,
    "APPENDS": None,
    "SETITEM": 2,
    "SETITEMS": None,
    "BUILD": 1,
}  # number of values added to the value below them
IGNORED = {"PROTO", "STOP", "FRAME"}
# Only in other programs' pickles: protocols 0, 3, 4 and 5, and sets, which are read as lists.
THEIRS = {
    *("SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "INT", "LONG", "FLOAT", "GET", "PUT", "MEMOIZE", "STACK_GLOBAL", "NEWOBJ_EX"),
    *("EMPTY_SET", "FROZENSET", "ADDITEMS", "LIST", "FRAME"),
}


class NotUnderstood(ValueError):
    """The pickle may be sound, but needs more than is built here."""


class Forbidden(ValueError):
    """The pickle asks for objects that are not allowed; `names` lists them, sorted."""

    def __init__(self, names: set[str]) -> None:
        self.names = sorted(names)
        super().__init__(", ".join(self.names))


@dataclass(frozen=True, slots=True)
class Call:
    """A function that a pickle may call with a tuple of arguments."""

    function: Callable[..., Any]


def build(pickled: bytes, names: Mapping[str, Any], *, reference: Callable[[Any], Any], objects: bool = False) -> Any:
    """Return the value of a pickle that asks only for `names` ("module name" -> a Call or a value).

    `reference` returns the value of a persistent id. With `objects`, any other name that only holds data is read as
    plain values. Raise Forbidden if the pickle asks for anything else, NotUnderstood if it needs more than that;
    ValueError, or any exception of pickletools or of a Call, if it is damaged, contains itself, or exceeds LIMIT.
    """
    machine, forbidden = _Machine(names, reference, objects), set()
    try:
        for name, argument in _opcodes(pickled):
            if name in ("GLOBAL", "INST") and machine.forbids(argument):
                forbidden.add(argument.replace(" ", "."))
            elif not forbidden:
                machine.step(name, argument)
    except Exception:
        if not forbidden:
            raise
    if forbidden:
        raise Forbidden(forbidden)
    return machine.result()


def forbidden_names(pickled: bytes, allowed: re.Pattern[str]) -> list[str]:
    """Return the names that a pickle asks for and `allowed` does not match, sorted; raise what pickletools raises."""
    asked = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        wanted = str(argument)
        if opcode.name in ("GLOBAL", "INST") and not allowed.fullmatch(wanted):
            asked.add(wanted.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL" or opcode.name.startswith("EXT"):  # the name is known only by running it
            asked.add(opcode.name)
    return sorted(asked)


def strings(pickled: bytes) -> frozenset[str]:
    """Return the first STRINGS_LIMIT distinct strings of a pickle, without long ones; raise what pickletools raises."""
    found: set[str] = set()
    for _, argument in _opcodes(pickled):
        if isinstance(argument, str) and len(argument) <= LENGTH_LIMIT and len(found) < STRINGS_LIMIT:
            found.add(argument)
    return frozenset(found)


def _opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if count >= LIMIT:
            raise NotUnderstood(f"it has more than {LIMIT} opcodes")
        yield opcode.name, argument


@dataclass(slots=True)
class _Value:
    """A value on the stack.

    `parts`: its size, with shared values counted each time; `depth`: its nesting levels; `open`: whether more may be
    added to it. `name` ("module name") is that of a class or function to be read as plain values; `made`: whether the
    value stands for an object, whose fields follow.
    """

    value: Any
    parts: int = 1
    depth: int = 0
    open: bool = False
    name: str = ""
    made: bool = False


# Shared, so that millions of them take only their slots on the stack.
CONSTANTS = {"NONE": _Value(None), "NEWTRUE": _Value(True), "NEWFALSE": _Value(False), "EMPTY_TUPLE": _Value(())}


class _Machine:
    """Build a pickle's value and count its parts.

    The count stops exponential values, such as fifty nested tuples that each hold the previous one twice: hashing or
    printing them never ends. Each value on the stack is used once, and a value fetched from the memo counts again with
    all its parts, so `parts` bounds every walk. Nothing is added to a value after it was fetched, so it cannot grow
    uncounted or contain itself.
    """

    def __init__(self, names: Mapping[str, Any], reference: Callable[[Any], Any], objects: bool) -> None:
        self.names, self.reference, self.objects = names, reference, objects
        self.stack: list[_Value] = []
        self.marked: list[list[_Value]] = []  # the stacks below each MARK
        self.memo: dict[int, _Value] = {}
        self.hashes: collections.Counter[tuple[int, int]] = collections.Counter()
        self.parts = 0

    def result(self) -> Any:
        """Return the only value left on the stack."""
        if len(self.stack) != 1 or self.marked:
            raise ValueError("it does not end with one value")
        return self.stack[0].value

    def forbids(self, name: str) -> bool:
        """Whether `name` is neither known nor may be read as plain values."""
        return name not in self.names and (not self.objects or plain_objects.is_refused(name))

    def step(self, name: str, argument: Any) -> None:
        """Execute an opcode; raise ValueError, IndexError or KeyError for anything that a checkpoint never has."""
        self.parts += 1
        if name in PLAIN:
            self._scalar(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in GETS:
            self._fetch(self.memo[argument])
        elif name in EMPTY:
            self.parts += CONTAINER
            self.stack.append(_Value(EMPTY[name](), open=True))
        elif name == "GLOBAL":
            self._name(argument)
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in CALLS:
            self._call(*self._taken(2))
        elif name in JOINED:
            self._join(name)
        elif name in ADDED:
            self._add(name)
        elif name in THEIRS and self.objects:
            self._step_theirs(name, argument)
        elif name not in IGNORED:
            raise self._unknown(f"it has the opcode {name}")
        if self.parts > LIMIT:
            raise self._unknown(f"it would have more than {LIMIT} parts")

    def _step_theirs(self, name: str, argument: Any) -> None:
        """Execute an opcode that only other programs' pickles have."""
        if name in ("EMPTY_SET", "FROZENSET", "LIST"):
            inside = self._taken(None) if name != "EMPTY_SET" else []
            self.parts += CONTAINER
            self._push([item.value for item in inside], inside, open=name != "FROZENSET")
        elif name == "ADDITEMS":
            self._add("APPENDS")
        elif name in ("PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name == "GET":
            self._fetch(self.memo[argument])
        elif name == "STACK_GLOBAL":
            module, function = self._taken(2)
            wanted = f"{module.value!s:.200} {function.value!s:.200}"
            if self.forbids(wanted):
                raise Forbidden({wanted.replace(" ", ".")})
            self._name(wanted)
        elif name == "NEWOBJ_EX":
            function, arguments, named = self._taken(3)
            self._call(function, arguments if arguments.value else _Value((named.value,), named.parts, named.depth))
        elif name != "FRAME":
            self._scalar(argument)

    def _unknown(self, problem: str) -> ValueError:
        """Return the error for what is not built here; in a checkpoint of our own, it is damage."""
        return NotUnderstood(problem) if self.objects else ValueError(problem)

    def _scalar(self, value: Any) -> None:
        self.stack.append(
            _Value(value, 1 + (len(value) // LETTERS if isinstance(value, str | bytes | bytearray) else 0))
        )

    def _name(self, name: str) -> None:
        """Push what a name stands for; a class or function to be read as plain values is its dotted name."""
        if name in self.names:
            self.stack.append(_Value(self.names[name]))
        else:
            self.stack.append(_Value(name.replace(" ", "."), 1 + len(name) // LETTERS, name=name))

    def _fetch(self, value: _Value) -> None:
        value.open = False
        self.parts += value.parts
        self.stack.append(value)

    def _taken(self, count: int | None) -> list[_Value]:
        """Pop and return the last `count` values, or all since MARK."""
        if count is None:
            taken, self.stack = self.stack, self.marked.pop()
            return taken
        taken = self.stack[-count:]
        if len(taken) != count:
            raise ValueError("it takes more values than it has")
        del self.stack[-count:]
        return taken

    def _push(
        self, value: Any, inside: list[_Value], *, parts: int = 1, open: bool = False, made: bool = False
    ) -> None:
        depth = 1 + max((item.depth for item in inside), default=0)
        if depth > DEEPEST:
            raise self._unknown(f"it is nested deeper than {DEEPEST}")
        self.stack.append(_Value(value, parts + sum(item.parts for item in inside), depth, open, made=made))

    def _join(self, name: str) -> None:
        inside = self._taken(JOINED[name])
        if name == "BINPERSID":
            self._push(self.reference(inside[0].value), inside)
        else:
            self._push(tuple(item.value for item in inside), inside)

    def _call(self, function: _Value, arguments: _Value) -> None:
        if type(function.value) is not Call and not function.name:
            raise self._unknown("it calls something that is not a function")
        if type(arguments.value) is not tuple:
            raise ValueError("it calls a function without a tuple of arguments")
        self.parts += CALL
        if not function.name:
            self._push(function.value.function(*arguments.value), [arguments], parts=CALL, open=True)
            return
        self.parts += arguments.parts  # they may be copied
        try:
            value = plain_objects.called(function.name, arguments.value)
        except Exception as error:
            raise NotUnderstood(f"it describes {function.value:.80} in an unknown way") from error
        self._push(value, [arguments], parts=CALL, open=True, made=True)

    def _add(self, name: str) -> None:
        inside, target = self._taken(ADDED[name]), self.stack[-1]
        if not target.open:
            raise self._unknown("a value in it contains itself")
        target.depth = max(target.depth, *(1 + item.depth for item in inside), 0)
        if target.depth > DEEPEST:
            raise self._unknown(f"it is nested deeper than {DEEPEST}")
        target.parts += sum(item.parts for item in inside)
        values = [item.value for item in inside]
        if target.made and name.startswith("APPEND") and target.value == {}:
            target.value = []  # an object that is a list
        if name.startswith("APPEND") and type(target.value) is list:
            target.value.extend(values)
        elif name.startswith("SETITEM") and isinstance(target.value, dict) and len(values) % 2 == 0:
            for key, value in zip(values[::2], values[1::2], strict=True):
                self._set(target.value, key, value)
        elif name == "BUILD" and target.made:
            self._set_fields(target.value, values[0], copied=inside[0].parts)
        elif name != "BUILD" or type(target.value) is not collections.OrderedDict:  # its attributes are ignored
            raise self._unknown(f"it adds to {type(target.value).__name__} a value that it cannot hold")

    def _set_fields(self, fields: Any, state: Any, *, copied: int) -> None:
        """Add an object's fields to its dictionary; attributes of an object that is a scalar or a list are ignored."""
        if not isinstance(fields, dict):
            return
        self.parts += copied
        for name, value in plain_objects.fields_of(state).items():
            if name not in fields:
                self._set(fields, name, value)

    def _set(self, values: dict[Any, Any], key: Any, value: Any) -> None:
        """Set an item; raise ValueError if too many keys of the dictionary share its hash."""
        if type(key) is not str and not (type(key) is int and abs(key) < PLAIN_KEY):
            try:
                hashed = id(values), hash(key)
            except TypeError:
                raise self._unknown("a key of a dictionary in it is a list or a dictionary") from None
            self.hashes[hashed] += 1
            if self.hashes[hashed] > EQUAL_HASHES:
                raise self._unknown("the keys of a dictionary in it collide")
        values[key] = value
