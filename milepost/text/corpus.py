"""Where text comes from: a source given as one string becomes files, files become documents, documents become pieces.

A piece is `(text, ends)`: some characters, and True on the last piece of a document. Pieces are about a million
characters at most, so that everything downstream runs in flat memory. A document without text is left out.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import http.client
import json
import os
import re
import secrets
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

Piece = tuple[str, bool]
Say = Callable[[str], None]

BLOCK = 1 << 20  # bytes read at once, and characters in a piece at most
DOWNLOAD_LIMIT = 1 << 30  # bytes
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class DataError(Exception):
    """Bad or missing data, told in one sentence (exit code 4)."""


@dataclass(frozen=True)
class Corpus:
    """Files that together are the text: `source` as it was given, `name` fit for file names, `paths` in order."""

    source: str
    name: str
    paths: tuple[Path, ...]

    def pieces(self) -> Iterator[Piece]:
        """All text in order, as pieces; DataError where a file cannot be read, naming file and position."""
        for path in self.paths:
            yield from READERS[suffix_of(path.name)](path)


@dataclass(frozen=True)
class Scan:
    """What one pass over a corpus finds; `sha256` covers the text and where its documents end."""

    sha256: str
    characters: int
    documents: int
    alphabet: str  # the different characters, sorted


def open_corpus(
    source: str,
    *,
    data_dir: Path,
    max_download_bytes: int = DOWNLOAD_LIMIT,
    open_url: Callable[[str], Any] | None = None,
) -> Corpus:
    """The corpus named by `source`: a file, folder, glob, https URL or `tinyshakespeare`, or several joined by commas.

    Downloads are kept in `data_dir/.cache/downloads/` and used again. `open_url` opens a URL for reading.
    DataError if there is no such thing.
    """
    whole = os.path.lexists(os.path.expanduser(source))  # a file may have a comma in its name
    parts = [source] if whole else [part.strip() for part in source.split(",") if part.strip()]
    paths: list[Path] = []
    for part in parts:
        if part == "tinyshakespeare":
            paths.append(_tiny_shakespeare(data_dir, open_url or open_https))
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", part):
            paths.append(fetch(part, data_dir=data_dir, max_bytes=max_download_bytes, open_url=open_url or open_https))
        else:
            paths.extend(_local(part))
    if not paths:
        raise DataError(f"the data source {source!r} names nothing: expected a file, folder, glob or https URL")
    name = "_".join(_stem(part) for part in parts)[:40].strip("_")
    return Corpus(source=source, name=name, paths=tuple(paths))


def scan(corpus: Corpus, say: Say | None = None) -> Scan:
    """One pass over `corpus` in flat memory; DataError if there is no text at all."""
    digest = hashlib.sha256()
    seen = np.zeros(0x110000, dtype=bool)  # one flag for each code point
    characters = documents = 0
    progress = Progress(say, "reading")
    for text, ends in corpus.pieces():
        progress.add(add_to_digest(digest, text, ends))
        seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
        characters += len(text)
        documents += ends
    if not characters:
        raise DataError(f"{corpus.source} holds no text: every file of it is empty")
    alphabet = "".join(map(chr, np.flatnonzero(seen).tolist()))
    return Scan(sha256=digest.hexdigest(), characters=characters, documents=documents, alphabet=alphabet)


def add_to_digest(digest: Any, text: str, ends: bool) -> int:
    """Feed a piece to a hash and return its size in UTF-8 bytes; 0xff, never found in UTF-8, marks a document's end."""
    data = text.encode()
    digest.update(data)
    if ends:
        digest.update(b"\xff")
    return len(data)


class Progress:
    """Tells `say` about every two seconds how many MB long work has done."""

    def __init__(self, say: Say | None, verb: str) -> None:
        self._say = say
        self._verb = verb
        self._bytes = 0
        self._next = time.monotonic() + 2

    def add(self, size: int) -> None:
        """Count `size` more bytes of text."""
        self._bytes += size
        if self._say is not None and time.monotonic() >= self._next:
            self._say(f"{self._verb}: {self._bytes / 1e6:,.0f} MB done")
            self._next = time.monotonic() + 2


# Reading a file


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; whatever goes wrong while reading is a DataError."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, *, path: Path, position: int, final: bool) -> tuple[str, int]:
    """Text and how many bytes of `data` it took; unless `final`, a character that is cut off at the end waits."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        where = f"byte {position + error.start} is 0x{data[error.start]:02x}, {error.reason}"
        raise DataError(f"{path} is not valid UTF-8: {where}; save it as UTF-8") from None


def _blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks, exactly as it is, but for a byte order mark at its start."""
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
    """The lines of a file with their ends, split at line feeds only."""
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
    """The member `text` of a line's object; DataError if there is none, or none that is text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}): expected one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a member 'text', found a {type(row).__name__}")
    if "text" not in row:
        raise DataError(f"{where}: expected a member 'text', found {_some(list(row))}")
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a string as 'text', found a {type(text).__name__}")
    if re.search("[\ud800-\udfff]", text):  # JSON can write them, UTF-8 cannot
        raise DataError(f"{where}: 'text' holds half of a surrogate pair, which is no character")
    return text


def _read_csv(path: Path) -> Iterator[Piece]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents past 128 KB
    rows = csv.reader(lines_of(path), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if "text" not in header:
            raise DataError(f"{path}: expected a column 'text' in the first line, found {_some(header)}")
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


# Finding files


def suffix_of(name: str) -> str:
    """The suffix that says how to read a file of this name, in lower case and without `.gz`."""
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _stem(part: str) -> str:
    """A part of a source as [a-z0-9_]: the file's name without suffix, else the folder's."""
    path = Path(re.split("[?#]", part)[0] if "://" in part else os.path.abspath(os.path.expanduser(part)))
    base = path.name.lower().removesuffix(".gz")
    base = os.path.splitext(base)[0] if suffix_of(base) in READERS else base
    words = (re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in (base, path.parent.name))
    return next(filter(None, words), "text")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "nothing"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def _local(part: str) -> list[Path]:
    """The files of a path or a glob, in a fixed order."""
    given = os.path.expanduser(part)
    if os.path.isdir(given):
        return _in_folder(Path(given))
    if os.path.isfile(given):
        if suffix_of(given) not in READERS:
            raise DataError(f"{part}: files of this kind are not read: expected {SUPPORTED}")
        return [Path(given)]
    if os.path.exists(given):
        raise DataError(f"{part} is neither a file nor a folder")
    if glob.has_magic(given):
        return _matching(given)
    raise DataError(f"{part} does not exist: {_nearest(given)}")


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and suffix_of(path.name) in READERS]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise DataError(f"{folder} has no file to read: expected {SUPPORTED}; {_nearest(str(folder / '*'))}")
    return found


def _matching(pattern: str) -> list[Path]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
    found = [path for path in matches if suffix_of(path.name) in READERS]
    if not found and matches:
        raise DataError(f"{pattern}: no matching file is of a kind that is read: expected {SUPPORTED}")
    if not found:
        raise DataError(f"no file matches {pattern}: {_nearest(pattern)}")
    return found


def _nearest(path: str) -> str:
    """What the nearest folder above `path` that exists holds."""
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        return f"{folder} holds {_some(names)}"
    return f"{folder} cannot be listed"


# Fetching


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, but never away from https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith("https://"):
            raise DataError(f"{req.full_url} sends us on to {newurl}, which is not https: name another address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_https(url: str) -> Any:
    """The response of an https address, for reading."""
    request = urllib.request.Request(url, headers={"User-Agent": "milepost"})  # some servers refuse urllib's own name
    return urllib.request.build_opener(_HttpsOnly).open(request, timeout=30)


def fetch(
    url: str,
    *,
    data_dir: Path,
    max_bytes: int = DOWNLOAD_LIMIT,
    open_url: Callable[[str], Any] = open_https,
    sha256: str | None = None,
) -> Path:
    """A local copy of `url`, downloaded unless a whole one is there; the JSON beside it records sha256 and size.

    DataError for anything but https, an unknown suffix, more than `max_bytes`, a broken download, or another hash than
    `sha256`.
    """
    target = data_dir / ".cache" / "downloads" / _download_name(url)
    record = target.with_name(target.name + ".json")
    if not _is_whole(target, record):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            found = _download(url, target, max_bytes=max_bytes, open_url=open_url, sha256=sha256)
            with _atomically(record) as file:
                file.write(json.dumps({"url": url, **found}, indent=1).encode())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(f"{url} could not be fetched: {str(error).strip('<>')}") from error
    return target


def _download_name(url: str) -> str:
    """The file name that a download is kept under; DataError if it is not ours to fetch or could not be read."""
    scheme, _, path = url.partition("://")
    if scheme.lower() != "https":
        raise DataError(f"{url}: only https is fetched: write https:// or download the file and name it")
    name = re.split("[?#]", path)[0].rsplit("/", 1)[-1]
    if suffix_of(name) not in READERS:
        raise DataError(f"{url}: files of this kind are not read: expected {SUPPORTED}")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{safe}"


def _download(
    url: str, target: Path, *, max_bytes: int, open_url: Callable[[str], Any], sha256: str | None
) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    too_large = DataError(f"{url} is larger than {max_bytes:,} bytes: download it yourself and name the file")
    with open_url(url) as response, _atomically(target) as file:
        announced = response.headers.get("Content-Length")
        if announced and int(announced) > max_bytes:
            raise too_large
        while block := response.read(BLOCK):
            size += len(block)
            if size > max_bytes:
                raise too_large
            digest.update(block)
            file.write(block)
        if announced and size != int(announced):
            raise DataError(f"{url} broke off after {size:,} of {int(announced):,} bytes: try again")
        if sha256 and digest.hexdigest() != sha256:
            raise DataError(f"{url} is not the expected file: its sha256 is {digest.hexdigest()}, not {sha256}")
    return {"sha256": digest.hexdigest(), "bytes": size}


@contextlib.contextmanager
def _atomically(target: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `target`, on the disk, when all went well, and is gone when not."""
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_whole(target: Path, record: Path) -> bool:
    try:
        return bool(json.loads(record.read_bytes())["sha256"] == _file_sha256(target))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tiny_shakespeare(data_dir: Path, open_url: Callable[[str], Any]) -> Path:
    local = data_dir / "tinyshakespeare.txt"
    if not local.is_file():
        try:
            return fetch(TINY_SHAKESPEARE_URL, data_dir=data_dir, open_url=open_url, sha256=TINY_SHAKESPEARE_SHA256)
        except DataError as error:
            raise DataError(f"put the text of tiny Shakespeare at {local} and start again, because {error}") from error
    if (found := _file_sha256(local)) != TINY_SHAKESPEARE_SHA256:
        expected = f"expected {TINY_SHAKESPEARE_SHA256} ({TINY_SHAKESPEARE_URL})"
        raise DataError(f"{local} is not tiny Shakespeare: its sha256 is {found}, {expected}; rename or replace it")
    return local
