"""The likelihood of a text, document by document: loss, perplexity and bits per byte."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from milepost.text.blocks import RECORD_LIMIT
from milepost.text.chunks import rechunk
from milepost.text.conversations import Talk
from milepost.text.corpus import Corpus
from milepost.text.errors import DataError, UnknownCharacters
from milepost.text.scan import Scan
from milepost.text.token_files import CHUNK, cut
from milepost.text.tokenization import Tokenizer
from milepost.text.tokenization.base import edge

# Maps sequences of ids, each (N,), to the log-probabilities of all but the first id, in nats, each (N - 1,).
Score = Callable[[list[np.ndarray]], list[np.ndarray]]

GROUP = 2**16  # characters scored together
BLOCK, MOST_BLOCKS = (
    512,
    1000,
)  # two models are compared on blocks of at least so many bytes, and at most so many blocks


@dataclass(frozen=True)
class Text:
    """The text to predict: a corpus, from the unit `start` on, which is a character, a conversation, or an id of prepared data.

    `stand_ins` take the place of characters that a vocabulary lacks, by code point; in `passages`, not in `talks`, whose
    template may have such characters too.
    """

    corpus: Corpus
    scan: Scan
    start: int = 0
    stand_ins: Mapping[int, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[object, ...]:
        """A value that is equal for equal texts."""
        return self.scan.sha256, self.start, self.stand_ins

    @property
    def alphabet(self) -> str:
        """The distinct characters to predict, sorted."""
        return "".join(sorted({*self.scan.alphabet.translate(self.stand_ins)}))

    @property
    def is_talks(self) -> bool:
        """Whether the text is conversations, of which only answers are predicted."""
        return bool(self.corpus.reading.form)

    @property
    def unit(self) -> str:
        """What `start` counts."""
        return "conversation" if self.is_talks else "id" if self.corpus.prepared else "character"

    def talks(self) -> list[Talk]:
        """Return the conversations."""
        return [talk for _, talk in itertools.islice(self.corpus.conversations(), self.start, None)]

    def passages(self) -> Iterator[str]:
        """Yield the documents. A document of more than CHUNK characters is split into parts, cut between words."""
        ids = self.corpus.prepared
        parts = ((1, piece) for piece in ids.pieces(self.start)) if ids else cut(self.corpus.pieces(), self.start)
        pieces = (piece for part, piece in parts if part)
        texts = (text.translate(self.stand_ins) for text, _ in rechunk(pieces, size=CHUNK, limit=RECORD_LIMIT))
        return filter(None, texts)


@dataclass(frozen=True)
class Figures:
    """The negative log-likelihood of a text: `nats` in total, over `tokens` tokens and `bytes` bytes of UTF-8.

    `blocks` are the bits per byte of equally long blocks. Their number does not depend on the tokenizer, so two models can be
    compared on them.
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
        """e to the power of the loss: the number of equally likely tokens among which choosing is as hard."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits per byte of UTF-8. Unlike the other two it is comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def opening(tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids that precede a document in training: its `edge`, else a line feed; empty if the vocabulary has neither."""
    first = edge(tokenizer)
    if first is not None:
        return np.array([first], dtype=np.uint32)
    try:
        return tokenizer.encode_array("\n")[-1:]
    except UnknownCharacters:
        return np.zeros(0, dtype=np.uint32)


def measure(texts: Iterable[str], tokenizer: Tokenizer, score: Score, add: Callable[[int], None]) -> Figures:
    """Return the figures of `texts`. Each follows its `opening`, which is not counted itself.

    `add` is called with the number of characters just done. Raise DataError if there is nothing to predict.
    """
    head, size = opening(tokenizer), 0
    nats, lengths = [np.zeros(0)], [np.zeros(0)]
    for group in _groups(texts):
        encoded = [tokenizer.encode_array(text) for text in group]
        nats += [-row for row in score([np.concatenate([head, ids]) for ids in encoded])]
        first = 0 if len(head) else 1  # the first token that is predicted
        lengths += [_shares(ids, text, tokenizer)[first:] for ids, text in zip(encoded, group, strict=True)]
        size += sum(len(text.encode()) for text in group)
        add(sum(map(len, group)))
    tokens, counted = np.concatenate(nats), np.concatenate(lengths)
    if not counted.sum():
        raise DataError("the text to measure is too short: no token of it follows another; use more text")
    blocks = max(1, min(MOST_BLOCKS, size // BLOCK))
    bits = per_block(tokens, counted, blocks) / math.log(2) / (counted.sum() / blocks)
    return Figures(nats=float(tokens.sum()), tokens=len(tokens), bytes=round(float(counted.sum())), blocks=bits)


def _shares(ids: np.ndarray, text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return how many of the text's bytes of UTF-8 fall to each of its `ids` (N,), float64 (N,).

    The tokens may spell more or fewer bytes than the text has: a space that SentencePiece puts before it, or its NFC.
    """
    lengths = byte_lengths(ids, tokenizer).astype(np.float64)
    return lengths * (len(text.encode()) / max(1, lengths.sum()))  # none where a vocabulary has no token for the text


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield groups of consecutive texts of about GROUP characters in total."""
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
    """Return the number of UTF-8 bytes of each of `ids` (N,), int64 (N,)."""
    distinct, inverse = np.unique(ids, return_inverse=True)
    lengths = [len(tokenizer.decode_bytes([token])) for token in distinct.tolist()]
    return np.array(lengths, dtype=np.int64)[inverse]


def per_block(values: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """Return the sums (count,) of the tokens' values (N,) over equally long blocks of text.

    A token that crosses a border is divided in proportion to its bytes.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    borders = np.linspace(0, ends[-1], count + 1)
    return np.diff(np.interp(borders, ends, np.concatenate([[0], np.cumsum(values)])))
