"""The errors of this package."""


class DataError(Exception):
    """Bad or missing data, described in one sentence. Exit code 4."""


class UnknownCharacters(ValueError):
    """Text holds characters that a character vocabulary lacks; `characters` lists all of them, sorted."""

    def __init__(self, characters: str, vocab_size: int) -> None:
        self.characters = characters
        named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in characters[:10])
        more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
        super().__init__(f"{named}{more}: not in the vocabulary of {vocab_size} characters")


class IncompleteTokenizer(TypeError):
    """A registered class of tokenizer lacks what the interface asks for."""
