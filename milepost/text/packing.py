"""Batches of conversations as a pure function: several share a window, and which ones depends on (seed, epoch) alone.

The number of windows depends only on the lengths, so the windows of any step are known without those before it: each epoch
the same pattern of lengths is filled anew, with conversations of equal length exchanged at random.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
import torch

from milepost.splitmix import splitmix64
from milepost.text.batches import StepBatches, Steps, epoch_keys, permuted
from milepost.text.errors import DataError
from milepost.text.examples import Examples

IGNORED = -100  # a target that does not count, as torch's cross_entropy has it
_ORDER, _FILL = 2, 3  # the uses of a key
_GROUP = 1 << 16  # conversations looked at together

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Packing:
    """How conversations fill windows of `block_size` predictions.

    Conversation i takes `lengths[i]` predictions, of which `counted[i]` count. Window w has the places `slots[starts[w] :
    starts[w + 1]]` in the order of their lengths.
    """

    examples: Examples
    block_size: int
    answers: bool  # whether only the tokens of answers count
    used: np.ndarray  # (E,) the numbers of the conversations
    lengths: np.ndarray  # (E,)
    counted: np.ndarray  # (E,)
    slots: np.ndarray  # (E,)
    starts: np.ndarray  # (W + 1,)
    cut: int  # conversations that are longer than a window and lose their end
    left_out: int  # those without a target that counts in what is left

    @property
    def windows(self) -> int:
        """The number of windows of an epoch."""
        return len(self.starts) - 1

    @property
    def padding(self) -> float:
        """The fraction of all positions that hold nothing."""
        return 1 - float(self.lengths.sum()) / (self.windows * self.block_size)

    def filled(self, seed: int, epoch: int) -> np.ndarray:
        """Return which conversation is in each of `slots` in an epoch, (E,): longest first, at random among equals."""
        key = epoch_keys(seed, np.array([epoch], dtype=np.uint64), _FILL)
        return np.lexsort((splitmix64(key + np.arange(len(self.lengths), dtype=np.uint64)), -self.lengths))

    def batch(self, windows: list[np.ndarray], *, positions: bool) -> Batch:
        """Return inputs and targets (B, T) of windows, each given by its conversations, and with `positions` where each input
        stands in its conversation: 0 begins another. Targets that do not count are IGNORED.
        """
        x = np.zeros((len(windows), self.block_size), dtype=np.int64)
        y = np.full_like(x, IGNORED)
        where = np.zeros_like(x)
        for row, members in enumerate(windows):
            at = 0
            for member in members.tolist():
                end = at + int(self.lengths[member])
                ids, counts = self._ids(member)
                x[row, at:end] = ids[:-1]
                y[row, at:end] = np.where(counts[1:], ids[1:], IGNORED)
                where[row, at:end] = np.arange(end - at)
                at = end
            where[row, at:] = np.arange(self.block_size - at)  # padding is a conversation of its own
        return tuple(map(torch.from_numpy, (x, y, where) if positions else (x, y)))

    def _ids(self, member: int) -> tuple[np.ndarray, np.ndarray]:
        number = self.used[member]
        start = int(self.examples.ends[number - 1]) if number else 0
        tokens = np.asarray(self.examples.tokens[start : start + int(self.lengths[member]) + 1]).astype(np.int64)
        return tokens >> 1, tokens & 1 if self.answers else np.ones_like(tokens)


def packed(
    examples: Examples, *, block_size: int, pack: bool, answers: bool, part: Literal["train", "validate"] = "train"
) -> Packing:
    """Return how the conversations fill windows, one in each unless `pack`. Raise DataError if none has a target that counts,
    naming the `part` of the text that they are.

    One that is longer than a window loses its end, and is left out if no counted target remains.
    """
    ends = np.asarray(examples.ends)
    if not len(ends):
        raise DataError(f"no conversation is left to {part} on: use more, or hold out a smaller part or none of them")
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    lengths = np.clip(ends - starts - 1, 0, block_size)
    counted = _counted(examples, starts, lengths) if answers else lengths
    used = np.flatnonzero(counted > 0)
    if not len(used):
        raise DataError(
            f"none of {len(ends)} conversations to {part} on has an answer within a block size of {block_size} tokens: "
            "use a longer one, or more conversations"
        )
    longer = ends - starts - 1 > block_size
    lengths = lengths[used]
    window_of = best_fit(np.sort(lengths)[::-1], block_size) if pack else np.arange(len(used))
    return Packing(
        examples=examples,
        block_size=block_size,
        answers=answers,
        used=used,
        lengths=lengths,
        counted=counted[used],
        slots=np.argsort(window_of, kind="stable"),
        starts=np.concatenate([[0], np.cumsum(np.bincount(window_of))]),
        cut=int(longer[used].sum()),
        left_out=len(ends) - len(used),
    )


def _counted(examples: Examples, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return how many targets of each conversation count, reading the tokens in groups."""
    counted = np.zeros_like(lengths)
    for first in range(0, len(starts), _GROUP):
        part = slice(first, first + _GROUP)
        begin, end = int(starts[part][0]), int(examples.ends[part][-1])
        sums = np.concatenate([[0], np.cumsum(np.asarray(examples.tokens[begin:end]) & 1, dtype=np.int64)])
        inside = starts[part] - begin
        counted[part] = sums[inside + lengths[part] + (lengths[part] > 0)] - sums[inside + (lengths[part] > 0)]
    return counted


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Return the window of each of `lengths` (N,), which descend: the fullest that still has room (best-fit decreasing).

    Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms". Windows with equal
    room are found through a bit for each room, so the time hardly depends on their number.
    """
    windows, count = np.empty(len(lengths), dtype=np.int64), 0
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    bits = 0  # bit r: some window has room for r more
    for number, length in enumerate(lengths.tolist()):
        fitting = bits >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            window = with_room[left].pop()
            if not with_room[left]:
                bits &= ~(1 << left)
        else:
            window, left, count = count, room, count + 1
        windows[number] = window
        with_room[left - length].append(window)
        bits |= 1 << (left - length)
    return windows


class PackedBatches(StepBatches):
    """Training batches of conversations. `positions` adds them to a batch, for a model whose attention must not cross conversations.

    The order of windows is keyed by (seed, epoch).
    """

    def __init__(self, packing: Packing, *, positions: bool = True, **steps: Unpack[Steps]) -> None:
        super().__init__(block_size=packing.block_size, windows_per_epoch=packing.windows, **steps)
        self._packing, self._positions = packing, positions
        self._filled: dict[int, np.ndarray] = {}  # of the last epochs
        # The numbers that were asked for last, and their windows.
        self._last = np.zeros(0, dtype=np.int64), list[np.ndarray]()

    def windows_at(self, numbers: np.ndarray) -> Batch:
        return self._packing.batch(self._windows(numbers), positions=self._positions)

    def sizes_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows = self._windows(numbers)
        counted, lengths = self._packing.counted, self._packing.lengths
        return tuple(np.array([int(of[window].sum()) for window in windows]) for of in (counted, lengths))  # type: ignore[return-value]

    def _windows(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Return the conversations of each of these windows. A step asks for the same ones for its batch and for its sizes."""
        if not np.array_equal(numbers, self._last[0]):
            self._last = numbers, list(self._drawn(numbers))
        return self._last[1]

    def _drawn(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        epochs, indices = np.divmod(numbers.astype(np.uint64), np.uint64(self.windows_per_epoch))
        order = permuted(indices, size=self.windows_per_epoch, keys=epoch_keys(self._seed, epochs, _ORDER))
        starts, slots = self._packing.starts, self._packing.slots
        for epoch, window in zip(epochs.tolist(), order.tolist(), strict=True):
            yield self._epoch(epoch)[slots[starts[window] : starts[window + 1]]]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._filled:
            recent = {known: filled for known, filled in self._filled.items() if known == epoch - 1}
            self._filled = recent | {epoch: self._packing.filled(self._seed, epoch)}
        return self._filled[epoch]


def validation_batches(packing: Packing, *, batch_size: int, steps: int, positions: bool) -> Iterator[Batch]:
    """Yield fixed batches for evaluation, (B, T) each; only the last B may be below batch_size.

    They hold all windows if `steps` is 0, else steps * batch_size of them, evenly spaced.
    """
    count = min(steps * batch_size, packing.windows) if steps else packing.windows
    chosen = (np.arange(count) * packing.windows // max(1, count)).tolist()
    filled, starts = packing.filled(0, 0), packing.starts
    windows = [filled[packing.slots[starts[window] : starts[window + 1]]] for window in chosen]
    for first in range(0, count, batch_size):
        yield packing.batch(windows[first : first + batch_size], positions=positions)
