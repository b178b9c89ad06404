"""Cut long text into chunks at places where no token can cross."""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Final, Literal

from milepost.text.errors import DataError
from milepost.text.readers import Piece

WORD_LIMIT = 1 << 23  # characters without a space: tokenizers that read words take a hundred bytes for each of them

# The last place where a token always ends. GPT-2's regex ends one between a non-space character and a space or line feed: none
# of its alternatives matches across it, and it looks ahead only from within whitespace. Those of Llama 3 and Qwen2 keep a line
# feed with the punctuation before it, and end a token after a single one.
CUTS: Final = {
    "word": re.compile(r".*\S(?=[ \n])", re.DOTALL),
    "line": re.compile(r".*(?:\S(?= )|\S\n(?=\S))", re.DOTALL),
}
_BEFORE = 2  # characters before a cut that decide on it


class LongWordError(DataError):
    """A text cannot be cut between words, because too many characters follow one another without a space."""


def rechunk(
    pieces: Iterable[Piece], *, size: int, limit: int | None = None, at: Literal["word", "line"] = "word"
) -> Iterator[Piece]:
    """Yield the same text in pieces of about `size` characters, cut only between words, or where "line" allows it.

    A piece grows where there is no such place; raise LongWordError if it grows beyond `limit` characters (by default
    WORD_LIMIT between words, and none at lines). With a tokenizer that splits there, the tokens of a document's pieces, concatenated, are the document's tokens.
    """
    held, limit = "", limit or (WORD_LIMIT if at == "word" else sys.maxsize)
    for text, ends in pieces:
        for start in range(0, len(text), size):
            searched = max(0, len(held) - _BEFORE)
            held += text[start : start + size]
            last = ends and start + size >= len(text)
            if last:
                yield held, True
                held = ""
            elif cut := CUTS[at].match(held, searched):
                yield held[: cut.end()], False
                held = held[cut.end() :]
            elif len(held) > limit:
                remedy = "break its lines, or take a tokenizer of characters or bytes"
                raise LongWordError(f"more than {limit:,} characters follow one another without a space: {remedy}")
    if held:
        yield held, False


def whole_documents(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield each document in one piece."""
    held: list[str] = []
    for text, ends in pieces:
        held.append(text)
        if ends:
            yield "".join(held), True
            held = []
    if held:
        yield "".join(held), False
