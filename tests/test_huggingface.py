"""A GPT-2 that transformers saved computes the same here; anything else is refused in one sentence."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drive import ROOT
from records import bits, flipped
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, tensor_listing
from milepost.ckpt.foreign.huggingface_tokenizer import read_tokenizer
from milepost.ckpt.hub import local_folder
from milepost.ckpt.layouts import huggingface
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.text import tokenization
from milepost.text.tokenization.gpt2 import gpt2_file

CPU = torch.device("cpu")
SIZES = {"vocab_size": 97, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
WEIGHTS = "model.safetensors"
INDEX, FIRST = "model.safetensors.index.json", "model-0.safetensors"


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
    """Return our model's logits of fixed tokens, (3, 32, V)."""
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


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_logits_equal_transformers_from_a_compiled_or_wrapped_model(prefix, folder, theirs):
    rewrite(folder, lambda weights: weights.update({prefix + name: weights.pop(name) for name in list(weights)}))
    assert_same_logits(ckpt.load(folder), theirs)
    rewrite(folder, lambda weights: weights.update({"transformer.ln_f.bias": torch.ones(16)}))
    assert "tensors of one name, with and without the prefixes" in refused(folder)


def test_logits_equal_transformers_from_links_as_in_the_hubs_cache(saved, theirs, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(saved.iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    assert_same_logits(ckpt.load(tmp_path / "snapshot"), theirs)


def bare_names(weights: dict[str, torch.Tensor]) -> None:
    """As the published files have them: no `transformer.`, causal masks beside the weights,
    and the head written out.
    """
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
    with pytest.raises(CheckpointError, match=r"its tokenizer has \d+ tokens, but its model only 97 rows") as caught:
        build_tokenizer(record)
    assert caught.value.kind == "refused"  # nothing is damaged, and there is no earlier checkpoint to take
    record.model_settings["vocab_size"] = 400
    tokenizer = build_tokenizer(record)
    assert tokenizer.encode(TEXT) == trained.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    "values", [{}, {"model": [1]}, {"model": {"vocab": {}}, "added_tokens": [{"id": 0}, "<s>"]}], ids=str
)
def test_a_file_that_is_no_tokenizer_is_one_sentence(folder, values):
    (folder / "tokenizer.json").write_text(json.dumps(values))
    record = ckpt.load(folder)  # its weights are good
    with pytest.raises(CheckpointError, match="its tokenizer cannot be rebuilt") as caught:
        build_tokenizer(record)
    assert caught.value.kind == "not understood"


def test_a_missing_tokenizer_is_reported(saved):
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
    assert f"GPT-2's own is used, because its vocabulary has {rows} rows" in record.notes[0]
    assert build_tokenizer(record).encode("Dear Wren,") == [20266, 370, 918, 11]


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.txt"])
def test_gpt2s_tokenizer_is_not_guessed_beside_another_one(name, tmp_path):
    sizes = SIZES | {"vocab_size": 50257, "n_embd": 2, "n_head": 1, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    (tmp_path / name).write_text("[UNK]\n")
    record = ckpt.load(tmp_path)
    assert record.tokenizer is None
    (note,) = record.notes
    assert note.startswith(f"{tmp_path / name}: this kind of tokenizer is not read")
    assert "save_pretrained" in note


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_tokenizer_is_refused_with_as_many_rows_as_gpt2(name, tmp_path):
    sizes = SIZES | {"vocab_size": 50257, "n_embd": 2, "n_head": 1, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    two_files(tmp_path)
    (tmp_path / ({"vocab.json", "merges.txt"} - {name}).pop()).unlink()
    with pytest.raises(CheckpointError, match=f"has {name} without ") as caught:
        ckpt.load(tmp_path)
    assert caught.value.kind == "lacking"


def two_files(folder: Path) -> dict[str, int]:
    """GPT-2's vocab.json and merges.txt in place of tokenizer.json, and what fine-tunes add;
    returns the added tokens.
    """
    for name, ours in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (folder / name).write_bytes(gpt2_file(ours))
    added = {"<|speaker|>": 50257, "[PAD]": 50258}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    roles = {"bos_token": "<|endoftext|>", "pad_token": "[PAD]", "unk_token": {"content": "<|endoftext|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    return added


def test_a_fine_tune_with_added_tokens_in_gpt2s_two_files(tmp_path):
    """The ids that transformers' own tokenizer gives; [PAD] is special, and so no text has it."""
    sizes = SIZES | {"vocab_size": 50259, "n_embd": 2, "n_head": 1, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    two_files(tmp_path)
    tokenizer = build_tokenizer(ckpt.load(tmp_path))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_text) == ("bpe", 50259, 50256)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    text = "Dear Wren,<|speaker|> naïve café 😀\n\n  <|speaker|>what? [PAD] no"
    ids = tokenizer.encode(text)
    assert ids.count(50257) == 2
    assert 50258 not in ids
    theirs.add_tokens(["<|speaker|>"])
    assert ids == theirs.encode(text, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text * 3000) == ids * 3000  # cut into chunks on the way


def test_gpt2s_two_files_suffice_for_gpt2s_tokenizer(tmp_path):
    sizes = SIZES | {"vocab_size": 50304, "n_embd": 2, "n_head": 1, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    two_files(tmp_path)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    record = ckpt.load(tmp_path)
    assert (record.tokenizer, record.notes) == ({"kind": "gpt2"}, [])


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "qwen3"])
def test_two_files_are_cut_as_their_model_cuts_them(model_type, tmp_path):
    two_files(tmp_path)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 50257}))
    tokenizer = tokenization.from_dict(read_tokenizer(tmp_path, 50257)[0])
    text = "WE'LL see 12345 e\u0301 <p>\n\n  two  spaces.\n x"
    ids = tokenizer.encode(text)
    assert ids == AutoTokenizer.from_pretrained(tmp_path).encode(text)
    assert (ids == tokenization.from_dict({"kind": "gpt2"}).encode(text)) is (model_type == "gpt2")


@pytest.mark.parametrize("named", [{"tokenizer_class": "GPT2Tokenizer"}, {}])
def test_a_space_before_each_text_that_only_the_config_names_is_refused(named, tmp_path):
    two_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50259}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"add_prefix_space": True}))
    assert AutoTokenizer.from_pretrained(tmp_path).encode("Dear") == GPT2Tokenizer.from_pretrained(tmp_path).encode(
        " Dear"
    )
    with pytest.raises(CheckpointError, match="add_prefix_space is True") as caught:
        read_tokenizer(tmp_path, 50259)
    assert (caught.value.kind, caught.value.path) == ("not understood", tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"add_prefix_space": False}))
    assert read_tokenizer(tmp_path, 50259)[0]["kind"] == "bpe"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("vocab.json", "{", "vocab.json: "),
        ("vocab.json", '{"a": 0}', "exactly 0 to 2"),
        ("merges.txt", "\udcff", "merges.txt: cannot be read"),
        ("added_tokens.json", '{"<new>": "x"}', "exactly 0 to"),
        ("added_tokens.json", '{"two words": 50257}', "words without whitespace"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: holds list"),
    ],
)
def test_damaged_tokenizer_files_are_refused(file, text, reason, tmp_path):
    sizes = SIZES | {"vocab_size": 50304, "n_embd": 2, "n_head": 1, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    two_files(tmp_path)
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(ckpt.load(tmp_path))
    assert reason in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def refusal(folder: Path) -> CheckpointError:
    """Return the error that loading and building raise for `folder`: one sentence that names it."""
    with pytest.raises(CheckpointError) as caught:
        build_model(ckpt.load(folder), device=CPU)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def refused(folder: Path) -> str:
    """Return the sentence in which loading and building refuse `folder`."""
    return str(refusal(folder))


CONFIGS = [
    ({"activation_function": "silu"}, "activation_function is 'silu', expected 'gelu_new' or 'gelu_pytorch_tanh' or"),
    ({"model_type": "bert"}, "model_type is 'bert', expected one of gpt2, llama, qwen2, qwen3, mistral"),
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
    ({"vocab_size": 10**30}, "its settings do not build a model: "),
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
    (
        put(C_ATTN, torch.ones(16, 48, dtype=torch.int8)),
        [C_ATTN, "is torch.int8, expected floating point", "save the model again in float32"],
    ),
    (
        put(C_ATTN, torch.ones(16, 48).to(torch.float8_e4m3fn)),
        ["torch.float8_e4m3fn", "save the model again in float32"],
    ),
    (put("wte.weight", torch.ones(97, 16)), ["'wte.weight' is there twice, with and without `transformer.`"]),
    (put("lm_head.weight", torch.ones(97, 16)), ["lm_head.weight differs from wte.weight"]),
    (put("lm_head.weight", torch.ones(96, 16)), ["lm_head.weight differs from wte.weight"]),
]


@pytest.mark.parametrize(("change", "reasons"), TENSORS, ids=[reasons[0] for _, reasons in TENSORS])
def test_weights_that_are_not_the_configs_are_refused_by_name_and_shape(change, reasons, folder):
    rewrite(folder, change)
    error = refusal(folder)
    assert all(reason in str(error) for reason in reasons)
    assert error.kind in ("not understood", "refused")  # no byte is damaged


def test_a_long_list_of_wrong_shapes_is_cut_short(folder):
    configure(folder, n_embd=18)
    text = refused(folder)
    assert text.count("expected") == 10
    assert "and 18 more: put the config there that was saved with these weights" in text


def pickled(folder: Path, *, shards: int = 1) -> Path:
    """The folder with its weights in torch archives, as transformers wrote them before 2023:
    a tied pair shares its bytes.
    """
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    places = {name: names[number % shards] for number, name in enumerate(sorted(weights))}
    for file in names:
        torch.save({name: weights[name].clone() for name in weights if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_archives_are_read_where_no_safetensors_are(shards, folder, theirs):
    pickled(folder, shards=shards)
    assert_same_logits(ckpt.load(folder), theirs)
    assert ckpt.verify(folder) == []
    assert ckpt.load(folder).layout == "huggingface"
    held = {one.name for one in tensor_listing.held(folder)}
    assert {"transformer.wte.weight", "lm_head.weight"} <= held


def test_safetensors_come_first(folder, theirs):
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert_same_logits(ckpt.load(folder), theirs)


class Harmful:
    """Values that another program's pickle may hold."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/milepost-test-was-here",)


def test_a_torch_archive_runs_nothing(folder):
    pickled(folder)
    torch.save({"transformer.wte.weight": Harmful()}, folder / "pytorch_model.bin")
    assert "asks for Python objects that a checkpoint never needs (posix.mkdir)" in refused(folder)
    assert not os.path.exists("/tmp/milepost-test-was-here")


def test_a_bare_pickle_is_never_opened(folder):
    pickled(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": 1}, protocol=2))
    assert (refusal(folder).kind, refusal(folder).path) == ("refused", folder / "pytorch_model.bin")


def test_the_format_of_torch_before_1_6_is_read(folder):
    """GPT-2's own first file is in it."""
    expected = ckpt.load(folder)
    weights = load_file(folder / WEIGHTS)
    pickled(folder)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert bits(ckpt.load(folder)) == bits(expected)


HOSTILE = {
    "a number": ({"transformer.wte.weight": 3}, "'transformer.wte.weight' is int, expected a tensor"),
    "a name that is none": ({3: torch.ones(1)}, "3 is Tensor, expected a tensor"),
    "claims more than it holds": (
        {"wte.weight": torch.ones(1).expand(97, 16)},
        "claims more bytes than the file holds",
    ),
    "nested": ({"model": {"wte.weight": torch.ones(97, 16)}}, "'model' is dict, expected a tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_torch_archive_of_something_else_is_refused(name, folder):
    content, reason = HOSTILE[name]
    pickled(folder)
    torch.save(content, folder / "pytorch_model.bin")
    assert reason in refused(folder)


def test_a_flipped_bit_in_a_torch_archive_is_found_when_every_byte_is_verified(folder):
    path = pickled(folder) / "pytorch_model.bin"
    flipped(path, path.stat().st_size // 2, bit=3)
    (problem,) = ckpt.verify(folder)
    assert "do not match their checksum" in problem
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        ckpt.load(folder, verify=True)


def test_the_error_for_a_folder_without_weights_lists_its_files(folder):
    (folder / WEIGHTS).rename(folder / "flax_model.msgpack")
    assert "has no model.safetensors and no pytorch_model.bin (it holds config.json, flax_model.msgpack" in refused(
        folder
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory, and the context

LOADING = """
import json, re, sys
from pathlib import Path
import torch
from milepost import ckpt
from milepost.ckpt.restore import build_model
def load(folder):
    return build_model(ckpt.load(Path(folder), optimizer=False), device=torch.device("cpu"), take=True)
def kilobytes(word):
    return int(re.search(word + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load(sys.argv[1])  # everything is imported
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage's would be the parent's too
before = kilobytes("VmRSS")
model = load(sys.argv[2])
size = sum(each.nbytes for each in model.parameters())
print(json.dumps([(kilobytes("VmHWM") - before) * 1024 / size, size]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A GPT-2 of 126 MB, a third of it the embedding, as in GPT-2 of 124 million parameters."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"vocab_size": 20_000, "n_positions": 128, "n_layer": 7, "n_head": 8, "n_embd": 512}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["safetensors", "safetensors in shards", "torch archive", "torch archives in shards"])
def test_loading_takes_at_most_a_fifth_more_than_the_weights(form, large, saved, tmp_path):
    """The peak of the process while the model of a hub's folder is loaded, the pages of mapped files included."""
    folder = Path(shutil.copytree(large, tmp_path / "large"))
    if "torch" in form:
        pickled(folder, shards=3 if "shards" in form else 1)
    elif "shards" in form:
        GPT2LMHeadModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="30MB")
        folder = tmp_path / "sharded"
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    command = [sys.executable, "-c", LOADING, str(saved), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    share, size = json.loads(done.stdout)
    assert size > 100e6
    assert 0.9 < share < 1.2


def test_the_model_takes_the_weights_and_leaves_none(saved, theirs):
    record = ckpt.load(saved)
    weight = record.model_state["wpe.weight"]
    model = build_model(record, device=CPU, take=True).eval()
    assert record.model_state == {}
    assert model.wpe.weight.data_ptr() == weight.data_ptr()
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens())[0], theirs(tokens()).logits, atol=1e-4, rtol=0)


def test_what_is_mapped_from_a_file_is_copied_and_not_taken(saved, tmp_path):
    """A model that learned in memory mapped from a checkpoint would hang on that file."""
    path = ckpt.save(ckpt.load(saved), tmp_path)
    record = ckpt.load(path)
    model = build_model(record, device=CPU, take=True)
    assert model.wpe.weight.data_ptr() != record.model_state["wpe.weight"].data_ptr()


@pytest.mark.parametrize("form", ["safetensors", "torch archive"])
def test_a_smaller_context_crops_the_positions(form, folder, theirs):
    if form == "torch archive":
        pickled(folder)
    record = ckpt.load(folder)
    model = build_model(record, device=CPU, block_size=9, take=True).eval()
    assert model.wpe.weight.shape == (9, 16)
    ids = tokens()[:, :9]
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], theirs(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match="BLOCK_SIZE=64 is more than its 32 positions"):
        build_model(ckpt.load(folder), device=CPU, block_size=64)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused(cut, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:cut])
    assert "is damaged" in refused(folder) or "is not a complete safetensors file" in refused(folder)
    assert ckpt.verify(folder) == [refused(folder)]


def test_a_flipped_bit_in_the_header_is_refused(folder):
    flipped(folder / WEIGHTS, 3, bit=6)
    assert "is not a complete safetensors file" in refused(folder)
    flipped(folder / WEIGHTS, 3, bit=6)
    flipped(folder / WEIGHTS, 8, bit=6)
    assert "is damaged" in refused(folder)


def test_a_torch_archive_in_the_place_of_safetensors_is_refused(folder):
    torch.save({"a": torch.ones(1)}, folder / WEIGHTS)
    assert "is not a complete safetensors file" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "gpt2"' + "[" * 100_000, "\ud800"], ids=range(5))
def test_a_damaged_config_is_refused(text, folder):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json: " in refused(folder)


def sharded(folder: Path, weight_map: object) -> None:
    (folder / WEIGHTS).rename(folder / FIRST)  # a whole file would be used before an index
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors"])
def test_a_shard_outside_the_folder_is_never_opened(name, folder):
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    sharded(folder, {"wte.weight": name})
    assert (refusal(folder).kind, refusal(folder).path) == ("refused", folder / f"{WEIGHTS}.index.json")


@pytest.mark.parametrize("weight_map", [{}, None, [FIRST], *({"a": name} for name in ("9", "..", ""))], ids=str)
def test_an_index_without_its_shards_is_refused(weight_map, folder):
    sharded(folder, weight_map)
    error = refusal(folder)
    named = isinstance(weight_map, dict) and weight_map  # shards that are missing, rather than no list of shards
    assert (error.kind, error.path) == ("damaged" if named else "not understood", folder / f"{WEIGHTS}.index.json")


def test_a_shard_that_is_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "model-1.safetensors")
    sharded(folder, {"wte.weight": "model-1.safetensors"})
    assert (refusal(folder).kind, refusal(folder).path) == ("damaged", folder / f"{WEIGHTS}.index.json")


def test_one_name_in_two_shards_is_refused(folder):
    shutil.copy(folder / WEIGHTS, folder / "model-2.safetensors")
    sharded(folder, {"a": FIRST, "b": "model-2.safetensors"})
    assert refusal(folder).kind == "damaged"
    assert "is in an earlier shard too" in refused(folder)


@pytest.mark.parametrize("shards", ["missing", "present"])
def test_a_stale_index_beside_new_weights_is_named_and_not_used(shards, folder, theirs):
    """In the order of transformers, a whole file comes before an index."""
    old = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(old, FIRST)}))
    if shards == "present":
        save_file(old, folder / FIRST)
    assert_same_logits(ckpt.load(folder), theirs)
    assert_same_logits(ckpt.load(folder), GPT2LMHeadModel.from_pretrained(folder).eval())
    assert sum(INDEX in note for note in ckpt.load(folder).notes) == 1
    assert ckpt.verify(folder) == []


# ---------------------------------------------------------------------------------------------------------------------
# Finding it


def test_peek_needs_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert huggingface.LAYOUT.read_metadata(folder)["model_settings"]["n_layer"] == 2
    assert huggingface.LAYOUT.read_metadata(folder)["step"] == 0


def test_a_folder_is_found_by_relative_absolute_and_home_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("gpt2", "./gpt2", str(folder), "~/gpt2"):
        assert local_folder(name).samefile(folder)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none"])
def test_a_folder_that_is_not_there_is_no_name_for_the_hub(name):
    with pytest.raises(CheckpointError) as caught:
        local_folder(name)
    assert (caught.value.kind, caught.value.path) == ("not found", Path(name))
