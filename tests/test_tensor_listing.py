"""milepost/ckpt/tensor_listing.py: tensors listed from headers, hashed and compared byte by byte."""

import hashlib

import pytest
import torch
from records import WEIGHT, record
from safetensors.torch import save_file

from milepost.ckpt import CheckpointError
from milepost.ckpt.layouts import WRITERS, known_layout
from milepost.ckpt.tensor_listing import differing, held, labelled
from milepost.ckpt.tensors import digest


@pytest.mark.parametrize("layout", WRITERS)
def test_every_tensor_is_listed_with_its_part_and_bytes(tmp_path, layout):
    path = WRITERS[layout].write(record(1), tmp_path, "one")
    listed = held(path)
    assert sorted((one.part, one.dtype, one.shape, one.size) for one in listed) == [
        ("optimizer", "float32", (), 4),
        ("optimizer", "float32", (8, 8), 256),
        ("optimizer", "float32", (8, 8), 256),
        ("weights", "float32", (8, 8), 256),
    ]
    assert [one.name for one in listed if one.part == "weights"] == [WEIGHT]


def test_names_and_types_of_a_foreign_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4, dtype=torch.bool), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted((one.name, one.dtype, one.shape, one.size) for one in held(tmp_path)) == [
        ("a", "bfloat16", (2, 3), 12),
        ("b", "BOOL", (4,), 4),
        ("c", "float32", (0,), 0),
    ]


def shared(levels):
    """A list in which 2**levels ways lead to one tensor."""
    one = [torch.ones(1)]
    for _ in range(levels):
        one = [one, one]
    return one


def test_what_a_file_holds_twice_is_listed_once_and_what_is_very_deep_is_not(tmp_path):
    deep = {"tensor": torch.ones(2)}
    for _ in range(200):
        deep = {"below": deep}
    torch.save({"model": {"shared": shared(10), "deep": deep}}, tmp_path / "odd.pt")
    assert [(one.name, one.shape) for one in held(tmp_path / "odd.pt")] == [("shared" + ".0" * 11, (1,))]


def test_what_holds_itself_or_would_never_end_is_refused(tmp_path):
    around = {"tensor": torch.ones(3)}
    around["again"] = around
    for number, odd in enumerate((around, shared(60))):
        path = tmp_path / f"odd{number}.pt"
        torch.save({"model": {"odd": odd}}, path)
        with pytest.raises(CheckpointError, match=path.name):
            held(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(CheckpointError) as caught:
        known_layout(tmp_path / "notes.txt")
    assert (caught.value.kind, caught.value.path) == ("not understood", tmp_path / "notes.txt")
    (tmp_path / "notes.pt").write_text("notes")
    with pytest.raises(CheckpointError, match="is not a checkpoint but"):
        held(tmp_path / "notes.pt")


def test_the_hash_covers_names_types_shapes_and_bytes():
    weight = torch.arange(6.0).reshape(2, 3)
    expected = hashlib.sha256()
    for name, tensor in (("a", weight), ("b", weight.half())):
        expected.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert digest({"b": weight.half(), "a": weight}) == expected.hexdigest()
    transposed = weight.t().contiguous().t()  # the same numbers, elsewhere in memory
    assert digest({"a": transposed}) == digest({"a": weight})
    others = [{"b": weight}, {"a": weight.reshape(3, 2)}, {"a": weight.double()}, {"a": -weight}, {}]
    assert len({digest(each) for each in [{"a": weight}, *others]}) == 6


def test_moments_are_named_by_their_parameters(tmp_path):
    names = set(labelled(record(1)))
    assert names == {WEIGHT, *(f"optimizer: {WEIGHT}.{kind}" for kind in ("step", "exp_avg", "exp_avg_sq"))}
    assert set(labelled(record(1, optimizer_state=None))) == {WEIGHT}
    unnamed = record(1)
    del unnamed.optimizer_state["param_groups"][0]["param_names"]
    with pytest.raises(CheckpointError, match="not in torch's form with param_names"):
        labelled(unnamed)


def test_differences_in_words():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(2), "c": torch.ones(1)}
    other = {"a": torch.tensor([1.0, 4.5]), "b": torch.ones(3), "d": torch.ones(1)}
    assert differing(one, one) == {}
    assert differing(one, other) == {
        "a": "max |difference| 2.5",
        "b": "float32 (2,) against float32 (3,)",
        "c": "only in the first",
        "d": "only in the second",
    }
