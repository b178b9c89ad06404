"""MODEL_TYPE=llama through everything that a run lives through. Its logits are compared with transformers' own in
tests/exchange/test_llama_transformers.py.
"""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import command, newest, tensor_bytes, train
from script import call, script
from test_extending_models import COMMON, kill, lines_of

import models
from milepost import ckpt, config
from milepost.config import ConfigError
from models.llama import Llama, LlamaSettings, RotaryScaling, frequencies, rotated, rotation

SMALL: dict[str, Any] = {"vocab_size": 17, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
VARIABLES = COMMON | {"MODEL_TYPE": "llama", "N_KV_HEAD": "2"}


def small(**changes: Any) -> Llama:
    torch.manual_seed(3)
    return Llama(LlamaSettings(**SMALL | changes)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The model.


def test_what_is_not_given_follows_from_the_rest() -> None:
    settings = LlamaSettings(**SMALL)
    assert (settings.n_kv_head, settings.head_size, settings.n_inner) == (4, 8, 96)
    wide = LlamaSettings(**SMALL | {"n_embd": 128})
    assert 3 * 128 * wide.n_inner == pytest.approx(2 * 128 * 4 * 128, rel=0.05)  # GPT-2's MLP has as many parameters


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_head": 3}, "n_embd=32 and n_head=3"),
        ({"n_kv_head": 3}, "n_head=4 and n_kv_head=3"),
        ({"n_embd": 12}, "the size of a head must be even, and it is 3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
    ],
)
def test_sizes_that_make_no_model_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LlamaSettings(**SMALL | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"kind": "yarn"}, "yarn"), ({"factor": 0.5}, "factor=0.5"), ({"low_factor": 5.0}, "low_factor")],
)
def test_a_scaling_that_is_not_computed_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RotaryScaling(**{"kind": "llama3", "factor": 8.0, **changes})


def test_rotation_depends_on_the_distance_of_two_positions_alone() -> None:
    """Su et al. 2021, equation 16: the product of a query at m and a key at n depends on m - n."""
    settings, device = LlamaSettings(**SMALL), torch.device("cpu")
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def product(m: int, n: int) -> float:
        at = [tuple(part.double() for part in rotation(settings, place, 1, device)) for place in (m, n)]
        return float((rotated(q, *at[0]) * rotated(k, *at[1])).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), rel=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-2)
    assert frequencies(settings)[0] == 1.0


def test_llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    plain = LlamaSettings(**SMALL | {"n_embd": 256, "n_head": 1})
    scaled = LlamaSettings(
        **SMALL | {"n_embd": 256, "n_head": 1}, rope_scaling=RotaryScaling("llama3", 8.0, original_length=512)
    )
    before, after = frequencies(plain), frequencies(scaled)
    wavelengths = 2 * math.pi / before
    assert torch.equal(after[wavelengths < 512 / 4], before[wavelengths < 512 / 4])
    assert torch.allclose(after[wavelengths > 512], before[wavelengths > 512] / 8)
    assert (after <= before).all()
    assert (after >= before / 8).all()


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}, {"qk_norm": True, "qkv_bias": True}, {"tied": False}])
def test_with_a_cache_the_logits_are_those_without(changes: dict[str, Any]) -> None:
    model, ids = small(**changes), torch.randint(17, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, cache = model(ids).logits, model.new_cache(2)
        parts = [model(part, cache=cache).logits for part in ids.split([5, 1, 1, 4, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5)
    assert (cache.length, cache.keys[0].shape) == (16, (2, changes.get("n_kv_head", 4), 16, 8))
    with pytest.raises(ValueError, match="1 tokens after 16 in the cache"):
        model(ids[:, :1], cache=cache)


def test_a_token_reads_nothing_after_it() -> None:
    model, ids = small(), torch.randint(17, (1, 16), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 17
    with torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :10], two[:, :10])
    assert not torch.equal(one[:, 10], two[:, 10])


def test_a_head_of_keys_serves_the_heads_of_queries_that_it_replaces() -> None:
    """A model with shared keys equals one with its keys repeated for each head (Ainslie et al. 2023, section 2.2)."""
    grouped, whole = small(n_kv_head=2), small()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    whole.load_state_dict(state)
    ids = torch.randint(17, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(grouped(ids).logits, whole(ids).logits, rtol=0, atol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    matrices = small().muon_matrices()
    assert len(matrices) == 2 * 7
    assert set(matrices.values()) == {1}
    assert not any("norm" in name or "embed" in name for name in matrices)


# ---------------------------------------------------------------------------------------------------------------------
# A run.


@pytest.mark.parametrize(
    "changes", [{}, {"DROPOUT": "0.2", "OPTIMIZER": "muon", "DTYPE": "bfloat16"}, {"OPTIMIZER": "adamw"}]
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(changes: dict[str, str], tmp_path: Path) -> None:
    settings = VARIABLES | changes
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    for each in (straight, folder):
        each.mkdir()
    code, said = train(straight, **settings)
    assert code == 0, said
    kill("toy_metric", folder, **settings)
    code, said = train(folder, RESUME="auto", **settings)
    assert (code, "not bit-exact" in said) == (0, False), said
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))
    without = [{k: v for k, v in line.items() if not k.startswith("grad_norm_")} for line in lines_of(folder)]
    assert without == lines_of(straight)


@pytest.mark.parametrize("layout", ["unified", "separated", "directory", "stepfiles", "consolidated", "huggingface"])
def test_every_layout_holds_it(layout: str, tmp_path: Path) -> None:
    code, said = train(tmp_path, CHECKPOINT_LAYOUT=layout, **VARIABLES)
    assert code == 0, said
    record = newest(tmp_path)
    assert (record.layout, record.model_type, record.model_settings["n_kv_head"]) == (layout, "llama", 2)
    assert ckpt.verify(record.path) == []
    text = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=record.path, SAMPLE_SEED="1", MAX_NEW_TOKENS="20")
    assert (text.code, len(text.out) >= 20) == (0, True), text.err


def test_adapters_train_alone_on_it_and_merge(tmp_path: Path) -> None:
    assert train(tmp_path, **VARIABLES)[0] == 0
    base = newest(tmp_path)
    folder = tmp_path / "adapted"
    folder.mkdir()
    own = dict.fromkeys(("MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"))  # not set: the base brings them
    code, said = train(folder, INIT_FROM=str(base.path), LORA_RANK="2", LORA_TARGETS="q_proj,down_proj", **COMMON | own)
    assert code == 0, said
    adapted = newest(folder)
    added = {name for name in adapted.model_state if "lora" in name}
    assert added == {
        f"layers.{block}.{layer}.lora_{part}"
        for block in range(base.model_settings["n_layer"])
        for layer in ("self_attn.q_proj", "mlp.down_proj")
        for part in "AB"
    }
    for name, tensor in base.model_state.items():
        assert torch.equal(adapted.model_state[name], tensor)
    all_layers = tmp_path / "all"
    all_layers.mkdir()
    assert train(all_layers, INIT_FROM=str(base.path), LORA_RANK="2", **COMMON | own)[0] == 0
    assert sum("lora_A" in name for name in newest(all_layers).model_state) == 7 * base.model_settings["n_layer"]
    merged = call(script("merge_adapters"), folder, CHECKPOINT_PATH=adapted.path, OUTPUT=folder / "merged")
    assert merged.code == 0, merged.err


def test_layers_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config.read({"MODEL_TYPE": "llama", "LORA_RANK": "2", "LORA_TARGETS": "c_attn", "INIT_FROM": str(tmp_path)})
    assert any("LORA_TARGETS=c_attn" in problem and "q_proj" in problem for problem in error.value.problems)
    with pytest.raises(ValueError, match="'c_fc' is not one of q_proj"):
        models.build("llama", SMALL | {"lora": {"rank": 2, "alpha": 4.0, "targets": "c_fc"}})


def test_settings_of_it_have_no_effect_on_another_model() -> None:
    settings = config.read({"MODEL_TYPE": "gpt2", "N_KV_HEAD": "2", "N_INNER": "64"}, reads=["Model"])
    (said,) = config.no_effect(settings, "training.py")
    assert ("N_KV_HEAD=2" in said, "N_INNER=64" in said, "needs MODEL_TYPE=llama" in said) == (True, True, True)


def test_heads_that_do_not_divide_are_refused_before_training(tmp_path: Path) -> None:
    done = command("training.py", tmp_path, MODEL_TYPE="llama", N_HEAD="4", N_EMBD="32", N_KV_HEAD="3")
    assert done.returncode == 2
    assert "N_KV_HEAD=3 (environment) must divide N_HEAD=4 (environment): set N_KV_HEAD=2, or none" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_signal_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    learn = training.training_step

    def step(run: Any, lr: float) -> Any:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(run, lr)

    monkeypatch.setattr(training, "training_step", step)
    assert train(tmp_path, **VARIABLES | {"CHECKPOINT_INTERVAL": "100"})[0] == 130
    assert newest(tmp_path).step in (3, 4)


# (V, n_layer, n_head, n_embd, block_size, batch size), bytes per value, peak MB of a step with AdamW on a CPU, less the
# process before it
MEASURED = [
    ((74, 6, 6, 384, 256, 32), 2, 2104),
    ((74, 6, 6, 384, 256, 32), 4, 3161),
    ((32000, 4, 8, 512, 512, 4), 2, 1505),
]


@pytest.mark.parametrize(("sizes", "bytes_per_value", "peak"), MEASURED)
def test_training_memory_is_within_1_5x_of_the_measured(
    sizes: tuple[int, ...], bytes_per_value: int, peak: int
) -> None:
    fields = dict(zip(("vocab_size", "n_layer", "n_head", "n_embd", "block_size"), sizes, strict=False))
    with torch.device("meta"):
        model = models.build("llama", fields)
    estimate = models.training_bytes(model, sizes[-1], bytes_per_value=bytes_per_value) / 1e6
    assert 1 / 1.5 < estimate / peak < 1.5
