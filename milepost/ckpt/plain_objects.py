"""Read the objects that a pickle describes as plain values: nothing is imported, constructed or called.

An object becomes the dictionary of its fields, an enum member or a number of numpy its value, a path or a date its text,
a named tuple a tuple, a set a list, and a class or function its dotted name.
"""

import datetime
import re
import struct
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable, Mapping
from typing import Any

# Top modules of the standard library, also by the names of Python 2, which protocol 2 writes.
STANDARD = sys.stdlib_module_names | IMPORT_MAPPING.keys() | {"exceptions"}

# Names of the standard library that only hold data. Others, such as os.system, mark a file as hostile.
HARMLESS = re.compile(
    r"(__builtin__|builtins) (set|frozenset|bytes|bytearray|complex|x?range|slice|object|list|dict|tuple|str|int|long|float|bool"
    r"|getattr)|_codecs encode|argparse Namespace|array array"
    r"|collections (OrderedDict|defaultdict|Counter|deque|ChainMap|UserDict|UserList)"
    r"|copy_?reg (_reconstructor|__newobj__)|datetime \w+|decimal Decimal|enum \w+|fractions Fraction"
    r"|functools partial|ipaddress \w+|numbers \w+|pathlib(\._local)? \w+|random Random|re _compile"
    r"|string Template|UserDict UserDict|UserList UserList|types SimpleNamespace|typing \w+|uuid \w+|zoneinfo ZoneInfo"
)
NUMBERS = {  # numpy's dtypes: formats of struct
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
SCALARS = (str, bytes, int, float, bool, type(None))


def is_refused(name: str) -> bool:
    """Whether `name` ("module name") is of the standard library and may do more than hold data."""
    module = name.split(" ")[0].split(".")[0]
    return module in STANDARD and not HARMLESS.fullmatch(name)


def called(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the plain value of a call of `name`: of a known class its content, of another one its arguments.

    An empty dictionary stands for an object whose fields follow. Raise any exception for arguments that do not fit.
    """
    if make := KNOWN.get(name):
        return make(*arguments)
    if PATH.fullmatch(name):
        return "/".join(part for part in arguments if isinstance(part, str)).replace("//", "/", 1)
    if not arguments:
        return {}
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], SCALARS) else arguments


def fields_of(state: Any) -> dict[Any, Any]:
    """Return the fields that a state sets: a dictionary, a pair of dictionaries (with __slots__), or anything else."""
    halves = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    if all(half is None or isinstance(half, Mapping) for half in halves):
        return {name: value for half in halves if half for name, value in half.items()}
    return {"__state__": state}


PATH = re.compile(r"pathlib(\._local)? (Pure)?(Posix|Windows)?Path")


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """Return bytes, which protocol 2 pickles as text."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding:.20}")
    return text.encode("latin1")


def _bytes(data: Any = b"", *encoding: str) -> bytes:
    return data if isinstance(data, bytes) else _encoded(data, *encoding)


def _number(dtype: Any, data: Any = b"") -> Any:
    """Return the value of a numpy scalar; its dtype is the dictionary that `called` and `fields_of` made of it."""
    code = dtype["dtype"]
    state = dtype.get("__state__") or ("", "<")
    order = ">" if state[1] == ">" else "<"
    if code in NUMBERS:
        return struct.unpack(order + NUMBERS[code], data)[0]
    if code.startswith("U"):
        return data.decode("utf-32-be" if order == ">" else "utf-32-le").rstrip("\0")
    return {"dtype": code}


def _date(data: Any, *rest: Any) -> str:
    """Return the text of a date or a date and time, whose ten bytes are year, month, day, hour and so on."""
    if not isinstance(data, bytes):
        year, month, day = _numbers((data, *rest[:2]))
        return f"{year:.0f}-{month:02.0f}-{day:02.0f}"
    year, month = data[0] * 256 + data[1], data[2] & 0x7F
    if len(data) == 4:
        return datetime.date(year, month, data[3]).isoformat()
    day, hour, minute, second = data[3:7]
    return datetime.datetime(year, month, day, hour, minute, second, int.from_bytes(data[7:10], "big")).isoformat()


def _seconds(days: Any = 0, seconds: Any = 0, micro: Any = 0) -> float:
    days, seconds, micro = _numbers((days, seconds, micro))
    return days * 86400 + seconds + micro / 1e6


def _items(items: Any = (), *_: Any) -> list[Any]:
    if not isinstance(items, list | tuple):  # a text would become a list of its letters
        raise TypeError("expected a list")
    return list(items)


def _counts(counts: Any = None) -> dict[Any, Any]:
    if counts is not None and not isinstance(counts, dict):
        raise TypeError("expected a dictionary")
    return dict(counts or {})


def _attribute(owner: Any, name: Any) -> str:
    if not isinstance(owner, str) or not isinstance(name, str):
        raise TypeError("expected two names")
    return f"{owner}.{name}"


def _numbers(values: tuple[Any, ...]) -> tuple[float, ...]:
    """Return the values if all are numbers: anything else could grow in a sum or a product."""
    if not all(isinstance(value, int | float) for value in values):
        raise TypeError("expected numbers")
    return tuple(float(value) for value in values)


def _rebuilt(kind: Any, base: Any, state: Any = None) -> Any:
    return {} if state is None else state


KNOWN: dict[str, Callable[..., Any]] = {
    "_codecs encode": _encoded,
    "collections defaultdict": lambda *_: {},
    "collections Counter": _counts,
    "collections deque": _items,
    "copyreg _reconstructor": _rebuilt,
    "copy_reg _reconstructor": _rebuilt,
    "datetime datetime": _date,
    "datetime date": _date,
    "datetime timedelta": _seconds,
    "numpy dtype": lambda code, *_: {"dtype": code},
    "numpy.core.multiarray scalar": _number,
    "numpy._core.multiarray scalar": _number,
}
for _builtins in ("builtins", "__builtin__"):
    KNOWN |= dict.fromkeys((f"{_builtins} {kind}" for kind in ("set", "frozenset", "list")), _items)
    KNOWN |= dict.fromkeys((f"{_builtins} {kind}" for kind in ("bytes", "bytearray")), _bytes)
    KNOWN[f"{_builtins} getattr"] = _attribute
