"""Byte-level byte-pair encoding, trained on the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self

from milepost.lazy import np
from milepost.text.chunks import rechunk
from milepost.text.errors import UnknownCharacters
from milepost.text.readers import Piece
from milepost.text.tokenization.base import END_OF_TEXT, byte_letters, checked_ids, replace_surrogates
from milepost.text.tokenization.library import LibraryTokenizer, as_json, section, tokens_before

UNMERGED_TOKENS, UNMERGED_SHARE = (
    8,
    0.1,
)  # tokens without a merge that are accepted: this many, or this share of the vocabulary
BPE_TRAINING_CHARACTERS = 64_000_000  # merges learned from more text hardly differ
# The time to learn merges grows with the square of a word's length: a word of a million characters would take an hour.
LONGEST_WORD = 256
# How other models cut a text before the merges: the patterns of `Split` that are taken. A pattern from a file could take for
# ever, and the library does not hear a signal meanwhile.
SPLITS = {
    "Qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Bytes that a vocabulary may lack, as SmolLM2's does: control characters, and what begins characters outside ASCII.
RARE_BYTES = frozenset({*range(0x20), *range(0xC0, 0x100)} - set(b"\t\n\r"))
_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


class BpeTokenizer(LibraryTokenizer):
    """Byte-level byte-pair encoding, from the JSON of the `tokenizers` library.

    It cuts the text as GPT-2 does, or as SmolLM2 (each digit apart), Qwen2 or Llama 3.
    """

    kind = "bpe"
    splits_at: Literal["word", "line"] = "word"

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        if not splits_as_gpt2(self._json):
            self.splits_at = "line"
        _check_merges(self._json)
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        known = bytes(byte for letter, byte in letters.items() if letter in self._json["model"]["vocab"])
        self._known_bytes = known if len(known) < 256 else None
        self._bytes = [b""] * self.vocab_size
        for token, i in self._tokenizer.get_vocab().items():
            self._bytes[i] = token.encode() if token in self._added else bytes(letters[letter] for letter in token)

    @staticmethod
    def check(tokenizer: object) -> str:
        return check_bpe(tokenizer)

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        """Return a BPE of `vocab_size` tokens, trained on the first BPE_TRAINING_CHARACTERS of the text."""
        return cls(_train(pieces, vocab_size))

    def encode_array(self, text: str) -> np.ndarray:
        texts = [replace_surrogates(text)]
        self._check_bytes(texts[0])
        # Short texts in a batch take a fifth of the time of one long text.
        texts = [chunk for chunk, _ in rechunk([(texts[0], True)], size=1 << 14, at=self.splits_at)]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.uint32), *(np.array(encoding.ids, np.uint32) for encoding in encoded)])

    def _check_bytes(self, text: str) -> None:
        """Raise UnknownCharacters if the vocabulary lacks a byte of the text: the library would drop it."""
        if self._known_bytes is not None and (lost := text.encode().translate(None, self._known_bytes)):
            unknown = {character for character in set(text) if set(character.encode()) & set(lost)}
            raise UnknownCharacters("".join(sorted(unknown)), self.vocab_size, unit="tokens")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in checked_ids(ids, self.vocab_size))


# Training


def _train(pieces: Iterable[Piece], vocab_size: int) -> dict[str, Any]:
    """Return the JSON of a trained tokenizer."""
    from tokenizers import Tokenizer as Trainee
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(
            f"a bpe vocabulary of {vocab_size} is too small: expected at least 257 (256 bytes and the end of text)"
        )
    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainee.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_letters(),
        show_progress=False,
    )
    trainee.train_from_iterator(training_parts(pieces), trainer=trainer)
    return json.loads(trainee.to_str())


def training_parts(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield the first BPE_TRAINING_CHARACTERS of the pieces in parts cut between words, and within very long ones."""
    for text, _ in rechunk(_head(pieces, BPE_TRAINING_CHARACTERS), size=1 << 16):
        yield from _parts(text)


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts, so that none of its words is longer than LONGEST_WORD."""
    start = 0
    for long in _LONG.finditer(text):
        yield text[start : long.end()]
        start = long.end()
    yield text[start:]


def _head(pieces: Iterable[Piece], characters: int) -> Iterator[Piece]:
    """Yield the first `characters` characters of the pieces."""
    for text, ends in pieces:
        yield text[:characters], ends
        characters -= len(text)
        if characters <= 0:
            return


def check_bpe(spec: object) -> str:
    """Return `spec` as JSON text. Raise ValueError unless it describes a lossless byte-level BPE.

    The library itself accepts two tokens with one id, ids outside the vocabulary, and steps that change or drop text.
    """
    text = as_json(spec, "bpe")
    top = spec if isinstance(spec, dict) else {}
    model, before = section(top, "model"), section(top, "pre_tokenizer")
    rules = {
        "model.type must be BPE": model.get("type") == "BPE",
        "model.dropout must be null": model.get("dropout") is None,
        "tokens must have no prefix or suffix": not (
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "model.byte_fallback must be false": not model.get("byte_fallback"),
        "the normalizer must be null or NFC": top.get("normalizer") in (None, {"type": "NFC"}),
        "truncation and padding must be null": top.get("truncation") is None and top.get("padding") is None,
        f"the pre_tokenizer must be ByteLevel with GPT-2's regex and no prefix space, or as that of SmolLM2, {' or '.join(SPLITS)}": (
            _is_byte_level(before, regex=True) or _cuts_and_is_byte_level(before)
        ),
        "the post_processor must be null or ByteLevel, or put one special token before a text": (
            tokens_before(top.get("post_processor")) is not None
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"the tokenizer is not a byte-level BPE: {rule}")
    special = _check_bpe_tokens(model.get("vocab"), top.get("added_tokens"))
    words = model["vocab"].keys() if model.get("ignore_merges") else ()  # each is a result then, whatever the merges
    _check_special_tokens(_results(model).union(words), special)
    return text


def splits_as_gpt2(spec: Mapping[str, Any]) -> bool:
    """Whether the JSON of a BPE cuts a text as GPT-2 does, changes nothing before, and merges every word."""
    plain = spec.get("normalizer") is None and not spec["model"].get("ignore_merges")
    return plain and splits_as(spec) == "GPT-2"


def splits_as(spec: Mapping[str, Any]) -> str:
    """Return whose model the JSON of a BPE cuts a text as: GPT-2, SmolLM2 or one of SPLITS; or "" if it is none of them."""
    before = section(dict(spec), "pre_tokenizer")
    if _is_byte_level(before, regex=True):
        return "GPT-2"
    if not _cuts_and_is_byte_level(before):
        return ""
    first = before["pretokenizers"][0]
    if first["type"] == "Digits":
        return "SmolLM2" if first.get("individual_digits") is True else ""
    return next(name for name, regex in SPLITS.items() if first["pattern"]["Regex"] == regex)


def _is_byte_level(part: Mapping[str, Any], *, regex: bool) -> bool:
    plain = part.get("type") == "ByteLevel" and part.get("add_prefix_space") is False
    return plain and part.get("use_regex", True) is regex


def _cuts_and_is_byte_level(before: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer is a sequence that cuts at digits and then as GPT-2 does, or by one of SPLITS."""
    parts = before.get("pretokenizers") if before.get("type") == "Sequence" else None
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, dict) for part in parts):
        return False
    first, last = parts
    if first.get("type") == "Digits":
        return _is_byte_level(last, regex=True)
    pattern = first.get("pattern")
    known = isinstance(pattern, dict) and pattern.get("Regex") in SPLITS.values()
    plain = first.get("type") == "Split" and first.get("behavior") == "Isolated" and first.get("invert") is False
    return known and plain and _is_byte_level(last, regex=False)


def adds_nothing(post_processor: object) -> bool:
    """Whether it is the template that transformers writes when it saves any tokenizer: one text, or a pair of texts."""
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    return post_processor == template


def _check_bpe_tokens(vocab: object, added: object) -> set[str]:
    """Return the special tokens. Raise ValueError unless tokens and ids correspond one to one and every token decodes to bytes."""
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ValueError("the bpe tokenizer needs model.vocab (an object) and added_tokens (a list)")
    ids = dict(vocab)
    special = set()
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or not (token.get("special") is True or _is_word(token)):
            raise ValueError(
                "the bpe tokenizer's added tokens must be special tokens with a content, or words without whitespace or strip flags"
            )
        if ids.setdefault(content, token.get("id")) != token.get("id"):
            raise ValueError(f"the bpe tokenizer gives {content!r} two ids")
        special.add(content)
    if any(type(i) is not int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"the bpe tokenizer's ids are not exactly 0 to {len(ids) - 1}")
    letters = set(byte_letters())
    if not {letter for byte, letter in enumerate(byte_letters()) if byte not in RARE_BYTES} <= vocab.keys():
        raise ValueError("the bpe tokenizer lacks some of the 256 bytes")
    for token in vocab.keys() - special:
        if not token or not letters.issuperset(token):
            raise ValueError(f"the bpe tokenizer's token {token!r} does not consist of GPT-2's byte letters")
    return special


def _is_word(token: dict[str, Any]) -> bool:
    """Whether an added token matches only its own text and has no whitespace, so that cutting between words never splits it.

    The end of text is not a word: encoding never produces it.
    """
    if token["content"] == END_OF_TEXT:
        return False
    strips = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    return not strips and not re.search(r"\s", token["content"])


def _results(model: dict[str, Any]) -> set[str]:
    """Return the tokens that the merges make."""
    merges = model.get("merges")
    pairs = (
        [merge.split(" ") if isinstance(merge, str) else merge for merge in merges] if isinstance(merges, list) else []
    )
    return {"".join(map(str, pair)) for pair in pairs if isinstance(pair, list)}


def _check_merges(spec: dict[str, Any]) -> None:
    """Raise ValueError if so many tokens have no merge that the list must be cut: text would become other tokens than the model
    learned. Some programs add a few such tokens on purpose.
    """
    special = {token["content"] for token in spec["added_tokens"]}
    longer = {token for token in spec["model"]["vocab"].keys() - special if len(token) > 1}
    lacking = len(longer - _results(spec["model"]))
    if lacking > max(UNMERGED_TOKENS, UNMERGED_SHARE * len(longer)):
        raise ValueError(
            f"{lacking} of the vocabulary's {len(longer)} tokens of several bytes have no merge, so merges are missing "
            "(merges.txt, or model.merges of tokenizer.json): copy or download the tokenizer's files again"
        )


def _check_special_tokens(merged: set[str], special: set[str]) -> None:
    """Raise ValueError if ordinary text can become a special token, which decodes to its content, not to its letters' bytes."""
    if ambiguous := sorted(special & merged.union(byte_letters())):
        raise ValueError(
            f"the bpe tokenizer's token {ambiguous[0]!r} is special and also a result of merging ordinary text"
        )
