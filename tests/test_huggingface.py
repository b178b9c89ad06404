"""A GPT-2 that transformers saved computes the same here, and what is no such GPT-2 is refused in one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from records import flipped
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import ckpt
from ckpt import Checkpoint, CheckpointError
from ckpt.hub import local_folder
from ckpt.layouts import huggingface
from ckpt.rebuild import build_model, build_tokenizer
from data import tokenization

CPU = torch.device("cpu")
SIZES = {"vocab_size": 97, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    """transformers' GPT-2, every tensor random and large enough that an error in any shows."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, resid_pdrop=0.25, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of `saved` to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "gpt2"))


def logits(record: Checkpoint) -> torch.Tensor:
    """What our model makes of fixed tokens, (3, 32, V)."""
    with torch.no_grad():
        return build_model(record, device=CPU).eval()(tokens())[0]


def tokens() -> torch.Tensor:
    return torch.randint(97, (3, 32), generator=torch.Generator().manual_seed(2))  # (B, T)


def assert_same_logits(record: Checkpoint, theirs: GPT2LMHeadModel) -> None:
    with torch.no_grad():
        expected = theirs(tokens()).logits
    assert expected.std() > 1  # large enough for 1e-4 to mean something
    torch.testing.assert_close(logits(record), expected, atol=1e-4, rtol=0)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------------------
# The same logits


def test_logits_equal_transformers(saved, theirs):
    record = ckpt.load(saved)
    assert_same_logits(record, theirs)
    assert record.model_settings == {
        "vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.25, "bias": True,
        "activation": "gelu", "tied": True,
    }  # fmt: skip
    assert (record.model_type, record.layout, record.step, record.optimizer_state) == ("gpt2", "huggingface", 0, None)
    assert ckpt.verify(saved) == []


def test_logits_equal_transformers_from_shards(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(ckpt.load(tmp_path), theirs)


def test_logits_equal_transformers_from_links_as_in_the_hubs_cache(saved, theirs, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(saved.iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    assert_same_logits(ckpt.load(tmp_path / "snapshot"), theirs)


def bare_names(weights: dict[str, torch.Tensor]) -> None:
    """As the published files have them: no `transformer.`, causal masks beside the weights, and the head written out."""
    for name in list(weights):
        weights[name.removeprefix("transformer.")] = weights.pop(name)
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()


def test_logits_equal_transformers_from_the_published_files_form(folder, theirs):
    rewrite(folder, bare_names)
    assert_same_logits(ckpt.load(folder), theirs)


@pytest.mark.parametrize("changes", [{"n_inner": 64}, {"activation_function": "gelu_pytorch_tanh"}], ids=str)
def test_another_word_for_the_same_model_is_taken(changes, folder, theirs):
    configure(folder, **changes)
    assert_same_logits(ckpt.load(folder), theirs)


@pytest.mark.parametrize("function", ["relu", "gelu", "gelu_new"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_transformers_with_another_activation_or_a_head_of_its_own(function, tied, tmp_path):
    torch.manual_seed(3)
    other = GPT2LMHeadModel(GPT2Config(**SIZES, activation_function=function, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    other.save_pretrained(tmp_path)
    record = ckpt.load(tmp_path)
    assert record.model_settings["tied"] == tied
    assert ("lm_head.weight" in record.model_state) == (not tied)
    assert_same_logits(record, other)


def test_half_precision_weights_become_float32(folder, theirs):
    rewrite(folder, lambda weights: weights.update({name: each.bfloat16() for name, each in weights.items()}))
    record = ckpt.load(folder)
    assert {parameter.dtype for parameter in build_model(record, device=CPU).parameters()} == {torch.float32}
    expected = theirs(tokens()).logits
    assert (logits(record) - expected).abs().max() < 0.5 * expected.std()


def test_control_a_transposed_matrix_would_be_seen(folder, theirs):
    """Negative control: the square attention projection fits either way round, so only the logits can tell."""

    def turn(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.h.1.attn.c_proj.weight"] = weights["transformer.h.1.attn.c_proj.weight"].t()

    rewrite(folder, turn)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(ckpt.load(folder), theirs)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


TEXT = "Dear Wren, my neighbour's cat has adopted me. What do I owe my neighbour?\n" * 20


def test_a_tokenizer_beside_the_weights_is_taken(folder):
    trained = tokenization.build("bpe", [(TEXT, True)], alphabet="", documents=1, vocab_size=300)
    (folder / "tokenizer.json").write_text(json.dumps(trained.to_dict()["tokenizer"]))
    record = ckpt.load(folder)
    assert record.notes == []
    with pytest.raises(CheckpointError, match=r"its tokenizer has \d+ tokens, but its model only 97 rows"):
        build_tokenizer(record)
    record.model_settings["vocab_size"] = 400
    tokenizer = build_tokenizer(record)
    assert tokenizer.encode(TEXT) == trained.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_without_a_tokenizer_it_is_said_that_there_is_none(saved):
    record = ckpt.load(saved)
    assert record.tokenizer is None
    assert record.notes == []  # whoever needs one says so, after a look at TRAINING_DATA_SOURCE
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        build_tokenizer(record)


@pytest.mark.parametrize("rows", [50257, 50304])
def test_as_many_rows_as_gpt2_mean_gpt2s_own_tokenizer(rows, tmp_path):
    sizes = SIZES | {"vocab_size": rows, "n_embd": 2, "n_head": 1, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    record = ckpt.load(tmp_path)
    assert f"GPT-2's own is taken, because its vocabulary has {rows} rows" in record.notes[0]
    assert build_tokenizer(record).encode("Dear Wren,") == [20266, 370, 918, 11]


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def refused(folder: Path) -> str:
    """The one sentence in which loading and building refuse `folder`."""
    with pytest.raises(CheckpointError) as caught:
        build_model(ckpt.load(folder), device=CPU)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    return text


CONFIGS = [
    ({"activation_function": "silu"}, "activation_function is 'silu', expected 'gelu_new' or 'gelu_pytorch_tanh' or"),
    ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt2'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"n_inner": 100}, "n_inner is 100, expected null or 4 * n_embd"),
    ({"n_layer": "2"}, "n_layer is '2', expected a positive whole number"),
    ({"n_layer": True}, "n_layer is True"),
    ({"n_head": 0}, "n_head is 0"),
    ({"n_embd": -16}, "n_embd is -16"),
    ({"vocab_size": 97.0}, "vocab_size is 97.0"),
    ({"n_positions": None}, "n_positions is None"),
    ({"n_positions": [32]}, "n_positions is [32]"),
    ({"n_head": 3}, "n_embd=16 and n_head=3"),
    ({"n_layer": 10**9}, "n_layer is 1000000000, but it holds only 28 tensors"),
    ({"n_positions": 10**12}, "wpe.weight is (32, 16), expected (1000000000000, 16)"),
    ({"vocab_size": 10**30}, "its settings make no model: "),
    ({"resid_pdrop": "much"}, "resid_pdrop is 'much', expected a number from 0 to below 1"),
    ({"resid_pdrop": None}, "resid_pdrop is None"),
    ({"resid_pdrop": 1.5}, "resid_pdrop is 1.5"),
    ({"resid_pdrop": float("nan")}, "NaN is not a JSON number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ({"tie_word_embeddings": False}, "lm_head.weight (97, 16) is missing"),
]


@pytest.mark.parametrize(("changes", "reason"), CONFIGS, ids=[str(changes) for changes, _ in CONFIGS])
def test_a_config_of_another_model_or_of_wrong_types_is_refused(changes, reason, folder):
    configure(folder, **changes)
    assert reason in refused(folder)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.__delitem__(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.update({name: tensor})


C_ATTN = "transformer.h.0.attn.c_attn.weight"
TENSORS = [
    (drop("transformer.wpe.weight"), ["wpe.weight (32, 16) is missing"]),
    (drop(C_ATTN), ["h.0.attn.c_attn.weight (48, 16) is missing"]),
    (drop("transformer.wte.weight"), ["wte.weight (97, 16) is missing"]),
    (put("transformer.h.9.ln_1.weight", torch.ones(16)), ["h.9.ln_1.weight (16,) is not expected"]),
    (put("transformer.wte.weight", torch.ones(96, 16)), ["wte.weight is (96, 16), expected (97, 16)"]),
    (put(C_ATTN, torch.ones(48, 16)), ["h.0.attn.c_attn.weight is (16, 48), expected (48, 16)"]),
    (put(C_ATTN, torch.ones(1, 16, 48)), ["h.0.attn.c_attn.weight is (1, 16, 48), expected (48, 16)"]),
    (put(C_ATTN, torch.ones(16, 48, dtype=torch.int8)), [C_ATTN, "is torch.int8, expected floating point"]),
    (put("wte.weight", torch.ones(97, 16)), ["'wte.weight' is there twice, with and without `transformer.`"]),
    (put("lm_head.weight", torch.ones(97, 16)), ["lm_head.weight differs from wte.weight"]),
    (put("lm_head.weight", torch.ones(96, 16)), ["lm_head.weight differs from wte.weight"]),
]


@pytest.mark.parametrize(("change", "reasons"), TENSORS, ids=[reasons[0] for _, reasons in TENSORS])
def test_weights_that_are_not_the_configs_are_refused_by_name_and_shape(change, reasons, folder):
    rewrite(folder, change)
    text = refused(folder)
    assert all(reason in text for reason in reasons)


def test_a_long_list_of_wrong_shapes_is_cut_short(folder):
    configure(folder, n_embd=18)
    text = refused(folder)
    assert text.count("expected") == 10
    assert text.endswith("and 18 more")


def test_a_pickle_of_weights_is_never_opened(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    text = refused(folder)
    assert "pytorch_model.bin" in text
    assert "never from a .bin" in text


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused(cut, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:cut])
    assert "is damaged" in refused(folder) or "is no whole safetensors file" in refused(folder)
    assert ckpt.verify(folder) == [refused(folder)]


def test_a_flipped_bit_in_the_header_is_refused(folder):
    flipped(folder / WEIGHTS, 3, bit=6)
    assert "is no whole safetensors file" in refused(folder)
    flipped(folder / WEIGHTS, 3, bit=6)
    flipped(folder / WEIGHTS, 8, bit=6)
    assert "is damaged" in refused(folder)


def test_a_torch_archive_in_the_place_of_safetensors_is_refused(folder):
    torch.save({"a": torch.ones(1)}, folder / WEIGHTS)
    assert "is no whole safetensors file" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "gpt2"' + "[" * 100_000, "\ud800"], ids=range(5))
def test_a_damaged_config_is_refused(text, folder):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json: " in refused(folder)


def sharded(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors"])
def test_a_shard_outside_the_folder_is_never_opened(name, folder):
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    sharded(folder, {"wte.weight": name})
    assert "which lies outside its folder" in refused(folder)


@pytest.mark.parametrize("weight_map", [{}, None, [WEIGHTS], *({"a": name} for name in ("9", "..", ""))], ids=str)
def test_an_index_without_its_shards_is_refused(weight_map, folder):
    sharded(folder, weight_map)
    assert "has no weight_map" in refused(folder) or "', which is not there" in refused(folder)


def test_a_shard_that_is_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "model-1.safetensors")
    sharded(folder, {"wte.weight": "model-1.safetensors"})
    assert "which is not there" in refused(folder)


def test_one_name_in_two_shards_is_refused(folder):
    shutil.copy(folder / WEIGHTS, folder / "model-2.safetensors")
    sharded(folder, {"a": WEIGHTS, "b": "model-2.safetensors"})
    assert "is in an earlier shard too" in refused(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Finding it


def test_peek_needs_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert huggingface.peek(folder)["model_settings"]["n_layer"] == 2
    assert huggingface.peek(folder)["step"] == 0


def test_a_folder_is_meant_by_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("gpt2", "./gpt2", str(folder), "~/gpt2"):
        assert local_folder(name).samefile(folder)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none"])
def test_a_folder_that_is_not_there_is_no_name_for_the_hub(name):
    with pytest.raises(CheckpointError, match="there is no such folder; expected one with config"):
        local_folder(name)
