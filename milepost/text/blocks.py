"""The text of a file in blocks and lines: decompressed, decoded, with normalized line ends, in bounded memory."""

import codecs
import contextlib
import gzip
import importlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from milepost.text.errors import DataError

BLOCK = 1 << 20  # bytes per read, and the most characters of a block
RECORD_LIMIT = 1 << 26  # characters of a line, a row or a JSON value: they are held in memory whole
PACKED = (".gz", ".zst")
UNPACKED_LIMIT = (
    1 << 30
)  # bytes that any packed file may hold; above, it must not be smaller than a MOST_PACKED-th of them
MOST_PACKED = 250  # text is packed to a third or a tenth; gzip can reach a thousandth, zstd more
MARKS = {  # with which other encodings than UTF-8 begin; one of UTF-32 begins as one of UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
LONGEST_MARK = 4  # bytes
# In UTF-16: the high bytes of Latin, Greek, Cyrillic, Hebrew, Arabic, Indic scripts and punctuation, and the share that must be so.
ALPHABETS, MOSTLY = range(0x21), 0.9
SHORTEST = 16  # bytes in which these show
PLANES = 17
POINTER, LONGEST_POINTER = b"version https://git-lfs", 1024  # bytes; longer files are texts
DECODERS: dict[str, Callable[[bytes, str, bool], tuple[str, int]]] = {
    "utf-8": codecs.utf_8_decode, "utf-16-le": codecs.utf_16_le_decode, "utf-16-be": codecs.utf_16_be_decode,
    "utf-32-le": codecs.utf_32_le_decode, "utf-32-be": codecs.utf_32_be_decode,
}  # fmt: skip


def normalized(text: str) -> str:
    """Return a text without a byte order mark at its start, and with "\\n" for "\\r\\n" and for a lone "\\r"."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def blocks_of(path: Path, *, verbatim: bool = False) -> Iterator[str]:
    """Yield the text of a file in blocks, without a byte order mark at its start and with "\\n" at all line ends.

    `verbatim` leaves the line ends as they are. Raise DataError naming the byte that is not UTF-8, or the limit exceeded.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    for text in _decoded(path):
        if text := text if verbatim else newlines.decode(text):
            yield text
    if rest := newlines.decode("", final=True):  # a carriage return at the end
        yield rest


def lines_of(path: Path, *, verbatim: bool = False) -> Iterator[str]:
    """Yield the lines of a file with their line feeds. Raise DataError for a line above RECORD_LIMIT, before it is whole."""
    held: list[str] = []
    number = 1
    for block in blocks_of(path, verbatim=verbatim):
        first, *others = block.split("\n")
        held.append(first)
        for line in others:
            yield "".join(held) + "\n"
            held, number = [line], number + 1
        check_length(sum(map(len, held)), where=f"{path} line {number}", what="the line")
    if rest := "".join(held):
        yield rest


def check_length(characters: int, *, where: str, what: str) -> None:
    """Raise DataError if a record of so many characters is above RECORD_LIMIT."""
    if characters > RECORD_LIMIT:
        remedy = "divide it into shorter records, or save the text as .txt, where any length is read"
        raise DataError(f"{where}: {what} has more than {RECORD_LIMIT:,} characters: {remedy}")


def decoded(data: bytes) -> str:
    """Return the text of UTF-8, or of UTF-16 or UTF-32 if it begins with its mark. Raise UnicodeDecodeError for anything else."""
    if (encoding := _encoding(data)) == "utf-8":
        _check_marked(data)
    return data.decode(encoding)


def _encoding(data: bytes) -> str:
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")


def _check_marked(data: bytes) -> None:
    """Raise UnicodeDecodeError if bytes without a mark are not UTF-8, though they may be valid in it."""
    if name := _unmarked(data):
        at = data.index(0)
        raise UnicodeDecodeError("utf-8", data, at, at + 1, f"as {name} without its byte order mark has")


def _unmarked(data: bytes) -> str:
    """Return "UTF-16" or "UTF-32" if bytes without a mark are text in it, though they may be valid UTF-8; else "".

    The high byte of a character is zero for ASCII, and low for other alphabets; the low byte is not zero. In UTF-32 two more
    follow: one of 17 planes, and zero.
    """
    if [byte == 0 for byte in data[:4]] in ([True, False, True, False], [False, True, False, True]):
        return "UTF-16"  # the first two characters are ASCII (RFC 4627, section 3)
    if len(data) < SHORTEST or b"\0" not in data:
        return ""
    for low, high in ((data[0::2], data[1::2]), (data[1::2], data[0::2])):
        if b"\0" in high and b"\0" not in low and _is_alphabetic(high):
            return "UTF-16"
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        low, high, plane, zero = (data[at::4] for at in order)
        if any(low) and _is_alphabetic(high) and max(plane) < PLANES and not any(zero):
            return "UTF-32"
    return ""


def _is_alphabetic(high: bytes) -> bool:
    return sum(map(high.count, ALPHABETS)) >= MOSTLY * len(high)


def _decoded(path: Path) -> Iterator[str]:
    position, rest, encoding = 0, b"", ""
    with _opened(path) as file:
        while True:
            block = file.read(BLOCK if position else max(BLOCK, LONGEST_MARK))
            data = rest + block
            encoding = encoding or _encoding(data)
            text, used = _decode(data, encoding, path=path, position=position, final=not block)
            if position == 0:
                text = text.removeprefix("\ufeff")
            position, rest = position + used, data[used:]
            _check_unpacked(path, position)
            if text:
                yield text
            if not block:
                return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield the file's bytes, decompressed. Read errors become DataError."""
    zstd = _zstd(path) if path.suffix.lower() == ".zst" else None
    opener: Any = zstd.open if zstd else gzip.open if path.suffix.lower() == ".gz" else open
    damaged = (EOFError, zlib.error, gzip.BadGzipFile, *([zstd.ZstdError] if zstd else []))
    try:
        refuse_pointer(path)
        with opener(path, "rb") as file:
            yield file
    except damaged as error:
        kind = "zstd" if zstd else "gzip"
        raise DataError(f"{path} is a damaged {kind} file ({error}): copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _zstd(path: Path) -> Any:
    """Return Python's module for zstd, or before 3.14 its backport. Raise DataError if there is none."""
    for module in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    raise DataError(f"{path} is read with backports.zstd, which is not installed: pip install backports.zstd")


def refuse_pointer(path: Path) -> None:
    """Raise DataError if git keeps the file elsewhere, and only its pointer is there."""
    with open(path, "rb") as file:
        begin = file.read(LONGEST_POINTER + 1)
    if len(begin) <= LONGEST_POINTER and begin.startswith(POINTER) and b"\noid " in begin:
        raise DataError(f"{path} is a git-lfs pointer, not the text itself: run `git lfs pull` in its folder")


def _decode(data: bytes, encoding: str, *, path: Path, position: int, final: bool) -> tuple[str, int]:
    """Return the text of `data` and how many bytes it used. Unless `final`, a character cut off at the end is left over."""
    try:
        if position == 0 and encoding == "utf-8":
            _check_marked(data)
        return DECODERS[encoding](data, "strict", final)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} {not_decoded(error, position)}") from None


def not_decoded(error: UnicodeDecodeError, position: int = 0) -> str:
    """Return the problem with a file that is not the text it should be, and the remedy. `position` is where its data begins.

    Windows wrote text in its own code page for decades. That is named where the byte is a letter there, and never assumed.
    """
    byte = error.object[error.start]
    where = f"byte {position + error.start} is 0x{byte:02x}, {error.reason}"
    letter = bytes([byte]).decode("cp1252", "replace")
    guess = f" ({letter!r} in Windows-1252)" if error.encoding == "utf-8" and letter.isalpha() else ""
    return (
        f"is not valid {error.encoding[:6].upper()}: {where}{guess}; save it as UTF-8, as editors offer under Save As"
    )


def _check_unpacked(path: Path, size: int) -> None:
    """Raise DataError if a small file unpacks to so many bytes that it can hardly be a text."""
    if size > UNPACKED_LIMIT and size > MOST_PACKED * os.path.getsize(path):
        what = f"it unpacks to more than {UNPACKED_LIMIT:,} bytes and more than {MOST_PACKED} times its size"
        raise DataError(f"{path}: {what}: if that is meant, unpack it yourself and set the path of the result")
