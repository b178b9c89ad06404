"""The metrics of a run as columns of numbers, read as the file grows: a later look reads only what was added."""

import contextlib
import json
import math
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from milepost.ckpt.manifest import is_regular
from milepost.plots.curves import MAX_VALUE, is_line, number
from milepost.runtime.progress import parse_line

CHUNK = 2**22  # bytes read at once; a longer line is left out
TAIL = 64  # bytes before the end of what was read, which tell whether the file still begins with it
MOST_FIELDS = 64  # of a split; later ones are left out
SPLITS = ("train", "validation")
NOT_NUMBERS = ("run_id", "split")
ALWAYS = ("step", "time")  # fields of every line
PLAIN = {int, float, type(None)}


@dataclass
class Columns:
    """The numbers of the lines of one split, in the order of the file; NaN where a line has none."""

    fields: "dict[str, array[float]]" = field(default_factory=dict)
    count: int = 0

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append lines that have a step and a time."""
        for name in dict.fromkeys((*ALWAYS, *(name for line in lines for name in line))):
            if name not in self.fields and name not in NOT_NUMBERS and len(self.fields) < MOST_FIELDS:
                self.fields[name] = array("d", [math.nan]) * self.count
        for name, column in self.fields.items():
            column.frombytes(numbers([line.get(name) for line in lines]).tobytes())
        self.count += len(lines)

    def last(self, name: str) -> float | None:
        """Return the last number of a field; None if it has none."""
        return next((value for value in reversed(self.fields.get(name, ())) if math.isfinite(value)), None)

    def lowest(self, name: str) -> float | None:
        """Return the lowest number of a field; None if it has none."""
        column = np.array(self.fields.get(name, ()))
        finite = column[np.isfinite(column)]
        return float(finite.min()) if len(finite) else None


Splits = dict[str, Columns]


def numbers(values: list[Any]) -> npt.NDArray[np.float64]:
    """Return values of lines as floats; NaN for what is not a number."""
    if PLAIN.issuperset(map(type, values)):  # the rule, and ten times as fast
        with contextlib.suppress(OverflowError):
            found = np.array(values, dtype=np.float64)  # None becomes NaN
            found[np.abs(found) > MAX_VALUE] = math.nan
            return found
    return np.array([number(value) for value in values])


def as_columns(lines: Iterable[dict[str, Any]]) -> Splits:
    """Return the lines of a metrics.jsonl as columns, by split."""
    splits: Splits = {}
    _add(splits, list(lines))
    return splits


def _add(splits: Splits, lines: list[dict[str, Any]]) -> None:
    for name in SPLITS:
        if own := [line for line in lines if line.get("split") == name]:
            splits.setdefault(name, Columns()).add(own)


@dataclass
class Followed:
    """A metrics.jsonl, and what was read of it."""

    path: Path
    splits: Splits = field(default_factory=dict)
    stamp: tuple[int, ...] = ()  # inode, size in bytes and modification time at the last look
    read: int = 0  # bytes
    tail: bytes = b""  # of what was read

    def has_changed(self) -> bool:
        """Return whether the file differs from what was read; False if it cannot be looked at."""
        with contextlib.suppress(OSError, ValueError):
            return _stamp(os.stat(self.path)) != self.stamp
        return False

    def read_on(self) -> None:
        """Read what was added since the last call, and all of it again if the file was replaced, as a resume does."""
        with contextlib.suppress(OSError, ValueError):
            if not is_regular(self.path):  # reading a pipe would block
                return
            with open(self.path, "rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                if not self._continues(file, stamp):
                    self.splits, self.read, self.tail = {}, 0, b""
                self._read_from(file)
                self.stamp = stamp

    def _continues(self, file: BinaryIO, stamp: tuple[int, ...]) -> bool:
        if self.stamp and stamp[0] != self.stamp[0]:
            return False
        file.seek(self.read - len(self.tail))
        return file.read(len(self.tail)) == self.tail

    def _read_from(self, file: BinaryIO) -> None:
        file.seek(self.read)
        while data := file.read(CHUNK):
            end = data.rfind(b"\n") + 1
            if not end and len(data) < CHUNK:  # the rest of the line is still to come
                return
            _add(self.splits, parsed(data[:end]))
            self.read += end or len(data)
            self.tail = data[: end or len(data)][-TAIL:]
            file.seek(self.read)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def parsed(data: bytes) -> list[dict[str, Any]]:
    """Return the complete lines of metrics in `data`, without those that are torn or lack a step or a time."""
    texts = data.decode(errors="replace").split("\n")[:-1]
    try:  # all at once, which takes half the time
        lines = json.loads(f"[{','.join(texts)}]", parse_constant=lambda _: None)
        if len(lines) != len(texts):
            raise ValueError
    except (ValueError, RecursionError):
        lines = map(parse_line, texts)
    return [line for line in lines if isinstance(line, dict) and is_line(line)]
