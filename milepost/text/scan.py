"""One pass over a corpus: its fingerprint, its length and its alphabet, remembered until a file changes."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milepost.text.corpus import Corpus
from milepost.text.errors import DataError
from milepost.text.prepared import Prepared
from milepost.text.readers import END_OF_TEXT, SEPARABLE, suffix_of
from milepost.text.stamps import forget, remembered

Log = Callable[[str], None]

IDS_RECORD = "ids1"  # of prepared data
RECORD, FOLDER = "scan4", "scans"  # raise the number when the same files give another Scan
VERBATIM_RECORD = "scan1"  # of files read as they are, which is how the first version read all
MOST_NOTES = 3
LOG_SECONDS = 2


@dataclass(frozen=True)
class Scan:
    """What one pass over a corpus finds. `sha256` covers the text and where its documents end."""

    sha256: str
    characters: int
    documents: int
    alphabet: str  # the distinct characters, sorted
    notes: tuple[str, ...] = ()  # what the readers remark on files, such as the delimiter of a CSV
    parts: tuple["Scan", ...] = ()  # of a mixture: what one pass over each source finds


def scan(corpus: Corpus, *, log: Log | None = None) -> Scan:
    """Read all of `corpus` in flat memory. Raise DataError if it holds no text."""
    if corpus.prepared:
        return _scan_ids(corpus.source, corpus.prepared, log)
    digest = hashlib.sha256()
    seen = np.zeros(0x110000, dtype=bool)  # one flag per code point
    characters = documents = ends_written = zeros = 0
    notes: list[str] = []
    tail = ""
    progress = ByteProgress(log, "reading")
    for text, ends in corpus.pieces(notes.append):
        progress.add(add_to_digest(digest, text, ends))
        seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
        characters += len(text)
        documents += ends
        zeros += text.count("\0")
        tail += text
        ends_written += tail.count(END_OF_TEXT)
        tail = tail[1 - len(END_OF_TEXT) :]  # too short to be counted again
    if not characters:
        raise DataError(f"{corpus.source} holds no text: all its files are empty")
    alphabet = "".join(map(chr, np.flatnonzero(seen).tolist()))
    more = [f"and so in {len(notes) - MOST_NOTES} more files"] if len(notes) > MOST_NOTES else []
    more += [_about_ends(corpus, ends_written)] if ends_written else []
    more += (
        [f"{corpus.source} has {zeros:,} zeros (U+0000) among its characters, as a damaged file has"] if zeros else []
    )
    return Scan(digest.hexdigest(), characters, documents, alphabet, (*notes[:MOST_NOTES], *more))


def _scan_ids(source: str, prepared: Prepared, log: Log | None) -> Scan:
    """Return what one pass over ids finds. `sha256` covers the ids; the alphabet has the characters of their tokens, without those
    that several tokens share. Of tokens that only a model has, no character is known.
    """
    vocabulary = prepared.vocabulary
    digest, counts, progress = (
        ids_digest(prepared),
        np.zeros(vocabulary.size, dtype=np.int64),
        ByteProgress(log, "reading"),
    )
    for ids in prepared.ids():
        progress.add(ids.nbytes)
        digest.update(ids)
        counts += np.bincount(ids, minlength=vocabulary.size)
    characters, alphabet, tokenizer = 0, set[str](), vocabulary.tokenizer()
    documents = 1 if vocabulary.edge is None else max(1, int(counts[vocabulary.edge]))
    for token in np.flatnonzero(counts).tolist():
        written = b"" if tokenizer is None or token == vocabulary.edge else tokenizer.decode_bytes([token])
        characters += int(counts[token]) * sum(byte & 0xC0 != 0x80 for byte in written)  # all but continuing bytes
        alphabet.update(written.decode("utf-8", "ignore"))
    return Scan(
        digest.hexdigest(), characters, documents, "".join(sorted(alphabet)), (f"{source}: {prepared.described}",)
    )


def ids_digest(prepared: Prepared) -> Any:
    """Return the beginning of a hash of ids, which no text has."""
    return hashlib.sha256(f"\xffids {prepared.vocabulary.dtype}".encode("latin-1"))


def _about_ends(corpus: Corpus, count: int) -> str:
    """Return a line on a text in which the end of a document is written out, as texts for other programs have it."""
    line = f"{corpus.source} has {END_OF_TEXT} {count} time{'s' * (count > 1)}, read as ordinary characters"
    if not any(suffix_of(path.name) in SEPARABLE for path in corpus.paths):
        return line
    return f"{line}; make it the document separator if it ends documents"


def cached_scan(
    corpus: Corpus, *, cache_dir: Path, log: Log | None = None, now: Callable[[], int] = time.time_ns
) -> Scan:
    """Return `scan(corpus)`, from `cache_dir` if no file has changed since; see milepost.text.stamps for what that means.

    That of a mixture is made of those of its sources; its `sha256` covers their texts and weights.
    """
    if corpus.parts:
        parts = [cached_scan(part, cache_dir=cache_dir, log=log, now=now) for part in corpus.parts]
        return _mixed(parts, corpus.weights)
    values = remembered(
        _record(corpus), corpus.paths, cache_dir / FOLDER, lambda: dataclasses.asdict(scan(corpus, log=log)), now=now
    )
    return Scan(**{**values, "notes": tuple(values.get("notes", ())), "parts": ()})


def _mixed(parts: Sequence[Scan], weights: Sequence[str]) -> Scan:
    digest = hashlib.sha256("".join(f"{w} {part.sha256}\n" for w, part in zip(weights, parts, strict=True)).encode())
    return Scan(
        sha256=digest.hexdigest(),
        characters=sum(part.characters for part in parts),
        documents=sum(part.documents for part in parts),
        alphabet="".join(sorted({character for part in parts for character in part.alphabet})),
        notes=tuple(note for part in parts for note in part.notes),
        parts=tuple(parts),
    )


def forget_scan(corpus: Corpus, *, cache_dir: Path) -> None:
    """Make the next `cached_scan` read the files."""
    forget(_record(corpus), corpus.paths, cache_dir / FOLDER)


def _record(corpus: Corpus) -> str:
    """Return the name of what is remembered: the same files give another scan if they are read in another way."""
    reading = corpus.reading
    if corpus.prepared:
        return f"{IDS_RECORD}-{hashlib.sha256(repr(corpus.prepared.vocabulary).encode()).hexdigest()[:16]}"
    plain = VERBATIM_RECORD if reading.verbatim else RECORD
    if reading.form:
        fields = f"{reading.form} {reading.prompt_field!r} {reading.answer_field!r}"
        return f"{plain}-talks-{hashlib.sha256(fields.encode()).hexdigest()[:16]}"
    if reading.text_field == "text" and not reading.separator:
        return plain
    way = "\0".join(filter(None, (reading.text_field, reading.separator)))
    return f"{plain}-{hashlib.sha256(way.encode()).hexdigest()[:16]}"


def add_to_digest(digest: Any, text: str, ends: bool) -> int:
    """Add a piece to a hash and return its size in UTF-8 bytes. 0xff, which UTF-8 never uses, marks the end of a document."""
    data = text.encode()
    digest.update(data)
    if ends:
        digest.update(b"\xff")
    return len(data)


class ByteProgress:
    """Logs about every two seconds how many MB are done."""

    def __init__(self, log: Log | None, verb: str) -> None:
        self._log = log
        self._verb = verb
        self._bytes = 0
        self._next = time.monotonic() + LOG_SECONDS

    def add(self, size: int) -> None:
        """Count `size` more bytes of text."""
        self._bytes += size
        if self._log is not None and time.monotonic() >= self._next:
            self._log(f"{self._verb}: {self._bytes / 1e6:,.0f} MB done")
            self._next = time.monotonic() + LOG_SECONDS
