"""The texts of a request, token by token, with log-probabilities where they are asked for."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from milepost.generation.decoder import DecodeCache, Decoder
from milepost.generation.prefixes import Prefixes
from milepost.generation.texts import Sampling, steps
from milepost.text.tokenization.base import Tokenizer
from models.model import Model

ROWS = 64  # tokens of a prompt whose probabilities are computed at a time
LOWEST = -9999.0  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Work:
    """Texts to generate: `n` after each prompt. Text number i after a prompt depends only on it, the seed and i.

    `logprobs` is how many of the likeliest tokens to list; None for no log-probabilities.
    """

    model: Model
    generator: Model | Decoder
    lookup: bool
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    seed: int
    n: int = 1
    logprobs: int | None = None
    echo: bool = False


class Score(NamedTuple):
    """A token as its bytes, its log-probability in nats (None for the first token of a text), and the likeliest tokens
    in its place.
    """

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]


class Piece(NamedTuple):
    """What one step adds to text number `choice` of a request. `finish` is why it ends; else ""."""

    choice: int
    text: str = ""
    tokens: int = 0  # generated
    scores: Sequence[Score] = ()
    finish: Literal["", "stop", "length"] = ""
    kept: int = 0  # tokens of the prompt that an earlier text had read; told once for each prompt


class Next(NamedTuple):
    """The token that a text reads next, after what its cache holds, so that several texts can be read together."""

    token: int
    cache: DecodeCache


def pieces_by_text(work: Work, prefixes: Prefixes) -> Iterator[Iterator[tuple[Piece, Next | None]]]:
    """Yield for each text, in the order of their number, an iterator over its pieces; nothing is computed before it is asked.

    `prefixes` keeps what was read. The iterators raise ValueError if the logits are not finite.
    """
    for number, ids in enumerate(work.prompts):
        scores = functools.cache(functools.partial(prompt_scores, work, tuple(ids)))
        for text in range(work.n):
            yield _pieces(work, prefixes, ids, scores, index=number * work.n + text, number=text)


def _pieces(
    work: Work, prefixes: Prefixes, ids: Sequence[int], scores: Callable[[], list[Score]], *, index: int, number: int
) -> Iterator[tuple[Piece, Next | None]]:
    if work.echo:
        text = work.tokenizer.decode(ids[_unshown(work, ids) :])
        yield Piece(index, text, scores=scores() if work.logprobs is not None else []), None
    yield from _continued(work, prefixes, ids, index=index, number=number)


def _unshown(work: Work, ids: Sequence[int]) -> int:
    """Return how many tokens at the beginning of a prompt are no part of its text: 1 if a token that begins texts is there, else 0."""
    begin = work.tokenizer.begin_of_text
    return int(begin is not None and list(ids[:1]) == [begin])


def _continued(
    work: Work, prefixes: Prefixes, ids: Sequence[int], *, index: int, number: int
) -> Iterator[tuple[Piece, Next | None]]:
    cache = prefixes.cache_for(work.generator, ids)
    if number == 0 and isinstance(cache, DecodeCache) and cache.length:
        yield Piece(index, kept=cache.length), None
    drawn = steps(
        work.generator,
        work.tokenizer,
        list(ids),
        sampling=work.sampling,
        seed=work.seed,
        number=number,
        lookup=work.lookup,
        cache=cache,
    )
    for step in drawn:
        scores: list[Score] = []
        if work.logprobs is not None and step.token is not None and step.logits is not None:
            scores = [_score(work, step.token, step.logits.float().log_softmax(-1))]
        piece = Piece(index, step.text, int(step.token is not None), scores, step.finish)
        goes_on = step.token is not None and not step.finish and isinstance(cache, DecodeCache)
        yield piece, Next(step.token, cache) if goes_on else None  # type: ignore[arg-type]


def _score(work: Work, token: int, logprobs: Tensor) -> Score:
    """Return the score of a token by the log-probabilities (V,)."""
    best = logprobs[: work.tokenizer.vocab_size].topk(min(work.logprobs or 0, work.tokenizer.vocab_size))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = [(work.tokenizer.decode_bytes([i]), max(value, LOWEST)) for i, value in pairs]
    return Score(work.tokenizer.decode_bytes([token]), max(logprobs[token].item(), LOWEST), top)


@torch.inference_mode()
def prompt_scores(work: Work, ids: Sequence[int]) -> list[Score]:
    """Return the scores of the tokens of a prompt, by the model itself in float32, as an evaluation computes them."""
    if not ids:
        return []
    first = b"" if _unshown(work, ids) else work.tokenizer.decode_bytes(ids[:1])  # the tokens make up the text
    found = [Score(first, None, [])]
    if len(ids) > 1:
        device = next(work.model.parameters()).device
        logits: Tensor = work.model(torch.tensor([ids[:-1]], device=device)).logits[0]  # (T - 1, V)
        for start in range(0, len(logits), ROWS):
            rows = logits[start : start + ROWS].float().log_softmax(-1).cpu()
            found += [_score(work, token, row) for token, row in zip(ids[start + 1 :], rows, strict=False)]
    return found
