"""The interface of a tokenizer, and what several tokenizers share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, Self

from milepost.lazy import np
from milepost.registry import undefined
from milepost.text.readers import END_OF_TEXT as END_OF_TEXT
from milepost.text.readers import Piece


class Tokenizer(Protocol):
    """Text to token ids and back. Special tokens are never parsed: "<|endoftext|>" in a text is ordinary text.

    Subclass it, set the attributes, and define the methods of REQUIRED. `kind` is the name in milepost.text.registry.
    `end_of_text` is the id that separates documents; None separates them by a line feed. `begin_of_text` is the id that
    precedes every text, if the tokenizer has one: encode() leaves it out, encode_whole() puts it there. `prefix` is what
    encode() puts before a text that does not begin with it: a space, for some.

    `splits_at` declares where a document may be cut so that the ids of its parts, concatenated, are the ids of the whole:
    between any two characters, between words (before a space or line feed that follows another character), at a "line" (before
    a space that follows another character, and after a single line feed between two), or nowhere. The default is always right,
    but holds a whole document in memory. The parts after the first are encoded by encode_part().
    """

    kind: str
    vocab_size: int
    end_of_text: int | None = None
    begin_of_text: int | None = None
    prefix: str = ""
    splits_at: Literal["character", "word", "line", "document"] = "document"

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        """Return a tokenizer for a text, given as `pieces`, with the distinct characters `alphabet`.

        It must depend on the text only, not on where its pieces are cut. `vocab_size` is the requested number of tokens, for
        tokenizers that learn their vocabulary.
        """
        ...

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Return the tokenizer that `to_dict` described. Raise ValueError if `saved` is not such a dictionary."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `text` as an array of unsigned integers, (N,)."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of `ids`. Raise ValueError for an id outside the vocabulary."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the kind as "kind", from which `from_dict` makes an equal tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self.encode_array(text).tolist()

    def encode_part(self, text: str, *, after: Literal["nothing", "text", "special"]) -> np.ndarray:
        """Return the ids of a part of a longer text, (N,): of its beginning, of what follows text, or a special token."""
        return self.encode_array(text)

    def encode_whole(self, text: str) -> list[int]:
        """Return the ids of a whole text, with the one that precedes every text."""
        begin = [] if self.begin_of_text is None else [self.begin_of_text]
        return begin + self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with U+FFFD for bytes that are not valid UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which generation stops, `end_of_text` first."""
        return () if self.end_of_text is None else (self.end_of_text,)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that no text becomes, by their own text: a chat template may write them."""
        return {} if self.end_of_text is None else {END_OF_TEXT: self.end_of_text}

    @property
    def chat_template(self) -> str | None:
        """The template in Jinja with which the tokenizer's model was trained on conversations; None if it has none."""
        return None

    @property
    def digest(self) -> str:
        """The sha256 of the tokenizer's canonical JSON, in hex."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class FixedTokenizer(Tokenizer):
    """A tokenizer whose vocabulary depends on no text and has no settings. Subclasses define the rest."""

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        return cls()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


def edge(tokenizer: Tokenizer) -> int | None:
    """Return the token that precedes a document in training: the one that begins a text, else the end of the text before it."""
    return tokenizer.end_of_text if tokenizer.begin_of_text is None else tokenizer.begin_of_text


REQUIRED = ("kind", "build", "from_dict", "encode_array", "decode_bytes", "to_dict")


def undeclared(cls: type[Tokenizer]) -> str | None:
    """Return one sentence naming those of REQUIRED that a tokenizer class does not define; None if it defines all."""
    lacks = undefined(cls, Tokenizer, REQUIRED)
    if not lacks:
        return None
    return f"{cls.__module__}.{cls.__name__} does not define {', '.join(lacks)}; see milepost/text/tokenization/base.py"


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return `ids` as a list. Raise ValueError for an id outside the vocabulary."""
    checked = list(map(int, ids))
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token {i} is outside the vocabulary of {vocab_size} tokens")
    return checked


def replace_surrogates(text: str) -> str:
    """Return `text` with U+FFFD for lone surrogates, as tiktoken does; the environment has them for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte in GPT-2's vocabulary (openai/gpt-2 src/encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
