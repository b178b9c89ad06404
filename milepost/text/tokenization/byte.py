"""One token per byte of UTF-8."""

from __future__ import annotations

from collections.abc import Iterable

from milepost.lazy import np
from milepost.text.tokenization.base import FixedTokenizer, checked_ids, replace_surrogates


class ByteTokenizer(FixedTokenizer):
    """The 256 byte values of UTF-8."""

    kind = "byte"
    vocab_size = 256
    splits_at = "character"

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(checked_ids(ids, 256))
