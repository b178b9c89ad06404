"""Text with characters that a vocabulary lacks: refused, skipped, or replaced by a character that it has."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from milepost.text.corpus import Corpus
from milepost.text.errors import UnknownCharacters, named
from milepost.text.readers import Piece
from milepost.text.scan import FOLDER, Scan
from milepost.text.stamps import remembered
from milepost.text.tokenization.base import Tokenizer

Mode = Literal["refuse", "skip", "replace"]

STAND_INS = "\ufffd?*_#-. "  # the first of them that the vocabulary has replaces every unknown character


class Lenient(Tokenizer):
    """Encodes as `tokenizer`, after skipping or replacing the characters that it lacks. For reading text; never saved."""

    def __init__(self, tokenizer: Tokenizer, unknown: str, stand_in: str) -> None:
        self.kind, self.vocab_size = tokenizer.kind, tokenizer.vocab_size
        self.end_of_text, self.splits_at = tokenizer.end_of_text, tokenizer.splits_at
        self.begin_of_text, self.prefix = tokenizer.begin_of_text, tokenizer.prefix
        self._tokenizer, self._stand_in = tokenizer, stand_in
        self._table = dict.fromkeys(map(ord, unknown), stand_in)

    def encode_array(self, text: str) -> np.ndarray:
        return self._tokenizer.encode_array(text.translate(self._table))

    def encode_part(self, text: str, *, after: Literal["nothing", "text", "special"]) -> np.ndarray:
        return self._tokenizer.encode_part(text.translate(self._table), after=after)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._tokenizer.decode_bytes(ids)

    def to_dict(self) -> dict[str, Any]:
        return self._tokenizer.to_dict()

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        raise NotImplementedError

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._tokenizer.special_tokens

    @property
    def digest(self) -> str:
        """Another digest than the tokenizer's: the tokens of a text differ."""
        return hashlib.sha256(f"{self._tokenizer.digest} {self._stand_in!r}".encode()).hexdigest()


def unknown_characters(tokenizer: Tokenizer, text: str) -> str:
    """Return the characters of the text that the vocabulary lacks, sorted."""
    try:
        tokenizer.encode_array(text)
    except UnknownCharacters as error:
        return error.characters
    return ""


def first_known(tokenizer: Tokenizer, alphabet: str) -> str:
    """Return a line feed, or else the first character of the alphabet, that the vocabulary has."""
    ordered = sorted(alphabet, key="\n".__ne__)
    return next(character for character in ordered if not unknown_characters(tokenizer, character))


def stand_in(tokenizer: Tokenizer, unknown: str, mode: Mode) -> tuple[str, str]:
    """Return what takes the place of unknown characters, nothing if they are skipped, and what is done with them, in words.

    A vocabulary without any of STAND_INS skips what is to be replaced. Raise UnknownCharacters if they are to be refused.
    """
    if mode == "refuse":
        unit = "characters" if tokenizer.kind == "char" else "tokens"
        raise UnknownCharacters(unknown, tokenizer.vocab_size, unit=unit)
    known = [character for character in STAND_INS if not unknown_characters(tokenizer, character)]
    if mode == "skip" or not known:
        return "", "skipped"
    return known[0], f"replaced by {known[0]!r}"


def lenient(tokenizer: Tokenizer, unknown: str, mode: Mode) -> tuple[Tokenizer, str]:
    """Return a tokenizer that takes the unknown characters too, and what it does with them, as `stand_in` does."""
    character, done = stand_in(tokenizer, unknown, mode)
    return Lenient(tokenizer, unknown, character), done


def encoder_of(
    tokenizer: Tokenizer, corpus: Corpus, scan: Scan, *, mode: Mode, cache_dir: Path
) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer that encodes the corpus, and a line on its unknown characters; None if it has none. The line feed
    that separates documents where the tokenizer has no end of text is a character of the corpus.

    Raise UnknownCharacters with all of them if they are to be refused.
    """
    between = scan.documents - 1 if tokenizer.end_of_text is None and not corpus.reading.form else 0
    unknown = unknown_characters(tokenizer, scan.alphabet + "\n" * bool(between))
    if not unknown:
        return tokenizer, None
    encoder, done = lenient(tokenizer, unknown, mode)
    what = f"unknown-{scan.sha256[:16]}-{tokenizer.digest[:16]}"
    counts = remembered(what, corpus.paths, cache_dir / FOLDER, lambda: occurrences(corpus.pieces(), unknown))
    if between and "\n" in unknown:
        counts = {**counts, "\n": counts.get("\n", 0) + between}
    return encoder, f"{corpus.source}: {told(counts, done)}"


def occurrences(pieces: Iterable[Piece], characters: str) -> dict[str, int]:
    """Return how often each of the characters occurs."""
    wanted = np.zeros(0x110000, dtype=bool)
    wanted[list(map(ord, characters))] = True
    totals: dict[str, int] = {}
    for text, _ in pieces:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        found, counts = np.unique(codes[wanted[codes]], return_counts=True)
        for code, number in zip(found.tolist(), counts.tolist(), strict=True):
            totals[chr(code)] = totals.get(chr(code), 0) + number
    return totals


def told(counts: Mapping[str, int], done: str) -> str:
    """Return a line on unknown characters and how often each occurs, the most frequent first."""
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    times = [f"{named(character)} x {counts[character]}" for character in ordered[:10]]
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    total = sum(counts.values())
    return f"{total} character{'s' * (total > 1)} that the vocabulary lacks {done}: {', '.join(times)}{more}"
