"""How likely a model finds given tokens: the natural logarithm of each one's probability after those before it."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.model import Model

LOGITS: Final = 2**26  # at once, 256 MB in float32: rather than take more, a batch is made smaller


class Window(NamedTuple):
    """The predictions `first` to `end` of a sequence, made while its ids from `start` to `end` are read.

    Prediction i is of ids[i + 1], made once ids[i] is read.
    """

    start: int
    first: int
    end: int


def windows(length: int, *, context: int, stride: int) -> Iterator[Window]:
    """How a sequence of `length` ids is read, `context` at a time, so that each of its length - 1 predictions is made once.

    The first window reads from the beginning. Each further one ends `stride` ids later (1 to context), the last one at the end, and
    reads back over `context` ids: every prediction in it is made from more than context - stride of them.
    """
    done = 0
    while done < length - 1:
        end = min(length - 1, done + stride if done else context)
        yield Window(max(0, end - context), done, end)
        done = end


def log_likelihoods(
    model: Model, sequences: Sequence[np.ndarray], *, batch_size: int, stride: int | None = None
) -> list[np.ndarray]:
    """Of each sequence of ids (N,) the log-probabilities, in nats, of all ids but the first: float64 (N - 1,).

    They are read by `windows` of the model's block_size, `stride` apart (None: side by side), at most batch_size of them at once. The
    model must be in evaluation mode; softmax is taken in float32 over all of its rows, those above the tokenizer's included.
    """
    context = model.settings.block_size
    jobs = [
        (which, window)
        for which, ids in enumerate(sequences)
        for window in windows(len(ids), context=context, stride=stride or context)
    ]
    jobs.sort(key=lambda job: job[1].end - job[1].start)  # so that those of a batch are about equally long
    results = [np.empty(max(0, len(ids) - 1)) for ids in sequences]
    rows = max(1, min(batch_size, LOGITS // (context * model.settings.vocab_size)))
    for position in range(0, len(jobs), rows):
        batch = jobs[position : position + rows]
        found = _log_probabilities(model, [sequences[which][one.start : one.end + 1] for which, one in batch])
        for (which, one), row in zip(batch, found, strict=True):
            results[which][one.first : one.end] = row[one.first - one.start : one.end - one.start]
    return results


@torch.inference_mode()
def _log_probabilities(model: Model, rows: list[np.ndarray]) -> np.ndarray:
    """The log-probabilities (B, T) of each row's ids but the first; behind the end of a shorter row stands nothing of use."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # (B, T + 1)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = torch.from_numpy(
            row.astype(np.int64)
        )  # what comes later changes nothing before it: any padding will do
    ids = padded.to(next(model.parameters()).device)
    logits: Tensor = model(ids[:, :-1]).logits.float()  # (B, T, V)
    chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]  # (B, T)
    return (chosen - logits.logsumexp(-1)).cpu().double().numpy()
