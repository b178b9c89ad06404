"""The readers of text files: each yields the documents of one format as pieces.

A piece is `(text, ends)`: some characters, and True on the last piece of a document. A piece has at most `blocks.BLOCK`
characters and a separator's, so memory use is flat downstream. Empty documents are skipped.
"""

import csv
import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.text import blocks
from milepost.text.blocks import PACKED, blocks_of, check_length, lines_of, normalized
from milepost.text.columnar import SUFFIXES as COLUMNAR
from milepost.text.columnar import columnar_rows, columns_of
from milepost.text.errors import DataError, TextFieldError

Piece = tuple[str, bool]

END_OF_TEXT = "<|endoftext|>"  # as GPT-2 writes it; in a text it is ordinary text

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of CSV, in the order in which they are tried
SPACE = re.compile(r"\s*")
# Of a JSON file: what may come next, and after a mark or a value what may come then.
MARKS = {
    ("list or value", "["): "member or ]",
    ("member or ]", "]"): "end",
    ("comma or ]", ","): "member",
    ("comma or ]", "]"): "end",
}
AFTER_VALUE = {"list or value": "value", "value": "value", "member or ]": "comma or ]", "member": "comma or ]"}
INSIDE = ("member or ]", "member", "comma or ]")  # of a list


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise DataError if a key is repeated: which of its values is meant is not known."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"the key {repeated!r:.60} is there twice: leave one of its values out")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True)
class Reading:
    """How files become text.

    `text_field` is the column of a CSV and the member of a JSON object that holds the text. `separator` ends a document
    within a .txt or .md file, and is no text itself; empty: a file is one document. `verbatim` reads as versions
    did that did not normalize text: line ends and marks inside as they are, only the formats VERBATIM. `first_types` reads
    in folders only what versions before parquet read. Remarks on a file go to `note`. `prompt_field` and `answer_field` are those of conversations, whose rows have a `form` of
    milepost.text.conversations.
    """

    text_field: str = "text"
    prompt_field: str | None = None
    answer_field: str | None = None
    form: str = ""
    separator: str = ""
    verbatim: bool = False
    first_types: bool = False
    note: Callable[[str], None] = lambda _: None


PLAIN = Reading()


def _read_text(path: Path, reading: Reading) -> Iterator[Piece]:
    held, separator = "", reading.separator
    for text in blocks_of(path, verbatim=reading.verbatim):
        *documents, held = (held + text).split(separator) if separator else [held + text]
        yield from ((document, True) for document in documents if document)
        kept = len(separator) or len(text)  # a separator may begin in them, and then follows some text of its document
        if len(held) > kept:
            yield held[:-kept], False
            held = held[-kept:]
    if held:
        yield held, True


def _read_code(path: Path, reading: Reading) -> Iterator[Piece]:
    return _read_text(path, dataclasses.replace(reading, separator=""))


# JSON


def _read_jsonl(path: Path, reading: Reading) -> Iterator[Piece]:
    for where, row in _jsonl_rows(path, reading, ()):
        yield from _slices(_text_in(row, reading, where=where), reading)


def _jsonl_rows(path: Path, reading: Reading, _: Collection[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines_of(path, verbatim=reading.verbatim), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = json.loads(line) if reading.verbatim else JSON.decode(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid JSON ({error}): expected one object per line") from None
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if isinstance(row, list):
                raise DataError(f"{where}: expected an object, found a list: name a file of one list .json")
            yield where, row


def _json_rows(path: Path, reading: Reading, _: Collection[str]) -> Iterator[tuple[str, Any]]:
    return ((f"{path} record {number}", value) for number, value in enumerate(_json_values(path), 1))


def _read_json(path: Path, reading: Reading) -> Iterator[Piece]:
    for where, value in _json_rows(path, reading, ()):
        text = value if isinstance(value, str) else _text_in(value, reading, where=where)
        yield from _slices(_checked(text, reading, where=where), reading)


def _json_values(path: Path) -> Iterator[Any]:
    """Yield the members of a JSON list, or the values that follow one another. Only one of them is held in memory."""
    held, enough, number, due = "", 1, 1, "list or value"
    for block, last in _with_last(blocks_of(path)):
        held += block
        if len(held) < enough and not last:
            continue
        at = _after_space(held, 0)
        while at < len(held):
            if following := MARKS.get((due, held[at])):
                due, at = following, _after_space(held, at + 1)
                continue
            if problem := _misplaced(held[at], due):
                raise DataError(f"{path} record {number} is not valid JSON ({problem})")
            try:
                value, end = JSON.raw_decode(held, at)
            except DataError as error:
                raise DataError(f"{path} record {number}: {error}") from None
            except (ValueError, RecursionError) as error:
                if last:
                    raise DataError(f"{path} record {number} is not valid JSON ({error})") from None
                break  # its end may be in the next block
            yield value
            number, due, at = number + 1, AFTER_VALUE[due], _after_space(held, end)
        held = held[at:]
        check_length(len(held), where=f"{path} record {number}", what="it is not valid JSON, or")
        enough = min(2 * len(held), blocks.RECORD_LIMIT + 1)  # else a long value would be parsed again for each block
    if due in INSIDE:
        raise DataError(f"{path} ends within its list, after record {number - 1}: copy or download it again")


def _misplaced(character: str, due: str) -> str:
    """Return why neither a mark nor a value may begin with this character here; "" if a value may."""
    if due == "end":
        return "its list ends before it: leave the rest out"
    if due == "comma or ]":
        return "no comma stands before it: add one"
    if character == "," and due == "value":
        return "a comma stands before it outside of a list: put [ and ] around all of them, or leave the commas out"
    if character == ",":
        return "a comma stands in its place: leave that out"
    return "a comma stands before the end of the list: leave that out" if (due, character) == ("member", "]") else ""


def _after_space(text: str, at: int) -> int:
    """Return the position of the next character that is not a space."""
    found = SPACE.match(text, at)
    return found.end() if found else at


def _with_last(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each text with False, then an empty text with True."""
    yield from ((text, False) for text in texts)
    yield "", True


def _text_in(row: Any, reading: Reading, *, where: str) -> str:
    """Return the member `text_field` of a JSON object. Raise DataError if it is missing or not text."""
    field = reading.text_field
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a member {field!r}, found a {type(row).__name__}")
    if field not in row:
        if talks := next((key for key, value in row.items() if _are_messages(value)), None):
            problem = f"its conversation is in {talks!r:.60}, and not in a form that is read here"
            raise DataError(f"{where}: {problem}: write it as messages, each with role and content")
        if rows := next((key for key, value in row.items() if _are_rows(value, field)), None):
            raise DataError(f"{where}: its rows are in {rows!r:.60}: save that list as a file of its own")
        raise TextFieldError(f"{where}: expected a member {field!r}, found {listed(list(row))}")
    return _checked(row[field], reading, where=where)


def _are_messages(value: Any) -> bool:
    """Whether a value is messages in another form, such as {"from", "value"}."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, dict) and {"role", "from"} & {*m} for m in value)
    )


def _are_rows(value: Any, field: str) -> bool:
    """Whether a value is a list of objects with a text, as of a JSON file that is one object around its rows."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) and field in row for row in value)


def _checked(text: Any, reading: Reading, *, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: {reading.text_field!r} is {text!r:.60}, not text: fill it or leave the row out")
    if re.search("[\ud800-\udfff]", text):  # JSON can write them, UTF-8 cannot
        raise DataError(f"{where}: the text holds half of a surrogate pair, which is not a character")
    return text


def listed(names: list[str]) -> str:
    """Return the first ten names joined by commas, and how many more there are."""
    shown = ", ".join(names[:10]) or "nothing"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


# CSV


def csv_rows(path: Path, lines: Iterable[str], *, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the number of its last line. Raise DataError for a row above RECORD_LIMIT, before it is whole."""
    size, begins = 0, 1

    def counted() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            check_length(size, where=f"{path} line {begins}", what="a quote is never closed, or a row")
            yield line

    csv.field_size_limit(blocks.RECORD_LIMIT)  # the default refuses documents past 128 KB
    rows = csv.reader(counted(), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
            size, begins = 0, rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num} is not valid CSV: {error}") from None


def _read_csv(path: Path, reading: Reading) -> Iterator[Piece]:
    field = reading.text_field
    header, rows = _table(path, reading, field)
    if field not in header:
        problem = f"expected a column {field!r} in the first line, found {listed(header)}"
        raise TextFieldError(f"{path}: {problem}")
    column, wider = header.index(field), 0
    if not reading.verbatim:
        _check_named_once(path, header, (field,))
    for number, row in rows:
        if row and len(row) <= column:
            raise DataError(f"{path} line {number}: the row ends before the column {field!r}")
        if row and not reading.verbatim:
            wider += _is_wider(row, header, where=f"{path} line {number}")
        if row:
            yield from _slices(row[column], reading)
    _note_wider(wider, path, reading)


def _table_rows(path: Path, reading: Reading, fields: Collection[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a CSV by the names of its first line."""
    header, rows = _table(path, reading, reading.answer_field or "")
    _check_named_once(path, header, fields)
    wider = 0
    for number, row in rows:
        if row and len(row) < len(header):
            raise DataError(f"{path} line {number}: the row ends before the column {header[len(row)]!r}")
        if row:
            wider += _is_wider(row, header, where=f"{path} line {number}")
            yield f"{path} line {number}", dict(zip(header, row, strict=False))
    _note_wider(wider, path, reading)


def _table(path: Path, reading: Reading, field: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the names in the first line of a CSV that has the column `field`, and the rows below it with their lines."""
    lines = lines_of(path, verbatim=reading.verbatim)
    first = next(lines, "")
    delimiter = _delimiter(path, first, field)
    if delimiter != "," and suffix_of(path.name) == ".csv":
        reading.note(f"{path}: columns are separated by {DELIMITERS[delimiter]}")
    rows = csv_rows(path, itertools.chain([first] if first else [], lines), delimiter=delimiter)
    names = next(rows, (1, list[str]()))[1]
    return [name.strip() for name in names], rows


def _check_named_once(path: Path, header: list[str], fields: Collection[str]) -> None:
    if repeated := next((field for field in fields if header.count(field) > 1), None):
        raise DataError(f"{path}: the first line names the column {repeated!r} twice: rename or remove one of them")


def _is_wider(row: list[str], header: list[str], *, where: str) -> bool:
    """Whether a row has empty cells that the first line does not name.

    Raise DataError if one of them holds something, or if they follow the only column: a text was cut at its separator.
    """
    more = row[len(header) :]
    if any(cell.strip() for cell in more) or (more and len(header) == 1):
        problem = f"the row has {len(row)} columns, the first line names {len(header)}"
        raise DataError(f"{where}: {problem}: put quotes around a text that holds the separator")
    return bool(more)


def _note_wider(count: int, path: Path, reading: Reading) -> None:
    if count:
        what = f"{count} row{'s' * (count > 1)} with more columns than the first line names"
        reading.note(f"{path}: {what}, which are empty; a text that ends with the separator needs quotes")


def _delimiter(path: Path, first: str, field: str) -> str:
    """Return the delimiter with which the first line has the column `field`, else the one with which it has most columns."""
    headers = {delimiter: _columns(first, delimiter) for delimiter in DELIMITERS}
    having = [delimiter for delimiter, names in headers.items() if field in names]
    usual = "\t" if suffix_of(path.name) == ".tsv" else ","
    if usual in having:  # a first line of one column has it with any delimiter
        return usual
    return next(iter(having), max(headers, key=lambda delimiter: (len(headers[delimiter]), delimiter == usual)))


def _columns(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


# Columns


def _read_columns(path: Path, reading: Reading) -> Iterator[Piece]:
    for where, row in columnar_rows(path, (reading.text_field,)):
        yield from _slices(_text_in(row, reading, where=where), reading)


def _column_rows(path: Path, _: Reading, fields: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    return columnar_rows(path, fields)


def _slices(text: str, reading: Reading) -> Iterator[Piece]:
    text = text if reading.verbatim else normalized(text)
    for start in range(0, len(text), blocks.BLOCK):
        yield text[start : start + blocks.BLOCK], start + blocks.BLOCK >= len(text)


def first_row(path: Path) -> Any:
    """Return the first row of a file; where the names of columns are stored apart, those alone; None if the file has none.

    Raise DataError if it cannot be read.
    """
    if suffix_of(path.name) in COLUMNAR:
        return dict.fromkeys(columns_of(path))
    if suffix_of(path.name) in (".csv", ".tsv"):
        first = next(lines_of(path), "")
        return dict.fromkeys(_columns(first, _delimiter(path, first, ""))) or None
    return next((row for _, row in ROWS[suffix_of(path.name)](path, PLAIN, ())), None)


# Of source code; each file is a document.
_CODE = (
    "py pyi js mjs cjs jsx ts tsx c h cc cpp cxx hpp cu cs "
    "rs go java kt scala swift rb php pl lua r jl hs ml ex exs erl clj zig sh bash ps1 sql"
)
CODE = tuple(f".{name}" for name in _CODE.split())
READERS: dict[str, Callable[[Path, Reading], Iterator[Piece]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_columns,
    ".arrow": _read_columns,
    **dict.fromkeys(CODE, _read_code),
}
# Each row with its place. The names are of the fields that are used: of files with columns no others are read.
ROWS: dict[str, Callable[[Path, Reading, Collection[str]], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".parquet": _column_rows,
    ".arrow": _column_rows,
}
SEPARABLE = (".txt", ".md")  # the types in which a separator ends a document
VERBATIM = (*SEPARABLE, ".jsonl", ".csv")  # the types of versions that did not normalize text
FIRST_TYPES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv")  # and of those before parquet
SUPPORTED = f"{', '.join(FIRST_TYPES)}, each also with .gz or .zst, {', '.join(COLUMNAR)}"


def suffix_of(name: str) -> str:
    """Return the suffix that selects the reader of a file name, in lower case and without `.gz` or `.zst`."""
    return os.path.splitext(unpacked_name(name))[1]


def unpacked_name(name: str) -> str:
    """Return a file name in lower case, without `.gz` or `.zst`."""
    base, suffix = os.path.splitext(name.lower())
    return base if suffix in PACKED else name.lower()


def is_first_type(name: str) -> bool:
    """Return whether versions before parquet read a file of this name in a folder."""
    return suffix_of(name) in FIRST_TYPES and not name.lower().endswith(".zst")
