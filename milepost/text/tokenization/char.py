"""One token per character."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Self

from milepost.lazy import np
from milepost.text.errors import UnknownCharacters
from milepost.text.readers import Piece
from milepost.text.tokenization.base import Tokenizer, checked_ids


class CharTokenizer(Tokenizer):
    """One id per distinct character, in the order of `chars`."""

    kind = "char"
    splits_at = "character"

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        if not self.chars or any(not isinstance(char, str) or len(char) != 1 for char in self.chars):
            raise ValueError("a char tokenizer needs a list of single characters")
        if len(set(self.chars)) != len(self.chars):
            raise ValueError("a char tokenizer's characters must be distinct")
        if any("\ud800" <= char <= "\udfff" for char in self.chars):
            raise ValueError("a char tokenizer cannot hold surrogates, which are not characters")
        self._bytes = [char.encode() for char in self.chars]

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """The id of each code point, -1 for a character that the vocabulary lacks."""
        ids = np.full(0x110000, -1, dtype=np.int32)
        ids[[ord(char) for char in self.chars]] = np.arange(self.vocab_size)
        return ids

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        return cls(sorted({*alphabet, "\n"} if documents > 1 else alphabet))  # "\n" separates documents

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        chars = saved.get("chars")
        return cls(chars if isinstance(chars, list) else [])

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `text`. Raise UnknownCharacters with all characters that the vocabulary lacks."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[codes]
        if (unknown := ids < 0).any():
            raise UnknownCharacters("".join(map(chr, np.unique(codes[unknown]).tolist())), self.vocab_size)
        return ids.astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in checked_ids(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "chars": list(self.chars)}
