"""Text as token ids in memory-mapped files, tokenized once for each text, tokenizer and split."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter
from pathlib import Path

import numpy as np

from milepost.text.corpus import Corpus, DataError, Piece, Progress, Say, Scan, add_to_digest, sync_folder
from milepost.text.tokenization import Tokenizer, rechunk

FORMAT = 1  # raise it when the same inputs give other files
FILES = ("train.npy", "validation.npy")
SUMS = "sha256.json"  # what the two must hash to: a flipped bit in them would change what is learned, and nothing would tell
CHUNK = 1 << 18  # characters tokenized at once
THREADS = min(8, os.cpu_count() or 1)  # more would wait for the one that reads, hashes and writes
ABANDONED = 24 * 3600  # seconds without a write after which a half-built folder belongs to no living process

Group = tuple[
    bool, list[Piece]
]  # pieces in a row, and whether the first of them begins a document that is not the first


@dataclass(frozen=True)
class TokenSplit:
    """Token ids of both parts of a text: read-only memory maps, uint16 or for large vocabularies uint32, (N,)."""

    train: np.ndarray
    validation: np.ndarray


def prepare(
    corpus: Corpus,
    scan: Scan,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache_dir: Path,
    say: Say | None = None,
) -> TokenSplit:
    """The tokens of `corpus`, from `cache_dir` if they are there undamaged, else tokenized into it.

    The text is split at character int(characters * (1 - validation_fraction)), training text first, and each side is
    tokenized on its own. Within a side the tokenizer's end of text, else "\\n", stands between documents. DataError
    if the text is no longer what `scan` saw or the files cannot be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    folder = cache_dir / _key(scan, tokenizer, validation_fraction)
    found = _open(folder, dtype)
    if found is None:
        at = split_at(scan.characters, validation_fraction)
        pieces = _checked(corpus, scan, Progress(say, "tokenizing"))
        try:
            found = _build(folder, cut(pieces, at), tokenizer=tokenizer, dtype=dtype)
        except OSError as error:
            raise DataError(f"the token files in {cache_dir} cannot be written: {error}") from error
    return found


def split_at(characters: int, validation_fraction: float) -> int:
    """The character of a text with which its validation part begins."""
    return int(characters * (1 - Fraction(str(validation_fraction))))  # exact where floats are not


def _key(scan: Scan, tokenizer: Tokenizer, validation_fraction: float) -> str:
    parts = f"{scan.sha256} {tokenizer.digest} {float(validation_fraction)!r} {FORMAT}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _checked(corpus: Corpus, scan: Scan, progress: Progress) -> Iterator[Piece]:
    """The pieces of `corpus`; DataError at their end if they are not the text that was scanned."""
    digest = hashlib.sha256()
    for text, ends in corpus.pieces():
        progress.add(add_to_digest(digest, text, ends))
        yield text, ends
    if digest.hexdigest() != scan.sha256:
        raise DataError(f"{corpus.source} changed while it was read: start again")


def cut(pieces: Iterable[Piece], at: int) -> Iterator[tuple[int, Piece]]:
    """Pieces with the side they are on: 0 before character `at` of the text, 1 from there."""
    position = 0
    for text, ends in pieces:
        room = min(max(0, at - position), len(text))
        position += len(text)
        if room:
            yield 0, (text[:room], ends and room == len(text))
        if room < len(text):
            yield 1, (text[room:], ends)


def token_ids(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of one side in chunks, with a separator between documents and none after the last."""
    encode = functools.partial(_group_ids, tokenizer=tokenizer)
    if tokenizer.kind in ("char", "byte"):  # these may be cut anywhere, and take no longer than reading the text
        return map(encode, _groups(pieces))
    return _in_threads(encode, _groups(rechunk(pieces, size=CHUNK)))


def _groups(pieces: Iterable[Piece]) -> Iterator[Group]:
    """Pieces in a row that have about CHUNK characters together, however short each of them is."""
    between, room, group = False, CHUNK, []
    for text, ends in pieces:
        group.append((text, ends))
        room -= len(text) + 1
        if room <= 0:
            yield between, group
            between, room, group = ends, CHUNK, []
    if group:
        yield between, group


def _group_ids(group: Group, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of pieces in a row, (N,)."""
    between, pieces = group
    arrays = []
    for text, ends in pieces:
        if between:
            end = tokenizer.end_of_text
            arrays.append(tokenizer.encode_array("\n") if end is None else np.array([end], dtype=np.uint32))
        arrays.append(tokenizer.encode_array(text))
        between = ends
    return np.concatenate(arrays)


def _in_threads(encode: Callable[[Group], np.ndarray], groups: Iterable[Group]) -> Iterator[np.ndarray]:
    """What `encode` makes of each group, in their order; the next ones are under way meanwhile, one for each thread.

    Threads, because tiktoken and tokenizers work outside the interpreter's lock.
    """
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for group in groups:
            waiting.append(pool.submit(encode, group))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        yield from (each.result() for each in waiting)


# Files


def _build(folder: Path, sides: Iterable[tuple[int, Piece]], *, tokenizer: Tokenizer, dtype: np.dtype) -> TokenSplit:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        for name in FILES:
            _write(temporary / name, [], dtype)
        for side, group in itertools.groupby(sides, key=itemgetter(0)):
            _write(temporary / FILES[side], token_ids((piece for _, piece in group), tokenizer), dtype)
        (temporary / SUMS).write_text(json.dumps({name: _digest(temporary / name) for name in FILES}), encoding="utf-8")
        sync_folder(temporary)
        return _reveal(temporary, folder, dtype)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, arrays: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Stream ids into a .npy file, whose length is known only at the end."""
    count = 0
    with open(path, "wb") as file:
        _write_header(file, 0, dtype)
        for ids in arrays:
            file.write(ids.astype(dtype).tobytes())
            count += len(ids)
        file.seek(0)
        _write_header(file, count, dtype)  # takes the same room: numpy pads it for any length
        file.flush()
        os.fsync(file.fileno())


def _write_header(file: object, count: int, dtype: np.dtype) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]


def _open(folder: Path, dtype: np.dtype) -> TokenSplit | None:
    """The token files of a folder, or None if any is missing, damaged or not of the size and type that its header says."""
    arrays = []
    if not all(map(os.path.isfile, (folder / name for name in (*FILES, SUMS)))):  # a pipe would be waited for
        return None
    for name in FILES:
        try:
            if json.loads((folder / SUMS).read_text(encoding="utf-8"))[name] != _digest(folder / name):
                return None
            array = np.load(folder / name, mmap_mode="r")
            end = array.offset + array.nbytes
            if array.dtype != dtype or array.ndim != 1 or os.path.getsize(folder / name) != end:
                return None
        except Exception:  # whatever is wrong with a cache, it is made again
            return None
        arrays.append(array)
    return TokenSplit(*arrays)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reveal(temporary: Path, folder: Path, dtype: np.dtype) -> TokenSplit:
    """Give a finished folder its name unless another process was faster; a damaged one there is moved aside."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        if found := _open(folder, dtype):
            return found
        aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
    raise DataError(f"the token files in {folder} cannot be replaced: remove that folder")


def _sweep(cache_dir: Path) -> None:
    """Remove half-built folders that a killed process left behind."""
    for folder in cache_dir.glob(".*-*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
