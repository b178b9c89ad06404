"""The bigram model against numbers worked out by hand, and the registry's refusals."""

import dataclasses
import json
import math

import pytest
import torch

from models import build, load, parameter_count, settings_from, training_bytes
from models.bigram import Bigram, BigramSettings

GPT2_FIELDS = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}


def bigram_with(table: list[list[float]]) -> Bigram:
    model = Bigram(BigramSettings(vocab_size=len(table), block_size=4))
    model.load_state_dict({"token_embedding_table.weight": torch.tensor(table)})
    return model


def test_logits_are_the_rows_and_the_loss_is_their_mean_cross_entropy() -> None:
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    model = bigram_with([[half, quarter, quarter], [quarter, quarter, half], [0.0, 0.0, 0.0]])
    logits, loss, _ = model(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 2], [1, 1]]))
    assert logits[0, 1].tolist() == pytest.approx([quarter, quarter, half])
    # -log of 1/2, 1/2, 1/3 and 1/4, averaged
    assert loss.item() == pytest.approx((2 * math.log(2) + math.log(3) + math.log(4)) / 4)


def test_gradient_of_one_step_is_probability_minus_target() -> None:
    model = bigram_with([[0.0, 0.0], [0.0, math.log(3)]])
    model(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))[1].backward()
    gradient = model.token_embedding_table.weight.grad
    assert gradient is not None
    assert gradient.flatten().tolist() == pytest.approx([0.25, -0.25, 0.125, -0.125])


def test_last_only_and_a_cache_give_the_same_last_logits() -> None:
    model = build("bigram", {"vocab_size": 7, "block_size": 4})
    ids = torch.tensor([[3, 1, 6, 6, 2, 0]])  # longer than block_size, which binds only the training windows
    cache = model.new_cache(1)
    model(ids[:, :4], cache=cache)
    logits, loss, _ = model(ids[:, 4:], cache=cache, last_only=True)
    assert loss is None
    assert cache.length == 6
    assert torch.equal(logits, model(ids)[0][:, -1:])


def test_untrained_model_predicts_nearly_uniformly() -> None:
    torch.manual_seed(0)
    model = build("bigram", {"vocab_size": 65, "block_size": 8})
    ids = torch.randint(65, (16, 8))
    assert model(ids, ids.roll(1))[1].item() == pytest.approx(math.log(65), abs=0.01)


def test_state_has_one_tensor_under_the_lectures_name() -> None:
    model = build("bigram", {"vocab_size": 5, "block_size": 4})
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {"token_embedding_table.weight": (5, 5)}
    assert parameter_count(model) == 25


@pytest.mark.parametrize(
    ("model_type", "fields"), [("bigram", {"vocab_size": 5, "block_size": 4}), ("gpt2", GPT2_FIELDS)]
)
def test_settings_survive_json_and_build_the_same_shapes(model_type: str, fields: dict[str, int]) -> None:
    model = build(model_type, fields)
    stored = json.loads(json.dumps(dataclasses.asdict(model.settings)))
    again = build(model_type, stored)
    assert (type(again), again.settings) == (load(model_type), model.settings)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(model.settings, "block_size", 1)  # noqa: B010


def test_largest_table_is_two_gibibytes() -> None:
    edge = math.isqrt(2**29)  # 4 bytes each: 2 GiB
    assert settings_from("bigram", {"vocab_size": edge, "block_size": 8}).vocab_size == 23170
    with pytest.raises(
        ValueError, match=r"vocab_size=50257: .* would take 9\.4 GiB.*; use TOKENIZER=char, byte or bpe"
    ):
        build("bigram", {"vocab_size": 50257, "block_size": 8})


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gtp2", {}, "model_type='gtp2': expected one of bigram, gpt2"),
        ("gpt2", {"n_heads": 2}, "n_heads=2: the gpt2 model has vocab_size, .* and no such setting"),
        ("gpt2", {"n_layer": None}, "n_layer=None: expected int, got NoneType"),
        ("gpt2", {"n_layer": "2"}, "n_layer='2': expected int, got str"),
        ("gpt2", {"n_layer": 2.0}, r"n_layer=2\.0: expected int, got float"),
        ("gpt2", {"n_layer": True}, "n_layer=True: expected int, got bool"),
        ("gpt2", {"bias": 1}, "bias=1: expected bool, got int"),
        ("gpt2", {"n_head": 0}, "n_head=0: expected a whole number of at least 1"),
        ("gpt2", {"vocab_size": -5}, "vocab_size=-5: expected a whole number of at least 1"),
        ("gpt2", {"n_head": 3}, "n_embd=8 and n_head=3: .* n_embd must be a multiple of n_head"),
        ("gpt2", {"dropout": 1.0}, r"dropout=1\.0: expected a probability"),
        ("gpt2", {"dropout": math.nan}, "dropout=nan: expected a probability"),
        ("bigram", {"n_layer": 2}, "n_layer=2: the bigram model has vocab_size, block_size and no such setting"),
    ],
)
def test_settings_that_make_no_model_are_refused_by_name(model_type: str, change: dict, message: str) -> None:
    fields = {"vocab_size": 5, "block_size": 4} if model_type == "bigram" else GPT2_FIELDS
    with pytest.raises(ValueError, match=message):
        build(model_type, fields | change)


def test_all_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"^n_head, n_embd: missing from the settings of the gpt2 model\.$"):
        build("gpt2", {"vocab_size": 11, "block_size": 8, "n_layer": 2})


def test_whole_number_is_taken_for_a_dropout() -> None:
    dropout = dataclasses.asdict(build("gpt2", GPT2_FIELDS | {"dropout": 0}).settings)["dropout"]
    assert (dropout, type(dropout)) == (0.0, float)


def test_training_memory_counts_four_tables_and_the_logits() -> None:
    model = build("bigram", {"vocab_size": 100, "block_size": 8})
    assert training_bytes(model, 4, bytes_per_value=4) == 16 * 100 * 100 + 16 * 4 * 8 * 100
    assert training_bytes(model, 4, bytes_per_value=4, processes=4) == 4 * 100 * 100 + 16 * 4 * 8 * 100
    model.requires_grad_(False)
    assert training_bytes(model, 4, bytes_per_value=4) == 4 * 100 * 100 + 16 * 4 * 8 * 100
