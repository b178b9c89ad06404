"""Text to token ids and back. The registry of tokenizers is milepost/text/registry.py."""

from collections.abc import Iterable, Mapping
from typing import Any

from milepost.registry import imported
from milepost.text.errors import IncompleteTokenizer, UnknownCharacters
from milepost.text.readers import Piece
from milepost.text.registry import TOKENIZERS
from milepost.text.tokenization.base import END_OF_TEXT, Tokenizer, undeclared
from milepost.text.tokenization.bpe import BpeTokenizer
from milepost.text.tokenization.byte import ByteTokenizer
from milepost.text.tokenization.char import CharTokenizer
from milepost.text.tokenization.gpt2 import Gpt2Tokenizer

__all__ = [
    "END_OF_TEXT", "BpeTokenizer", "ByteTokenizer", "CharTokenizer", "Gpt2Tokenizer", "IncompleteTokenizer", "Tokenizer", "UnknownCharacters",
    "build", "choose", "from_dict", "tokenizer_class",
]  # fmt: skip

AUTO_CHAR_LIMIT = 256  # the most distinct characters for which TOKENIZER=auto is char


def choose(kind: str, *, alphabet: str, pretrained: bool) -> str:
    """Return the kind that `auto` stands for: gpt2 for pretrained weights, else char for a small alphabet, else bpe."""
    if kind != "auto":
        return kind
    if pretrained:
        return "gpt2"
    return "char" if len(alphabet) <= AUTO_CHAR_LIMIT else "bpe"


def build(kind: str, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Tokenizer:
    """Return a tokenizer of `kind` for a text; the arguments are those of Tokenizer.build.

    Raise ValueError for an unknown kind and for a `vocab_size` that is too small.
    """
    return tokenizer_class(kind).build(pieces, alphabet=alphabet, documents=documents, vocab_size=vocab_size)


def from_dict(saved: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that `to_dict` described. Raise ValueError describing what is wrong with `saved`."""
    kind = saved.get("kind") if isinstance(saved, Mapping) else None
    return tokenizer_class(kind).from_dict(saved)


def tokenizer_class(kind: object) -> type[Tokenizer]:
    """Return the class of a registered tokenizer.

    Raise ValueError for an unknown kind, IncompleteTokenizer naming what a class lacks.
    """
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer kind {str(kind)[:40]!r}: expected one of {', '.join(TOKENIZERS)}")
    cls: type[Tokenizer] = imported(TOKENIZERS[kind])
    if problem := undeclared(cls):
        raise IncompleteTokenizer(f"tokenizer {kind!r}: {problem}")
    if cls.kind != kind:
        named = f"{cls.__module__}.{cls.__name__} has the kind {cls.kind!r}"
        raise IncompleteTokenizer(f"tokenizer {kind!r}: {named}; expected the name under which it is registered")
    return cls
