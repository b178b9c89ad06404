"""Mixtures: batches whose windows come from several sources by weight, as a pure function of (seed, number of the window).

Windows are counted over all epochs. They are divided into cycles, of which each holds as many windows of a source as its weight
says, in an order keyed by (seed, cycle). So the source of any window, and which of its own windows it is, are known at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Unpack

import numpy as np
import torch

from milepost.text.batches import StepBatches, Steps, epoch_keys, permuted
from milepost.text.errors import DataError
from milepost.text.examples import Examples, ExampleSplit
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


class MixedBatches(StepBatches):
    """Training batches of several sources: `parts` have the windows of each, of which `cycle` says how many are in a cycle."""

    def __init__(self, parts: Sequence[StepBatches], cycle: Sequence[int], **steps: Unpack[Steps]) -> None:
        windows = sum(part.windows_per_epoch for part in parts)
        super().__init__(block_size=parts[0].block_size, windows_per_epoch=windows, **steps)
        self._parts, self._cycle = parts, np.array(cycle, dtype=np.int64)
        self._ends = np.cumsum(self._cycle)

    def windows_at(self, numbers: np.ndarray) -> tuple[torch.Tensor, ...]:
        sources, within = self._sources(numbers)
        found: list[torch.Tensor] = []
        for source, part in enumerate(self._parts):
            own = torch.from_numpy(np.flatnonzero(sources == source))
            windows = part.windows_at(within[sources == source])
            found = found or [each.new_empty(len(sources), self.block_size) for each in windows]
            for into, each in zip(found, windows, strict=True):
                into[own] = each
        return tuple(found)

    def sizes_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, within = self._sources(numbers)
        counted, read = np.zeros_like(within), np.zeros_like(within)
        for source, part in enumerate(self._parts):
            own = sources == source
            counted[own], read[own] = part.sizes_at(within[own])
        return counted, read

    def windows_by_source(self, step: int) -> list[int]:
        """Return how many of the windows before the batch of `step` came from each source."""
        cycles, rest = divmod(self.windows_seen(step), int(self._ends[-1]))
        sources, _ = self._sources(np.arange(rest) + cycles * int(self._ends[-1]))
        return (cycles * self._cycle + np.bincount(sources, minlength=len(self._parts))).tolist()

    def epochs_by_source(self, step: int) -> list[float]:
        """Return how often each source was read before the batch of `step`."""
        counts = self.windows_by_source(step)
        return [count / part.windows_per_epoch for count, part in zip(counts, self._parts, strict=True)]

    def _sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each of the windows at `positions`, and the number among all windows of that source."""
        size = int(self._ends[-1])
        cycles, places = np.divmod(positions.astype(np.uint64), np.uint64(size))
        drawn = permuted(places, size=size, keys=epoch_keys(self._seed, cycles, _MIX)).astype(np.int64)
        sources = np.searchsorted(self._ends, drawn, side="right")
        within = drawn - (self._ends - self._cycle)[sources]
        return sources, cycles.astype(np.int64) * self._cycle[sources] + within
