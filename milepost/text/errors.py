"""The errors of this package."""


class DataError(Exception):
    """Bad or missing data, described in one sentence. Exit code 4."""


class TextFieldError(DataError):
    """Records have no text field of the given name. The message lists their fields."""


class UnknownCharacters(ValueError):
    """Text holds characters that a vocabulary lacks; `characters` lists all of them, sorted."""

    def __init__(self, characters: str, vocab_size: int, *, unit: str = "characters") -> None:
        self.characters = characters
        first = ", ".join(map(named, characters[:10]))
        more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
        super().__init__(f"{first}{more}: not in the vocabulary of {vocab_size} {unit}")


class IncompleteTokenizer(TypeError):
    """A registered class of tokenizer lacks what the interface asks for."""


def named(character: str) -> str:
    """Return a character as Python writes it, and its code point."""
    return f"{character!r} (U+{ord(character):04X})"
