"""How a data source is written: parts joined by commas, each a place with what may stand around it.

`code:` before a folder means its source code, `*3` behind a place is its weight in a mixture.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

CODE = "code:"
_PART = re.compile(rf"(?P<kind>{CODE})?(?P<place>.*?)(?P<weight>\*\d+(?:\.\d+)?)?", re.DOTALL)


class Part(NamedTuple):
    """A part of a source: a path, glob, address or named set. `kind` is CODE or empty, `weight` like `*3` or empty."""

    kind: str
    place: str
    weight: str


def parts_of(source: str) -> list[Part]:
    """Return the parts of a source. A query may end in anything, so an address that has one carries no weight."""
    return [_part(part.strip()) for part in source.split(",") if part.strip()]


def _part(text: str) -> Part:
    found = _PART.fullmatch(text)
    if not found or ("://" in text and re.search("[?#]", text)):
        return Part("", text, "")
    return Part(found["kind"] or "", found["place"], found["weight"] or "")


def with_places(source: str, change: Callable[[str], str]) -> str:
    """Return the source with `change` applied to the place of each part."""
    return joined(part._replace(place=change(part.place)) for part in map(_part, source.split(",")))


def joined(parts: Iterable[Part]) -> str:
    """Return the source that has these parts."""
    return ",".join("".join(part) for part in parts)
