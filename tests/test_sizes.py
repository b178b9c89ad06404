"""The size of a model is known before it is built, and one that does not fit is refused without building it."""

import pytest
import torch
from drive import train

import models
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.restore import build_model
from milepost.runtime import hardware
from models.sizes import Size, layer_size, size_of

GPT2 = {"vocab_size": 11, "block_size": 7, "n_layer": 5, "n_head": 2, "n_embd": 8}
BIGRAM = {"vocab_size": 11, "block_size": 7}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bigram", BIGRAM),
        *(("gpt2", GPT2 | {"n_layer": count, "bias": bias, "tied": tied}) for count in (1, 2, 3, 5) for bias in (True, False) for tied in (True, False)),
    ],
)  # fmt: skip
def test_the_size_is_that_of_the_model(kind, settings):
    state = models.build(kind, settings).state_dict().values()
    assert size_of(kind, settings) == Size(len(state), sum(tensor.numel() for tensor in state))


def test_layers_are_measured_without_building_them():
    one = layer_size("gpt2", GPT2)
    many = size_of("gpt2", GPT2 | {"n_layer": 10**12})
    assert many.elements - size_of("gpt2", GPT2 | {"n_layer": 10**12 - 1}).elements == one.elements
    assert many.bytes > 10**12 * 4 * one.elements


def test_adapters_are_left_out():
    lora = {"rank": 2, "alpha": 2.0, "dropout": 0.0, "targets": "c_attn"}
    ttt = {"layers": "4", "base_lr": 1.0, "mini_batch_size": 2, "initial_gating_alpha": 0.1}
    assert size_of("gpt2", GPT2 | {"lora": lora, "ttt": ttt}) == size_of("gpt2", GPT2)


class Built(BaseException):
    """A model was built."""


@pytest.mark.parametrize(
    "sizes",
    [
        {"N_LAYER": "100000000"},
        {"N_LAYER": "100000000", "N_EMBD": "1", "N_HEAD": "1"},
        {"N_EMBD": "100000000"},
        {"N_EMBD": "4000000000"},
        {"N_LAYER": "1000000000000", "N_EMBD": "4000000000"},
    ],
    ids=str,
)
def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(sizes, tmp_path, monkeypatch):
    plain = models.build

    def build(kind, settings):
        if settings.get("n_layer", 1) > 2 or torch.empty(0).device.type != "meta":
            raise Built
        return plain(kind, settings)

    monkeypatch.setattr(models, "build", build)
    code, said = train(tmp_path, **sizes)
    assert code == 2, said
    assert all(f"{name}={value}" in said.splitlines()[-1] for name, value in sizes.items() if name != "N_HEAD")
    with pytest.raises(Built):  # the control
        train(tmp_path, N_LAYER="2")


def test_the_free_memory_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "free_main_memory", lambda: 100_000)
    code, said = train(tmp_path)
    assert code == 2
    assert "100kB" in said.splitlines()[-1]
    monkeypatch.setattr(hardware, "free_main_memory", lambda: None)  # not every system tells
    assert train(tmp_path)[0] == 0


def test_numbers_and_not_only_tensors_must_be_there_for_layers():
    """A file of tensors of one number each, as many as a deep model has, holds no such model."""
    layers = 400
    one = layer_size("gpt2", GPT2)
    state = {f"h.{number}.weight": torch.ones(1) for number in range(layers * one.tensors + 10)}
    record = Checkpoint(model_state=state, model_type="gpt2", model_settings=GPT2 | {"n_layer": layers})
    with pytest.raises(CheckpointError) as caught:
        build_model(record, device=torch.device("cpu"))
    assert caught.value.kind == "damaged"
    assert f"n_layer is {layers}" in str(caught.value)
    assert "numbers" in str(caught.value)


def test_a_missing_matrix_is_named():
    model = models.build("gpt2", GPT2)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "h.3.mlp.c_fc.weight"}
    record = Checkpoint(model_state=state, model_type="gpt2", model_settings=GPT2)
    with pytest.raises(CheckpointError, match=r"h\.3\.mlp\.c_fc\.weight"):
        build_model(record, device=torch.device("cpu"))
