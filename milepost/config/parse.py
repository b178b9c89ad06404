"""Values of variables: parse them from text or from a checkpoint, format them as text, refuse invalid ones."""

import difflib
import glob
import json
import math
import operator
import os
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import Field
from types import NoneType
from typing import Any, get_args

from milepost.config.variables import ALLOW_BLANK, MAX_INT, SECRET_FORMS
from milepost.text.addresses import HIDDEN, is_address, masked
from milepost.text.sources import with_places
from models import lora_layers

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

NAMED = re.compile(r"([A-Za-z0-9][\w.-]{0,63})=(.+)", re.DOTALL)  # a checkpoint by a name of one's own

SYNONYMS = {("eval_type", "paper_metrics"): "benchmark"}  # other programs' words: (variable, word) -> ours

LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def parse_value(variable: Field[Any], text: str, folder: str) -> Any:
    """Return the value of a variable. Raise ValueError if `text` is not what `expected` describes. Relative paths start at `folder`."""
    rules, word = variable.metadata, text.strip().lower()
    word = SYNONYMS.get((variable.name, word), word)
    text.encode("utf-8")  # invalid UTF-8 arrives as lone surrogates; UnicodeEncodeError is a ValueError
    if word in rules["words"]:
        return word
    if rules["choices"]:
        if "true" in rules["choices"] and word in BOOLEANS:
            word = str(BOOLEANS[word]).lower()
        if word not in rules["choices"]:
            raise ValueError(text)
        return word
    blank = not (text if variable.name.upper() in ALLOW_BLANK else word)
    if blank or "\0" in text or (variable.name == "resume" and word in BOOLEANS):
        raise ValueError(text)
    if rules["form"]:
        return FORMS[rules["form"]](text, folder)
    value = PARSERS[kind_of(variable)](text)
    if not all(holds(value, rules[limit]) for limit, (_, holds) in LIMITS.items() if rules[limit] is not None):
        raise ValueError(text)
    return value


def parse_saved(variable: Field[Any], value: object, folder: str) -> Any:
    """Return the value that a checkpoint holds, checked like text. Relative paths start at `folder`."""
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
    number = _number(text)  # accepts 1e4
    value = int(number) if re.search("[.eE]", text) else int(text)
    if not number.is_integer() or abs(value) > MAX_INT:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not text.isascii():
        raise ValueError(text)
    return value


def absolute_path(text: str, folder: str) -> str:
    """Return the absolute path. A glob stays valid below a folder whose name has brackets."""
    text = os.path.expanduser(text)
    path = os.path.abspath(os.path.join(folder, text))
    if glob.has_magic(text) and not os.path.lexists(path):
        return os.path.abspath(os.path.join(glob.escape(folder), text))
    return path


def _source(text: str, folder: str) -> str:
    """Return a data source with absolute paths; URLs and named sets stay as they are."""
    if os.path.lexists(absolute_path(text, folder)):  # a single path that may contain a comma
        return absolute_path(text, folder)
    parts = ",".join(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise ValueError(text)
    return with_places(
        parts, lambda part: part if "://" in part or part == "tinyshakespeare" else absolute_path(part, folder)
    )


def _address(text: str, _folder: str) -> str:
    """Return the address of a store, which has a scheme, as it is. Only names of folders hold spaces."""
    if not is_address(text.strip()):
        raise ValueError(text)
    return text.strip()


def _path(text: str, folder: str) -> str:
    """Return an absolute path. An address would become a folder of an odd name."""
    if "://" in text:
        raise ValueError(text)
    return absolute_path(text, folder)


def _path_or_address(text: str, folder: str) -> str:
    """Return an absolute path, or the address of a store as it is."""
    return _address(text, folder) if "://" in text else absolute_path(text, folder)


def _paths(text: str, folder: str) -> str:
    """Return paths joined by commas as absolute paths; latest, best and addresses stay as they are, and what names one in
    `name=path`.
    """
    if os.path.lexists(absolute_path(text, folder)):  # a single path that may contain a comma
        return absolute_path(text, folder)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(text)
    return ",".join(_named_path(part, folder) for part in parts)


def _named_path(part: str, folder: str) -> str:
    if part.lower() in ("latest", "best"):
        return part.lower()
    path, named = absolute_path(part, folder), NAMED.fullmatch(part)
    if "://" in part:
        return f"{named[1]}={_address(named[2], folder)}" if named else _address(part, folder)
    if named and not glob.glob(path) and (named[2].lower() in ("latest", "best") or _names_any(named[2], folder)):
        return f"{named[1]}={_named_path(named[2], folder)}"
    return path


def _names_any(text: str, folder: str) -> bool:
    path = absolute_path(text, folder)
    return os.path.lexists(path) or bool(glob.glob(path))


def _secret(text: str, _folder: str) -> str:
    """Return a key as it is sent in a header."""
    if not re.fullmatch(r"[!-~]+", text.strip()):
        raise ValueError(text)
    return text.strip()


def _hub(text: str, folder: str) -> str:
    """Return the absolute path of a folder, or a hub name as it is."""
    path = absolute_path(text.strip(), folder)
    return path if text.strip().startswith((".", "/", "~")) or os.path.isdir(path) else text.strip()


def _hub_model(text: str, _folder: str) -> str:
    name, at, revision = text.strip().partition("@")
    if at and not re.fullmatch(r"[\w.][\w./-]{0,95}", revision, re.ASCII):
        raise ValueError(text)
    return _hub_name(name, "") + at + revision


def _hub_name(text: str, _folder: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", text.strip(), re.ASCII):
        raise ValueError(text)
    return text.strip()


def _list(text: str, _folder: str) -> tuple[str, ...]:
    """Return the strings of a JSON list, or `text` as a single string with its escapes replaced."""
    if not text.lstrip().startswith("["):
        return (re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text),)
    values = json.loads(text)
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError(text)
    "".join(values).encode("utf-8")
    return tuple(values)


def _name(text: str, folder: str) -> str:
    """Return the prefix of a file name. It must not contain a separator or start with a dot."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", text.strip()):
        raise ValueError(text)
    return text.strip()


def _layers(text: str, _folder: str) -> str:
    """Return names of layers that LoRA may adapt, joined by commas, in the order of the models' own."""
    names, layers = [name.strip() for name in text.split(",")], lora_layers()
    if not names or not set(names) <= set(layers):
        raise ValueError(text)
    return ",".join(name for name in layers if name in names)


def _blocks(text: str, _folder: str) -> str:
    """Return distinct block numbers joined by commas, sorted."""
    numbers = sorted(_integer(word.strip()) for word in text.split(","))
    if numbers[0] < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(text)
    return ",".join(map(str, numbers))


def _webhook(text: str, _folder: str) -> str:
    parts = urllib.parse.urlsplit(text.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.netloc.isprintable():
        raise ValueError(text)
    return text.strip()


# How to parse the value of a variable with a `form`: text and current folder -> value.
FORMS: dict[str, Callable[[str, str], Any]] = {
    "path": _path,
    "folder": _path_or_address,
    "paths": _paths,
    "source": _source,
    "address": _address,
    "hub": _hub,
    "hub_name": _hub_name,
    "hub_model": _hub_model,
    "secret": _secret,
    "list": _list,
    "name": _name,
    "layers": _layers,
    "blocks": _blocks,
    "webhook": _webhook,
}

PARSERS: dict[type, Callable[[str], Any]] = {bool: _boolean, int: _integer, float: _number, str: str}

# What a type or form accepts, in messages and in the documentation.
NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in UTF-8",
    "path": "a path",
    "folder": "a path, or an address such as s3://bucket/path",
    "paths": "a path or an address, or several joined by commas",
    "source": "files, folders, globs, an https URL or tinyshakespeare",
    "address": "an address such as s3://bucket/path, or file:///path for a folder",
    "hub": "a hub name or a folder",
    "hub_name": "owner/name",
    "hub_model": "owner/name or owner/name@revision; INIT_FROM takes a folder",
    "secret": "printable ASCII without spaces",
    "list": 'text, or a JSON list like ["a", "b"]',
    "name": "up to 40 letters, digits, `_`, `.` and `-`",
    "layers": f"some of {', '.join(lora_layers())}, joined by commas",
    "blocks": "different whole numbers from 0, joined by commas",
    "webhook": "an http or https URL",
}


def kind_of(variable: Field[Any]) -> type:
    """Return bool, int, float or str: the type without None and words."""
    kind: Any = variable.type
    return (get_args(kind) or (kind,))[0]


def expected(variable: Field[Any]) -> str:
    """Describe the values that a variable accepts."""
    rules = variable.metadata
    if rules["choices"]:
        return "one of " + ", ".join([*rules["words"], *rules["choices"]])
    limits = [f"{word} {as_text(rules[limit])}" for limit, (word, _) in LIMITS.items() if rules[limit] is not None]
    value = " ".join([NOUNS[rules["form"] or kind_of(variable)], " and ".join(limits)]).strip()
    return f"{', '.join(rules['words'])} or {value}" if rules["words"] else value


def refusal(variable: Field[Any], value: object, source: str) -> str:
    """Return the sentence that refuses a value: the value, where it was set, and what was expected."""
    if isinstance(value, int) and abs(value) > MAX_INT:  # Python does not print very large integers
        value = shown = f"(a number of {value.bit_length()} bits)"
    else:
        secret = variable.metadata["form"] in SECRET_FORMS
        shown = HIDDEN if secret else clip(repr(masked(value) if isinstance(value, str) else value))
    limit = " below 2**63" if kind_of(variable) is int and _is_too_large(str(value)) else ""
    options = (*variable.metadata["words"], *variable.metadata["choices"])
    hint = "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(str(value).lower(), options, 1))
    return f"{variable.name.upper()}={shown} ({source}): expected {expected(variable)}{limit}{hint}"


def _is_too_large(text: str) -> bool:
    try:
        return "inf" not in text.lower() and float(text) > MAX_INT
    except ValueError:
        return False


def as_text(value: Any) -> str:
    """Return a value as the text of its environment variable; an empty text means not set."""
    if value is None or value == ():
        return ""
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-").removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def quoted(text: str) -> str:
    """Quote `text` for python-dotenv, which has no escape for `${`; a default without a name stands in for it."""
    if re.fullmatch(r"[\w./:@%+,-]*", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return '"' + escaped.replace("${", "${:-$}{") + '"'


def short_text(value: Any) -> str:
    """Return a value for a line of the log: bare if it is plain, else quoted and shortened."""
    text = as_text(value)
    return text if re.fullmatch(r"[\w./:@%+,*-]+", text) else clip(repr(text))


def clip(text: str, length: int = 60) -> str:
    """Return `text`, shortened to `length` characters with an ellipsis."""
    return text if len(text) <= length else text[: length - 3] + "..."
