import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.splitmix import splitmix64
from milepost.text import batches as batches_module
from milepost.text.batches import Batches, largest_block_size, permuted, validation_windows
from milepost.text.errors import DataError


def numbers(count: int) -> np.ndarray:
    """Tokens equal to their positions, so that a window shows where it starts."""
    return np.arange(count, dtype=np.uint32)


def first_tokens(batches: Batches, steps: range) -> list[int]:
    """The first token of each window, in training order."""
    return [start for step in steps for start in batches.at(step)[0][..., 0].flatten().tolist()]


def same(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


sizes = st.tuples(st.integers(1, 9), st.integers(2, 200)).filter(lambda size: size[1] > size[0])


@settings(max_examples=100, deadline=None)
@given(size=sizes, batch=st.integers(1, 7), accumulation=st.integers(1, 3), step=st.integers(0, 10**9))
def test_windows_are_slices_and_targets_are_shifted_by_one(
    size: tuple[int, int], batch: int, accumulation: int, step: int
) -> None:
    block_size, count = size
    x, y = Batches(numbers(count), block_size=block_size, batch_size=batch, accumulation=accumulation, seed=step).at(
        step
    )
    assert x.shape == y.shape == (accumulation, batch, block_size)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[..., :1], torch.arange(block_size).expand_as(x))
    assert x.min() >= 0
    assert y.max() < count


@settings(max_examples=100, deadline=None)
@given(size=sizes, seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 50))
def test_an_epoch_is_every_window_once(size: tuple[int, int], seed: int, epoch: int) -> None:
    block_size, count = size
    batches = Batches(numbers(count), block_size=block_size, batch_size=1, seed=seed)
    windows = batches.windows_per_epoch
    assert windows == max(1, (count - block_size) // block_size)
    starts = sorted(first_tokens(batches, range(epoch * windows, (epoch + 1) * windows)))
    phase = starts[0]
    assert starts == [phase + i * block_size for i in range(windows)]
    assert 0 <= phase < min(block_size, count - windows * block_size)
    unused = count - (windows * block_size + 1)
    assert unused < 2 * block_size


@settings(max_examples=60, deadline=None)
@given(
    size=sizes,
    batch=st.integers(1, 7),
    ahead=st.integers(1, 40),
    steps=st.lists(st.integers(5, 300) | st.integers(0, 10**12), min_size=2, max_size=30),
)
def test_a_batch_does_not_depend_on_earlier_calls(
    size: tuple[int, int], batch: int, ahead: int, steps: list[int]
) -> None:
    def new() -> Batches:
        return Batches(numbers(size[1]), block_size=size[0], batch_size=batch, seed=1, start_step=5, start_window=900)

    used, ordered = new(), sorted(step + 5 for step in steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "AHEAD", 1)  # the plain way: each step's windows alone
        plain = {step: new().at(step) for one in ordered for step in (one, one + 1)}
        patch.setattr(batches_module, "AHEAD", ahead)
        for step in [*ordered, *(step + 5 for step in steps), *plain]:
            assert same(used.at(step), plain[step])


def test_phase_and_order_change_with_epoch_and_seed() -> None:
    def epochs(seed: int) -> list[tuple[int, ...]]:
        batches = Batches(numbers(1000), block_size=10, batch_size=99, seed=seed)
        return [tuple(first_tokens(batches, range(epoch, epoch + 1))) for epoch in range(50)]

    seen = [*epochs(1), *epochs(2)]
    assert {min(starts) for starts in seen} == set(range(10))  # every phase
    orders = {tuple((start - min(starts)) // 10 for start in starts) for starts in seen}
    assert len(orders) == 100


def test_the_order_never_changes_silently() -> None:
    """Values pinned for good: other ones would make every resumed run see other data."""
    batches = Batches(numbers(103), block_size=8, batch_size=4, seed=1337)
    assert first_tokens(batches, range(6)) == GOLDEN
    late = Batches(numbers(10**7), block_size=64, batch_size=4, seed=2**63)
    assert first_tokens(late, range(10**9, 10**9 + 1)) == GOLDEN_LATE


GOLDEN = [85, 21, 77, 13, 29, 61, 69, 45, 5, 37, 53, 78, 62, 38, 70, 86, 54, 6, 46, 30, 14, 22, 56, 72]
GOLDEN_LATE = [2229250, 7034370, 9315842, 8804354]


def test_the_mix_is_splitmix64() -> None:
    """The first outputs for the seed 0, published with the xoshiro generators' reference code."""
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    assert sorted(permuted(np.arange(size), size=size, keys=keys).tolist()) == list(range(size))


def test_a_permutation_of_many_takes_no_memory_for_them() -> None:
    size = 10**15 + 1
    indices = np.arange(0, size, size // 1000)
    found = permuted(indices, size=size, keys=np.full(len(indices), 5, dtype=np.uint64))
    assert len(set(found.tolist())) == len(indices)
    assert found.max() < size
    deciles = np.bincount((found // np.uint64(size // 10 + 1)).astype(int), minlength=10)
    assert deciles.min() > 60  # of about 100 each


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_few_windows_are_about_equally_frequent(size: int) -> None:
    epochs = 12_000
    keys = np.repeat(splitmix64(np.arange(epochs, dtype=np.uint64)), size)
    orders = permuted(np.tile(np.arange(size), epochs), size=size, keys=keys).reshape(epochs, size)
    found = Counter(map(tuple, orders.tolist()))
    expected = epochs / len(list(itertools.permutations(range(size))))
    assert all(0.85 < found[order] / expected < 1.15 for order in itertools.permutations(range(size)))


@settings(max_examples=50, deadline=None)
@given(steps=st.permutations(range(12)), batch=st.integers(1, 30))
def test_a_step_is_the_same_after_any_earlier_calls(steps: list[int], batch: int) -> None:
    def fresh() -> Batches:
        return Batches(numbers(300), block_size=7, batch_size=batch, seed=3)

    asked = fresh()
    assert all(same(asked.at(step), fresh().at(step)) for step in steps)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 6), accumulation=st.integers(1, 4), count=st.integers(9, 200))
def test_rows_do_not_depend_on_how_a_step_is_divided(batch: int, accumulation: int, count: int) -> None:
    divided = Batches(numbers(count), block_size=8, batch_size=batch, accumulation=accumulation, seed=1)
    whole = Batches(numbers(count), block_size=8, batch_size=batch * accumulation, seed=1)
    single = Batches(numbers(count), block_size=8, batch_size=1, seed=1)
    rows = batch * accumulation
    assert divided.rows_per_step == whole.rows_per_step == rows
    for step in (0, 1, 77):
        flat = divided.at(step)[0].flatten(0, 1)
        assert torch.equal(flat, whole.at(step)[0][0])
        assert torch.equal(flat, torch.cat([single.at(step * rows + row)[0][0] for row in range(rows)]))


def test_resuming_from_a_count_of_windows() -> None:
    """A run that changes its batch size resumes at the same window; without a change it sees the same batches."""
    first = Batches(numbers(500), block_size=8, batch_size=6, seed=9)
    same_size = Batches(
        numbers(500), block_size=8, batch_size=6, seed=9, start_step=10, start_window=first.windows_seen(10)
    )
    assert same(same_size.at(12), first.at(12))
    halved = Batches(
        numbers(500), block_size=8, batch_size=3, seed=9, start_step=10, start_window=first.windows_seen(10)
    )
    assert halved.windows_seen(10) == first.windows_seen(10) == 60
    assert first_tokens(halved, range(10, 12)) == first_tokens(first, range(10, 11))


def test_epochs_are_counted() -> None:
    batches = Batches(numbers(100), block_size=10, batch_size=2, accumulation=3, seed=0)
    assert (batches.windows_per_epoch, batches.rows_per_step) == (9, 6)
    assert [batches.windows_seen(step) for step in (0, 1, 3)] == [0, 6, 18]
    assert [batches.epoch(step) for step in (0, 3)] == [0.0, 2.0]
    assert batches.epoch(1) == pytest.approx(2 / 3)


def test_memory_maps_are_read_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(1000, dtype=np.uint16) + 64_000)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    from_disk = Batches(mapped, block_size=8, batch_size=4, seed=1).at(5)
    assert same(from_disk, Batches(np.array(mapped), block_size=8, batch_size=4, seed=1).at(5))
    assert from_disk[0].min() >= 64_000


def test_the_global_generators_are_not_touched() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    Batches(numbers(100), block_size=8, batch_size=4, seed=1).at(3)
    list(validation_windows(numbers(100), block_size=8, batch_size=4, steps=2))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]


# Too short texts


def test_a_too_short_text_is_refused_with_the_largest_size() -> None:
    with pytest.raises(DataError) as caught:
        Batches(numbers(812), block_size=1024, batch_size=1, seed=0)
    assert re.findall(r"\d+", str(caught.value)) == ["1024", "1025", "812", "811"]
    with pytest.raises(DataError, match=r"validation text has 8\b.* 7 or less"):
        validation_windows(numbers(8), block_size=8, batch_size=1, steps=0)
    for count in (0, 1):
        with pytest.raises(DataError, match=f"training text has {count} tokens"):
            Batches(numbers(count), block_size=1, batch_size=1, seed=0)


@given(train=st.integers(2, 50), validation=st.just(0) | st.integers(2, 50))
def test_the_largest_block_size_fits_and_one_more_does_not(train: int, validation: int) -> None:
    def fits(block_size: int) -> bool:
        try:
            Batches(numbers(train), block_size=block_size, batch_size=1, seed=0).at(0)
            list(validation_windows(numbers(validation), block_size=block_size, batch_size=1, steps=0))
        except DataError:
            return False
        return True

    largest = largest_block_size(train, validation)
    assert fits(largest)
    assert not fits(largest + 1)


# Validation


@settings(max_examples=100, deadline=None)
@given(size=sizes, batch=st.integers(1, 6))
def test_all_validation_windows_lie_side_by_side(size: tuple[int, int], batch: int) -> None:
    block_size, count = size
    found = list(validation_windows(numbers(count), block_size=block_size, batch_size=batch, steps=0))
    x, y = (torch.cat(part) for part in zip(*found, strict=True))
    windows = (count - 1) // block_size
    assert x.flatten().tolist() == list(range(windows * block_size))
    assert torch.equal(y, x + 1)
    assert [len(each) for each, _ in found[:-1]] == [batch] * (len(found) - 1)
    assert 1 <= len(found[-1][0]) <= batch


def test_some_validation_windows_are_evenly_spaced_and_fixed() -> None:
    def starts(steps: int) -> list[list[int]]:
        found = validation_windows(numbers(1001), block_size=10, batch_size=4, steps=steps)
        return [x[:, 0].tolist() for x, _ in found]

    assert starts(2) == [[0, 120, 250, 370], [500, 620, 750, 870]] == starts(2)
    assert starts(1) == [[0, 250, 500, 750]]
    everything = [list(range(first, first + 40, 10)) for first in range(0, 1000, 40)]
    assert starts(1000) == everything == starts(0)


def test_without_validation_text_there_are_no_windows() -> None:
    assert list(validation_windows(numbers(0), block_size=10, batch_size=4, steps=0)) == []
    assert list(validation_windows(numbers(0), block_size=10, batch_size=4, steps=3)) == []
