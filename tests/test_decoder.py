"""The fast decoders against the plain model: logits, tokens, and that drafting changes no text."""

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampling import lively, seeded

from milepost.generation.compiled import CompiledDecoder
from milepost.generation.decoder import RESCORED, Decoder
from milepost.generation.lookup import Lookup
from milepost.generation.sampling import BEST, generate, keep_top_k, keep_top_p, next_token
from models.gpt2 import GPT2, GPT2Settings
from models.linears import LINEARS, quantized
from models.llama import Llama, LlamaSettings, RotaryScaling

ROOT = Path(__file__).resolve().parent.parent

# A vocabulary of several times RESCORED: of a smaller one every logit would be computed again, whatever the head has
# made of it.
VOCAB = 1000
SETTINGS = GPT2Settings(VOCAB, block_size=48, n_layer=3, n_head=4, n_embd=64)
LLAMA = LlamaSettings(VOCAB, block_size=48, n_layer=3, n_head=4, n_embd=64, n_kv_head=2)
VARIANTS = {
    "published": SETTINGS,
    "no biases": replace(SETTINGS, bias=False),
    "relu": replace(SETTINGS, activation="relu"),
    "erf": replace(SETTINGS, activation="gelu_erf"),
    "untied": replace(SETTINGS, tied=False),
    "llama": LLAMA,
    "llama, as many heads of keys, untied": replace(LLAMA, n_kv_head=4, tied=False),
    "llama, biases, norms of heads": replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
    "llama, other heads, scaling": replace(
        LLAMA, head_size=24, rope_scaling=RotaryScaling("llama3", 4.0, original_length=16)
    ),
}
WEIGHTS = list(LINEARS)
KINDS = [Decoder, CompiledDecoder]
both_kinds = pytest.mark.parametrize("decoder_of", KINDS, ids=["torch", "compiled"])
# Of logits whose spread is 1: float32 differs in the order of sums, the others by what their formats round off.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.15}
TOLERANCE_LLAMA = {"float32": 1e-4, "bfloat16": 0.08, "int8": 0.25}  # its MLP multiplies two rounded numbers


@functools.cache
def random_model(settings: GPT2Settings | LlamaSettings) -> GPT2 | Llama:
    """Every tensor random, biases and norms too, with logits of spread 1."""
    torch.manual_seed(1)
    model = (GPT2(settings) if isinstance(settings, GPT2Settings) else Llama(settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        scale = 1 / model(torch.arange(48)[None])[0].std()
        for name, parameter in model.named_parameters():
            if name.startswith(("ln_f.", "norm.", "lm_head.bias")):
                parameter.mul_(scale)
    return model


def published() -> GPT2:
    return random_model(SETTINGS)


def plain(model: GPT2, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0][0]  # (T, V)


def through_cache(decoder: Decoder, ids: Sequence[int], parts: Sequence[int]) -> torch.Tensor:
    """The logits of all ids (T, V), computed in passes of so many tokens."""
    cache, rows, start = decoder.new_cache(), [], 0
    for part in parts:
        rows += list(decoder.rows(ids[start : start + part], cache, last=part))
        start += part
    assert cache.length == start == len(ids)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def trained() -> tuple[GPT2, torch.Tensor]:
    """A model trained on sentences of a small grammar, and held-out tokens."""
    generator = seeded(0)
    text = torch.randint(0, 24, (9000,), generator=generator)
    table = torch.randint(0, VOCAB, (24, 8), generator=generator)
    tokens = table[text].flatten()  # words of 8 tokens
    torch.manual_seed(0)
    model = GPT2(GPT2Settings(VOCAB, 64, n_layer=2, n_head=4, n_embd=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        at = torch.randint(0, 60_000, (8,), generator=generator)
        window = torch.stack([tokens[i : i + 65] for i in at])
        loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.5
    return model.eval(), tokens[60_100:].clone()[: 64 * 40].view(40, 64)


# --- logits


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parts", [(48,), (1,) * 48, (20, 1, 1, 5, 12, 1, 8)], ids=["at once", "singly", "mixed"])
@both_kinds
def test_logits_are_the_plain_models(
    weights: str, variant: str, parts: tuple[int, ...], decoder_of: type[Decoder]
) -> None:
    ids = torch.randint(VOCAB, (48,), generator=seeded(3)).tolist()
    expected = plain(random_model(VARIANTS[variant]), ids)
    logits = through_cache(decoder_of(random_model(VARIANTS[variant]), weights=weights), ids, parts)
    assert logits.dtype == torch.float32
    assert expected.std() > 0.5
    tolerance = TOLERANCE_LLAMA if variant.startswith("llama") else TOLERANCE
    torch.testing.assert_close(logits, expected, atol=tolerance[weights], rtol=0)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_best_logits_are_not_rounded(weights: str) -> None:
    """Where the vocabulary is larger than the recomputed part, the best logits have float32's bits, the others
    bfloat16's.
    """
    model = random_model(replace(SETTINGS, vocab_size=700))
    logits = through_cache(Decoder(model, weights=weights), [1, 2, 3], [3])[-1]
    coarse = logits == logits.bfloat16().float()
    order = logits.argsort(descending=True)
    assert coarse[order[:250]].float().mean() < 0.1
    assert coarse[order[300:]].all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", ["published", "llama", "llama, biases, norms of heads"])
@both_kinds
def test_a_token_has_the_same_bits_in_a_pass_of_any_size(weights: str, variant: str, decoder_of: type[Decoder]) -> None:
    ids = torch.randint(VOCAB, (40,), generator=seeded(4)).tolist()
    decoder = decoder_of(random_model(VARIANTS[variant]), weights=weights)
    singly = through_cache(decoder, ids, [8, *[1] * 32])
    for size in (2, 3, 4, 5, 8, 11, 16):
        together = through_cache(decoder, ids, [8, *[size] * (32 // size), *[32 % size] * (32 % size > 0)])
        assert torch.equal(together[8:], singly[8:])
    assert decoder.agrees()


@pytest.mark.parametrize("weights", WEIGHTS)
@both_kinds
def test_texts_that_are_read_ahead_together_have_the_bits_of_each_alone(
    weights: str, decoder_of: type[Decoder]
) -> None:
    decoder = decoder_of(published(), weights=weights)
    lengths = [1, 5, 17, 40, 47]
    if not decoder.agrees(len(lengths)):
        pytest.skip("this processor computes several rows otherwise than one")
    texts = [[(7 * number + at) % VOCAB for at in range(length)] for number, length in enumerate(lengths)]
    apart, together = ([decoder.new_cache() for _ in texts] for _ in range(2))
    for ids, one, other in zip(texts, apart, together, strict=True):
        decoder.rows(ids, one)
        decoder.rows(ids, other)
    tokens = [100 + number for number in range(len(texts))]
    expected = [next(iter(decoder.rows([token], cache))) for token, cache in zip(tokens, apart, strict=True)]
    decoder.read_ahead(tokens, together)
    head, decoder.head = decoder.head, zero_head  # rows() computes nothing of its own
    found = [next(iter(decoder.rows([token], cache))) for token, cache in zip(tokens, together, strict=True)]
    decoder.head = head
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [cache.length for cache in together] == [length + 1 for length in lengths]
    for one, other, length in zip(apart, together, lengths, strict=True):
        assert torch.equal(one.states[:, :, :, :, : length + 1], other.states[:, :, :, :, : length + 1])


@both_kinds
def test_what_was_read_ahead_is_dropped_where_the_text_continues_otherwise(decoder_of: type[Decoder]) -> None:
    decoder = decoder_of(published(), weights="float32")
    cache, other = decoder.new_cache(), decoder.new_cache()
    for each in (cache, other):
        decoder.rows([1, 2, 3], each)
    decoder.read_ahead([4, 4], [cache, decoder.new_cache()])
    assert torch.equal(next(iter(decoder.rows([5], cache))), next(iter(decoder.rows([5], other))))
    decoder.read_ahead([6, 6], [cache, decoder.new_cache()])
    cache.length = other.length = 0  # a window that begins anew
    assert torch.equal(next(iter(decoder.rows([6], cache))), next(iter(decoder.rows([6], other))))


@pytest.mark.parametrize("rows", range(2, 13))
def test_a_processor_that_computes_some_number_of_rows_otherwise_is_noticed(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    decoder = Decoder(published(), weights="float32")
    head = decoder.head
    monkeypatch.setattr(decoder, "head", lambda x: head(x) + 1e-6 * (x.size(0) == rows))
    assert not decoder.agrees()


def test_a_processor_without_bfloat16_generates_in_it_too() -> None:
    """oneDNN refuses there to turn the weights; then they are multiplied as they are, row by row, and drafts gain nothing."""
    code = """
import torch
from test_decoder import published, through_cache
from milepost.generation.decoder import Decoder
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
for weights in ("bfloat16", "int8"):
    decoder = Decoder(published(), weights=weights)
    logits = through_cache(decoder, [1, 2, 3, 4], [3, 1])
    error = (logits - published()(torch.tensor([[1, 2, 3, 4]]))[0][0]).abs().max().item()
    print(weights, error < 0.1, decoder.longest_draft, decoder.agrees(3))
"""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    said = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "bfloat16 True 0 True\nint8 True 3 True\n"), said.stderr


@both_kinds
def test_the_cache_has_a_fixed_size_and_can_be_truncated(decoder_of: type[Decoder]) -> None:
    decoder = decoder_of(published(), weights="float32")
    cache = decoder.new_cache()
    place, size = cache.states.data_ptr(), cache.states.nbytes
    assert size == 3 * 2 * 48 * 64 * 4
    decoder.rows([1, 2, 3, 4], cache)
    decoder.rows([50, 51, 52], cache)
    cache.length = 4
    (logits,) = decoder.rows([5], cache)
    assert torch.equal(logits, through_cache(decoder, [1, 2, 3, 4, 5], [4, 1])[-1])
    assert (cache.states.data_ptr(), cache.states.nbytes, cache.length) == (place, size, 5)


# --- int8


def test_quantized_weights_are_the_weights_to_half_a_scale() -> None:
    weight = torch.randn(3000, 700, generator=seeded(5))
    weight[17] = 0
    whole, scales = quantized(weight)
    assert whole.dtype == torch.int8
    assert torch.equal(scales, scales.bfloat16().float())
    error = (whole * scales[:, None] - weight).abs()
    # A scale that bfloat16 rounds down cuts the largest weights off, by a 256th of 127 scales at most.
    assert (error <= scales[:, None] * 0.5 + 1e-6).float().mean() > 0.999
    assert (error <= scales[:, None]).all()
    assert (whole[17] == 0).all()


def against_plain(decoder: Decoder, model: GPT2, held_out: torch.Tensor) -> tuple[float, float]:
    """The fraction of teacher-forced positions with the same next token, and the relative change of perplexity."""
    logits = torch.stack([through_cache(decoder, ids, [20, *[4] * 11]) for ids in held_out.tolist()])
    expected = torch.stack([plain(model, ids) for ids in held_out.tolist()])
    ours, theirs = (
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        for x in (logits, expected)
    )
    assert theirs < 1.5  # it has learned something that could be lost
    return (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(), abs(ours.exp() / theirs.exp() - 1).item()


@pytest.mark.parametrize("width", [2, 20, 100, 333])
def test_int8_rows_of_any_width_are_multiplied(width: int) -> None:
    """PyTorch's product reads beyond them, into what is no number or not there at all."""
    weight, x = torch.randn(65, width, generator=seeded(0)), torch.randn(40, width, generator=seeded(1))
    whole, scales = quantized(weight)
    for rows in (1, 5, 40):
        expected = x[:rows].bfloat16().float() @ (whole * scales[:, None]).T
        torch.testing.assert_close(LINEARS["int8"](weight)(x[:rows]).float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("weights", "agreement", "loss"), [("float32", 1.0, 1e-5), ("bfloat16", 0.95, 0.01), ("int8", 0.95, 0.01)]
)
@both_kinds
def test_a_trained_model_predicts_the_same(
    weights: str, agreement: float, loss: float, trained, decoder_of: type[Decoder]
) -> None:
    """The same next token at teacher-forced positions, and the same perplexity to 1 %, on held-out text."""
    model, held_out = trained
    agreed, changed = against_plain(decoder_of(model, weights=weights), model, held_out)
    assert agreed >= agreement
    assert changed <= loss


@pytest.mark.parametrize("weights", WEIGHTS)
@both_kinds
def test_a_head_that_is_lost_is_noticed(weights: str, trained, decoder_of: type[Decoder]) -> None:
    """Control for the tests above: logits recomputed from the float32 weights must not hide the head's."""
    assert RESCORED < VOCAB / 2
    decoder = decoder_of(published(), weights=weights)
    decoder.head = zero_head
    wrong = (through_cache(decoder, [1, 2, 3], [3]) - plain(published(), [1, 2, 3])).abs() > TOLERANCE[weights]
    assert wrong.float().mean() > 0.5
    model, held_out = trained
    decoder = decoder_of(model, weights=weights)
    decoder.head = zero_head
    agreed, changed = against_plain(decoder, model, held_out[:4])
    assert agreed < 0.5
    assert changed > 1


def zero_head(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(x.size(0), VOCAB)


# --- tokens


def tokens(model: GPT2 | Decoder, prompt: list[int], seed: int = 0, **how: Any) -> list[int]:
    return list(generate(model, prompt, generator=seeded(seed), **{"max_new_tokens": 120} | how))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [[5], [7, 30, 2], list(range(48)), list(range(90))], ids=len)
@pytest.mark.parametrize("settings", [SETTINGS, LLAMA], ids=["gpt2", "llama"])
@both_kinds
def test_float32_generates_what_the_plain_model_generates(
    prompt: list[int], temperature: float, settings: GPT2Settings | LlamaSettings, decoder_of: type[Decoder]
) -> None:
    """Through three slides of the window, and from prompts that fill it or exceed it."""
    model = lively(GPT2(settings) if isinstance(settings, GPT2Settings) else Llama(settings))
    how = {"temperature": temperature, "repetition_penalty": 1.2, "top_k": 20}
    assert tokens(decoder_of(model, weights="float32"), prompt, **how) == tokens(model, prompt, **how)


def test_surplus_rows_and_stop_ids() -> None:
    decoder = Decoder(published(), weights="bfloat16")
    whole = tokens(decoder, [1, 2], vocab_size=40)
    assert max(whole) < 40
    assert tokens(decoder, [1, 2], vocab_size=40, stop_ids=[whole[9]]) == whole[: whole.index(whole[9])]


PROMPTS = {"one": [3], "repeats": [4, 5, 6, 7] * 5, "long": list(range(60))}
# A Latin square: each two of weights, temperature and prompt meet once, with either kind of model.
MET = [
    (weights, (0.0, 0.3, 1.0)[(row + column) % 3], prompt)
    for row, weights in enumerate(WEIGHTS)
    for column, prompt in enumerate(PROMPTS)
]


@pytest.mark.parametrize(("weights", "temperature", "prompt"), MET)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@both_kinds
def test_lookup_changes_no_token(
    weights: str, temperature: float, prompt: str, kind: str, decoder_of: type[Decoder]
) -> None:
    """Tokens that repeat and that do not, window slides included; the generator ends in the same state."""
    decoder = decoder_of(lively(GPT2(SETTINGS) if kind == "gpt2" else Llama(LLAMA)), weights=weights)
    states, texts = [], []
    for lookup in (False, True):
        generator = seeded(6)
        how = {"temperature": temperature, "top_p": 0.9, "repetition_penalty": 0.9}
        found = generate(decoder, PROMPTS[prompt], max_new_tokens=150, generator=generator, lookup=lookup, **how)
        texts.append(list(found))
        states.append(generator.get_state())
    assert texts[0] == texts[1]
    assert torch.equal(*states)


def test_lookup_takes_fewer_passes_where_text_repeats(monkeypatch: pytest.MonkeyPatch, trained) -> None:
    model, held_out = trained
    decoder = Decoder(model, weights="float32")
    passes, rows = [], Decoder.rows
    monkeypatch.setattr(Decoder, "rows", lambda *a, **k: passes.append(len(a[1])) or rows(*a, **k))
    prompt = held_out[0, :40].tolist()
    text = tokens(decoder, prompt, temperature=0.0, max_new_tokens=200, lookup=True)
    quick = len(passes)
    assert quick < 150
    passes.clear()
    assert tokens(decoder, prompt, temperature=0.0, max_new_tokens=200) == text
    assert len(passes) == 200


def test_lookup_is_ignored_by_a_plain_model() -> None:
    assert tokens(published(), [1, 2] * 8, lookup=True) == tokens(published(), [1, 2] * 8)


# --- drafts


def test_drafts_are_the_tokens_that_followed_before() -> None:
    lookup = Lookup(longest=5)
    assert lookup.draft([1, 2, 3, 4], room=9) == []
    assert lookup.draft([1, 2, 3, 4, 9, 1, 2, 3], room=9) == [4, 9, 1, 2, 3]
    assert lookup.draft([1, 2, 3, 4, 9, 1, 2, 3], room=2) == [4, 9]
    assert lookup.draft([1, 2, 3, 4, 9, 1, 2, 3, 7, 1, 2, 3], room=3) == [7, 1, 2]  # the latest
    assert lookup.draft([1, 2, 3, 4, 9, 1, 2, 3, 7, 1, 2, 3], room=0) == []


def test_drafts_turn_in_circles_with_the_text() -> None:
    assert Lookup(longest=5).draft([8, 6, 6, 6, 6], room=9) == [6] * 5
    assert Lookup(longest=6).draft([1, 2, 1, 2, 1], room=9) == [2, 1, 2, 1, 2, 1]


def test_drafting_pauses_longer_after_each_failure_and_recovers() -> None:
    lookup, history, tried = Lookup(longest=4), [1, 2, 3] * 4, []
    for step in range(300):
        if draft := lookup.draft(history, room=9):
            tried.append(step)
            lookup.learn(len(draft), 0)
    assert tried == [0, 2, 5, 10, 19, 36, 69, 134, 199, 264]
    for _ in range(65):
        draft = lookup.draft(history, room=9)
    assert len(draft) == 1  # a failure makes drafts short, successes make them long again
    lookup.learn(1, 1)
    assert len(lookup.draft(history, room=9)) == 2
    lookup.learn(2, 2)
    assert len(lookup.draft(history, room=9)) == 4
    lookup.learn(4, 3)
    assert len(lookup.draft(history, room=9)) == 3


# --- drawing without sorting


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_top_p_of_many_tokens_is_that_of_all_sorted(p: float, spread: float) -> None:
    logits = torch.randn(20 * BEST, generator=seeded(7)) * spread
    best, order = logits.sort(descending=True)
    probs = best.double().softmax(-1)
    count = int((probs.cumsum(0) - probs < p - 1e-6).sum())
    kept = keep_top_p(logits, p).isfinite()
    assert abs(int(kept.sum()) - count) <= max(1, count // 1000)  # float32 sums may take a token more or less
    assert kept[order[: count - max(1, count // 1000)]].all()


def test_top_k_draws_as_masking_does() -> None:
    logits = torch.randn(5000, generator=seeded(8)).mul(3).mul(4).round().div(4)  # many ties
    kept = set(keep_top_k(logits, 40).isfinite().nonzero()[:, 0].tolist())
    assert len(kept) > 40
    drawn = [next_token(logits, temperature=1.0, top_k=40, top_p=1.0, generator=seeded(seed)) for seed in range(400)]
    probs = keep_top_k(logits, 40).double().softmax(-1).cumsum(0)
    uniforms = [torch.rand((), dtype=torch.float64, generator=seeded(seed)) for seed in range(400)]
    assert drawn == [int((probs > u).nonzero()[0]) for u in uniforms]
