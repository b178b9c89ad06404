"""Mixtures: batches whose windows come from several sources by weight, as a pure function of (seed, number of the window).

Windows are counted over all epochs. They are divided into cycles, of which each holds as many windows of a source as its weight
says, in an order keyed by (seed, cycle). So the source of any window, and which of its own windows it is, are known at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from milepost.text.batches import Batches, epoch_keys, permuted
from milepost.text.errors import DataError
from milepost.text.examples import Examples, ExampleSplit
from milepost.text.packing import PackedBatches
from milepost.text.token_arrays import Tokens
from milepost.text.token_files import TokenSplit

LONGEST_CYCLE = 1_000_000  # windows
_MIX = 4  # the use of a key


@dataclass(frozen=True)
class MixedTokens:
    """The tokens of each source of a mixture."""

    parts: tuple[Tokens | Examples, ...]

    def __len__(self) -> int:
        """Return the number of tokens of all sources."""
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class MixedSplit:
    """Both parts of each source, and how many windows of each are in a cycle."""

    train: MixedTokens
    validation: MixedTokens | Tokens | Examples
    cycle: tuple[int, ...]


def mixed_split(splits: Sequence[TokenSplit | ExampleSplit], weights: Sequence[str]) -> MixedSplit:
    """Return the splits of the sources of a mixture as one."""
    train, validation = (MixedTokens(tuple(getattr(each, name) for each in splits)) for name in ("train", "validation"))
    return MixedSplit(train, validation, cycle_of(weights))


def cycle_of(weights: Sequence[str]) -> tuple[int, ...]:
    """Return how many windows of each source are in a cycle: the smallest whole numbers in the ratio of the weights.

    Raise DataError if a weight is 0, or the cycle would be longer than LONGEST_CYCLE.
    """
    values = [Fraction(weight.removeprefix("*")) for weight in weights]
    if not all(values):
        raise DataError("a weight of a mixture is 0: leave that source out")
    whole = [int(value * math.lcm(*(each.denominator for each in values))) for value in values]
    cycle = tuple(each // math.gcd(*whole) for each in whole)
    if sum(cycle) > LONGEST_CYCLE:
        raise DataError(
            f"the weights {', '.join(weights)} of a mixture are too fine: use rounder ones, such as *3 and *1"
        )
    return cycle


class MixedBatches:
    """Training batches of several sources, with the interface of `milepost.text.batches.Batches`.

    `parts` have the windows of each source, of which `cycle` says how many are in a cycle.
    """

    def __init__(
        self,
        parts: Sequence[Batches | PackedBatches],
        cycle: Sequence[int],
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int,
        start_step: int = 0,
        start_window: int = 0,
        rows: slice = slice(None),
    ) -> None:
        self._parts, self._cycle, self._seed = parts, np.array(cycle, dtype=np.int64), seed
        self._ends = np.cumsum(self._cycle)
        self._shape, self._rows = (accumulation, batch_size), rows
        self._start = (start_step, start_window)
        self.block_size = parts[0].block_size
        self.rows_per_step = accumulation * batch_size
        self.windows_per_epoch = sum(part.windows_per_epoch for part in parts)

    def windows_seen(self, step: int) -> int:
        """Return the number of windows before the batch of `step`, over all epochs."""
        start_step, start_window = self._start
        return start_window + (step - start_step) * self.rows_per_step

    def epoch(self, step: int) -> float:
        """Return the number of windows before the batch of `step`, by how many all sources have together."""
        return self.windows_seen(step) / self.windows_per_epoch

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        """Return what the sources' batches have for `step`, each (accumulation, rows, block_size) int64."""
        sources, numbers = (each[:, self._rows].reshape(-1) for each in self._windows_of(step))
        found: list[torch.Tensor] = []
        for source, part in enumerate(self._parts):
            own = torch.from_numpy(np.flatnonzero(sources == source))
            windows = part.windows_at(numbers[sources == source])
            found = found or [each.new_empty(len(sources), self.block_size) for each in windows]
            for into, each in zip(found, windows, strict=True):
                into[own] = each
        return tuple(each.view(self._shape[0], -1, self.block_size) for each in found)

    def divisors(self, step: int) -> list[float]:
        """Return, for each micro-batch, by what to divide this process's mean loss over counted targets, so that the mean over
        processes of the sum over micro-batches is the mean over all counted targets of the step.
        """
        counted, _ = self._sizes(step)
        own = counted[:, self._rows]
        processes = counted.shape[1] // own.shape[1]
        return [int(counted.sum()) / (int(count) * processes) for count in own.sum(1)]

    def tokens_in(self, step: int) -> int:
        """Return how many tokens the step reads, without padding."""
        return int(self._sizes(step)[1].sum())

    def windows_by_source(self, step: int) -> list[int]:
        """Return how many of the windows before the batch of `step` came from each source."""
        cycles, rest = divmod(self.windows_seen(step), int(self._ends[-1]))
        sources, _ = self._sources(np.arange(rest) + cycles * int(self._ends[-1]))
        return (cycles * self._cycle + np.bincount(sources, minlength=len(self._parts))).tolist()

    def epochs_by_source(self, step: int) -> list[float]:
        """Return how often each source was read before the batch of `step`."""
        counts = self.windows_by_source(step)
        return [count / part.windows_per_epoch for count, part in zip(counts, self._parts, strict=True)]

    def _sizes(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many targets count and how many tokens are read in each window of all processes, (A, B) each."""
        sources, numbers = self._windows_of(step)
        counted, read = np.zeros_like(numbers), np.zeros_like(numbers)
        for source, part in enumerate(self._parts):
            own = sources == source
            counted[own], read[own] = part.sizes_at(numbers[own])
        return counted, read

    def _windows_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each window of all processes and its number there, (A, B) each."""
        first = self.windows_seen(step)
        sources, numbers = self._sources(np.arange(first, first + self.rows_per_step))
        return sources.reshape(self._shape), numbers.reshape(self._shape)

    def _sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each of the windows at `positions`, and the number among all windows of that source."""
        size = int(self._ends[-1])
        cycles, places = np.divmod(positions.astype(np.uint64), np.uint64(size))
        drawn = permuted(places, size=size, keys=epoch_keys(self._seed, cycles, _MIX)).astype(np.int64)
        sources = np.searchsorted(self._ends, drawn, side="right")
        within = drawn - (self._ends - self._cycle)[sources]
        return sources, cycles.astype(np.int64) * self._cycle[sources] + within
