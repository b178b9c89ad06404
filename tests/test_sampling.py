"""Sampling against transformers' own processors, and generate()'s promises: cached equals uncached, no side effects."""

from collections import Counter
from itertools import islice
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from milepost.generation.sampling import draw, generate, keep_top_k, keep_top_p, next_token, penalize
from models.bigram import Bigram, BigramSettings
from models.gpt2 import GPT2, GPT2Cache, GPT2Settings
from models.model import Model

VOCAB, BLOCK = 61, 16
Net = TypeVar("Net", bound=Model)


def lively(model: Net) -> Net:
    """The model with weights large enough that its next token depends on its whole context, far beyond rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 0.5 if name.startswith("h.") else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_gpt2(*, vocab_size: int = VOCAB, block_size: int = BLOCK) -> GPT2:
    return lively(GPT2(GPT2Settings(vocab_size, block_size, n_layer=2, n_head=2, n_embd=16, dropout=0.3)))


SMALL = make_gpt2()
BIGRAM = lively(Bigram(BigramSettings(VOCAB, BLOCK)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(seed: int, size: int = 200) -> torch.Tensor:
    return torch.randn(size, generator=seeded(seed)) * 3


# --- one row of logits


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_penalty_equals_transformers(penalty: float) -> None:
    logits, ids = spread(1), [3, 5, 3, 199, 0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None])[0]
    assert torch.equal(penalize(logits, set(ids), penalty), expected)


@pytest.mark.parametrize("k", [1, 2, 50, 199, 200, 500])
def test_top_k_equals_transformers(k: int) -> None:
    logits = spread(2)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits[None])[0])


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_top_p_equals_transformers(p: float, seed: int) -> None:
    logits = spread(seed)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits[None])[0])


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.floats(1e-9, 1, exclude_max=True))
def test_top_p_keeps_the_smallest_sufficient_set(values: list[float], p: float) -> None:
    logits = torch.tensor(values)
    kept = keep_top_p(logits, p).isfinite()
    probs = logits.double().softmax(-1)
    assert kept[logits.argmax()]
    assert probs[kept].sum() >= p - 1e-5
    assert probs[kept].sum() - probs[kept].min() <= p + 1e-5  # one fewer would not do
    assert not kept.all() or logits.numel() == 1 or probs.sum() - probs.min() <= p + 1e-5


def test_top_p_at_an_exact_boundary_keeps_no_token_more() -> None:
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    assert keep_top_p(logits, 0.75).isfinite().tolist() == [False, True, False, True]
    assert keep_top_p(logits, 0.76).isfinite().tolist() == [True, True, False, True]  # of equals the first
    assert keep_top_p(logits, 1.0) is logits


@pytest.mark.parametrize(
    "setting", [{"top_p": 1e-50}, {"top_p": 5e-324}, {"repetition_penalty": 1e-50}, {"repetition_penalty": 1e300}]
)
@pytest.mark.parametrize("temperature", [2e-6, 1.0])
def test_settings_beyond_float32_are_not_blamed_on_the_weights(setting: dict[str, float], temperature: float) -> None:
    tokens = list(generate(SMALL, [1, 2], max_new_tokens=8, temperature=temperature, generator=seeded(3), **setting))
    assert len(tokens) == 8
    assert all(0 <= token < SMALL.settings.vocab_size for token in tokens)


def test_a_penalty_hides_no_logit_that_is_not_finite() -> None:
    """The control: diverged weights are still reported."""
    assert penalize(torch.tensor([torch.inf, 1.0]), [0, 1], 0.5)[0] == torch.inf
    assert penalize(torch.tensor([torch.nan, 1.0]), [0, 1], 2.0)[0].isnan()


def test_top_k_zero_and_penalty_one_change_nothing() -> None:
    logits = spread(3)
    assert keep_top_k(logits, 0) is logits
    assert penalize(logits, {1, 2}, 1.0) is logits


def test_draws_follow_the_probabilities() -> None:
    probs, generator, n = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]), seeded(4), 20_000
    counts = Counter(draw(probs, generator) for _ in range(n))
    assert set(counts) == {1, 3, 4}  # a token without probability is never drawn
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probs.tolist()) if p)
    assert chi_square < 13.8  # 2 degrees of freedom: exceeded once in a thousand


def test_draw_is_where_the_uniform_number_falls() -> None:
    probs, uniforms = spread(5).softmax(-1), torch.rand(100, dtype=torch.float64, generator=seeded(6))
    generator = seeded(6)
    sums, expected = probs.double().cumsum(0).tolist(), []
    for u in uniforms.tolist():
        expected.append(next(i for i, s in enumerate(sums) if s > u * sums[-1]))
    assert [draw(probs, generator) for _ in range(100)] == expected


def test_a_uniform_number_of_zero_draws_the_first_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, generator: torch.zeros((), dtype=dtype))
    assert draw(torch.tensor([0.0, 0.0, 0.4, 0.6]), seeded(0)) == 2


def pick(logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> int:
    return next_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=seeded(seed))


def test_temperature_zero_is_the_best_token_and_draws_nothing() -> None:
    logits, generator = spread(7), seeded(0)
    before = generator.get_state()
    assert next_token(logits, temperature=0, top_k=0, top_p=1.0, generator=generator) == logits.argmax()
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-7, 1e-6, 1e-3])
def test_tiny_temperatures_are_greedy_and_finite(temperature: float) -> None:
    logits = spread(8) * 30
    assert pick(logits, temperature=temperature, top_p=0.9) == logits.argmax()


def test_temperature_scales_before_top_p_as_in_transformers() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    # Probabilities at temperature 0.5 are 0.865, 0.117, 0.016, 0.002, at temperature 1 0.644, 0.237, 0.087, 0.032.
    assert {pick(logits, temperature=0.5, top_p=0.95, seed=s) for s in range(400)} == {0, 1}
    assert {pick(logits, temperature=1.0, top_p=0.95, seed=s) for s in range(400)} == {0, 1, 2}


def test_half_precision_logits_draw_as_their_float32_values() -> None:
    logits = spread(9).bfloat16()
    drawn = [pick(logits, temperature=0.7, seed=s) for s in range(500)]
    assert drawn == [pick(logits.float(), temperature=0.7, seed=s) for s in range(500)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = spread(10)
    logits[17] = bad
    with pytest.raises(ValueError, match=f"best logit is {bad}: "):
        pick(logits, temperature=temperature)


# --- generate()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3 * BLOCK),
    length=st.integers(0, 5 * BLOCK),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 9),
)
def test_cached_and_uncached_tokens_are_equal(
    prompt: list[int], length: int, temperature: float, penalty: float, seed: int
) -> None:
    def tokens(use_cache: bool) -> list[int]:
        drawn = generate(
            SMALL,
            prompt,
            max_new_tokens=length,
            temperature=temperature,
            top_p=0.95,
            repetition_penalty=penalty,
            generator=seeded(seed),
            use_cache=use_cache,
        )
        return list(drawn)

    cached = tokens(use_cache=True)
    assert len(cached) == length
    assert cached == tokens(use_cache=False)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_tiny_contexts_slide_too(block_size: int) -> None:
    model = make_gpt2(block_size=block_size)
    cached, plain = (
        list(generate(model, [5, 6, 7, 8], max_new_tokens=30, generator=seeded(1), use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert len(cached) == 30
    assert cached == plain


def test_a_cache_that_forgets_its_first_token_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = list(generate(SMALL, [1, 2, 3], max_new_tokens=40, temperature=0, use_cache=False))
    append = GPT2Cache.append

    def forgetful(cache: GPT2Cache, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = append(cache, layer, k, v)
        values[:, :, 0] = 0
        return keys, values

    monkeypatch.setattr(GPT2Cache, "append", forgetful)
    assert list(generate(SMALL, [1, 2, 3], max_new_tokens=40, temperature=0)) != plain


def windows_seen(ids: list[int], *, max_new_tokens: int) -> list[list[int]]:
    """The inputs that forward() gets while generating without a cache."""
    seen: list[list[int]] = []
    hook = SMALL.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    list(generate(SMALL, ids, max_new_tokens=max_new_tokens, temperature=0, use_cache=False))
    hook.remove()
    return seen


def test_the_window_grows_to_the_context_then_is_halved() -> None:
    windows = windows_seen([1, 2, 3], max_new_tokens=40)
    assert [len(w) for w in windows] == [*range(3, 17), *range(8, 17), *range(8, 17), *range(8, 16)]
    assert windows[14][:-1] == windows[13][-7:]  # the newest tokens stay


@pytest.mark.parametrize(("length", "first"), [(15, 15), (16, 16), (17, 8), (50, 8)])
def test_a_prompt_that_is_too_long_is_cut_to_the_same_window(length: int, first: int) -> None:
    prompt = [i % VOCAB for i in range(length)]
    assert windows_seen(prompt, max_new_tokens=1) == [prompt[-first:]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_sliding_is_reported_once_and_only_where_it_happens(use_cache: bool) -> None:
    def slides(model: Model, prompt: int, new: int) -> int:
        told: list[int] = []
        for _ in generate(
            model, [1] * prompt, max_new_tokens=new, use_cache=use_cache, on_slide=lambda: told.append(1)
        ):
            pass
        return len(told)

    assert slides(SMALL, prompt=3, new=14) == 0  # the 14th is drawn from the full window of 16
    assert slides(SMALL, prompt=3, new=15) == 1
    assert slides(SMALL, prompt=3, new=90) == 1
    assert slides(SMALL, prompt=17, new=1) == 1
    assert slides(BIGRAM, prompt=40, new=40) == 0  # it never looks further back than one token


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers_generate(penalty: float) -> None:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=VOCAB, n_positions=BLOCK, n_layer=2, n_head=2, n_embd=16, bos_token_id=0)
    theirs: Any = GPT2LMHeadModel(config).eval()
    state = {f"transformer.{name}": t for name, t in SMALL.state_dict().items()}
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: t.t() if name.endswith(linear) else t for name, t in state.items()}
    theirs.load_state_dict(state | {"lm_head.weight": SMALL.wte.weight})
    prompt = torch.tensor([[7, 30, 2]])
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=13,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=penalty,
    )[0, 3:].tolist()
    assert len(set(expected)) > 4
    tokens = generate(SMALL, [7, 30, 2], max_new_tokens=13, temperature=0, repetition_penalty=penalty)
    assert list(tokens) == expected


def test_bigram_greedy_follows_its_table() -> None:
    best = BIGRAM.token_embedding_table.weight.argmax(-1).tolist()
    tokens = list(generate(BIGRAM, [4, 9], max_new_tokens=40, temperature=0))
    assert tokens == [best[i] for i in [9, *tokens[:-1]]]


@pytest.mark.parametrize("model", [SMALL, BIGRAM], ids=["gpt2", "bigram"])
def test_a_seed_repeats_and_another_differs(model: Model) -> None:
    def tokens(seed: int | None) -> list[int]:
        generator = None if seed is None else seeded(seed)
        return list(generate(model, [1], max_new_tokens=40, temperature=2.0, generator=generator))

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("generator", [None, seeded(1)], ids=["fresh", "given"])
@pytest.mark.parametrize("model", [SMALL, BIGRAM], ids=["gpt2", "bigram"])
def test_global_random_state_and_weights_stay(model: Model, generator: torch.Generator | None) -> None:
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    before = torch.get_rng_state()
    list(generate(model.train(), [1, 2], max_new_tokens=40, generator=generator))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_mode_and_gradients_are_the_callers_between_tokens_and_after_a_break() -> None:
    model = make_gpt2().train()
    model.get_submodule("h.1").eval()  # as a frozen part of a model in training
    modes = [module.training for module in model.modules()]
    during: list[bool] = []
    hook = model.get_submodule("h.0.attn").register_forward_pre_hook(lambda module, _: during.append(module.training))
    for count, _ in enumerate(generate(model, [1, 2], max_new_tokens=40)):
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        if count == 3:
            break
    hook.remove()
    assert [module.training for module in model.modules()] == modes
    assert during == [False] * 4
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1].backward()  # nothing of inference mode is left behind
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_mode_is_restored_when_the_model_fails() -> None:
    model = make_gpt2().train()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.ln_f.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generate(model, [1], max_new_tokens=1))
    assert all(module.training for module in model.modules())


def test_surplus_rows_are_never_drawn_and_change_nothing() -> None:
    padded = make_gpt2(vocab_size=VOCAB + 3)
    table = SMALL.wte.weight.detach()
    padded.load_state_dict(SMALL.state_dict() | {"wte.weight": torch.cat([table, 9 * table[:3]])})
    expected = list(generate(SMALL, [1, 2], max_new_tokens=60, generator=seeded(2)))
    assert list(generate(padded, [1, 2], max_new_tokens=60, generator=seeded(2), vocab_size=VOCAB)) == expected
    assert max(generate(padded, [1, 2], max_new_tokens=60, generator=seeded(2))) >= VOCAB  # they would have been


def test_stop_id_ends_and_is_not_yielded() -> None:
    whole = list(generate(SMALL, [1, 2], max_new_tokens=30, generator=seeded(3)))
    stop = whole[11]
    tokens = list(generate(SMALL, [1, 2], max_new_tokens=30, generator=seeded(3), stop_ids=[stop, 1000]))
    assert tokens == whole[: whole.index(stop)]


def test_no_more_is_computed_than_requested() -> None:
    calls: list[int] = []
    hook = SMALL.register_forward_hook(lambda *_: calls.append(1))
    stream = generate(SMALL, [1], max_new_tokens=5)
    assert calls == []
    list(islice(stream, 2))
    assert len(calls) == 2
    assert len(list(stream)) == 3
    hook.remove()
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": []}, "the prompt has no tokens"),
        ({"ids": [1, VOCAB]}, "the prompt holds token 61, but the vocabulary ends at 60"),
        ({"ids": [-1]}, "the prompt holds token -1"),
        ({"ids": [60], "vocab_size": 60}, "the vocabulary ends at 59"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: expected a number 0 or more"),
        ({"temperature": -0.1}, r"temperature=-0\.1: expected a number 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0\.0: expected a number above 0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: expected a number above 0"),
    ],
)
def test_senseless_arguments_are_refused_at_the_call(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(SMALL, **{"ids": [1], "max_new_tokens": 1} | arguments)
