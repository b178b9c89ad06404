"""Token ids in files: a text is tokenized once per text, tokenizer and split."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np

from milepost.files import (
    APPEND,
    flush_to_disk,
    in_words,
    is_unreachable,
    lacks,
    new_folder,
    remove,
    remove_abandoned,
    write_json,
)
from milepost.text.chunks import LongWordError, rechunk, whole_documents
from milepost.text.corpus import Corpus
from milepost.text.errors import DataError
from milepost.text.prepared import Prepared
from milepost.text.readers import Piece
from milepost.text.scan import ByteProgress, Log, Scan, add_to_digest, forget_scan, ids_digest
from milepost.text.stamps import file_sha256
from milepost.text.token_arrays import Tokens, opened
from milepost.text.tokenization.base import Tokenizer

FORMAT = 1  # raise it when the same inputs give other files
FILES = ("train.npy", "validation.npy")
SUMS = "sha256.json"  # the sha256 of both: a flipped bit in them would change the training and nothing would notice
CHUNK = 1 << 18  # characters tokenized at once
THREADS = min(8, os.cpu_count() or 1)  # more would wait for the thread that reads, hashes and writes
ATTEMPTS = 10  # at building the folder while other processes build or remove it

# Consecutive pieces, and what the first one does: it begins the text, or another document of it, or continues one.
T = TypeVar("T")
Start = Literal["text", "document", ""]
Group = tuple[Start, list[Piece]]


@dataclass(frozen=True)
class TokenSplit:
    """Token ids of both parts of a text: (N,), uint16, or uint32 for large vocabularies."""

    train: Tokens
    validation: Tokens


def prepare(
    corpus: Corpus,
    scan: Scan,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache_dir: Path,
    log: Log | None = None,
) -> TokenSplit:
    """Return the tokens of `corpus`, from `cache_dir` if they are there and intact, else tokenized into it.

    The text is split at character int(characters * (1 - validation_fraction)), training text first, and each part is tokenized
    separately. Within a part, the tokenizer's end of text, else "\\n", separates documents, and the token that begins a text, if
    it has one, precedes each. Raise DataError if the text differs
    from what `scan` saw or the files cannot be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    at = split_at(scan.characters, validation_fraction)

    def parts() -> Iterator[tuple[int, Piece]]:
        return cut(verified(corpus, corpus.pieces(), scan, cache_dir, ByteProgress(log, "tokenizing")), at)

    encode = functools.partial(token_ids, tokenizer=tokenizer)
    folder = cache_dir / _key(scan, tokenizer, validation_fraction)
    try:
        arrays = open_or_build(
            folder, dict.fromkeys(FILES, dtype), lambda hidden: _build(hidden, parts(), encode, dtype)
        )
        return TokenSplit(*arrays)
    except LongWordError as error:
        raise DataError(f"{corpus.source}: {error}") from error


def prepare_ids(
    corpus: Corpus,
    prepared: Prepared,
    scan: Scan,
    *,
    validation_fraction: float,
    cache_dir: Path,
    log: Log | None = None,
) -> TokenSplit:
    """Return the ids of prepared data, from `cache_dir` if they are there and intact, else copied into it, where no other program
    writes.

    The first int(ids * (1 - validation_fraction)) are the training part. Raise DataError if the files differ from what `scan` saw.
    """
    dtype, at = np.dtype(prepared.vocabulary.dtype), split_at(prepared.count, validation_fraction)

    def parts() -> Iterator[tuple[int, np.ndarray]]:
        digest, position, progress = ids_digest(prepared), 0, ByteProgress(log, "copying")
        for ids in prepared.ids():
            progress.add(ids.nbytes)
            digest.update(ids)
            room = min(max(0, at - position), len(ids))
            position += len(ids)
            yield from ((part, piece) for part, piece in enumerate((ids[:room], ids[room:])) if len(piece))
        _check_digest(digest, corpus, scan, cache_dir)

    key = hashlib.sha256(f"{scan.sha256} ids {float(validation_fraction)!r} {FORMAT}".encode()).hexdigest()[:32]
    return TokenSplit(
        *open_or_build(
            cache_dir / key, dict.fromkeys(FILES, dtype), lambda hidden: _build(hidden, parts(), iter, dtype)
        )
    )


def split_at(characters: int, validation_fraction: float) -> int:
    """Return the position of the first character of the validation part."""
    return int(characters * (1 - Fraction(str(validation_fraction))))  # exact where floats are not


def _key(scan: Scan, tokenizer: Tokenizer, validation_fraction: float) -> str:
    parts = f"{scan.sha256} {tokenizer.digest} {float(validation_fraction)!r} {FORMAT}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def verified(
    corpus: Corpus, pieces: Iterable[Piece], scan: Scan, cache_dir: Path, progress: ByteProgress
) -> Iterator[Piece]:
    """Yield the pieces of `corpus`. Raise DataError after the last one if they are not the text that was scanned."""
    digest = hashlib.sha256()
    for text, ends in pieces:
        progress.add(add_to_digest(digest, text, ends))
        yield text, ends
    _check_digest(digest, corpus, scan, cache_dir)


def _check_digest(digest: Any, corpus: Corpus, scan: Scan, cache_dir: Path) -> None:
    if digest.hexdigest() != scan.sha256:
        forget_scan(corpus, cache_dir=cache_dir)  # else the next start would trust it again
        raise DataError(f"{corpus.source} changed while it was read: start again")


def cut(pieces: Iterable[Piece], at: int) -> Iterator[tuple[int, Piece]]:
    """Yield the pieces with the part they belong to: 0 before character `at` of the text, 1 from there."""
    position = 0
    for text, ends in pieces:
        room = min(max(0, at - position), len(text))
        position += len(text)
        if room:
            yield 0, (text[:room], ends and room == len(text))
        if room < len(text):
            yield 1, (text[room:], ends)


def token_ids(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of one part in chunks, with a separator between documents."""
    encode = functools.partial(_group_ids, tokenizer=tokenizer)
    if tokenizer.splits_at == "character":  # these take no longer than reading the text: threads would not help
        return map(encode, _groups(pieces))
    if tokenizer.splits_at == "document":
        return _in_threads(encode, _groups(whole_documents(pieces)))
    return _in_threads(encode, _groups(rechunk(pieces, size=CHUNK, at=tokenizer.splits_at)))


def _groups(pieces: Iterable[Piece]) -> Iterator[Group]:
    """Yield groups of consecutive pieces of about CHUNK characters in total, however short each piece is."""
    start: Start = "text"
    room, group = CHUNK, []
    for text, ends in pieces:
        group.append((text, ends))
        room -= len(text) + 1
        if room <= 0:
            yield start, group
            start, room, group = "document" if ends else "", CHUNK, []
    if group:
        yield start, group


def _group_ids(group: Group, tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of consecutive pieces, (N,)."""
    start, pieces = group
    end, begin = tokenizer.end_of_text, tokenizer.begin_of_text
    arrays: list[Tokens] = []
    for text, ends in pieces:
        if start == "document":
            arrays.append(tokenizer.encode_array("\n") if end is None else np.array([end], dtype=np.uint32))
        if start and begin is not None:
            arrays.append(np.array([begin], dtype=np.uint32))
        arrays.append(tokenizer.encode_array(text) if start else tokenizer.encode_part(text, after="text"))
        start = "document" if ends else ""
    return np.concatenate(arrays)


def _in_threads(encode: Callable[[Group], np.ndarray], groups: Iterable[Group]) -> Iterator[np.ndarray]:
    """Yield `encode(group)` in order, while the threads work on the next groups.

    Threads suffice: tiktoken and tokenizers release the interpreter's lock.
    """
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for group in groups:
            waiting.append(pool.submit(encode, group))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


# Files


def open_or_build(folder: Path, dtypes: Mapping[str, np.dtype], build: Callable[[Path], None]) -> list[Tokens]:
    """Return the arrays in the files of `folder`, by the names in `dtypes`, (N,) each; see token_arrays.

    `build` writes them into a hidden folder if they are missing or damaged; other processes may do the same. Raise DataError
    if they cannot be written.
    """
    try:
        return _open_built(folder, dtypes, build)
    except OSError as error:
        remedy = "free space and fix permissions there; a read-only checkout uses XDG_CACHE_HOME instead"
        problem = f"the token files in {folder.parent} cannot be written ({in_words(error)})"
        raise DataError(f"{problem}: {remedy}") from error


def _open_built(folder: Path, dtypes: Mapping[str, np.dtype], build: Callable[[Path], None]) -> list[Tokens]:
    for _ in range(ATTEMPTS):
        exists = os.path.lexists(folder)
        if found := _open(folder, dtypes):
            return found
        if exists:
            _discard(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        try:
            with new_folder(folder) as hidden:
                build(hidden)
                write_json(hidden / SUMS, {name: file_sha256(hidden / name) for name in dtypes})
        except OSError:
            if not os.path.lexists(folder):  # else another process was faster
                raise
    raise DataError(f"the token files in {folder} cannot be replaced: remove that folder")


def _build(
    folder: Path, parts: Iterable[tuple[int, T]], encode: Callable[[Iterable[T]], Iterable[np.ndarray]], dtype: np.dtype
) -> None:
    for name in FILES:
        write_array(folder / name, [], dtype)
    for part, group in itertools.groupby(parts, key=itemgetter(0)):
        write_array(folder / FILES[part], encode(piece for _, piece in group), dtype)


def _discard(folder: Path) -> None:
    """Delete a damaged folder, or what has its name, so that nobody sees it half deleted."""
    with contextlib.suppress(OSError):
        folder.unlink() if folder.is_symlink() else remove([folder])


def write_array(path: Path, arrays: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Stream ids into a .npy file. Its length is known only at the end, so the header is written twice, or where a file is
    written once from its beginning to its end, after the ids are in a temporary file.
    """
    path.unlink(missing_ok=True)  # some systems let nobody write a file again
    with open(path, "xb") as file:
        if APPEND in lacks(path.parent):
            with tempfile.TemporaryFile() as ids_only:
                count = _stream(ids_only, arrays, dtype)
                ids_only.seek(0)
                _write_header(file, count, dtype)
                shutil.copyfileobj(ids_only, file)
        else:
            _write_header(file, 0, dtype)
            count = _stream(file, arrays, dtype)
            file.seek(0)
            _write_header(file, count, dtype)  # of the same size: numpy pads it for any length
        file.flush()
        flush_to_disk(file.fileno())


def _stream(file: IO[bytes], arrays: Iterable[np.ndarray], dtype: np.dtype) -> int:
    """Write the ids; return their number."""
    count = 0
    for ids in arrays:
        file.write(ids.astype(dtype).tobytes())
        count += len(ids)
    return count


def _write_header(file: object, count: int, dtype: np.dtype) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]


def _open(folder: Path, dtypes: Mapping[str, np.dtype]) -> list[Tokens] | None:
    """Return the arrays of a folder; None if one is missing, damaged, or not of the expected size and type."""
    if not all(os.path.isfile(folder / name) for name in (*dtypes, SUMS)):  # opening a named pipe would block
        return None
    arrays: list[Tokens] = []
    for name, dtype in dtypes.items():
        try:
            if json.loads((folder / SUMS).read_text(encoding="utf-8"))[name] != file_sha256(folder / name):
                return None
            array = opened(folder / name)
            if array.dtype != dtype or array.ndim != 1:
                return None
        except Exception as error:  # whatever is wrong with a cache, it is rebuilt
            if is_unreachable(error):
                raise
            return None
        arrays.append(array)
    return arrays
