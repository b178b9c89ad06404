"""Log-likelihoods of token sequences: the natural logarithm of each token's probability given the tokens before it."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.model import Model

LOGITS: Final = 2**26  # the most per batch, 256 MB in float32: larger batches are made smaller


class Window(NamedTuple):
    """Predictions `first` to `end` of a sequence, made from its ids `start` to `end`.

    Prediction i is that of ids[i + 1].
    """

    start: int
    first: int
    end: int


def windows(length: int, *, context: int, stride: int) -> Iterator[Window]:
    """Yield windows of at most `context` ids that make each of the length - 1 predictions of a sequence once.

    The first window starts at the beginning. Each further window ends `stride` ids later (1 to context), the last one
    at the end, and spans `context` ids, so every prediction in it uses more than context - stride of them.
    """
    done = 0
    while done < length - 1:
        end = min(length - 1, done + stride if done else context)
        yield Window(max(0, end - context), done, end)
        done = end


def log_likelihoods(
    model: Model, sequences: Sequence[np.ndarray], *, batch_size: int, stride: int | None = None
) -> list[np.ndarray]:
    """Return, for each sequence of ids (N,), the log-probabilities in nats of all ids but the first: float64 (N - 1,).

    Sequences are read in `windows` of the model's block_size, `stride` apart (None: adjacent), at most batch_size at
    once. The model must be in eval mode. Softmax is computed in float32 over all rows of the head, including those
    above the tokenizer's.
    """
    context = model.settings.block_size
    jobs = [
        (which, window)
        for which, ids in enumerate(sequences)
        for window in windows(len(ids), context=context, stride=stride or context)
    ]
    jobs.sort(key=lambda job: job[1].end - job[1].start)  # so that the windows of a batch are about equally long
    results = [np.empty(max(0, len(ids) - 1)) for ids in sequences]
    rows = rows_at_once(model, batch_size)
    for position in range(0, len(jobs), rows):
        batch = jobs[position : position + rows]
        found = _log_probabilities(model, [sequences[which][window.start : window.end + 1] for which, window in batch])
        for (which, window), row in zip(batch, found, strict=True):
            results[which][window.first : window.end] = row[window.first - window.start : window.end - window.start]
    return results


def rows_at_once(model: Model, batch_size: int) -> int:
    """Return how many windows are read at once: batch_size, or as many as LOGITS allows."""
    return max(1, min(batch_size, LOGITS // (model.settings.block_size * model.settings.vocab_size)))


@torch.inference_mode()
def _log_probabilities(model: Model, rows: list[np.ndarray]) -> np.ndarray:
    """Return the log-probabilities (B, T) of each row's ids but the first.

    Values past the end of a shorter row are meaningless.
    """
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # (B, T + 1)
    for into, row in zip(padded, rows, strict=True):  # any padding will do: later ids do not affect earlier predictions
        into[: len(row)] = torch.from_numpy(row.astype(np.int64))
    ids = padded.to(next(model.parameters()).device)
    logits: Tensor = model(ids[:, :-1]).logits.float()  # (B, T, V)
    chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]  # (B, T)
    return (chosen - logits.logsumexp(-1)).cpu().double().numpy()
