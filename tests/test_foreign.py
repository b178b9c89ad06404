"""Other programs' checkpoints against small models of their shape, and everything that must be refused in one sentence."""

import io
import pickle
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from foreign_programs import SIZES, LectureModel, shaken
from torch import Tensor, nn

import models
from milepost.ckpt import foreign
from milepost.ckpt.foreign import keys as foreign_words
from milepost.ckpt.foreign import weights as foreign_models
from milepost.ckpt.foreign.optimizer import matched
from milepost.ckpt.foreign.tokenizer import read_meta, tokenizer_for
from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.restore import build_model, restore_optimizer
from models.model import Model

WHERE = "old/ckpt.pt"
IDS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))  # (B, T)
C, HS = 12, 4


def ours(**changes: Any) -> Model:
    torch.manual_seed(5)
    return shaken(models.build("gpt2", SIZES | changes))


def nanogpt(**changes: Any) -> dict[str, Any]:
    """What nanoGPT's train.py saves for a model: exact GELU, the tied head stored twice, masks where flash attention lacks."""
    state = ours(activation="gelu_erf", **changes).state_dict()
    mask = torch.ones(6, 6).tril().view(1, 1, 6, 6)
    named = {f"transformer.{name}": tensor for name, tensor in state.items() if not name.startswith("lm_head")}
    named |= {f"transformer.h.{n}.attn.bias": mask for n in range(2)}
    named["lm_head.weight"] = state["wte.weight"].clone()
    args = SIZES | {"bias": changes.get("bias", True), "dropout": 0.1}
    return {
        "model": named,
        "optimizer": None,
        "model_args": args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.75),
        "config": {"n_layer": 12, "out_dir": "out", "learning_rate": 6e-4},
    }


def logits(found: foreign.Foreign) -> Tensor:
    """What the translated checkpoint computes, through the same door as every checkpoint."""
    record = Checkpoint(model_state=found.model_state, model_type=found.model_type, model_settings=found.model_settings)
    with torch.no_grad():
        return build_model(record, device=torch.device("cpu")).eval()(IDS)[0]


def refusal(call: Any, *arguments: Any, **words: Any) -> str:
    """Return the message of the error that `call` raises: it names the place and its kind, and has no line break."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **({"where": WHERE} | words))
    message = str(caught.value)
    assert caught.value.kind in ("damaged", "not understood", "lacking", "refused")
    assert str(caught.value.path).startswith(WHERE)
    assert message.startswith(WHERE)
    assert message.isprintable()
    assert len(message) < 2000
    return message


# Names


def test_prefixes_come_off_in_any_order() -> None:
    state = {
        "_orig_mod.module.transformer.wte.weight": 1,
        "module._orig_mod.module.wpe.weight": 2,
        "lm_head.weight": 3,
        "model.x": 4,
    }
    assert foreign_words.strip_prefixes(state, where=WHERE) == {
        "wte.weight": 1,
        "wpe.weight": 2,
        "lm_head.weight": 3,
        "model.x": 4,  # not common to all, so part of the name
    }


def test_lightnings_model_comes_off_where_all_names_have_it() -> None:
    state = {"model._orig_mod.transformer.wte.weight": 1, "module.model.model.lm_head.weight": 2}
    assert foreign_words.strip_prefixes(state, where=WHERE) == {"wte.weight": 1, "model.lm_head.weight": 2}
    assert foreign_words.strip_prefixes({"model.model.a": 1}, where=WHERE) == {"a": 1}


def test_names_that_become_one_are_listed() -> None:
    message = refusal(foreign_words.strip_prefixes, {"module.a": torch.zeros(2, 3), "_orig_mod.a": torch.zeros(4)})
    assert "module.a (2, 3) and _orig_mod.a (4,) are both a without" in message


@pytest.mark.parametrize("name", [1, "", "a\nb", "a" * 513, "a\ud800", None])
def test_names_that_are_none_are_refused(name: Any) -> None:
    assert "is not a tensor name" in refusal(foreign_words.strip_prefixes, {name: torch.zeros(1)})
    assert "is not a tensor name" in refusal(foreign_words.flattened, {name: torch.zeros(1)})


def test_nested_dicts_and_lists_become_dotted_names() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    nested = {"h": [{"attn": {"c_attn": {"weight": a}}}, {"ln": {"bias": b}}], "drop": {}, "wte": {"weight": c}}
    found = foreign_words.flattened(nested, where=WHERE)
    assert list(found) == ["h.0.attn.c_attn.weight", "h.1.ln.bias", "wte.weight"]
    assert found["h.1.ln.bias"] is b


def test_what_is_nested_without_end_is_refused() -> None:
    cycle: dict[str, Any] = {"weight": torch.zeros(1)}
    cycle["self"] = cycle
    doubled: Any = torch.zeros(1)
    for _ in range(40):
        doubled = [doubled, doubled]
    for bomb in (cycle, doubled, {"list": [torch.zeros(1)] * 1_000_001}):
        assert "is nested deeper than 64" in refusal(foreign_words.flattened, bomb)


def test_what_is_no_tensor_or_twice_there_is_refused() -> None:
    twice = {"a.b": torch.zeros(1), "a": {"b": torch.zeros(2)}}
    assert "a.b is there twice, (1,) and (2,)" in refusal(foreign_words.flattened, twice)
    assert "a.b is int, expected a tensor" in refusal(foreign_words.flattened, {"a": {"b": 3}})


# Where the weights are


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", ""])
def test_weights_are_found_under_every_key(key: str) -> None:
    state = {"a": torch.zeros(2), "b": torch.ones(3)}
    content = {key: state, "step": 3} if key else state
    assert foreign_words.weights_of(content, where=WHERE) == (key, state)
    nested = {"layers": [{"weight": torch.zeros(2)}]}
    content = {key: nested, "step": 3} if key else nested
    assert list(foreign_words.weights_of(content, where=WHERE)[1]) == ["layers.0.weight"]


def test_a_description_under_model_is_no_weights() -> None:
    content = {"model": {"n_layer": 2}, "state_dict": {"a": torch.zeros(2)}}
    assert foreign_words.weights_of(content, where=WHERE)[0] == "state_dict"


@pytest.mark.parametrize("content", [{}, {"weights": {"n": 1}, "step": torch.zeros(1)}, {"model": {}}])
def test_no_weights_lists_the_keys_seen(content: dict[str, Any]) -> None:
    message = refusal(foreign_words.weights_of, content)
    assert "does not contain model_state_dict" in message
    assert all(repr(key) in message for key in content)


def test_two_weights_must_agree() -> None:
    one, twin, other = ({"a": torch.full((2,), value)} for value in (1.0, 1.0, 2.0))
    content = {"model": {"module.a": twin["a"]}, "model_state_dict": one}
    assert foreign_words.weights_of(content, where=WHERE) == ("model_state_dict", one)
    for bad in (other, {"b": one["a"]}, {"a": one["a"].double()}, {"a": torch.ones(2, device="meta")}):
        refusal(foreign_words.weights_of, {"model": bad, "model_state_dict": one})
    assert "model_state_dict and model both hold weights" in refusal(
        foreign_words.weights_of, {"model": other, "model_state_dict": one}
    )


# nanoGPT and our own names


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_the_same_logits(bias: bool) -> None:
    found = foreign.understood(nanogpt(bias=bias), where=WHERE)
    expected = ours(activation="gelu_erf", bias=bias)
    with torch.no_grad():
        torch.testing.assert_close(logits(found), expected(IDS)[0], atol=1e-6, rtol=0)
        assert not torch.allclose(logits(found), ours(bias=bias)(IDS)[0], atol=1e-4)  # tanh GELU would be noticed
    assert found.model_settings == SIZES | {"dropout": 0.1, "bias": bias, "activation": "gelu_erf", "tied": True}
    assert (found.step, found.epoch, found.validation_loss) == (250, None, 1.75)
    assert found.model_settings["n_layer"] == 2  # of model_args; `config` has train.py's default
    assert any("exact GELU" in note for note in found.notes)


def test_our_own_names_without_metadata() -> None:
    for changes in ({}, {"tied": False, "activation": "relu"}, {"activation": "gelu_erf", "bias": False}):
        state = ours(**changes).state_dict()
        content = {"state_dict": dict(reversed(state.items())), "config": SIZES | changes, "global_step": 7}
        found = foreign.understood(content, where=WHERE)
        assert found.model_settings == models.plain(models.settings_from("gpt2", SIZES | changes))
        assert list(found.model_state) == list(state)  # in the model's order, not the file's
        assert all(torch.equal(found.model_state[name], tensor) for name, tensor in state.items())
        assert (found.step, found.notes) == (7, [])


def test_an_untied_head_is_kept() -> None:
    content = nanogpt()
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    found = foreign.understood(content, where=WHERE)
    assert found.model_settings["tied"] is False
    assert torch.equal(found.model_state["lm_head.weight"], content["model"]["lm_head.weight"])
    assert found.model_state["lm_head.bias"].tolist() == [0.0] * 11
    assert any("lm_head.weight differs from the token embedding" in note for note in found.notes)
    content["model_args"]["tied"] = True
    assert "tied is True in its config" in refusal(foreign.understood, content)


def test_a_stored_choice_to_keep_the_heads_apart_is_kept() -> None:
    state = ours(tied=False).state_dict()
    state["lm_head.weight"], state["lm_head.bias"] = state["wte.weight"], torch.zeros(11)
    apart = foreign.understood({"model": state, "config": SIZES | {"tied": False}}, where=WHERE)
    assert apart.model_settings["tied"] is False
    assert apart.model_state["lm_head.weight"].data_ptr() != apart.model_state["wte.weight"].data_ptr()
    assert foreign.understood({"model": state, "config": SIZES}, where=WHERE).model_settings["tied"] is True


def test_padded_rows_are_kept() -> None:
    state = ours(vocab_size=64).state_dict()
    found = foreign.understood({"model": state, "config": {"n_head": 3, "vocab_size": 64}}, where=WHERE)
    assert found.model_state["wte.weight"].shape == (64, 12)


@pytest.mark.parametrize("word", ["n_head", "num_heads", "num_attention_heads", "n_heads"])
def test_heads_are_known_by_several_words(word: str) -> None:
    found = foreign.understood(ours().state_dict(), {word: 3}, where=WHERE)
    assert found.model_settings["n_head"] == 3


def test_heads_that_nothing_records_are_left_open() -> None:
    found = foreign.understood(ours().state_dict(), {}, where=WHERE)
    assert "n_head" not in found.model_settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_head": 5}, "n_head is 5 in its config, which does not divide n_embd=12"),
        ({"n_head": 0}, "n_head is 0 in its config, expected a positive whole number"),
        ({"n_head": -3}, "n_head is -3"),
        ({"n_head": True}, "n_head is True"),
        ({"n_head": 3.0}, r"n_head is 3\.0"),
        ({"n_head": "3"}, "n_head is '3'"),
        ({"n_head": 10**30}, "n_head is int"),
        ({"n_head": [3]}, "n_head is list"),
        ({"n_head": 3, "num_heads": 4}, "n_head 3 and num_heads 4, which are two words"),
        ({"n_head": 3, "n_layer": 3}, "n_layer is 3 in its config, but 2 by its weights"),
        ({"n_head": 3, "d_model": 24}, "n_embd is 24 in its config, but 12"),
        ({"n_head": 3, "vocab_size": 12}, "vocab_size is 12 in its config, but 11"),
        ({"n_head": 3, "block_size": 10**9}, "block_size is 1000000000 in its config, but 6"),
        ({"n_head": 3, "bias": False}, "bias is False in its config, but True by its weights"),
        ({"n_head": 3, "dropout": 1.0}, r"dropout is 1\.0"),
        ({"n_head": 3, "dropout": float("nan")}, "dropout is float"),
        ({"n_head": 3, "dropout": True}, "dropout is True"),
        ({"n_head": 3, "activation": "silu"}, "activation is 'silu' in its config, expected one of gelu, gelu_erf"),
        ({"n_head": 3, "activation": ["relu"]}, "activation is list"),
        ({"n_head": 3, "hidden_act": "silu"}, "activation is 'silu' in its config"),
        ({"n_head": 3, "layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06 in its config, expected 1e-05"),
        ({"n_head": 3, "layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12 in its config, expected 1e-05"),
        ({"n_head": 3, "scale_attn_weights": False}, "scale_attn_weights is False in its config, expected True"),
        (
            {"n_head": 3, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True in its config, expected False: another model is computed",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field(config: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(foreign_models.translated, ours().state_dict(), config))


def test_a_config_that_says_what_is_computed_changes_nothing() -> None:
    config = {
        "n_head": 3,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": None,
    }
    plain = foreign.understood(ours().state_dict(), {"n_head": 3}, where=WHERE)
    assert torch.equal(logits(foreign.understood(ours().state_dict(), config, where=WHERE)), logits(plain))


def test_a_config_beside_it_must_not_contradict_the_one_inside() -> None:
    content = nanogpt()
    assert foreign.understood(content, {"n_head": 3, "dropout": 0.5}, where=WHERE).model_settings["dropout"] == 0.1
    assert "n_head is 3 inside, but 4 in the config.json beside it" in refusal(
        foreign.understood, content, {"n_head": 4}
    )


def changed(**changes: Any) -> dict[str, Any]:
    """Our weights with some replaced, by names with `_` for `.`; None takes one away."""
    state: dict[str, Any] = dict(ours().state_dict())
    for name, value in changes.items():
        dotted = name.replace("__", ".")
        state = {key: tensor for key, tensor in state.items() if key != dotted}
        state |= {} if value is None else {dotted: value}
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(h__1__ln_1__bias=None), r"none were: h\.1\.ln_1\.bias \(12,\) is missing"),
        (changed(extra=torch.zeros(2, 3)), r"extra \(2, 3\) is not known"),
        (changed(wpe__weight=torch.zeros(6, 13)), r"wpe\.weight is \(6, 13\), expected \(6, 12\)"),
        (changed(wte__weight=torch.zeros(12)), r"wte\.weight \(12,\) is not an embedding"),
        (changed(h__7__ln_1__bias=torch.zeros(12)), r"h\.7\.ln_1\.bias \(12,\) is not known; h\.2\."),
        (changed(ln_f__bias=torch.zeros(12, dtype=torch.int64)), "torch.int64 tensor on cpu, expected dense floats"),
        (changed(ln_f__bias=torch.zeros(12, dtype=torch.complex64)), "complex64"),
        (changed(ln_f__bias=torch.zeros(12, device="meta")), "on meta"),
        (changed(ln_f__bias=torch.zeros(12).to_sparse()), "sparse"),
        (changed(ln_f__bias=torch.zeros(1).expand(12)), r"ln_f\.bias of shape \(12,\) claims more bytes"),
        (changed(ln_f__bias=torch.zeros(0)), "is empty"),
        (changed(ln_f__bias=[1.0]), "is list, expected a tensor"),
        ({"fc1.weight": torch.zeros(3, 4)}, r"no model that milepost knows: fc1\.weight \(3, 4\); expected"),
        ({f"x{n}": torch.zeros(1) for n in range(30)}, r"x9 \(1,\) and 20 more; expected"),
        ({}, "holds no weights"),
    ],
)
def test_weights_that_are_not_wholly_ours_are_refused_by_name(state: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(foreign_models.translated, state, {"n_head": 3}))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.embed_tokens.weight", "a Llama opens from a folder of transformers"),
        ("tok_embeddings.weight", "a Llama opens from a folder of transformers"),
        ("layers.0.self_attn.q_proj.lora_a", "these are adapters: merge them into their base"),
        ("features.0.weight", "save the whole model's state_dict() again"),
    ],
)
def test_the_remedy_for_weights_of_another_model_works_for_it(name: str, remedy: str) -> None:
    assert remedy in refusal(foreign_models.translated, {name: torch.ones(3, 2), "x.weight": torch.ones(2)}, {})


def test_many_views_of_one_storage_are_refused() -> None:
    shared = torch.zeros(48, 12)
    state = {f"h.{n}.mlp.c_fc.weight": shared for n in range(200)}
    assert "claim more bytes than the file holds" in refusal(foreign_models.translated, state, {})


def test_transposed_weights_get_a_hint() -> None:
    state = {name: t.t() if name.endswith("c_fc.weight") else t for name, t in ours().state_dict().items()}
    message = refusal(foreign_models.translated, state, {"n_head": 3})
    assert "h.0.mlp.c_fc.weight is (12, 48), expected (48, 12)" in message
    assert "transposed weights are Hugging Face's" in message


def test_a_mask_is_dropped_but_a_bias_of_its_name_is_not() -> None:
    state = dict(ours().state_dict()) | {"h.0.attn.bias": torch.ones(1, 1, 6, 6, dtype=torch.bool)}
    state |= {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert "h.0.attn.bias" not in foreign_models.translated(state, {"n_head": 3}, where=WHERE)[2]
    state["h.0.attn.bias"] = torch.zeros(12)
    assert "h.0.attn.bias (12,) is not known" in refusal(foreign_models.translated, state, {"n_head": 3})


# The lecture's models


def lecture() -> LectureModel:
    return shaken(LectureModel(**SIZES))


def test_the_lecture_model_computes_the_same_logits() -> None:
    model = lecture()
    with torch.no_grad():
        expected = model(IDS)
    found = foreign.understood(model.state_dict(), {"n_head": 3, "bias": False, "device": "cuda"}, where=WHERE)
    assert expected.std() > 1  # large enough for 1e-5 to mean something
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=0)
    assert found.model_settings == SIZES | {"dropout": 0.0, "bias": True, "activation": "relu", "tied": False}
    assert found.model_state["h.0.attn.c_attn.weight"].shape == (36, 12)
    assert not found.model_state["h.0.attn.c_attn.bias"].any()


def test_heads_joined_in_another_order_would_be_noticed() -> None:
    model = lecture()
    state = model.state_dict()
    name = "blocks.1.sa.heads.{}.query.weight".format
    state[name(0)], state[name(1)] = state[name(1)], state[name(0)]
    with torch.no_grad():
        error = (logits(foreign.understood(state, where=WHERE)) - model(IDS)).abs().max()
    assert error > 1e-3


def test_the_lecture_model_with_its_head_tied_and_biases_of_heads() -> None:
    model = lecture()
    model.lm_head.bias = None
    model.lm_head.weight = model.token_embedding_table.weight
    for head in model.get_submodule("blocks.0.sa.heads").children():
        head.query.bias = nn.Parameter(torch.randn(HS))
    with torch.no_grad():
        expected = model(IDS)
    found = foreign.understood({"model_state_dict": model.state_dict(), "step": 4}, where=WHERE)
    assert found.model_settings["tied"] is True
    assert "lm_head.weight" not in found.model_state
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {"blocks.1.sa.heads.2.key.weight": None},
            {},
            r"blocks\.1\.sa\.heads\.2\.key\.weight \(4, 12\) is missing",
        ),
        ({"blocks.0.ln1.weight": None}, {}, r"blocks\.0\.ln1\.weight \(12,\) is missing"),
        ({"lm_head.weight": None, "lm_head.bias": None}, {}, r"lm_head\.weight \(11, 12\) is missing"),
        ({"lm_head.bias": torch.zeros(12)}, {}, r"lm_head\.bias is \(12,\), expected \(11,\)"),
        (
            {"blocks.0.sa.heads.0.key.weight": torch.zeros(5, 12)},
            {},
            r"heads\.0\.key\.weight is \(5, 12\), expected \(4, 12\)",
        ),
        ({"blocks.0.moe.weight": torch.zeros(2)}, {}, r"blocks\.0\.moe\.weight \(2,\) is not known"),
        ({f"blocks.0.sa.heads.{n}.key.weight": torch.zeros(1) for n in range(3, 40)}, {}, "2 blocks of 40 heads"),
        ({}, {"n_head": 4}, "n_head is 4 in its config, but 3 by its weights"),
        ({}, {"n_layer": 6}, "n_layer is 6 in its config, but 2"),
        ({}, {"vocab_size": 50304}, "vocab_size is 50304 in its config, but 11"),
    ],
)
def test_a_lecture_model_that_does_not_fit_is_refused(
    change: dict[str, Tensor | None], config: dict[str, Any], message: str
) -> None:
    state = {name: t for name, t in (lecture().state_dict() | change).items() if t is not None}
    assert re.search(message, refusal(foreign_models.translated, state, config))


def test_the_lectures_bigram() -> None:
    table = torch.randn(11, 11)
    found = foreign.understood({"token_embedding_table.weight": table}, where=WHERE)
    assert (found.model_type, found.model_settings) == ("bigram", {"vocab_size": 11, "block_size": 8})
    assert torch.equal(logits(found), table[IDS])
    assert "records no block_size; 8 is used" in found.notes[0]
    named = foreign.understood({"token_embedding_table.weight": table}, {"block_size": 32, "n_embd": 4}, where=WHERE)
    assert (named.model_settings["block_size"], named.notes) == (32, [])
    message = refusal(foreign_models.translated, {"token_embedding_table.weight": torch.zeros(11, 4)}, {})
    assert "(11, 4) is no bigram model's" in message


# Words beside the weights


def test_config_is_found_and_made_plain() -> None:
    class Odd(str):
        pass

    args = {"n_head": 3, "betas": (0.9, 0.95), "f": float("nan"), "t": torch.zeros(1), "s": Odd("x"), 5: 1, "a\n": 1}
    content = {"config": {"n_layer": 12}, "model_args": args | {"deep": {"n": 1}, "none": None, "huge": 2**70}}
    assert foreign_words.config_of(content) == {"n_head": 3, "betas": [0.9, 0.95], "none": None}
    assert foreign_words.config_of({"hyper_parameters": {"lr": 0.1, "config": {"n_head": 2}}}) == {"n_head": 2}
    assert foreign_words.config_of({"hyper_parameters": {"lr": 0.1}, "config": {"num_heads": 2}}) == {"num_heads": 2}
    assert foreign_words.config_of({"hyperparameters": {"BATCH_SIZE": 4}}) == {"BATCH_SIZE": 4}
    assert foreign_words.config_of({"config": "x"}) == {}


@pytest.mark.parametrize("word", ["step", "global_step", "iter_num", "iteration", "it", "iter", "steps"])
def test_steps_by_every_word(word: str) -> None:
    whole = (12, torch.tensor(12), torch.tensor([12]), torch.tensor(12.0), torch.tensor(12, dtype=torch.int32))
    assert [foreign_words.step_of({word: step, "epoch": 1}, where=WHERE) for step in whole] == [12] * len(whole)
    assert foreign_words.step_of({}, where=WHERE) == foreign_words.step_of({word: None}, where=WHERE) == 0
    odd = (torch.tensor(3.5), torch.tensor([1, 2]), torch.tensor(True), torch.tensor(3, device="meta"))
    for bad in (-1, True, 1.0, float("nan"), "12", 2**63, torch.tensor(-3), *odd, [[[]]]):
        assert re.search(f"{word} is .*, expected a whole number", refusal(foreign_words.step_of, {word: bad}))


def test_epochs_and_losses() -> None:
    assert foreign_words.epoch_of({"epoch": 3}, where=WHERE) == 3.0
    assert foreign_words.epoch_of({}, where=WHERE) is None
    for bad in (-1, True, float("nan"), float("inf"), "1"):
        assert "epoch is" in refusal(foreign_words.epoch_of, {"epoch": bad})
    found = [2.5, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.bfloat16)]
    assert [foreign_words.validation_loss_of({"best_val_loss": loss}) for loss in found] == [2.5] * 3
    none = [1e9, 0.0, -1, float("nan"), float("inf"), torch.tensor(1e9), torch.tensor([2.5]), "2.5", True, None]
    none.append(torch.zeros((), device="meta"))
    assert [foreign_words.validation_loss_of({"best_val_loss": loss}) for loss in none] == [None] * len(none)


# nanoGPT's optimizer


def trained(*, bias: bool = True) -> tuple[Model, dict[str, Any]]:
    """A model after two steps of AdamW grouped as nanoGPT's configure_optimizers() does, and the optimizer's state."""
    model = ours(activation="gelu_erf", bias=bias)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(2):
        model(IDS[:, :-1], IDS[:, 1:])[1].backward()
        optimizer.step()
    return model, optimizer.state_dict()


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_moments_get_names(bias: bool) -> None:
    model, saved = trained(bias=bias)
    found = foreign.understood(nanogpt(bias=bias) | {"optimizer": saved}, where=WHERE)
    assert found.optimizer_state is not None
    record = Checkpoint(
        model_state=found.model_state,
        model_type="gpt2",
        model_settings=found.model_settings,
        optimizer_state=found.optimizer_state,
    )
    names = [name for name, _ in model.named_parameters()]
    fresh = torch.optim.AdamW(list(model.named_parameters()), lr=0.5)
    restored = restore_optimizer(fresh, record)
    assert (restored.restored, restored.missing) == (len(names), ())
    matrices = [name for name, p in model.named_parameters() if p.dim() >= 2]
    for index, name in enumerate(matrices):
        moments = fresh.state[dict(model.named_parameters())[name]]
        assert torch.equal(moments["exp_avg"], saved["state"][index]["exp_avg"]), name
    assert found.optimizer_state["param_groups"][0]["betas"] == [0.9, 0.95]
    assert found.optimizer_state["param_groups"][1]["weight_decay"] == 0.0
    assert found.optimizer_state["param_groups"][1]["param_names"][0] == "h.0.ln_1.weight"


def unchanged(model: Model, saved: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Match an optimizer's state with a model whose names and shapes need no translation."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return matched(saved, shapes, shapes, lambda tensors: tensors)


def test_moments_that_do_not_fit_cannot_be_used_for_a_reason() -> None:
    model, saved = trained()
    assert unchanged(model, saved)[1] is None
    for damage in ("exp_avg", "exp_avg_sq", "step"):
        state = saved["state"] | {3: saved["state"][3] | {damage: torch.zeros(5, 5)}}
        found, note = unchanged(model, saved | {"state": state})
        assert found is None
        assert note is not None
        assert note.startswith("its optimizer state is present but cannot be used: ")
    odd: dict[str, Any] = {
        "meta": saved["state"] | {0: saved["state"][0] | {"exp_avg": torch.zeros(11, 12, device="meta")}},
        "momentum": {n: {"momentum_buffer": one["exp_avg"]} for n, one in saved["state"].items()},
        "amsgrad": {n: one | {"max_exp_avg_sq": one["exp_avg"]} for n, one in saved["state"].items()},
        "one missing": {n: one for n, one in saved["state"].items() if n},
        "another's": saved["state"] | {99: saved["state"][0]},
        "no step": {n: one | {"step": None} for n, one in saved["state"].items()},
        "empty": {},
    }
    assert [name for name, state in odd.items() if unchanged(model, saved | {"state": state})[0] is not None] == []


GROUPS: dict[str, Any] = {
    "two by dimension": lambda first, second, total: [first, second],
    "the same, the other first": lambda first, second, total: [second, first],
}
ODD_GROUPS: dict[str, Any] = {
    "renumbered": lambda first, second, total: [first | {"params": first["params"][::-1]}, second],
    "bools": lambda first, second, total: [first | {"params": [False, True, *first["params"][2:]]}, second],
    "none": lambda first, second, total: [None, None],
    "text": lambda first, second, total: "groups",
    "three": lambda first, second, total: [first, second, {"params": []}],
    "one in another order": lambda first, second, total: [first | {"params": list(range(total))}],
}


def assert_matched(model: Model, optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Each parameter has exactly the moments that its optimizer holds for it."""
    names = {
        index: name
        for group in found["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    by_name = {names[index]: kinds for index, kinds in found["state"].items()}
    parameters = dict(model.named_parameters())
    assert by_name.keys() == parameters.keys()
    for name, kinds in by_name.items():
        for kind, value in optimizer.state[parameters[name]].items():
            assert torch.equal(kinds[kind], value), (name, kind)


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_by_dimension_are_matched(groups: str) -> None:
    model, saved = trained()
    first, second = saved["param_groups"]
    found, note = unchanged(model, saved | {"param_groups": GROUPS[groups](first, second, len(saved["state"]))})
    assert note is None
    assert found is not None
    names = [name for name, p in model.named_parameters() if p.dim() >= 2]
    assert sorted(group["param_names"] for group in found["param_groups"])[1] == names


@pytest.mark.parametrize("groups", ODD_GROUPS)
def test_groups_of_another_kind_are_not_guessed(groups: str) -> None:
    model, saved = trained()
    first, second = saved["param_groups"]
    odd = ODD_GROUPS[groups](first, second, len(saved["state"]))
    found, note = unchanged(model, saved | {"param_groups": odd})
    assert found is None
    assert note is not None
    assert "present but cannot be used" in note


def mingpt_groups(model: Model) -> list[dict[str, Any]]:
    """minGPT's configure_optimizers(): linear weights decay, the rest does not, each in alphabetical order."""
    named = {("" if name.startswith("lm_head") else "transformer.") + name: p for name, p in model.named_parameters()}
    decay = {name for name, p in named.items() if p.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight"))}
    orders = (sorted(decay), sorted(named.keys() - decay))
    return [{"params": [named[name] for name in order], "weight_decay": 0.1} for order in orders]


MAKERS: dict[str, Any] = {
    "AdamW of parameters()": lambda model: torch.optim.AdamW(model.parameters()),
    "Adam of parameters()": lambda model: torch.optim.Adam(model.parameters()),
    "named_parameters()": lambda model: torch.optim.AdamW(model.named_parameters()),
    "named, in another order": lambda model: torch.optim.AdamW(list(model.named_parameters())[::-1]),
    "named, prefixed": lambda model: torch.optim.AdamW([(f"net.{n}", p) for n, p in model.named_parameters()]),
    "minGPT's groups": lambda model: torch.optim.AdamW(mingpt_groups(model)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_an_optimizer_is_matched_by_names_or_by_order_and_shape(maker: str) -> None:
    model = ours(activation="gelu_erf")
    optimizer = MAKERS[maker](model)
    for _ in range(2):
        model(IDS[:, :-1], IDS[:, 1:])[1].backward()
        optimizer.step()
    found, note = unchanged(model, optimizer.state_dict())
    assert note is None
    assert found is not None
    assert_matched(model, optimizer, found)


def test_a_lecture_models_moments_are_joined_as_its_weights_are() -> None:
    model = lecture()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(IDS).square().mean().backward()
        optimizer.step()
    content = {"model": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    found = foreign.understood(content, where=WHERE)
    assert found.optimizer_state is not None
    assert found.notes == []
    state = dict(zip(found.model_state, found.optimizer_state["state"].values(), strict=True))
    heads = dict(model.named_parameters())
    queries = [optimizer.state[heads[f"blocks.1.sa.heads.{n}.query.weight"]]["exp_avg"] for n in range(3)]
    assert torch.equal(state["h.1.attn.c_attn.weight"]["exp_avg"][:C], torch.cat(queries))
    assert state["h.1.attn.c_attn.weight"]["step"] == 3
    assert state["h.1.attn.c_attn.bias"]["step"] == 0  # its heads have none, so it starts anew


@pytest.mark.parametrize("saved", [None, [], [None], [None, None]], ids=str)
def test_no_optimizer_is_not_an_unusable_one(saved: Any) -> None:
    found = foreign.understood({"model": lecture().state_dict(), "optimizer_states": saved}, where=WHERE)
    assert (found.optimizer_state, found.notes) == (None, [])


def test_an_empty_or_second_optimizer_is_reported() -> None:
    model = lecture()
    empty = torch.optim.AdamW(model.parameters()).state_dict()
    for saved, reason in (([empty], "it is empty"), ([empty, empty], "of 2 optimizers"), ({"a": 1}, "no param_groups")):
        content = {"model": model.state_dict(), "optimizer_states": saved}
        found = foreign.understood(content, where=WHERE)
        assert found.optimizer_state is None
        (note,) = found.notes
        assert reason in note
        assert foreign.understood(content, where=WHERE, optimizer=False).notes == []


# Tokenizers


@pytest.mark.parametrize(
    ("vocab_size", "file", "chars", "expected", "note"),
    [
        (50304, {"token_kind": "gpt2"}, None, {"kind": "gpt2"}, "gpt2 with 50257 tokens, from the file"),
        (3, {"token_kind": "char", "chars": list("abc")}, None, {"kind": "char", "chars": list("abc")}, "3 tokens"),
        (3, {"kind": "char", "chars": list("ab")}, None, {"kind": "char", "chars": list("ab")}, "2 tokens"),
        (256, {"kind": "byte"}, None, {"kind": "byte"}, "byte with 256 tokens"),
        (9, {"kind": "bpe", "tokenizer": {"a": 1}}, None, {"kind": "bpe", "tokenizer": {"a": 1}}, "bpe with"),
        (
            2,
            {"model": {"vocab": {"a": 0, "b": 1}}},
            None,
            {"kind": "bpe", "tokenizer": {"model": {"vocab": {"a": 0, "b": 1}}}},
            "bpe with 2 tokens",
        ),
        (
            2,
            {"vocab_size": 2, "itos": {1: "a", 0: "b"}, "stoi": {"a": 1, "b": 0}},
            list("xy"),
            {"kind": "char", "chars": ["b", "a"]},
            "2 tokens",
        ),
        (50257, None, None, {"kind": "gpt2"}, "GPT-2's own is used, because its vocabulary has 50257 rows"),
        (50304, None, list("ab"), {"kind": "gpt2"}, "because its vocabulary has 50304 rows"),
        (2, None, list("ab"), {"kind": "char", "chars": ["a", "b"]}, "2 different characters of TRAINING_DATA_SOURCE"),
        (3, None, list("ab"), None, "has 3 tokens, nor do the 2 different characters of TRAINING_DATA_SOURCE; put"),
        (77, None, None, None, "no tokenizer that milepost knows has 77 tokens; put its tokenizer.json or meta.pkl"),
    ],
)
def test_which_tokenizer_is_taken_and_why(
    vocab_size: int, file: dict | None, chars: list[str] | None, expected: dict | None, note: str
) -> None:
    found, said = tokenizer_for(vocab_size, file, chars=chars, where=WHERE)
    assert found == expected
    assert said.startswith(WHERE)
    assert note in said


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"token_kind": "gpt2"}, "has 50257 tokens, but the model beside it only 3 rows"),
        ({"kind": "byte"}, "has 256 tokens"),
        ({"token_kind": "char", "chars": list("abcd")}, "has 4 tokens, but the model beside it only 3 rows"),
        ({"model": {"vocab": dict.fromkeys("abcd", 0)}}, "has 4 tokens"),
        ({"token_kind": "char", "chars": ["a", "bc"]}, "'bc' is among its characters"),
        ({"token_kind": "char", "chars": ["a", 1]}, "int is among its characters"),
        ({"token_kind": "char", "chars": ["a", "\ud800"]}, r"'\\ud800' is among"),
        ({"token_kind": "char", "chars": ["a", "a"]}, "a character is there twice"),
        ({"token_kind": "char", "chars": "abc"}, "chars is 'abc', expected a list"),
        ({"token_kind": "char"}, "chars is NoneType"),
        ({"token_kind": "words"}, "is not a tokenizer that milepost knows .kind 'words'."),
        ({"token_kind": ["gpt2"]}, "kind list"),
        ({"model_max_length": 5}, "kind NoneType"),
        ({"itos": {0: "a"}, "stoi": {"a": 0}, "vocab_size": 2}, "vocab_size is 2, but itos has 1"),
        ({"itos": {0: "a"}, "stoi": {"b": 0}, "vocab_size": 1}, "itos and stoi disagree on token 0"),
        ({"itos": {0: "a"}, "stoi": {"a": False}, "vocab_size": 1}, "itos and stoi disagree on token 0"),
        ({"itos": {1: "a"}, "stoi": {"a": 1}, "vocab_size": 1}, "itos and stoi disagree on token 0"),
        ({"itos": {0: "a"}, "stoi": {"a": 0}}, "has no vocab_size, itos and stoi"),
        (["a"], "holds list"),
    ],
)
def test_a_file_that_is_no_tokenizer_for_the_model_is_refused(file: Any, message: str) -> None:
    assert re.search(message, refusal(tokenizer_for, 3, file))


# meta.pkl


def meta(text: str = "\n abc☃𝄞") -> dict[str, Any]:
    chars = sorted(set(text))
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_is_read_in_every_protocol(protocol: int) -> None:
    many = meta("".join(map(chr, range(32, 5000))))
    for values in (meta(), many):
        assert read_meta(pickle.dumps(values, protocol), where=WHERE) == values
    found = tokenizer_for(7, read_meta(pickle.dumps(meta(), protocol), where=WHERE), where=WHERE)[0]
    assert found == {"kind": "char", "chars": list("\n abc☃𝄞")}


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_meta_runs_nothing(tmp_path: Any) -> None:
    path = tmp_path / "touched"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        message = refusal(read_meta, pickle.dumps(meta() | {"extra": Touch(path)}, protocol))
        assert "asks for more than plain values" in message
    assert not path.exists()
    call, arguments = Touch(path).__reduce__()  # what any other unpickler would have done
    call(*arguments)
    assert path.exists()


def persistent() -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return "x" if value == "a" else None

    file = io.BytesIO()
    Pickler(file).dump(meta() | {"extra": "a"})
    return file.getvalue()


def bomb() -> dict[str, Any]:
    doubled: Any = []
    for _ in range(40):
        doubled = [doubled, doubled]
    return meta() | {"extra": doubled}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a meta.pkl of nanoGPT, or damaged"),
        (b"{}", "or damaged"),
        (pickle.dumps(meta())[:-20], "or damaged"),
        (pickle.dumps(meta())[:-1] + b"0.", "or damaged|more than plain"),
        (pickle.dumps(OrderedDict(meta())), "STACK_GLOBAL"),
        (pickle.dumps(torch.Size([1])), "asks for more than plain values"),
        (persistent(), "BINPERSID"),
        (pickle.dumps(meta() | {"extra": (1, 2)}), "TUPLE2"),
        (pickle.dumps(meta() | {"vocab_size": 2**40}), "far more memory than its size"),
        (pickle.dumps(meta() | {"vocab_size": -(10**600)}), "more than plain|far more memory"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "far more memory than its size"),  # a memo cell of number 2**31 - 1
        (b"\x80\x02}r\x00\x00\x00\x70.", "far more memory than its size"),
        (b"\x80\x02]" + b"N0" * 10, "POP"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "or damaged"),  # a string of 2**63 - 1 bytes
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "far more memory|damaged"),
        (b"}]Ns.", "or damaged"),  # a list as a key
        (pickle.dumps([1]), "has no vocab_size, itos and stoi"),
        (pickle.dumps(5), "has no vocab_size"),
        (pickle.dumps(meta() | {"vocab_size": 3}), "vocab_size is 3, but itos has 7 and stoi 7"),
        (pickle.dumps(meta() | {"vocab_size": True}), "has no vocab_size"),
        (pickle.dumps(meta() | {"itos": meta("1234567")["itos"]}), "disagree on token 0"),
        (b"\x80" * (4 * 2**20 + 1), "is larger than 4194304 bytes"),
        (b"N" * 2_000_001 + b".", "far more memory than its size"),
    ],
)
def test_meta_that_is_not_nanogpts_is_refused(data: bytes, message: str) -> None:
    assert re.search(message, refusal(read_meta, data))


def test_meta_with_more_than_it_needs_is_read_without_it() -> None:
    assert read_meta(pickle.dumps(bomb()), where=WHERE) == meta()
