"""One value of a variable: from text, from a checkpoint, back to text, and the sentence that refuses it."""

import difflib
import glob
import json
import math
import operator
import os
import re
from collections.abc import Callable
from dataclasses import Field
from types import NoneType
from typing import Any, get_args

from milepost.config.variables import BIGGEST, LAYERS, MAY_BE_BLANK

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def parse_value(variable: Field[Any], text: str, folder: str) -> Any:
    """The value of a variable; ValueError where `text` is not as `expected` says. Relative paths start at `folder`."""
    rules, word = variable.metadata, text.strip().lower()
    text.encode("utf-8")  # bytes that are no UTF-8 arrive as lone surrogates; UnicodeEncodeError is a ValueError
    if word in rules["words"]:
        return word
    if rules["choices"]:
        if "true" in rules["choices"] and word in BOOLEANS:
            word = str(BOOLEANS[word]).lower()
        if word not in rules["choices"]:
            raise ValueError(text)
        return word
    blank = not (text if variable.name.upper() in MAY_BE_BLANK else word)
    if blank or "\0" in text or (variable.name == "resume" and word in BOOLEANS):
        raise ValueError(text)
    if rules["form"]:
        return FORMS[rules["form"]](text, folder)
    value = PARSERS[kind_of(variable)](text)
    if not all(holds(value, rules[limit]) for limit, (_, holds) in LIMITS.items() if rules[limit] is not None):
        raise ValueError(text)
    return value


def parse_saved(variable: Field[Any], value: object, folder: str) -> Any:
    """Return a saved value, held to the same limits. Relative paths start at `folder`."""
    if value is None and NoneType in get_args(variable.type):
        return None
    if not isinstance(value, str | int | float) or (variable.metadata["form"] and not isinstance(value, str)):
        raise ValueError(value)
    return parse_value(variable, value if isinstance(value, str) else json.dumps(value), folder)


def _boolean(text: str) -> bool:
    if text.strip().lower() not in BOOLEANS:
        raise ValueError(text)
    return BOOLEANS[text.strip().lower()]


def _integer(text: str) -> int:
    number = _number(text)  # 1e4 is a whole number too
    value = int(number) if re.search("[.eE]", text) else int(text)
    if not number.is_integer() or abs(value) > BIGGEST:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not text.isascii():
        raise ValueError(text)
    return value


def absolute_path(text: str, folder: str) -> str:
    """The absolute path; a glob keeps its meaning below a folder whose own name holds brackets."""
    text = os.path.expanduser(text)
    path = os.path.abspath(os.path.join(folder, text))
    if glob.has_magic(text) and not os.path.lexists(path):
        return os.path.abspath(os.path.join(glob.escape(folder), text))
    return path


def _source(text: str, folder: str) -> str:
    """A data source, its paths made absolute; URLs and named sets stay as they are."""
    if os.path.lexists(absolute_path(text, folder)):  # one path, though it may hold a comma
        return absolute_path(text, folder)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(text)
    return ",".join(
        part if "://" in part or part == "tinyshakespeare" else absolute_path(part, folder) for part in parts
    )


def _paths(text: str, folder: str) -> str:
    """Paths joined by commas, made absolute; latest and best among them stay as they are."""
    if "," not in text or os.path.lexists(absolute_path(text, folder)):  # one path, though it may hold a comma
        return absolute_path(text, folder)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(text)
    return ",".join(
        part.lower() if part.lower() in ("latest", "best") else absolute_path(part, folder) for part in parts
    )


def _hub(text: str, folder: str) -> str:
    """The absolute path of what is a folder or written like one, else the hub name as it is."""
    path = absolute_path(text.strip(), folder)
    return path if text.strip().startswith((".", "/", "~")) or os.path.isdir(path) else text.strip()


def _list(text: str, _folder: str) -> tuple[str, ...]:
    """The strings of a JSON list, or the one string that `text` is, with escapes."""
    if not text.lstrip().startswith("["):
        return (re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text),)
    values = json.loads(text)
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError(text)
    "".join(values).encode("utf-8")
    return tuple(values)


def _name(text: str, folder: str) -> str:
    """The beginning of a file's name: it must not lead out of its folder, nor hide it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", text.strip()):
        raise ValueError(text)
    return text.strip()


def _layers(text: str, _folder: str) -> str:
    """Names of layers joined by commas, in their own order."""
    names = [name.strip() for name in text.split(",")]
    if not names or not set(names) <= set(LAYERS):
        raise ValueError(text)
    return ",".join(name for name in LAYERS if name in names)


def _blocks(text: str, _folder: str) -> str:
    """Numbers joined by commas, each once, in order."""
    numbers = sorted(_integer(word.strip()) for word in text.split(","))
    if numbers[0] < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(text)
    return ",".join(map(str, numbers))


FORMS: dict[str, Callable[[str, str], Any]] = {
    **{
        "path": absolute_path,
        "paths": _paths,
        "source": _source,
        "hub": _hub,
        "list": _list,
        "name": _name,
        "layers": _layers,
    },
    **{"blocks": _blocks},
}


PARSERS: dict[type, Callable[[str], Any]] = {bool: _boolean, int: _integer, float: _number, str: str}


NOUNS: dict[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text in UTF-8", "path": "a path"},
    **{"paths": "a path, or several joined by commas"},
    **{"source": "files, folders, globs, an https URL or tinyshakespeare", "hub": "a hub name or a folder"},
    **{"list": 'text, or a JSON list like ["a", "b"]', "name": "up to 40 letters, digits, `_`, `.` and `-`"},
    **{"layers": f"some of {', '.join(LAYERS)}, joined by commas"},
    **{"blocks": "different whole numbers from 0, joined by commas"},
}


def kind_of(variable: Field[Any]) -> type:
    """bool, int, float or str: the type without None and words."""
    kind: Any = variable.type
    return (get_args(kind) or (kind,))[0]


def expected(variable: Field[Any]) -> str:
    """What a variable takes, in words."""
    rules = variable.metadata
    if rules["choices"]:
        return "one of " + ", ".join(rules["choices"])
    limits = [f"{word} {rules[limit]}" for limit, (word, _) in LIMITS.items() if rules[limit] is not None]
    value = " ".join([NOUNS[rules["form"] or kind_of(variable)], " and ".join(limits)]).strip()
    return f"{', '.join(rules['words'])} or {value}" if rules["words"] else value


def refusal(variable: Field[Any], value: object, source: str) -> str:
    """Return the sentence that refuses a value: what it is, where it was set, what was expected."""
    if isinstance(value, int) and abs(value) > BIGGEST:  # Python refuses to print the very large ones
        value = shown = f"(a number of {value.bit_length()} bits)"
    else:
        shown = clipped(repr(value))
    digits = str(value).strip()
    limit = " below 2**63" if kind_of(variable) is int and digits.isdecimal() and int(digits[:40]) > BIGGEST else ""
    options = (*variable.metadata["choices"], *variable.metadata["words"])
    hint = "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(str(value).lower(), options, 1))
    return f"{variable.name.upper()}={shown} ({source}): expected {expected(variable)}{limit}{hint}"


def as_text(value: Any) -> str:
    """A value as an environment variable would hold it; empty is not set."""
    if value is None or value == ():
        return ""
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-").removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def quoted(text: str) -> str:
    """`text` so that python-dotenv reads exactly it back: there is no escape for ${, but a nameless default will do."""
    if re.fullmatch(r"[\w./:@%+,-]*", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return '"' + escaped.replace("${", "${:-$}{") + '"'


def short_text(value: Any) -> str:
    """A value for one line: bare if it is plain, else quoted and clipped."""
    text = as_text(value)
    return text if re.fullmatch(r"[\w./:@%+,*-]+", text) else clipped(repr(text))


def clipped(text: str, length: int = 60) -> str:
    """Return `text`, or its first `length` - 3 characters and an ellipsis."""
    return text if len(text) <= length else text[: length - 3] + "..."
