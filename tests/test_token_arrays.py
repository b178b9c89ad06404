"""Token files that are read slice by slice, on any disk: the same values as a map has, and clear errors."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.text import token_arrays
from milepost.text.batches import Batches, validation_windows
from milepost.text.errors import DataError
from milepost.text.token_arrays import ReadArray
from milepost.text.token_files import write_array

IDS = np.arange(1000, dtype="<u2") * 61


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "train.npy"
    write_array(path, [IDS[:300], IDS[300:]], IDS.dtype)
    return path


@given(st.slices(1000))
def test_every_slice_is_that_of_the_array(path, part):
    if part.step is None or part.step > 0:
        found = ReadArray(path)[part]
        assert (found.tolist(), found.dtype) == (IDS[part].tolist(), IDS.dtype)


def test_batches_are_those_of_a_map(path):
    mapped, slices = np.load(path, mmap_mode="r"), ReadArray(path)
    assert len(slices) == len(mapped)
    one, other = (Batches(tokens, block_size=16, batch_size=4, seed=3) for tokens in (mapped, slices))
    for step in range(40):
        assert all(map(np.array_equal, one.at(step), other.at(step)))
    windows = (list(validation_windows(tokens, block_size=16, batch_size=4, steps=0)) for tokens in (mapped, slices))
    for (x, y), (same_x, same_y) in zip(*windows, strict=True):
        assert np.array_equal(x, same_x)
        assert np.array_equal(y, same_y)
    assert np.array_equal(np.asarray(slices), mapped)


def test_no_token_is_an_empty_array(tmp_path):
    write_array(tmp_path / "empty.npy", [], IDS.dtype)
    assert len(ReadArray(tmp_path / "empty.npy")) == len(np.asarray(ReadArray(tmp_path / "empty.npy"))) == 0


def test_a_file_that_was_cut_off_is_an_error(tmp_path, path):
    cut = tmp_path / "cut.npy"
    cut.write_bytes(path.read_bytes())
    tokens = ReadArray(cut)
    os.truncate(cut, 500)
    assert tokens[:10].tolist() == IDS[:10].tolist()
    with pytest.raises(DataError, match=str(cut)):
        tokens[900:910]
    cut.write_bytes(path.read_bytes() + b"two")
    with pytest.raises(ValueError, match="longer or shorter"):
        token_arrays.opened(cut)


def test_a_file_that_is_gone_is_waited_for(tmp_path, path, monkeypatch):
    place = tmp_path / "train.npy"
    place.write_bytes(path.read_bytes())
    tokens = ReadArray(place)
    place.rename(tmp_path / "away")
    monkeypatch.setattr(token_arrays, "PATIENCE", 0)
    with pytest.raises(DataError, match="cannot be read"):
        tokens[:1]
    monkeypatch.undo()
    back = threading.Timer(0.2, (tmp_path / "away").rename, [place])
    back.start()
    assert tokens[:5].tolist() == IDS[:5].tolist()
