"""BPE and Unigram over characters, as SentencePiece has them: spaces are written as a letter, rare characters as their bytes."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, Self

from milepost.lazy import np
from milepost.text.errors import UnknownCharacters
from milepost.text.readers import Piece
from milepost.text.tokenization.base import END_OF_TEXT, checked_ids, replace_surrogates
from milepost.text.tokenization.bpe import training_parts
from milepost.text.tokenization.library import (
    LibraryTokenizer,
    as_json,
    built,
    section,
    stated_ids,
    tokens_before,
    vocabulary,
)

SPACE: Final = "\u2581"  # the letter that stands for a space
BYTES: Final = {f"<0x{byte:02X}>": byte for byte in range(256)}
UNKNOWN, BEGIN = "<unk>", "<s>"  # of a tokenizer that is trained here
PREPEND: Final = {"type": "Prepend", "prepend": SPACE}
_CROSSES: Final = re.compile(rf"[^{SPACE}][{SPACE} ]|\n[^\n]")  # a token that goes on after a word, or after a line
REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


class SentencePieceTokenizer(LibraryTokenizer):
    """The tokenizer of Llama 2, Mistral and TinyLlama, and Unigrams of the same form, from their tokenizer.json.

    The vocabulary has a token for each byte, so that every text can be written; only the letter U+2581, which stands for a
    space, cannot. A space is put before a text that begins a document (`prefix`), and after a special token where the file
    says so.
    """

    kind = "sentencepiece"
    splits_at: Literal["line", "document"] = "document"

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.prefix = " " if _prefix_scheme(self._json) != "never" else ""
        self._bytes = [b""] * self.vocab_size
        for token, i in stated_ids(self._json).items():
            spelled = token if token in self._added else token.replace(SPACE, " ")
            self._bytes[i] = bytes([BYTES[token]]) if token in BYTES else spelled.encode()
        never = sorted(_reachable(self._json["model"]) & {*self._added, *BYTES}, key=len, reverse=True)
        self._never = re.compile("|".join(map(re.escape, never))) if never else None
        if self._json["model"]["type"] == "BPE" and not any(map(_CROSSES.search, stated_ids(self._json))):
            self.splits_at = "line"

    @staticmethod
    def check(tokenizer: object) -> str:
        return check_sentencepiece(tokenizer)

    @classmethod
    def build(cls, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Self:
        """Return a BPE of `vocab_size` tokens, trained on the first BPE_TRAINING_CHARACTERS of the text.

        A quarter of what is left beside the bytes may be characters; the rarer ones are written as their bytes.
        """
        return cls(_train(pieces, vocab_size))

    @functools.cached_property
    def _inside(self) -> Any:
        """The library's tokenizer that puts no space before a text."""
        return built(_without_prefix(self._json), self.kind)

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_part(text, after="nothing")

    def encode_part(self, text: str, *, after: Literal["nothing", "text", "special"]) -> np.ndarray:
        if SPACE in text:
            raise UnknownCharacters(SPACE, self.vocab_size, unit="tokens")
        begins = after == "nothing" or (after == "special" and _prefix_scheme(self._json) == "always")
        parts = self._ordinary(replace_surrogates(text))
        coders = [self._tokenizer if begins else self._inside, *[self._inside] * (len(parts) - 1)]
        found = [
            coder.encode(part, add_special_tokens=False).ids for coder, part in zip(coders, parts, strict=True) if part
        ]
        return np.concatenate([np.zeros(0, np.uint32), *(np.array(ids, np.uint32) for ids in found)])

    def _ordinary(self, text: str) -> list[str]:
        """Return the text cut within whatever reads as a special token or a byte: the model would find that token in it."""
        cuts = [match.start() + 1 for match in self._never.finditer(text)] if self._never else []
        return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in checked_ids(ids, self.vocab_size))


def _train(pieces: Iterable[Piece], vocab_size: int) -> dict[str, Any]:
    """Return the JSON of a trained tokenizer, of the form that transformers gives Llama 2's."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Trainee

    trainee: Any = Trainee(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    # Words end at lines too, wherever the text is cut into pieces.
    lines = pre_tokenizers.Split(Regex("\n+"), "isolated")
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True)
    trainee.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    first = [UNKNOWN, BEGIN, END_OF_TEXT, *BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=first,
        initial_alphabet=[SPACE],  # a text without spaces lacks it, and its bytes would read as the letter
        show_progress=False,
    )
    parts = _of_frequent_letters(list(training_parts(pieces)), count=max(1, (vocab_size - len(first)) // 4))
    trainee.train_from_iterator(parts, trainer=trainer)
    trainee.pre_tokenizer = None  # the merges cross no word
    trainee.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    trainee.decoder = decoders.Sequence(steps)
    trainee.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    spec = json.loads(trainee.to_str())
    spec["model"]["merges"] = [list(pair) for pair in pairs_of_tokens(spec)]  # all, as SentencePiece joins them
    return spec | {"added_tokens": [token for token in spec["added_tokens"] if token["content"] not in BYTES]}


def _of_frequent_letters(parts: list[str], *, count: int) -> Iterator[str]:
    """Yield the parts with only the `count` most frequent characters; the others end a line. The library's own limit takes
    any of equally frequent ones.
    """
    found = collections.Counter(itertools.chain.from_iterable(parts))
    others = sorted(found, key=lambda letter: (-found[letter], letter))[count:]
    table = str.maketrans(dict.fromkeys(others, "\n"))
    return (part.translate(table) for part in parts)


def is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether the JSON of a tokenizer is a Unigram, or a BPE that falls back to bytes."""
    model = section(spec, "model")
    return model.get("type") == "Unigram" or (model.get("type") == "BPE" and model.get("byte_fallback") is True)


def check_sentencepiece(spec: object) -> str:
    """Return `spec` as JSON text. Raise ValueError unless it describes a tokenizer that loses nothing of a text."""
    text = as_json(spec, "sentencepiece")
    top = spec if isinstance(spec, dict) else {}
    model, vocab = section(top, "model"), vocabulary(section(top, "model"))
    rules = {
        "model.type must be Unigram, or BPE with byte_fallback": is_sentencepiece(top),
        "model.byte_fallback must be true, or unknown characters would be lost": model.get("byte_fallback") is True,
        "model.dropout must be null": not model.get("dropout"),
        "tokens must have no prefix or suffix": not (
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "the vocabulary must have a token for each of the 256 bytes": vocab.keys() >= BYTES.keys(),
        "truncation and padding must be null": top.get("truncation") is None and top.get("padding") is None,
        f"normalizer and pre_tokenizer may only write {SPACE} for a space and put one before a text": (
            _prefix_scheme(top) is not None
        ),
        "the post_processor must be null, or put one special token before a text": (
            tokens_before(top.get("post_processor")) is not None
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"the tokenizer is not one like SentencePiece that loses nothing: {rule}")
    _check_tokens(vocab, top.get("added_tokens"))
    return text


def _check_tokens(vocab: Mapping[str, Any], added: object) -> None:
    """Raise ValueError unless tokens and ids correspond one to one and every added token is special."""
    ids = dict(vocab)
    for each in added if isinstance(added, list) else [None]:
        token = each if isinstance(each, dict) else {}
        content = token.get("content")
        if not isinstance(content, str) or not content or token.get("special") is not True or content in BYTES:
            raise ValueError("the sentencepiece tokenizer's added tokens must be special tokens with a content")
        if ids.setdefault(content, token.get("id")) != token.get("id"):
            raise ValueError(f"the sentencepiece tokenizer gives {content!r} two ids")
    if any(type(i) is not int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"the sentencepiece tokenizer's ids are not exactly 0 to {len(ids) - 1}")


def _reachable(model: Mapping[str, Any]) -> set[str]:
    """Return the tokens that a text can become: of a Unigram all, of a BPE the characters and the results of merges."""
    vocab = vocabulary(model)
    if model["type"] == "Unigram" or model.get("ignore_merges"):
        return {*vocab}
    return {token for token in vocab if len(token) == 1} | {"".join(pair) for pair in merge_pairs(model)}


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs that a BPE joins, the first ones first. A pair that is there twice has its last place, as in the library."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return list(dict.fromkeys((first, second) for first, second in reversed(pairs)))[::-1]


def pairs_of_tokens(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every pair of pieces of a text, characters or what a BPE joins them to, whose text is an ordinary token, token by token:
    those that are joined first come first.
    """
    model = spec["model"]
    reachable, never = _reachable(model), {*BYTES, *(token["content"] for token in spec["added_tokens"])}
    for token in dict.fromkeys([*map("".join, merge_pairs(model)), *vocabulary(model)]):
        for at in range(1, len(token) if token not in never else 0):
            pair = token[:at], token[at:]
            if all(len(piece) == 1 or piece in reachable for piece in pair):
                yield pair


def _prefix_scheme(spec: Mapping[str, Any]) -> Literal["first", "always", "never"] | None:
    """Return where a space is put before a text: at its beginning, also after special tokens, or never.

    None if the steps before the model do anything but write SPACE for a space.
    """
    steps = _steps(spec.get("normalizer"))
    if spec.get("pre_tokenizer") is None:
        if steps == [PREPEND, REPLACE]:
            return "always"
        return "never" if steps == [REPLACE] else None
    before = section(spec, "pre_tokenizer")
    scheme = before.get("prepend_scheme")
    plain = before.get("type") == "Metaspace" and before.get("replacement") == SPACE and not steps
    return scheme if plain and scheme in ("first", "always", "never") else None


def _steps(normalizer: object) -> list[object]:
    """Return the steps of a normalizer, one after the other."""
    if normalizer is None:
        return []
    sequence = isinstance(normalizer, dict) and normalizer.get("type") == "Sequence"
    steps = normalizer.get("normalizers") if sequence else [normalizer]  # type: ignore[attr-defined]
    return steps if isinstance(steps, list) else [normalizer]


def _without_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON of a tokenizer that puts no space before a text."""
    inside = copy.deepcopy(dict(spec))
    if inside["pre_tokenizer"] is None:
        inside["normalizer"] = REPLACE
    else:
        inside["pre_tokenizer"]["prepend_scheme"] = "never"
    return inside
