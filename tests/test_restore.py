"""Restore model, tokenizer and optimizer from a checkpoint: matching state is restored, the rest is reported."""

import copy
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from records import WEIGHT, record
from work import NoTensorAbove, calls

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.restore import build_model, build_tokenizer, moment_bytes, restore_optimizer
from milepost.runtime.optim import build_optimizer
from milepost.text import tokenization
from models.model import Model

CPU = torch.device("cpu")
SETTINGS = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0, "bias": True}


def trained(kind: str = "adamw", *, steps: int = 2) -> tuple[Model, torch.optim.Optimizer]:
    """A tiny GPT-2 after a few steps, so that all moments differ."""
    torch.manual_seed(3)
    model = models.build("gpt2", SETTINGS)
    optimizer = optimizer_of(model, kind)
    for _ in range(steps):
        model(tokens(), tokens())[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def optimizer_of(model: Model, kind: str = "adamw", **changes: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, kind, **({"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)} | changes))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_bytes_of_moments_are_known_before_the_first_step(kind):
    model, optimizer = trained(kind)
    kept = [value for kinds in optimizer.state_dict()["state"].values() for value in kinds.values() if value.dim()]
    assert moment_bytes(optimizer_of(model, kind)) == sum(value.nbytes for value in kept)


def tokens(length: int = 16) -> torch.Tensor:
    return torch.arange(2 * length).reshape(2, length) * 7 % 11  # (B, T)


@functools.cache
def trained_states(kind: str) -> dict[str, Any]:
    model, optimizer = trained(kind)
    return {"model_state": dict(model.state_dict()), "optimizer_state": optimizer.state_dict()}


def gpt2_record(kind: str = "adamw", **changes: Any) -> Checkpoint:
    """Return the record of a tiny trained GPT-2; each call creates new tensors."""
    fields = copy.deepcopy(trained_states(kind)) | {"step": 2}
    fields |= {"model_type": "gpt2", "model_settings": dict(SETTINGS), "tokenizer": None}
    return record(**(fields | changes))


OPENED = """
import sys
import torch
from records import record
import models
from milepost.ckpt.restore import build_model

settings = {settings}
state = models.build("gpt2", settings).state_dict()
one = record(model_type="gpt2", model_settings=settings, model_state=state, tokenizer=None)
model = build_model(one, device=torch.device("cpu"), shared=True)
assert torch.equal(model.wte.weight, state["wte.weight"])
print("torch._dynamo" in sys.modules)
"""


def test_building_a_model_does_not_import_torchs_compiler() -> None:
    """It would take a second, most of the start-up of a script that generates a line of text."""
    tests = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n" + OPENED.format(settings=SETTINGS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def refused(one: Checkpoint, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_model(one, device=CPU, **options)
    assert caught.value.kind in ("damaged", "lacking", "refused")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_the_model_has_the_records_weights_and_settings():
    one = gpt2_record()
    model = build_model(one, device=CPU)
    expected, _ = trained()
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == {
        name: tensor.numpy().tobytes() for name, tensor in expected.state_dict().items()
    }
    assert model.settings == expected.settings
    assert {parameter.device for parameter in model.parameters()} == {CPU}
    with torch.no_grad():
        assert model(tokens())[0].equal(expected(tokens())[0])


def test_building_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_model(record(), device=CPU)
    assert torch.get_rng_state().equal(before)


def test_the_model_owns_its_weights(tmp_path):
    """The record is mapped from the file; training must neither write there nor need the file."""
    path = ckpt.save(gpt2_record(), tmp_path)
    read = ckpt.load(path)
    model = build_model(read, device=CPU)
    with torch.no_grad():
        model.get_parameter("wte.weight").fill_(7)
    assert read.model_state["wte.weight"].equal(gpt2_record().model_state["wte.weight"])
    assert model.get_parameter("wte.weight").data_ptr() != read.model_state["wte.weight"].data_ptr()


def test_a_smaller_block_size_keeps_the_first_positions():
    one = gpt2_record()
    model = build_model(one, device=CPU, block_size=6)
    assert model.settings.block_size == 6
    assert model.state_dict()["wpe.weight"].equal(one.model_state["wpe.weight"][:6])
    with torch.no_grad():
        whole = build_model(one, device=CPU)(tokens(6))[0]
        torch.testing.assert_close(model(tokens(6))[0], whole)
    assert one.model_settings["block_size"] == 16
    assert build_model(record(), device=CPU, block_size=2).settings.block_size == 2  # a bigram has none to crop


def test_a_larger_block_size_is_refused():
    assert "BLOCK_SIZE=17 is more than its 16 positions: set BLOCK_SIZE=16 or less" in refused(
        gpt2_record(), block_size=17
    )


def test_dropout_is_set_by_the_caller():
    assert build_model(gpt2_record(), device=CPU, changes={"dropout": 0.5}).settings.dropout == 0.5
    assert build_model(gpt2_record(), device=CPU).settings.dropout == 0.0
    build_model(record(), device=CPU, changes={"dropout": 0.5})  # a bigram has no such setting


def changed(state: dict[str, torch.Tensor], **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return `state` with some tensors replaced, or removed for None; `__` stands for a dot."""
    replaced = state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in replaced.items() if tensor is not None}


SHAPES = [
    ({"wpe__weight": None}, "wpe.weight (16, 8) is missing"),
    ({"h__7__ln_1__weight": torch.ones(8)}, "h.7.ln_1.weight (8,) is not expected"),
    ({"wte__weight": torch.ones(12, 8)}, "wte.weight is (12, 8), expected (11, 8)"),
    ({"ln_f__bias": torch.ones(())}, "ln_f.bias is (), expected (8,)"),
    ({"wpe__weight": torch.ones(())}, "wpe.weight is (), expected "),
]


@pytest.mark.parametrize(("tensors", "reason"), SHAPES, ids=[reason for _, reason in SHAPES])
@pytest.mark.parametrize("block_size", [None, 4], ids=["whole", "cropped"])
def test_weights_that_do_not_fit_are_named_with_their_shapes(tensors, reason, block_size):
    one = gpt2_record()
    one.model_state = changed(one.model_state, **tensors)
    text = refused(one, block_size=block_size)
    assert reason in text or (block_size and reason.replace("16", "4") in text)
    assert "its weights do not fit its settings" in text


def test_all_problems_are_listed_up_to_ten():
    one = gpt2_record()
    one.model_state = {"one": torch.ones(2), "two": torch.ones(2)}
    text = refused(one)
    assert text.count(" is missing") == 10
    assert "and 20 more: take an earlier checkpoint" in text


SETTINGS_REFUSED = [
    ({"n_layer": 10**9}, "n_layer is 1000000000, but it holds only 28 tensors"),
    ({"n_layer": 29}, "n_layer is 29, but it holds only 28 tensors"),
    ({"n_layer": 0}, "n_layer=0"),
    ({"n_layer": -1}, "n_layer=-1"),
    ({"n_layer": "2"}, "n_layer='2'"),
    ({"n_layer": True}, "n_layer=True"),
    ({"n_embd": 2**62}, "its settings do not build a model"),
    ({"n_embd": 10**30}, "its settings do not build a model"),
    ({"vocab_size": 10**12}, "wte.weight is (11, 8), expected (1000000000000, 8)"),
    ({"n_head": 3}, "n_embd=8 and n_head=3"),
    ({"n_head": 10**12}, "n_head=1000000000000"),
    ({"dropout": float("inf")}, "dropout=inf"),
    ({"dropout": "0"}, "dropout='0'"),
    ({"bias": 1}, "bias=1"),
    ({"bias": False}, "h.0.attn.c_attn.bias (24,) is not expected"),
    ({"rotary": True}, "rotary=True"),
]


@pytest.mark.parametrize(("changes", "reason"), SETTINGS_REFUSED, ids=[str(changes) for changes, _ in SETTINGS_REFUSED])
def test_settings_of_another_model_are_refused_before_it_is_built(changes, reason):
    """Without more work than building a valid model, and without memory for the weights."""
    good = gpt2_record(model_settings=SETTINGS)
    build_model(good, device=CPU)  # imports what it needs
    _, built = calls(lambda: build_model(good, device=CPU))
    one = gpt2_record(model_settings=SETTINGS | changes)
    with NoTensorAbove(2**20):
        said, _ = calls(lambda: refused(one), most=built)
    assert reason in said


def test_a_model_of_an_unknown_kind_or_of_too_few_settings_is_refused():
    assert "model_type='mamba': expected one of bigram, gpt2, llama" in refused(gpt2_record(model_type="mamba"))
    assert "n_embd" in refused(
        gpt2_record(model_settings={name: size for name, size in SETTINGS.items() if name != "n_embd"})
    )


def test_a_bigram_with_a_window_longer_than_its_table_is_built():
    """3 x 3 weights and a block of 64: no size of the settings is bounded by the number of weights."""
    one = record(size=3, model_settings={"vocab_size": 3, "block_size": 64})
    assert build_model(one, device=CPU).state_dict()[WEIGHT].equal(one.model_state[WEIGHT])


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_every_tokenizer_is_restored_from_a_file(kind, tmp_path):
    text = "Dear Wren, what now? — 東京\n" * 9
    written = tokenization.build(kind, [(text, True)], alphabet="".join(sorted(set(text))), documents=1, vocab_size=280)
    rows = {"vocab_size": written.vocab_size, "block_size": 4}
    path = ckpt.save(record(tokenizer=written.to_dict(), model_settings=rows), tmp_path)
    read = build_tokenizer(ckpt.load(path))
    assert (read.kind, read.vocab_size, read.digest) == (kind, written.vocab_size, written.digest)
    assert read.encode(text) == written.encode(text)


def char(*characters: str) -> dict[str, Any]:
    return {"kind": "char", "chars": list(characters)}


TOKENIZERS = [
    (None, "carries no tokenizer"),
    (char(*"abcdefghi"), "its tokenizer has 9 tokens, but its model only 8 rows"),
    ({"kind": "gpt2"}, "its tokenizer has 50257 tokens, but its model only 8 rows"),
    (char("a", "a"), "must be distinct"),
    (char("ab"), "single characters"),
    (char("\ud800"), "surrogates"),
    ({"kind": "char", "chars": "abc"}, "single characters"),
    ({"kind": "char", "chars": [1, 2]}, "single characters"),
    ({"kind": "word"}, "unknown tokenizer kind 'word'"),
    ({}, "unknown tokenizer kind"),
    ({"kind": "bpe"}, "cannot be rebuilt"),
    ({"kind": "bpe", "tokenizer": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}}, "cannot be rebuilt"),
]


@pytest.mark.parametrize(("tokenizer", "reason"), TOKENIZERS, ids=[str(one)[:40] for one, _ in TOKENIZERS])
def test_an_invalid_tokenizer_is_refused(tokenizer, reason):
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(record(tokenizer=tokenizer))
    assert caught.value.kind == ("lacking" if tokenizer is None else "damaged")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_programs_tokenizer_that_is_not_read_is_not_called_damaged():
    theirs = record(tokenizer={"kind": "bpe", "tokenizer": {"model": {"type": "Unigram"}}})
    theirs.written_by = "another program (transformers)"
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(theirs)
    assert (caught.value.kind, "docs/models.md" in caught.value.remedy) == ("not understood", True)


def test_fewer_tokens_than_rows_are_accepted():
    assert build_tokenizer(record(tokenizer=char(*"abc"))).vocab_size == 3


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[Any, bytes]:
    state = optimizer.state_dict()["state"]
    return {(index, kind): value.numpy().tobytes() for index, each in state.items() for kind, value in each.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_moment_is_restored_and_the_next_step_is_identical(kind, tmp_path):
    expected, stepped = trained(kind)
    read = ckpt.load(ckpt.save(gpt2_record(kind), tmp_path))
    model = build_model(read, device=CPU)
    optimizer = optimizer_of(model, kind)
    restored = restore_optimizer(optimizer, read)
    assert (restored.restored, restored.total, restored.missing) == (28, 28, ())
    assert state_bytes(optimizer) == state_bytes(stepped)
    for each, by in ((model, optimizer), (expected, stepped)):
        each(tokens(), tokens())[1].backward()
        by.step()
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == {
        name: tensor.numpy().tobytes() for name, tensor in expected.state_dict().items()
    }


def test_the_file_is_not_written_through_the_optimizer(tmp_path):
    path = ckpt.save(gpt2_record(), tmp_path)
    read = ckpt.load(path)
    model = build_model(read, device=CPU)
    optimizer = optimizer_of(model)
    restore_optimizer(optimizer, read)
    model(tokens(), tokens())[1].backward()
    optimizer.step()
    assert read.optimizer_state["state"][0]["step"] == 2
    assert ckpt.load(path, verify=True).optimizer_state["state"][0]["step"] == 2


def test_optimizer_state_is_matched_by_name_and_not_by_position():
    one = gpt2_record()
    for group in one.optimizer_state["param_groups"]:
        group["params"], group["param_names"] = group["params"][::-1], group["param_names"][::-1]
    model, stepped = trained()
    optimizer = optimizer_of(model)
    assert restore_optimizer(optimizer, one).missing == ()
    assert state_bytes(optimizer) == state_bytes(stepped)


def test_learning_rate_decay_and_betas_stay_the_callers():
    model, _ = trained()
    optimizer = optimizer_of(model, lr=0.5, weight_decay=0.25, betas=(0.5, 0.75))
    restore_optimizer(optimizer, gpt2_record())
    groups = [(group["lr"], group["weight_decay"], group["betas"], group["fused"]) for group in optimizer.param_groups]
    assert groups == [(0.5, 0.25, (0.5, 0.75), True), (0.5, 0.0, (0.5, 0.75), True)]


NAMES = ["wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"]  # AdamW's first group begins so
MISFITS = {
    "another shape": {"exp_avg": torch.ones(3, 3)},
    "a scalar for a matrix": {"exp_avg_sq": torch.tensor(1.0)},
    "a matrix for the counter": {"step": torch.ones(2, 2)},
    "no tensor": {"exp_avg": "moments"},
    "a sparse tensor": {"exp_avg": torch.zeros(11, 8).to_sparse()},
    "a tensor without data": {"exp_avg": torch.zeros(11, 8, device="meta")},
    "one moment missing": {"exp_avg_sq": None},
    "one moment too many": {"max_exp_avg_sq": torch.zeros(11, 8)},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_moments_that_do_not_fit_are_missing_and_the_others_are_restored(misfit):
    """torch's own load_state_dict accepts most of these silently."""
    one = gpt2_record()
    state = one.optimizer_state["state"]
    state[0] = {kind: value for kind, value in (state[0] | MISFITS[misfit]).items() if value is not None}
    model, stepped = trained()
    optimizer = optimizer_of(model)
    restored = restore_optimizer(optimizer, one)
    assert (restored.restored, restored.total, restored.missing) == (27, 28, ("wte.weight",))
    expected = {key: value for key, value in state_bytes(stepped).items() if key[0] != 0}
    assert state_bytes(optimizer) == expected
    model(tokens(), tokens())[1].backward()
    optimizer.step()  # the parameter without moments begins anew
    assert optimizer.state_dict()["state"][0]["step"] == 1
    assert optimizer.state_dict()["state"][1]["step"] == 3


def test_missing_parameters_are_named():
    one = gpt2_record()
    one.optimizer_state["param_groups"][0]["param_names"][:2] = ["renamed", "gone"]
    del one.optimizer_state["state"][2]
    model, _ = trained()
    restored = restore_optimizer(optimizer_of(model), one)
    assert (restored.restored, restored.missing) == (25, tuple(NAMES))


def test_without_an_optimizer_state_all_are_missing():
    model, _ = trained()
    optimizer = optimizer_of(model)
    restored = restore_optimizer(optimizer, gpt2_record(optimizer_state=None))
    assert (restored.restored, restored.total, len(restored.missing)) == (0, 28, 28)
    assert state_bytes(optimizer) == {}


@pytest.mark.parametrize(("saved", "asked", "shared"), [("adamw", "muon", 20), ("muon", "adamw", 20)])
def test_moments_of_another_optimizer_are_missing_and_training_continues(saved, asked, shared):
    """Muon has the 8 matrices of the layers, AdamW the rest; parameters that AdamW has in both are restored."""
    model, _ = trained()
    optimizer = optimizer_of(model, asked)
    restored = restore_optimizer(optimizer, gpt2_record(saved))
    assert (restored.restored, restored.total) == (shared, 28)
    assert all(name.startswith("h.") and name.endswith("weight") for name in restored.missing)
    model(tokens(), tokens())[1].backward()
    optimizer.step()


@pytest.mark.parametrize(
    "state",
    [
        "state",
        {"state": {}},
        {"param_groups": [{"params": [0], "param_names": ["a"]}]},
        {"state": {}, "param_groups": 3},
        {"state": {}, "param_groups": [3]},
        {"state": {0: {}}, "param_groups": [{"params": [0]}]},
        {"state": {0: {}}, "param_groups": [{"params": [0], "param_names": []}]},
        {"state": {0: {}}, "param_groups": [{"params": [0], "param_names": [[]]}]},
        {"state": [5], "param_groups": [{"params": [5], "param_names": ["a"]}]},
        {"state": {0: {}}, "param_groups": [{"params": [{}], "param_names": ["a"]}]},
    ],
    ids=str,
)
def test_an_optimizer_state_of_another_form_is_refused(state):
    model, _ = trained()
    with pytest.raises(CheckpointError, match="its optimizer state is not in torch's form with param_names"):
        restore_optimizer(optimizer_of(model), gpt2_record(optimizer_state=state))
