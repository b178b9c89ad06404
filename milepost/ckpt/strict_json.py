"""JSON text parsed strictly: no constants that JSON lacks, no name twice.

The checkpoints of a run hold the same tokenizer, up to megabytes of text that a list does not need. So the tokenizer that
was parsed last is kept with its text, and where the same text comes again, its value is taken instead.
"""

import json
import secrets
from functools import partial
from typing import Any, NamedTuple

LARGE = 2**16  # bytes of a text in which a tokenizer is looked for
NAME = b'"tokenizer": '  # as written by json.dumps; within a string, its quotes would be escaped


class _Known(NamedTuple):
    """The text of an object, and its value."""

    text: bytes
    value: Any


_last = _Known(b"", None)


def loads(data: bytes) -> Any:
    """Return the value of JSON text; raise ValueError or RecursionError if it is not valid."""
    before, name, after = data.partition(NAME) if len(data) >= LARGE else (data, b"", b"")
    known = _tokenizer(after) if after.startswith(b"{") else None
    if known is None:
        return _parsed(data)
    # The text of an object is replaced by a string that no file can hold, and the string by the value of the object.
    place = secrets.token_hex(16)
    try:
        return _parsed(b'%b%b"%b"%b' % (before, name, place.encode(), after[len(known.text) :]), {place: known.value})
    except (ValueError, RecursionError):
        return _parsed(data)  # whose error names the right place


def _tokenizer(text: bytes) -> _Known | None:
    """Return the object with which the text begins; None if it is not valid."""
    global _last
    known = _last  # another thread may replace it
    if known.text and text.startswith(known.text):
        return known
    try:
        letters = text.decode(errors="surrogatepass")
        value, end = json.JSONDecoder(**_strictly({})).raw_decode(letters)
    except (ValueError, RecursionError):
        return None
    _last = _Known(letters[:end].encode(errors="surrogatepass"), value)
    return _last


def _parsed(data: bytes, values: dict[str, Any] | None = None) -> Any:
    return json.loads(data, **_strictly(values or {}))


def _strictly(values: dict[str, Any]) -> dict[str, Any]:
    return {"parse_constant": _refused, "object_pairs_hook": partial(_object, values=values)}


def _refused(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]], *, values: dict[str, Any]) -> dict[str, Any]:
    """Return the object of these pairs, with the `values` in place of the strings that stand for them."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is repeated")
    if values:
        found = {name: values.get(value, value) if isinstance(value, str) else value for name, value in found.items()}
    return found
