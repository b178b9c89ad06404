"""CONVERT_TO=gguf of MODEL_TYPE=llama in llama.cpp itself: nearly the same logits for every form that the model has, and the
same ids of any text for every way of cutting it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from records import gpt2_record
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as library_models

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.exports import gguf_llama
from milepost.ckpt.exports.gguf import TYPES
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.text import tokenization
from milepost.text.tokenization.bpe import SPLITS
from milepost.text.tokenizer_json import from_tokenizers_json

SIZES = {"vocab_size": 256, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_inner": 96}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_factor": 1.0, "high_factor": 4.0, "original_length": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"n_kv_head": 2},
    "one head of keys": {"n_kv_head": 1, "tied": False},
    "heads of another size": {"head_size": 32},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "linear scaling": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "llama3 scaling": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "qwen2": {"qkv_bias": True, "n_kv_head": 2},
    "qwen3": {"qk_norm": True, "n_kv_head": 2, "tied": False},
}
NAMES = {"qwen2": "qwen2", "qwen3": "qwen3"}  # the others are its llama
TEXTS = [
    "It's 2026, and we'll pay 12,345.67 for it!\n\n  Two spaces, a\ttab\r\n",
    "def f(x):\n    return x**2  # größer\n",
    "Привет, мир! 你好世界。 नमस्ते दुनिया ١٢٣ 👩\u200d👧 don't  x",
    " \n  a\r\n",
]


def random_model(**changes: Any) -> Checkpoint:
    """A model whose norms and biases are not what they start with, over bytes."""
    torch.manual_seed(5)
    model = models.build("llama", SIZES | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dataclasses.replace(
        gpt2_record(),
        model_type="llama",
        model_settings=models.plain(model.settings),
        model_state={name: tensor.detach() for name, tensor in model.state_dict().items()},
        tokenizer={"kind": "byte"},
    )


def opened(folder: Path, record: Checkpoint, kind: str = "f32", **options: Any) -> Llama:
    path = ckpt.exporter("gguf", gguf_type=kind).write(record, folder, "model")
    return Llama(str(path), n_ctx=64, n_threads=2, logits_all=True, verbose=False, **options)


def apart(llama: Llama, record: Checkpoint) -> float:
    """The largest difference of two logits, in standard deviations of ours."""
    ids = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = build_model(record, device=torch.device("cpu")).eval()(ids)[0][0]
    llama.eval(ids[0].tolist())
    return (torch.from_numpy(np.array(llama.scores[:40])) - ours).abs().max().item() / ours.std().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_nearly_the_same(tmp_path, shape):
    record = random_model(**SHAPES[shape])
    llama = opened(tmp_path, record)
    assert llama.metadata["general.architecture"] == NAMES.get(shape, "llama")
    assert apart(llama, record) < 0.02


@pytest.mark.parametrize(("kind", "most"), [("f32", 0.02), ("f16", 0.03), ("q8_0", 0.25)])
def test_rounded_weights_move_logits_little(tmp_path, kind, most):
    assert kind in TYPES
    record = random_model(n_kv_head=2)
    assert apart(opened(tmp_path, record, kind), record) < most


def test_control_another_order_of_the_rows_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_llama, "_neighbours", lambda rows, head_size: rows)
    record = random_model()
    assert apart(opened(tmp_path, record), record) > 0.1


def test_control_a_forgotten_scaling_would_be_seen(tmp_path, monkeypatch):
    record = random_model(**SHAPES["llama3 scaling"])
    monkeypatch.setattr(gguf_llama, "_factors", lambda settings: None)
    assert apart(opened(tmp_path, record), record) > 0.1


def tokenizer(name: str, **changes: Any) -> tokenization.Tokenizer:
    """A BPE that cuts as this model's, its merges learned from TEXTS."""
    library = Tokenizer(library_models.BPE(**changes))
    cut, regex = pre_tokenizers.Digits(individual_digits=True), True
    if name in SPLITS:
        cut, regex = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated", invert=False), False
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    library.decoder, library.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    library.train_from_iterator([*TEXTS, Path("README.md").read_text(encoding="utf-8")], trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))


@pytest.mark.parametrize(("name", "changes"), [("SmolLM2", {}), ("Qwen2", {}), ("Llama 3", {"ignore_merges": True})])
def test_the_ids_of_any_text_are_ours(tmp_path, name, changes):
    ours = tokenizer(name, **changes)
    record = dataclasses.replace(random_model(vocab_size=ours.vocab_size), tokenizer=ours.to_dict())
    llama = opened(tmp_path, record, vocab_only=True)
    for text in TEXTS:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == ours.encode(text), text
        assert llama.detokenize(ids).decode() == build_tokenizer(record).decode(ids)
    assert llama.token_eos() == ours.end_of_text


def test_the_token_that_begins_a_text_is_added_there_too(tmp_path):
    values = tokenizer("Llama 3", ignore_merges=True).to_dict()
    begin = {token["content"]: token["id"] for token in values["tokenizer"]["added_tokens"]}["<|im_end|>"]
    values["tokenizer"]["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", begin)]).__getstate__()
    )
    ours = tokenization.from_dict(values)
    record = dataclasses.replace(random_model(vocab_size=ours.vocab_size), tokenizer=ours.to_dict())
    llama = opened(tmp_path, record, vocab_only=True)
    assert (llama.token_bos(), llama.token_eos()) == (begin, ours.end_of_text)
    assert llama.tokenize(b"It's 2026", add_bos=True, special=False) == ours.encode_whole("It's 2026")


def test_cuts_that_llama_cpp_has_otherwise_are_refused(tmp_path):
    """It takes words of Llama 3's vocabulary whole, whatever the merges say, and those of no other."""
    for name, changes in (("Llama 3", {}), ("Qwen2", {"ignore_merges": True})):
        ours = tokenizer(name, **changes)
        record = dataclasses.replace(random_model(vocab_size=ours.vocab_size), tokenizer=ours.to_dict())
        with pytest.raises(CheckpointError, match="cuts texts in a way"):
            opened(tmp_path, record)
