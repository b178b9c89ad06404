"""The decoder of a GPU, run on the CPU without its graph: the model's logits and texts, one token at a time."""

from dataclasses import replace

import pytest
import torch
from test_decoder import LLAMA, SETTINGS, TOLERANCE, TOLERANCE_LLAMA, VARIANTS, random_model
from work import Waits

from milepost.generation import graphed
from milepost.generation.decoder import Decoder
from milepost.generation.graphed import FEWEST_TOKENS, GraphCache, GraphDecoder
from milepost.generation.sampling import generate
from milepost.generation.texts import choose_decoder

WEIGHTS = ("float32", "bfloat16", "float16")
TEXT = [(37 * place) % 1000 for place in range(40)]


def read(decoder, ids: list[int]) -> torch.Tensor:
    """The logits after each token from the third on: two are read at once, the others one by one; (T - 2, V)."""
    cache = decoder.new_cache(1)
    next(iter(decoder.rows(ids[:2], cache)))
    return torch.stack([next(iter(decoder.rows([token], cache))).clone() for token in ids[2:]])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_its_logits_are_those_of_the_model(variant, weights):
    model = random_model(VARIANTS[variant])
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0, 2:]
    found = read(GraphDecoder(model, weights=weights), TEXT)
    tolerances = TOLERANCE_LLAMA if variant.startswith("llama") else TOLERANCE
    assert (found - expected).abs().max() < tolerances.get(weights, tolerances["bfloat16"])
    assert (found.roll(1, 0) - expected).abs().max() > 1  # the control


@pytest.mark.parametrize("settings", [SETTINGS, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [40, 400], ids=["within the window", "past it"])
def test_its_texts_are_those_of_the_cpus_decoder(settings, tokens):
    """Where the buffer grows, and where the window is cut."""
    model = random_model(replace(settings, block_size=300 if tokens > 300 else 48))
    ours, theirs = (
        list(generate(decoder, [5, 6, 7], max_new_tokens=tokens, temperature=0))
        for decoder in (GraphDecoder(model, weights="float32"), Decoder(model, weights="float32"))
    )
    assert ours == theirs


def test_a_pass_is_prepared_once_for_each_size_of_the_buffer(monkeypatch):
    """And then never asks for a value that it computes: on a GPU each question would wait, and no graph can hold one."""
    prepared, model = [], random_model(replace(SETTINGS, block_size=300))
    monkeypatch.setattr(graphed, "_captured", lambda step, device: prepared.append(step) or step)
    decoder = GraphDecoder(model, weights="bfloat16")
    cache = decoder.new_cache()
    decoder.rows([1, 2, 3], cache)
    for number in range(290):
        with Waits() as waits:
            decoder.rows([number], cache)
        assert waits.count == 0
    assert (len(prepared), cache.length, cache.states.size(4)) == (2, 293, 300)


def test_what_lies_behind_a_token_is_not_read():
    model = random_model(SETTINGS)
    decoder = GraphDecoder(model, weights="float32")
    clean, dirty = decoder.new_cache(), decoder.new_cache()
    for cache in (clean, dirty):
        decoder.rows([1, 2, 3], cache)
    dirty.states[..., 4:, :] = 1e3
    assert torch.equal(decoder.rows([4], clean)[0], decoder.rows([4], dirty)[0])
    dirty.states[..., :2, :] = 1e3
    assert not torch.equal(decoder.rows([5], clean)[0], decoder.rows([5], dirty)[0])  # the control


def test_two_texts_do_not_share_their_caches():
    decoder = GraphDecoder(random_model(SETTINGS), weights="float32")
    alone = read(decoder, TEXT)
    caches = [decoder.new_cache(), decoder.new_cache()]
    for cache, start in zip(caches, (TEXT[:2], [9, 8]), strict=True):
        decoder.rows(start, cache)
    for number, token in enumerate(TEXT[2:]):
        (logits,) = decoder.rows([token], caches[0])
        assert torch.equal(logits, alone[number])
        decoder.rows([3], caches[1])


@pytest.mark.parametrize(
    ("device", "quantize", "tokens", "chosen"),
    [
        ("cuda", "none", FEWEST_TOKENS, GraphDecoder),
        ("cuda", "none", FEWEST_TOKENS - 1, type(None)),
        ("cuda", "int8", 1000, type(None)),
        ("mps", "none", 1000, type(None)),
    ],
)
def test_it_is_chosen_on_cuda_for_more_than_a_few_tokens(device, quantize, tokens, chosen):
    model = random_model(SETTINGS)
    decoder, reason = choose_decoder(
        model, device=torch.device(device), dtype="float32", quantize=quantize, tokens=tokens
    )
    assert type(decoder) is chosen
    assert (reason == "") == (decoder is not None)


def test_drafts_are_not_verified_by_it():
    decoder = GraphDecoder(random_model(SETTINGS), weights="float32")
    assert not decoder.agrees()
    assert isinstance(decoder.new_cache(), GraphCache)
