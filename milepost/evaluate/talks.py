"""The likelihood of a model's answers in conversations, and how many of them it would write exactly."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from milepost.evaluate.answers import Answers
from milepost.evaluate.passages import BLOCK, MOST_BLOCKS, Figures, byte_lengths, per_block
from milepost.evaluate.scoring import LOGITS
from milepost.text.conversations import Talk
from milepost.text.errors import DataError
from milepost.text.templates import example
from milepost.text.tokenization.base import Tokenizer
from models.model import Model


def measure_talks(
    talks: Sequence[Talk],
    model: Model,
    tokenizer: Tokenizer,
    template: str | None,
    *,
    batch_size: int,
    add: Callable[[int], None],
) -> tuple[Figures, Answers, int]:
    """Return the figures of all tokens of answers, which answers the model writes exactly when it takes the most likely
    token each time, and how many reach past its context; `add` is called with the number of conversations just done.

    An answer is exact if each of its tokens, its end too, is the most likely one after those before it: then greedy generation
    writes it. What is past the model's context is not measured, and an answer that reaches past it is not exact. Raise DataError
    if no answer is within it.
    """
    context = model.settings.block_size
    nats, lengths, exact, past = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], list[bool](), 0
    rows = max(1, min(batch_size, LOGITS // (context * model.settings.vocab_size)))
    for first in range(0, len(talks), rows):
        whole = [example(talk, tokenizer, template) for talk in talks[first : first + rows]]
        group = [(ids[: context + 1], answers[: context + 1]) for ids, answers in whole]
        predicted = _predicted(model, [ids for ids, _ in group])
        for (ids, answers), (_, every), (likelihoods, best) in zip(group, whole, predicted, strict=True):
            counted = answers[1:]
            nats.append(-likelihoods[counted])
            lengths.append(byte_lengths(ids[1:][counted], tokenizer))
            parts = list(_runs(every[1:]))
            exact += [part.stop <= len(best) and bool(best[part].all()) for part in parts]
            past += sum(part.stop > len(best) for part in parts)
        add(len(group))
    tokens, sizes = np.concatenate(nats), np.concatenate(lengths)
    if not sizes.sum():
        raise DataError(f"no answer lies within the model's context of {context} tokens: use shorter conversations")
    blocks = max(1, min(MOST_BLOCKS, int(sizes.sum()) // BLOCK))
    bits = per_block(tokens, sizes, blocks) / math.log(2) / (sizes.sum() / blocks)
    figures = Figures(nats=float(tokens.sum()), tokens=len(tokens), bytes=int(sizes.sum()), blocks=bits)
    return figures, Answers("exact match", "conversations", np.array(exact), None), past


def _runs(counted: np.ndarray) -> Iterator[slice]:
    """Yield where each run of True begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], counted, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield slice(start, end)


@torch.inference_mode()
def _predicted(model: Model, group: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each of the ids (N,), the log-probabilities (N - 1,) in nats of all ids but the first, and whether each is the most likely."""
    padded = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
    for into, ids in zip(padded, group, strict=True):
        into[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    padded = padded.to(next(model.parameters()).device)
    logits = model(padded[:, :-1]).logits.float()  # (B, T, V)
    targets = padded[:, 1:]
    chosen = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    best = logits.argmax(-1) == targets
    found = zip(chosen.cpu().double().numpy(), best.cpu().numpy(), group, strict=True)
    return [(row[: len(ids) - 1], right[: len(ids) - 1]) for row, right, ids in found]
