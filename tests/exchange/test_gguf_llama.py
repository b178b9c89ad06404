"""CONVERT_TO=gguf of MODEL_TYPE=llama as llama.cpp's own package reads it. tests/llama asks llama.cpp for its logits."""

import dataclasses
from typing import Any

import gguf
import pytest
import torch
from records import gpt2_record
from script import call, script
from test_export import exported, saved

import models
from milepost.ckpt import Checkpoint
from milepost.ckpt.exports.gguf_llama import _halves, _neighbours

converter = script("convert_checkpoint")
SIZES = {"vocab_size": 256, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_kv_head": 2}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_factor": 1.0, "high_factor": 4.0, "original_length": 16}
# Each form's settings, llama.cpp's name, and the architecture whose names of tensors its own package lists.
FORMS: dict[str, tuple[dict[str, Any], str, gguf.MODEL_ARCH]] = {
    "llama": ({"tied": False, "rope_scaling": LLAMA3}, "llama", gguf.MODEL_ARCH.LLAMA),
    "qwen2": ({"qkv_bias": True}, "qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": ({"qk_norm": True}, "qwen3", gguf.MODEL_ARCH.QWEN3),
}


def record(**changes: Any) -> Checkpoint:
    torch.manual_seed(5)
    model = models.build("llama", SIZES | changes)
    return dataclasses.replace(
        gpt2_record(),
        model_type="llama",
        model_settings=models.plain(model.settings),
        model_state={name: tensor.detach() for name, tensor in model.state_dict().items()},
        tokenizer={"kind": "byte"},
    )


@pytest.mark.parametrize("form", FORMS)
def test_names_and_sizes_are_those_of_its_own_package(tmp_path, form):
    changes, name, architecture = FORMS[form]
    one = record(**changes)
    path, said = exported(tmp_path, one, "gguf", GGUF_TYPE="f32")
    assert "differ by at most 0," in said, said  # read back from the file: every weight to the bit
    reader = gguf.GGUFReader(path)
    table, known = gguf.get_tensor_name_map(architecture, 2), gguf.MODEL_TENSORS[architecture]
    found = {tensor.name for tensor in reader.tensors}
    for ours in one.model_state:
        theirs = ours if ours.startswith("lm_head.") else f"model.{ours}"
        kind, renamed = table.get_type_and_name(theirs, try_suffixes=(".weight", ".bias"))
        assert kind in known
        assert renamed in found
    assert found - {"rope_freqs.weight"} == {
        table.get_name(each if each.startswith("lm_head.") else f"model.{each}", try_suffixes=(".weight", ".bias"))
        for each in one.model_state
    }
    assert ("rope_freqs.weight" in found) == ("rope_scaling" in changes)
    sizes = {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8, "block_count": 2}
    sizes |= {"feed_forward_length": one.model_settings["n_inner"], "context_length": 32}
    assert {size: reader.fields[f"{name}.{size}"].contents() for size in sizes} == sizes
    assert reader.fields[f"{name}.rope.freq_base"].contents() == 10000.0


def test_the_pairs_of_a_head_follow_each_other():
    """Two heads of six rows: value i turns with value i + 3."""
    rows = torch.arange(12)
    assert _neighbours(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(_halves(_neighbours(rows, 6), 6), rows)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_norm": True, "qkv_bias": True, "output_bias": True}, "llama.cpp's qwen3 has not"),
        ({"qkv_bias": True, "rope_scaling": LLAMA3}, "llama.cpp's qwen2 has not"),
        ({"lora": {"rank": 2, "alpha": 2.0, "targets": "q_proj"}}, "merge them first (scripts/merge_adapters.py)"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(tmp_path, changes, named):
    path, out = saved(tmp_path, record(**changes)), tmp_path / "out"
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="gguf", OUTPUT=out)
    assert (said.code, said.out) == (3, "")
    assert named in said.err
    assert not out.exists()
