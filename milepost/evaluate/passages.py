"""How well a text is predicted: its documents one by one, and the figures that add up over them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from milepost.text.chunks import rechunk
from milepost.text.corpus import Corpus
from milepost.text.errors import DataError, UnknownCharacters
from milepost.text.scan import Scan
from milepost.text.token_files import CHUNK, cut
from milepost.text.tokenization import Tokenizer

# From sequences of ids, each (N,), the log-probabilities of all but its first, in nats, each (N - 1,).
Score = Callable[[list[np.ndarray]], list[np.ndarray]]

GROUP = 2**16  # characters that are scored together
BLOCK, MOST_BLOCKS = 512, 1000  # bytes of the pieces of text on which two models are compared, and how many at most


@dataclass(frozen=True)
class Text:
    """What is to be predicted: a corpus, from character `start` of it on."""

    corpus: Corpus
    scan: Scan
    start: int = 0

    @property
    def identity(self) -> tuple[str, int]:
        """Equal for equal texts."""
        return self.scan.sha256, self.start

    def passages(self) -> Iterator[str]:
        """The documents one by one; one of more than CHUNK characters in parts, cut between words."""
        pieces = (piece for side, piece in cut(self.corpus.pieces(), self.start) if side)
        return (text for text, _ in rechunk(pieces, size=CHUNK))


@dataclass(frozen=True)
class Figures:
    """What a model makes of a text: `nats` for all of its `tokens`, `bytes` of UTF-8 together.

    `blocks` are the bits per byte of equally long pieces, as many for every tokenizer, so that two models can be compared on them.
    """

    nats: float
    tokens: int
    bytes: int
    blocks: np.ndarray

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss: the number of equally likely tokens among which it would be as hard to choose."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits per byte of UTF-8: of the three the one that does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes


def opening(tokenizer: Tokenizer) -> np.ndarray:
    """What stands before a document in training, as ids: the end of text, else a line break; none if the vocabulary has neither."""
    if tokenizer.end_of_text is not None:
        return np.array([tokenizer.end_of_text], dtype=np.uint32)
    try:
        return tokenizer.encode_array("\n")[-1:]
    except UnknownCharacters:
        return np.zeros(0, dtype=np.uint32)


def measure(texts: Iterable[str], tokenizer: Tokenizer, score: Score, add: Callable[[int], None]) -> Figures:
    """The figures of `texts`, each read after its `opening`, of which nothing is counted; `add` hears how many characters are done.

    DataError if nothing is left to predict.
    """
    head, size = opening(tokenizer), 0
    nats, lengths = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for group in _groups(texts):
        sequences = [np.concatenate([head, tokenizer.encode_array(each)]) for each in group]
        nats += [-each for each in score(sequences)]
        lengths += [byte_lengths(each[1:], tokenizer) for each in sequences]
        size += sum(len(each.encode()) for each in group)
        add(sum(map(len, group)))
    tokens, counted = np.concatenate(nats), np.concatenate(lengths)
    if not counted.sum():
        raise DataError(
            "the text to measure is too short: it has no token that another precedes; set EVAL_DATA to more of it"
        )
    blocks = max(1, min(MOST_BLOCKS, size // BLOCK))
    bits = per_block(tokens, counted, blocks) / math.log(2) / (counted.sum() / blocks)
    return Figures(nats=float(tokens.sum()), tokens=len(tokens), bytes=int(counted.sum()), blocks=bits)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in a row that have about GROUP characters together."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def byte_lengths(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of UTF-8 each of `ids` (N,) stands for, int64 (N,)."""
    kinds, places = np.unique(ids, return_inverse=True)
    lengths = [len(tokenizer.decode_bytes([one])) for one in kinds.tolist()]
    return np.array(lengths, dtype=np.int64)[places]


def per_block(values: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """The sums (count,) of the tokens' values (N,) over equally long pieces of text; a token that crosses a border is shared by bytes."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    borders = np.linspace(0, ends[-1], count + 1)
    return np.diff(np.interp(borders, ends, np.concatenate([[0], np.cumsum(values)])))
