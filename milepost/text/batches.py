"""Batches as a pure function: the windows of a step depend only on the seed and on the number of windows before it.

There is no random stream to advance, so any step's batch is computed at once and a checkpoint stores only a count.
"""

import math
from collections.abc import Iterator
from typing import Required, TypedDict, Unpack

import numpy as np
import torch

from milepost.splitmix import splitmix64
from milepost.text.errors import DataError
from milepost.text.token_arrays import Tokens, plain

ROUNDS = 8  # with 6 the orders of very short texts are visibly uneven
AHEAD = 4096  # window positions computed at once: computing 16 at a time takes seventy times as long per window
_PHASE, _ORDER = 1, 2  # the two uses of a key


class Steps(TypedDict, total=False):
    """Which windows the steps of a process read; StepBatches says how."""

    batch_size: Required[int]
    accumulation: int
    seed: Required[int]
    start_step: int
    start_window: int
    rows: slice


class StepBatches:
    """The batches of training steps. A subclass has the windows: `windows_at`, `sizes_at`, and their order, keyed by `seed`.

    `step` counts completed optimizer steps, so `at(start_step)` is the first batch; it begins at window `start_window`, counted over all
    epochs. `rows` selects one process's sequences of each micro-batch.
    """

    def __init__(
        self,
        *,
        block_size: int,
        windows_per_epoch: int,
        batch_size: int,
        accumulation: int = 1,
        seed: int,
        start_step: int = 0,
        start_window: int = 0,
        rows: slice = slice(None),
    ) -> None:
        self._shape, self._rows, self._seed = (accumulation, batch_size), rows, seed
        self._start = (start_step, start_window)
        self.block_size, self.windows_per_epoch = block_size, windows_per_epoch
        self.rows_per_step = accumulation * batch_size

    def windows_at(self, numbers: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return inputs, targets and what else a batch has, (N, block_size) int64 each, of the windows with these numbers (N,),
        which count over all epochs; targets are shifted by one token.
        """
        raise NotImplementedError

    def sizes_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many targets count and how many tokens are read, without padding, in each of these windows, (N,) each."""
        raise NotImplementedError

    def windows_seen(self, step: int) -> int:
        """Return the number of windows before the batch of `step`, over all epochs."""
        start_step, start_window = self._start
        return start_window + (step - start_step) * self.rows_per_step

    def epoch(self, step: int) -> float:
        """Return the number of epochs before the batch of `step`; of a mixture, of all its sources together."""
        return self.windows_seen(step) / self.windows_per_epoch

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        """Return what `windows_at` does for `step`, each (accumulation, rows, block_size)."""
        numbers = self._numbers(step)[:, self._rows]
        return tuple(part.view(*numbers.shape, self.block_size) for part in self.windows_at(numbers.reshape(-1)))

    def divisors(self, step: int) -> list[float]:
        """Return, for each micro-batch, by what to divide this process's mean loss over counted targets, so that the mean over
        processes of the sum over micro-batches is the mean over all counted targets of the step.
        """
        counted = self.sizes_at(self._numbers(step).reshape(-1))[0].reshape(self._shape)
        own = counted[:, self._rows]
        processes = counted.shape[1] // own.shape[1]
        return [int(counted.sum()) / (int(count) * processes) for count in own.sum(1)]

    def tokens_in(self, step: int) -> int:
        """Return how many tokens the step reads, without padding."""
        return int(self.sizes_at(self._numbers(step).reshape(-1))[1].sum())

    def _numbers(self, step: int) -> np.ndarray:
        """Return the numbers of the windows of all processes, (accumulation, batch_size)."""
        return (self.windows_seen(step) + np.arange(self.rows_per_step)).reshape(self._shape)


class Batches(StepBatches):
    """Training batches: every window of `tokens` once per epoch, in an order keyed by (seed, epoch).

    Windows are adjacent, `block_size` apart, and start at an offset also drawn from (seed, epoch). Raise DataError if the text is
    shorter than one window.
    """

    def __init__(self, tokens: Tokens, *, block_size: int, **steps: Unpack[Steps]) -> None:
        _check_length(len(tokens), block_size, "training")
        windows = max(1, (len(tokens) - block_size) // block_size)
        super().__init__(block_size=block_size, windows_per_epoch=windows, **steps)
        self._tokens = plain(tokens)
        self._phases = min(block_size, len(tokens) - windows * block_size)
        # The first window computed ahead, and where it and the next ones start.
        self._ahead = 0, np.zeros(0, dtype=np.int64)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of `step`, each (accumulation, rows, block_size) int64; targets are shifted by one token."""
        first = self.windows_seen(step)
        known, starts = self._ahead
        if not known <= first <= known + len(starts) - self.rows_per_step:
            count = max(AHEAD, self.rows_per_step)
            known, starts = self._ahead = first, self._window_starts(np.arange(first, first + count))
        starts = starts[first - known :][: self.rows_per_step]
        starts = starts.reshape(self._shape)[:, self._rows]  # (accumulation, rows)
        x, y = _windows(self._tokens, starts.reshape(-1), self.block_size)
        return x.view(*starts.shape, self.block_size), y.view(*starts.shape, self.block_size)

    def windows_at(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return _windows(self._tokens, self._window_starts(numbers), self.block_size)

    def sizes_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return as many as a whole block has."""
        sizes = np.full(len(numbers), self.block_size)
        return sizes, sizes

    def _window_starts(self, positions: np.ndarray) -> np.ndarray:
        """Return the first token of each of the windows at `positions`, which count over all epochs."""
        epochs, indices = np.divmod(positions.astype(np.uint64), np.uint64(self.windows_per_epoch))
        phases = epoch_keys(self._seed, epochs, _PHASE) % np.uint64(self._phases)
        windows = permuted(indices, size=self.windows_per_epoch, keys=epoch_keys(self._seed, epochs, _ORDER))
        return (phases + windows * np.uint64(self.block_size)).astype(np.int64)


def largest_block_size(train_tokens: int, validation_tokens: int) -> int:
    """Return the largest block size for which both parts of the text have a window. An empty validation part sets no limit."""
    return min(train_tokens, validation_tokens or train_tokens) - 1


def validation_windows(
    tokens: Tokens, *, block_size: int, batch_size: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield fixed batches (x, y) for evaluation, each (B, block_size) int64; only the last B may be below batch_size.

    They hold all adjacent windows of `tokens` if `steps` is 0, else steps * batch_size of them, evenly spaced. Empty `tokens`
    yield nothing. Raise DataError if there are too few for one window.
    """
    if len(tokens):
        _check_length(len(tokens), block_size, "validation")
    there = max(0, (len(tokens) - 1) // block_size)
    count = min(steps * batch_size, there) if steps else there
    starts = np.arange(count) * there // max(1, count) * block_size
    ids = plain(tokens)
    return (_windows(ids, starts[first : first + batch_size], block_size) for first in range(0, count, batch_size))


def permuted(indices: np.ndarray, *, size: int, keys: np.ndarray) -> np.ndarray:
    """Return keyed permutations of range(size), applied to `indices` element by element: `keys[i]` selects the i-th; uint64.

    A balanced Feistel network over pairs of numbers below ceil(sqrt(size)), combined by addition modulo that (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains"). Results past `size` are permuted again until they fall inside (cycle walking),
    which is rare because the square is hardly larger than `size`. Constant memory and time per index.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    result = indices.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _feistel(result[outside], side, keys[outside])
        outside = outside[result[outside] >= size]
    return result


def _feistel(values: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, side)
    for number in range(ROUNDS):
        mixed = splitmix64(keys ^ (right * np.uint64(ROUNDS) + np.uint64(number)))
        left, right = right, (left + mixed) % side
    return left * side + right


def epoch_keys(seed: int, epochs: np.ndarray, use: int) -> np.ndarray:
    """Return a key for each epoch, uint64."""
    first = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return splitmix64(splitmix64(first ^ np.uint64(use)) + epochs)


def _windows(tokens: Tokens, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.empty((len(starts), block_size + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        row[:] = tokens[start : start + block_size + 1]
    windows = torch.from_numpy(rows)  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _check_length(count: int, block_size: int, text: str) -> None:
    if count < 2:
        raise DataError(f"the {text} text has {count} tokens, too few for any block size: use more text")
    if count <= block_size:
        raise DataError(
            f"a block size of {block_size} needs at least {block_size + 1} tokens, the {text} text has {count}: "
            f"use a block size of {count - 1} or less"
        )
