"""The readers of text files: each yields the documents of one format as pieces.

A piece is `(text, ends)`: some characters, and True on the last piece of a document. A piece has at most BLOCK characters,
so memory use is flat downstream. Empty documents are skipped.
"""

import codecs
import contextlib
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from milepost.text.errors import DataError

Piece = tuple[str, bool]

BLOCK = 1 << 20  # bytes per read, and the most characters of a piece


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield the file's bytes, decompressed. Read errors become DataError."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, *, path: Path, position: int, final: bool) -> tuple[str, int]:
    """Return the text of `data` and how many bytes it used. Unless `final`, a character cut off at the end is left over."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        where = f"byte {position + error.start} is 0x{data[error.start]:02x}, {error.reason}"
        raise DataError(f"{path} is not valid UTF-8: {where}; save it as UTF-8") from None


def _blocks(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks, unchanged except for a byte order mark at its start."""
    position, rest, final = 0, b"", False
    with _opened(path) as file:
        while not final:
            block = file.read(BLOCK)
            final = not block
            data = rest + block
            text, used = _decode(data, path=path, position=position, final=final)
            if position == 0:
                text = text.removeprefix("\ufeff")
            position, rest = position + used, data[used:]
            if text:
                yield text


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a file with their line ends, split at line feeds only."""
    position = 0
    with _opened(path) as file:
        for line in file:
            text, _ = _decode(line, path=path, position=position, final=True)
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(line)


def _read_text(path: Path) -> Iterator[Piece]:
    held = ""
    for text in _blocks(path):
        if held:
            yield held, False
        held = text
    if held:
        yield held, True


def _read_jsonl(path: Path) -> Iterator[Piece]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield from _slices(_json_text(line, where=f"{path} line {number}"))


def _json_text(line: str, *, where: str) -> str:
    """Return the member `text` of a line's JSON object. Raise DataError if it is missing or not text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}): expected one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a member 'text', found a {type(row).__name__}")
    if "text" not in row:
        raise DataError(f"{where}: expected a member 'text', found {listed(list(row))}")
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a string as 'text', found a {type(text).__name__}")
    if re.search("[\ud800-\udfff]", text):  # JSON can write them, UTF-8 cannot
        raise DataError(f"{where}: 'text' holds half of a surrogate pair, which is not a character")
    return text


def listed(names: list[str]) -> str:
    """Return the first ten names joined by commas, and how many more there are."""
    shown = ", ".join(names[:10]) or "nothing"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def _read_csv(path: Path) -> Iterator[Piece]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents past 128 KB
    rows = csv.reader(lines_of(path), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if "text" not in header:
            raise DataError(f"{path}: expected a column 'text' in the first line, found {listed(header)}")
        column = header.index("text")
        for row in rows:
            if row and len(row) <= column:
                raise DataError(f"{path} line {rows.line_num}: the row ends before the column 'text'")
            if row:
                yield from _slices(row[column])
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num} is not valid CSV: {error}") from None


def _slices(text: str) -> Iterator[Piece]:
    for start in range(0, len(text), BLOCK):
        yield text[start : start + BLOCK], start + BLOCK >= len(text)


READERS: dict[str, Callable[[Path], Iterator[Piece]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}
SUPPORTED = f"{', '.join(READERS)}, each also with .gz"


def suffix_of(name: str) -> str:
    """Return the suffix that selects the reader of a file name, in lower case and without `.gz`."""
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]
