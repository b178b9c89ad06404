"""Files in the format that torch wrote before version 1.6: read within the same bounds as archives, or refused."""

import argparse
import os
import random
import warnings
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from foreign_programs import SIZES, NanoGPT, nanogpt, shaken
from records import bits, mapped_and_touched

from milepost import ckpt
from milepost.ckpt import CheckpointError, archive


def old(path: Path, content: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def content() -> dict[str, Any]:
    """nanoGPT's checkpoint after a step, with settings of a class."""
    torch.manual_seed(1)
    model = shaken(NanoGPT(**SIZES))
    optimizer = model.configure_optimizers()
    model(torch.arange(6).reshape(1, 6)).square().mean().backward()
    optimizer.step()
    return nanogpt(model, optimizer) | {"args": argparse.Namespace(seed=1)}


def test_it_opens_to_the_same_bits_as_an_archive(tmp_path: Path) -> None:
    one = content()
    new = tmp_path / "new.pt"
    torch.save(one, new)
    path = old(tmp_path / "old.pt", one)
    assert ckpt.verify(path) == []
    assert bits(ckpt.load(path, verify=True)) == bits(ckpt.load(new))
    assert ckpt.load(path).parts == ["model", "optimizer"]
    assert len(ckpt.find(tmp_path)) == 2
    assert archive.load(path)[0]["args"] == {"seed": 1}


def test_tensors_of_every_dtype_and_view(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(dtype): base.to(dtype) for dtype in dtypes}
    tensors |= {"transposed": base.t(), "part": base[1:3, 2:4], "empty": torch.empty(0), "none": torch.tensor(3.5)}
    found = archive.load(old(tmp_path / "a.pt", tensors))[0]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].stride() == tensor.stride()


def test_listing_maps_the_tensors_and_leaves_them_unread(tmp_path: Path) -> None:
    wide = SIZES | {"vocab_size": 3000, "n_embd": 192, "n_head": 6}
    path = old(tmp_path / "large.pt", nanogpt(NanoGPT(**wide)))
    archive.load(path)
    assert mapped_and_touched(path)[1] < path.stat().st_size / 8


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_it_runs(tmp_path: Path) -> None:
    path = old(tmp_path / "a.pt", content() | {"more": Hostile(tmp_path / "mark")})
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.kind == "refused"
    assert not (tmp_path / "mark").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = old(tmp_path / "a.pt", content()).read_bytes()
    path = tmp_path / "cut.pt"
    for length in (0, 1, 16, 17, 30, 500, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            ckpt.load(path)
        assert caught.value.kind in ("damaged", "not understood")
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError):
        ckpt.load(path)


@pytest.mark.parametrize("blind", [True, False])
def test_a_changed_file_is_read_or_refused_in_one_sentence(blind: bool, tmp_path: Path) -> None:
    whole = old(tmp_path / "a.pt", {"model": NanoGPT(**SIZES).state_dict(), "n_head": 3}).read_bytes()
    end = whole.index(b"PK") if b"PK" in whole else 6000
    path, refusals = tmp_path / "changed.pt", []
    for number in range(300):
        draw = random.Random(number)
        begin = fuzz.blind(draw, whole[:end], whole) if blind else whole[:30] + fuzz.blind(draw, whole[30:end], whole)
        path.write_bytes(begin + whole[end:])
        with warnings.catch_warnings(action="error"):
            try:
                ckpt.load(path)
            except CheckpointError as error:
                refusals.append(str(error))
    assert [text for text in refusals if not text.isprintable()] == []
    assert len(refusals) > 100
