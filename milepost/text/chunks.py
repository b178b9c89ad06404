"""Cut long text into chunks at places where no token can cross."""

import re
from collections.abc import Iterable, Iterator

from milepost.text.errors import DataError
from milepost.text.readers import Piece

WORD_LIMIT = 1 << 23  # characters without a space: tokenizers that read words take a hundred bytes for each of them

# The last place between a non-space character and a space or line feed. GPT-2's regex always ends a token there: none of its
# alternatives matches across it, and it looks ahead only from within whitespace.
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class LongWordError(DataError):
    """A text cannot be cut between words, because too many characters follow one another without a space."""


def rechunk(pieces: Iterable[Piece], *, size: int, limit: int | None = None) -> Iterator[Piece]:
    """Yield the same text in pieces of about `size` characters, cut only between words.

    A piece grows where there is no such place; raise LongWordError if it grows beyond `limit` characters (by default
    WORD_LIMIT). With a tokenizer that splits at "word", the tokens of a document's pieces, concatenated, are the document's tokens.
    """
    held, limit = "", WORD_LIMIT if limit is None else limit
    for text, ends in pieces:
        for start in range(0, len(text), size):
            searched = max(0, len(held) - 1)
            held += text[start : start + size]
            last = ends and start + size >= len(text)
            if last:
                yield held, True
                held = ""
            elif cut := _CUT.match(held, searched):
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
