"""Batches as a pure function: which windows a step sees depends on the seed and on how many windows came before.

Nothing is drawn from a stream, so any step is reached at once and nothing but a count has to be stored.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from milepost.text.corpus import DataError

ROUNDS = 8  # with 6 the orders of very short texts are visibly uneven
AHEAD = 4096  # windows placed at once: of 16 alone, each takes seventy times as long
_PHASE, _ORDER = 1, 2  # what a key is for


class Batches:
    """Training batches: in each epoch every window of `tokens` once, in an order keyed by (seed, epoch).

    Windows lie side by side, `block_size` apart, from a phase that is also drawn from (seed, epoch). `step` counts
    completed optimizer steps, so `at(start_step)` is the first batch, and it begins at window `start_window` of the
    whole count. Of each micro-batch only `rows` are given: one process's share. DataError if there is too little text
    for one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        block_size: int,
        batch_size: int,
        accumulation: int = 1,
        seed: int,
        start_step: int = 0,
        start_window: int = 0,
        rows: slice = slice(None),
    ) -> None:
        _check_length(len(tokens), block_size, "training")
        self._tokens = np.asarray(tokens)  # a memmap's own slices cost several times more
        self._shape, self._rows = (accumulation, batch_size), rows
        self._seed = seed
        self._start = (start_step, start_window)
        self._ahead = (0, np.zeros(0, dtype=np.int64))  # where windows start, from which one of the whole count on
        self.block_size = block_size
        self.rows_per_step = accumulation * batch_size
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._phases = min(block_size, len(tokens) - self.windows_per_epoch * block_size)

    def windows_seen(self, step: int) -> int:
        """How many windows come before the batch of `step`, over all epochs."""
        start_step, start_window = self._start
        return start_window + (step - start_step) * self.rows_per_step

    def epoch(self, step: int) -> float:
        """How many epochs come before the batch of `step`."""
        return self.windows_seen(step) / self.windows_per_epoch

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `step`, each (accumulation, rows, block_size) int64; targets are one token on."""
        first = self.windows_seen(step)
        known, starts = self._ahead
        if not known <= first <= known + len(starts) - self.rows_per_step:
            count = max(AHEAD, self.rows_per_step)
            known, starts = self._ahead = first, self._window_starts(np.arange(first, first + count))
        starts = starts[first - known :][: self.rows_per_step].reshape(self._shape)[
            :, self._rows
        ]  # (accumulation, rows)
        x, y = _windows(self._tokens, starts.reshape(-1), self.block_size)
        return x.view(*starts.shape, self.block_size), y.view(*starts.shape, self.block_size)

    def _window_starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the windows at `positions` of the whole count start in the tokens."""
        epochs, indices = np.divmod(positions.astype(np.uint64), np.uint64(self.windows_per_epoch))
        phases = _key(self._seed, epochs, _PHASE) % np.uint64(self._phases)
        windows = permuted(indices, size=self.windows_per_epoch, keys=_key(self._seed, epochs, _ORDER))
        return (phases + windows * np.uint64(self.block_size)).astype(np.int64)


def largest_block_size(train_tokens: int, validation_tokens: int) -> int:
    """The largest block size for which both texts have a window; an empty validation text sets no limit."""
    return min(train_tokens, validation_tokens or train_tokens) - 1


def validation_windows(
    tokens: np.ndarray, *, block_size: int, batch_size: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fixed batches (x, y) for evaluation, each (B, block_size) int64 with B = batch_size but for the last.

    Of the windows that lie side by side in `tokens` all are taken if `steps` is 0, else steps * batch_size of them,
    evenly spaced. Nothing comes from empty `tokens`; DataError if they are too few for one window.
    """
    if len(tokens):
        _check_length(len(tokens), block_size, "validation")
    there = max(0, (len(tokens) - 1) // block_size)
    count = min(steps * batch_size, there) if steps else there
    starts = np.arange(count) * there // max(1, count) * block_size
    plain = np.asarray(tokens)
    return (_windows(plain, starts[first : first + batch_size], block_size) for first in range(0, count, batch_size))


def permuted(indices: np.ndarray, *, size: int, keys: np.ndarray) -> np.ndarray:
    """Where keyed permutations of range(size) send `indices`: element by element, `keys[i]` says which one; uint64.

    A balanced Feistel network over pairs of numbers below ceil(sqrt(size)), added modulo that (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains"). What lands past `size` is sent on until it lands inside (cycle
    walking), which is rare since the square is hardly larger than `size`. Constant memory and time for each index.
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


def splitmix64(values: np.ndarray) -> np.ndarray:
    """The 64-bit mix of Steele, Lea and Flood 2014 ("Fast Splittable Pseudorandom Number Generators"), uint64.

    Written out here so that the order of the data never depends on a library's generator.
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _key(seed: int, epochs: np.ndarray, use: int) -> np.ndarray:
    """A key for each epoch, uint64."""
    first = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return splitmix64(splitmix64(first ^ np.uint64(use)) + epochs)


def _windows(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.empty((len(starts), block_size + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        row[:] = tokens[start : start + block_size + 1]
    windows = torch.from_numpy(rows)  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _check_length(count: int, block_size: int, text: str) -> None:
    if count < 2:
        raise DataError(f"the {text} text has {count} tokens, which is too little for any BLOCK_SIZE: give more text")
    if count <= block_size:
        raise DataError(
            f"BLOCK_SIZE={block_size} needs at least {block_size + 1} tokens, the {text} text has {count}: "
            f"set BLOCK_SIZE={count - 1} or less"
        )
