"""Named tensors: safetensors files equal the library's to the byte,
and tensors larger than their storage are refused.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import WEIGHT, gpt2_record, record
from safetensors import torch as library

from milepost.ckpt import CheckpointError
from milepost.ckpt.dtypes import DTYPES, name_of
from milepost.ckpt.tensors import (
    HEADER_LIMIT,
    checked_tensors,
    optimizer_groups,
    optimizer_state,
    optimizer_tensors,
    read_safetensors,
    tensor_shapes,
    write_safetensors,
)


def every_kind() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype under names whose order differs from the order by dtype."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        for shape in ((3, 2), (), (0,), (1, 0, 2), (7,)):
            values = torch.randn(shape, generator=draw) * 100
            tensors[f"{'zamby'[number % 5]}.{number}.{len(tensors)}"] = values.to(getattr(torch, dtype))
    return tensors


def theirs(tensors: dict[str, torch.Tensor]) -> bytes:
    return library.save({name: each.contiguous() for name, each in tensors.items()}, metadata={"format": "pt"})


CASES = {
    "every dtype and shape": every_kind(),
    "one": {"a": torch.ones(1)},
    "names": {
        name: torch.ones(2) for name in ('q"uote', "back\\slash", "é", "日本", "a b", "Z", "a.10", "a.9", "<|x|>")
    },
    "transposed": {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.arange(8.0)[::2]},
    "gpt2": gpt2_record().model_state,
    "moments": optimizer_tensors(gpt2_record().optimizer_state or {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_equals_the_librarys_to_the_byte(case, tmp_path):
    file = write_safetensors(tmp_path / "a.safetensors", CASES[case])
    assert (tmp_path / "a.safetensors").read_bytes() == theirs(CASES[case])
    assert file.size == len(theirs(CASES[case]))


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.sampled_from(list(DTYPES)), min_size=1, max_size=9))
def test_with_any_names_in_any_order_the_file_equals_the_librarys(tmp_path_factory, dtypes):
    if any("\ud800" <= character <= "\udfff" for name in dtypes for character in name):
        return
    tensors = {name: torch.arange(3).to(getattr(torch, dtype)) for name, dtype in dtypes.items()}
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    write_safetensors(path, tensors)
    assert path.read_bytes() == theirs(tensors)


def test_written_files_are_read_back_by_us_and_by_the_library(tmp_path):
    tensors, path = every_kind(), tmp_path / "a.safetensors"
    write_safetensors(path, tensors)
    for read in (read_safetensors(path), library.load_file(path)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].equal(tensor)
    shapes = {
        name: (DTYPES[name_of(tensor.dtype)].safetensors, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert tensor_shapes(path) == shapes


def sentence(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.isprintable()
    with pytest.raises(CheckpointError):
        tensor_shapes(path)
    return text


def with_header(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = [
    ({"a": ONE | {"data_offsets": [0, 16]}}, "is damaged"),
    ({"a": ONE | {"shape": [3]}}, "is damaged"),
    ({"a": ONE | {"dtype": "F99"}}, "is damaged"),
    ({"a": ONE | {"shape": [-2]}}, "is damaged"),
    ({"a": ONE | {"shape": [2**62, 2**62]}}, "is damaged"),
    ({"a": ONE, "b": ONE}, "is damaged"),
    ({"a": ONE | {"data_offsets": [8, 0]}}, "is damaged"),
    ([], "is damaged"),
    (b"{" * 5000, "is damaged"),
    (b"\xff" * 16, "is damaged"),
]


@pytest.mark.parametrize(("header", "reason"), HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_does_not_fit_its_bytes_is_refused(header, reason, tmp_path):
    assert reason in sentence(with_header(tmp_path / "a.safetensors", header))


def test_a_valid_header_is_read(tmp_path):
    """Negative control for the test above."""
    path = with_header(tmp_path / "a.safetensors", {"a": ONE})
    assert read_safetensors(path)["a"].tolist() == [0, 0]


@pytest.mark.parametrize("claimed", [0, 1, 9, HEADER_LIMIT + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(claimed, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}" + b" " * 6)
    assert f"its header claims {claimed} bytes of a file of 16" in sentence(path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(share, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, every_kind())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    sentence(path)


def test_pipes_and_folders_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "missing"):
        assert "is not a regular file" in sentence(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# What may pass for weights

W = torch.ones(2, 3)
NO_WEIGHTS = [
    ({}, "a dict of no tensors"),
    ([W], "a list of no tensors"),
    (None, "a NoneType of no tensors"),
    ({1: W}, "1 is not a tensor name"),
    ({"": W}, "'' is not a tensor name"),
    ({"a\nb": W}, "is not a tensor name"),
    ({"a" * 513: W}, "is not a tensor name"),
    ({"a": 1.5}, "a is float, expected a tensor"),
    ({"a": [W]}, "a is list, expected a tensor"),
    ({"a": W.long()}, "a is a torch.strided torch.int64 tensor on cpu, expected dense floats"),
    ({"a": W.bool()}, "expected dense floats"),
    ({"a": W.to(torch.complex64)}, "expected dense floats"),
    ({"a": W.to_sparse()}, "a is a torch.sparse_coo"),
    ({"a": torch.empty(2, device="meta")}, "expected dense floats"),
    ({"a": torch.ones(1).expand(10**9)}, "a of shape (1000000000,) claims more bytes than the file holds"),
    ({str(one): W for one in range(3)}, "its tensors claim more bytes than the file holds"),
]


@pytest.mark.parametrize(("values", "reason"), NO_WEIGHTS, ids=[reason for _, reason in NO_WEIGHTS])
def test_invalid_weights_are_refused(values, reason):
    with pytest.raises(CheckpointError) as caught:
        checked_tensors(values, "here")
    assert caught.value.kind in ("damaged", "not understood")
    assert caught.value.path == Path("here")
    assert str(caught.value).startswith("here: ")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "values", [{"a": W}, {"a": W, "twin": W}, {"a": W.t(), "b": W.half()}, gpt2_record().model_state]
)
def test_valid_weights_are_returned_unchanged(values):
    """Negative control for the test above; a tied pair is allowed."""
    assert checked_tensors(values, "here") is values


# ---------------------------------------------------------------------------------------------------------------------
# An optimizer's state as named tensors


@pytest.mark.parametrize(
    "made", [record, gpt2_record, lambda: gpt2_record(optimizer="muon")], ids=["bigram", "adamw", "muon"]
)
def test_optimizer_state_is_rebuilt_from_named_tensors(made):
    state = made().optimizer_state
    tensors, groups = optimizer_tensors(state), json.loads(json.dumps(optimizer_groups(state)))
    again = optimizer_state(dict(reversed(tensors.items())), groups, "here")
    assert list(again["state"]) == sorted(state["state"])
    for index, moments in state["state"].items():
        assert again["state"][index].keys() == moments.keys()
        assert all(again["state"][index][kind].equal(tensor) for kind, tensor in moments.items())
    assert again["param_groups"] == json.loads(json.dumps(state["param_groups"]))


def test_tensor_names_are_parameter_name_and_kind():
    assert optimizer_tensors(record().optimizer_state).keys() == {
        f"{WEIGHT}.{kind}" for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    muon = optimizer_tensors(gpt2_record(optimizer="muon").optimizer_state)
    assert "h.0.attn.c_attn.weight.momentum_buffer" in muon
    assert "wte.weight.exp_avg_sq" in muon
    assert "h.0.attn.c_attn.weight.exp_avg" not in muon


GROUP = {"params": [0], "param_names": ["a"]}
NO_GROUPS = [None, 3, "a", [None], [{}], [{"params": [0]}], [GROUP | {"param_names": []}], [GROUP | {"params": 0}]]
NO_GROUPS += [[GROUP | {"param_names": ["b"]}], [], [GROUP | {"param_names": [["a"]]}], [GROUP | {"params": [[0]]}]]


@pytest.mark.parametrize("groups", NO_GROUPS, ids=str)
def test_groups_that_do_not_match_the_tensors_are_refused(groups):
    with pytest.raises(CheckpointError, match="does not match its param_groups") as caught:
        optimizer_state({"a.exp_avg": W}, groups, "here")
    assert (caught.value.path, caught.value.kind) == (Path("here"), "damaged")


def test_matching_groups_are_accepted():
    assert optimizer_state({"a.exp_avg": W}, [GROUP], "here")["state"][0]["exp_avg"] is W
