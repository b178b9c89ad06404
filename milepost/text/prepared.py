"""Prepared data: files of token ids that nanoGPT and llm.c write, and that are trained on as they are.

nanoGPT (karpathy/nanoGPT data/*/prepare.py): uint16 without a header, of GPT-2's tokens, or of the characters in the meta.pkl
beside them. llm.c (karpathy/llm.c dev/data/data_common.py, write_datafile): 256 int32, which begin with magic, version and number
of tokens, then uint16 of GPT-2's tokens, or uint32 of Llama 3's. No token of GPT-2 is the lower half of a magic, so the first
bytes tell the two apart.
"""

import codecs
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from milepost.lazy import np
from milepost.text.blocks import refuse_pointer
from milepost.text.errors import DataError
from milepost.text.meta_pickle import META, META_LIMIT, MetaError, chars_of, meta_of
from milepost.text.readers import Piece
from milepost.text.tokenization import CharTokenizer, Gpt2Tokenizer, Tokenizer

SUFFIX = ".bin"
HEADER = 256 * 4  # bytes of llm.c's header
LLM_C_MAGIC = range(20240000, 20250000)  # llm.c's magic numbers are dates
ZIP = b"PK\x03\x04"  # how the archives of PyTorch begin, which have the same suffix
CHUNK = 1 << 18  # ids read at once
DECODED = 1 << 13  # ids decoded at once
AGAIN = "copy it again, or prepare it again"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that ids stand for: `chars`, else those of GPT-2 or Llama 3. `edge` is the id that stands between documents."""

    name: str
    size: int
    dtype: str = "<u2"
    edge: int | None = None
    chars: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that has these tokens; None for Llama 3's, which only a model of its kind brings along."""
        if self.chars:
            return CharTokenizer(self.chars)
        return Gpt2Tokenizer() if self == GPT2 else None

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Return whether the tokenizer has these tokens under the same ids."""
        own = self.tokenizer()
        if own is None:
            return (tokenizer.vocab_size, tokenizer.begin_of_text) == (self.size, self.edge)
        same_bytes = (tokenizer.decode_bytes([token]) == own.decode_bytes([token]) for token in range(self.size))
        return tokenizer.vocab_size == self.size and (tokenizer.digest == own.digest or all(same_bytes))


GPT2 = Vocabulary("GPT-2's tokens", Gpt2Tokenizer.vocab_size, edge=Gpt2Tokenizer.end_of_text)
LLAMA3 = Vocabulary("Llama 3's tokens", 128256, "<u4", edge=128000)
LLM_C = {(20240520, 1): GPT2, (20240801, 7): LLAMA3}  # magic and version


@dataclass(frozen=True)
class IdFile:
    """Where the ids of a file begin, how many there are, and what they stand for."""

    path: Path
    offset: int
    count: int
    vocabulary: Vocabulary
    form: str  # in words


@dataclass(frozen=True)
class Prepared:
    """Files of ids of one vocabulary, which follow one another."""

    files: tuple[IdFile, ...]

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids stand for."""
        return self.files[0].vocabulary

    @property
    def count(self) -> int:
        """The number of ids."""
        return sum(file.count for file in self.files)

    @property
    def described(self) -> str:
        """The form of the files, in words."""
        return f"{self.files[0].form}: {self.count:,} ids of {self.vocabulary.name}, used as they are"

    def ids(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the ids from `start` on, in arrays (N,). Raise DataError if a file is cut off or has an id that is no token."""
        for file in self.files:
            yield from _ids(file, min(start, file.count))
            start = max(0, start - file.count)

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield the text of the ids from `start` on, as pieces. Bytes that are cut off at an end become U+FFFD.

        Raise DataError if only a model has the tokens.
        """
        tokenizer = self.vocabulary.tokenizer()
        if tokenizer is None:
            raise DataError(
                f"{self.files[0].path} holds ids of {self.vocabulary.name}, whose text is not known here: use a text"
            )
        decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for ids, ends in self._documents(start):
            text = decoder.decode(tokenizer.decode_bytes(ids.tolist()), final=ends)
            if held and text:
                yield held, False
            held = text or held
            if held and ends:
                yield held, True
                held = ""

    def _documents(self, start: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the ids in short arrays, with True on the last of a document, which may be empty."""
        for ids in self.ids(start):
            for at in range(0, len(ids), DECODED):
                block = ids[at : at + DECODED]
                is_edge, begin = block == (-1 if self.vocabulary.edge is None else self.vocabulary.edge), 0
                for cut in np.flatnonzero(is_edge).tolist():
                    yield block[begin:cut], True
                    begin = cut + 1
                yield block[begin:], False
        yield np.zeros(0, dtype=self.vocabulary.dtype), True


def prepared_of(paths: Sequence[Path]) -> Prepared | None:
    """Return the prepared data in these files; None if none of them is. Raise DataError if they cannot be used together."""
    chosen = [path for path in paths if is_prepared(path.name)]
    if not chosen:
        return None
    if others := [path for path in paths if path not in chosen]:
        remedy = "name the one or the other, or mix them by weights (a.bin*1,b.txt*1)"
        raise DataError(f"{chosen[0]} holds ids, {others[0]} text: {remedy}")
    found = tuple(map(_recognized, chosen))
    for file in found:
        if file.vocabulary != found[0].vocabulary:
            what = f"{file.path} holds ids of {file.vocabulary.name}, {found[0].path} of {found[0].vocabulary.name}"
            raise DataError(f"{what}: train on files of one vocabulary")
    return Prepared(found)


def is_prepared(name: str) -> bool:
    """Return whether a file of this name is looked into for ids."""
    return name.lower().endswith(SUFFIX)


def validation_beside(source: str) -> str | None:
    """Return the source of the validation files that the same program wrote beside the training files; None if there are none.

    `train.bin` has `val.bin`, `fineweb_train_000001.bin` and `fineweb_train_*.bin` have `fineweb_val_*.bin`.
    """
    folder, name = os.path.split(source)
    found = re.fullmatch(r"(?P<before>[^,]*)train(?P<number>_[\d*?]+)?\.bin", name)
    if not found:
        return None
    beside = os.path.join(folder, f"{found['before']}val{'_*' if found['number'] else ''}{SUFFIX}")
    path = os.path.expanduser(beside)
    return beside if os.path.isfile(path) or glob.glob(path) else None


def _recognized(path: Path) -> IdFile:
    """Return what a file holds, by its first bytes. Raise DataError if that is not the data of nanoGPT or llm.c."""
    try:
        refuse_pointer(path)
        with open(path, "rb") as file:
            begin = file.read(HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    magic, version, count = np.frombuffer(begin[:12].ljust(12, b"\0"), "<i4").tolist()
    if begin.startswith(ZIP) or (magic in LLM_C_MAGIC and (magic, version) not in LLM_C):
        kind = "an archive" if begin.startswith(ZIP) else f"a file of llm.c with the numbers {magic} and {version}"
        expected = " or ".join(f"{magic} and {version}" for magic, version in LLM_C)
        raise DataError(f"{path} is {kind}: expected its data, with {expected}, or nanoGPT's train.bin")
    if magic in LLM_C_MAGIC:
        vocabulary = LLM_C[magic, version]
        if size != HEADER + count * np.dtype(vocabulary.dtype).itemsize or not count:
            raise DataError(f"{path} is damaged: its header names {count:,} tokens, and it has {size:,} bytes: {AGAIN}")
        return IdFile(path, HEADER, count, vocabulary, "llm.c's data")
    if size % 2 or not size:
        raise DataError(f"{path} is damaged: it has {size:,} bytes, expected two for each token: {AGAIN}")
    vocabulary, form = _of_meta(path.parent / META)
    return IdFile(path, 0, size // 2, vocabulary, form)


def _of_meta(path: Path) -> tuple[Vocabulary, str]:
    """Return the vocabulary of a nanoGPT data set, and its form in words: GPT-2's unless a meta.pkl names characters."""
    if not path.is_file():
        return GPT2, f"nanoGPT's data without {META}"
    try:
        with open(path, "rb") as file:
            chars = chars_of(meta_of(file.read(META_LIMIT + 1)))
        CharTokenizer(chars)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except MetaError as error:
        raise DataError(f"{path} {error}") from error
    except ValueError as error:  # tokens that are no characters
        raise DataError(f"{path} cannot be used ({error}): expected the characters of nanoGPT's prepare.py") from error
    return Vocabulary(f"the {len(chars)} characters of {META}", len(chars), chars=tuple(chars)), "nanoGPT's data"


def _ids(file: IdFile, start: int) -> Iterator[np.ndarray]:
    dtype, done = np.dtype(file.vocabulary.dtype), start
    try:
        with open(file.path, "rb") as opened:
            opened.seek(file.offset + start * dtype.itemsize)
            while done < file.count:
                size = min(CHUNK, file.count - done) * dtype.itemsize
                data = opened.read(size)
                if len(data) < size:
                    raise DataError(f"{file.path} became shorter while it was read: start again")
                ids = np.frombuffer(data, dtype)
                _check(ids, file, done)
                yield ids
                done += len(ids)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error


def _check(ids: np.ndarray, file: IdFile, position: int) -> None:
    """Raise DataError if one of the ids is no token."""
    size = file.vocabulary.size
    if ids.max() < size:
        return
    at = int(np.argmax(ids >= size))
    what = f"{file.path}: id {ids[at]} at position {position + at:,} is not one of {file.vocabulary.name} ({size:,})"
    raise DataError(
        f"{what}: expected nanoGPT's data with the {META} it was prepared with, or llm.c's; else use the text"
    )
