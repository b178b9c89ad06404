"""Token files of conversations: the ids of each, and which of them an assistant writes."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from milepost.text.conversations import Talk, as_pieces
from milepost.text.corpus import Corpus
from milepost.text.errors import DataError
from milepost.text.scan import ByteProgress, Log, Scan
from milepost.text.templates import TemplateError, example
from milepost.text.token_arrays import Tokens
from milepost.text.token_files import open_or_build, split_at, verified, write_array
from milepost.text.tokenization.base import Tokenizer

FORMAT = 2  # raise it when the same inputs give other files
PARTS = ("train", "validation")
TOKENS, ENDS = np.dtype("<u4"), np.dtype("<i8")


@dataclass(frozen=True)
class Examples:
    """Tokenized conversations. `tokens` (N,) are 2 * id + 1 where an assistant writes the token, else 2 * id; `ends` (E,) is
    where each conversation ends in them.
    """

    tokens: Tokens
    ends: np.ndarray

    def __len__(self) -> int:
        """Return the number of tokens, as of a text."""
        return len(self.tokens)

    def first_question(self) -> list[int]:
        """Return the ids of the first conversation up to where its first answer begins."""
        first = self.tokens[: self.ends[0]]
        return (first[: np.argmax(first & 1)] >> 1).tolist()


@dataclass(frozen=True)
class ExampleSplit:
    """Both parts of a file of conversations."""

    train: Examples
    validation: Examples


def prepare_examples(
    corpus: Corpus,
    scan: Scan,
    tokenizer: Tokenizer,
    *,
    template: str | None,
    validation_fraction: float,
    cache_dir: Path,
    log: Log | None = None,
) -> ExampleSplit:
    """Return the tokens of all conversations, from `cache_dir` if they are there and intact, else tokenized into it.

    The first int(conversations * (1 - validation_fraction)) are the training part. Raise DataError naming the row that the
    template refuses, or if the files differ from what `scan` saw.
    """
    parts = f"{scan.sha256} {tokenizer.digest} {template!r} {float(validation_fraction)!r} examples {FORMAT}"
    folder = cache_dir / hashlib.sha256(parts.encode()).hexdigest()[:32]
    dtypes = {f"{part}{kind}": dtype for part in PARTS for kind, dtype in ((".npy", TOKENS), ("_ends.npy", ENDS))}

    def build(hidden: Path) -> None:
        progress = ByteProgress(log, "tokenizing")
        talks = _checked(corpus, scan, cache_dir, progress)
        counts = split_at(scan.documents, validation_fraction), None
        for part, count in zip(PARTS, counts, strict=True):
            lengths: list[int] = []
            write_array(hidden / f"{part}.npy", _encoded(talks, count, tokenizer, template, lengths), TOKENS)
            write_array(hidden / f"{part}_ends.npy", [np.cumsum(lengths, dtype=np.int64)], ENDS)

    train, train_ends, validation, validation_ends = open_or_build(folder, dtypes, build)
    return ExampleSplit(Examples(train, np.asarray(train_ends)), Examples(validation, np.asarray(validation_ends)))


def _checked(corpus: Corpus, scan: Scan, cache_dir: Path, progress: ByteProgress) -> Iterator[tuple[str, Talk]]:
    """Yield the conversations. Raise DataError after the last one if they are not those that were scanned."""
    held: list[tuple[str, Talk]] = []

    def noted() -> Iterator[tuple[str, Talk]]:
        for each in corpus.conversations():
            held.append(each)
            yield each

    for _, ends in verified(corpus, as_pieces(noted()), scan, cache_dir, progress):
        if ends:
            yield held.pop()


def _encoded(
    talks: Iterator[tuple[str, Talk]],
    count: int | None,
    tokenizer: Tokenizer,
    template: str | None,
    lengths: list[int],
) -> Iterator[np.ndarray]:
    """Yield the tokens of the next `count` conversations, of all that are left if it is None, and add their lengths."""
    while count is None or len(lengths) < count:
        where, talk = next(talks, ("", None))
        if talk is None:
            return
        try:
            ids, answers = example(talk, tokenizer, template)
        except TemplateError as error:
            raise DataError(f"{where}: {error}") from error
        lengths.append(len(ids))
        yield 2 * ids.astype(np.uint32) + answers.astype(np.uint32)
