"""One token per byte of UTF-8."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from milepost.text.readers import Piece
from milepost.text.tokenization.base import Tokenizer, checked_ids, replace_surrogates


class ByteTokenizer(Tokenizer):
    """The 256 byte values of UTF-8."""

    kind = "byte"
    vocab_size = 256
    splits_at = "character"

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        return cls()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        return cls()

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(checked_ids(ids, 256))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}
