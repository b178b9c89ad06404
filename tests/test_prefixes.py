"""Texts that begin as earlier ones: what was read is not read again, and every bit stays."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_decoder import LLAMA, SETTINGS, VARIANTS, VOCAB, WEIGHTS, both_kinds, random_model
from test_sampling import lively, seeded

from milepost.generation.compiled import CompiledDecoder
from milepost.generation.decoder import DecodeCache, Decoder
from milepost.generation.graphed import GraphDecoder
from milepost.generation.prefixes import Prefixes
from milepost.generation.sampling import generate
from models.gpt2 import GPT2
from models.linears import FEW, PROMPT_CHUNK

LONG = 4 * PROMPT_CHUNK


def some(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=seeded(seed)).tolist()


def decoder_for(decoder_of: type[Decoder], variant: str = "published", weights: str = "float32") -> Decoder:
    return decoder_of(random_model(replace(VARIANTS[variant], block_size=LONG)), weights=weights)


def read(
    decoder: Decoder, ids: Sequence[int], cache: DecodeCache | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The logits after a prompt and after each of three tokens more, and all keys and values."""
    cache = cache or decoder.new_cache()
    logits = list(decoder.rows(ids[cache.length :], cache))
    for token in (1, 2, 3):
        logits += decoder.rows([token], cache)
    return logits, cache.states[..., : cache.length, :]


def same(left: tuple[list[torch.Tensor], torch.Tensor], right: tuple[list[torch.Tensor], torch.Tensor]) -> bool:
    return torch.equal(left[1], right[1]) and all(map(torch.equal, left[0], right[0]))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many tokens each pass of a decoder reads."""
    counts: list[int] = []
    follow = Decoder._follow

    def counted(self: Decoder, ids: Sequence[int], cache: DecodeCache) -> torch.Tensor:
        counts.append(len(ids))
        return follow(self, ids, cache)

    monkeypatch.setattr(Decoder, "_follow", counted)
    return counts


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
@both_kinds
def test_what_an_earlier_text_read_has_the_bits_of_a_prompt_read_anew(weights, variant, decoder_of, passes) -> None:
    decoder, prefixes = decoder_for(decoder_of, variant, weights), Prefixes(most=1)
    first = some(3 * PROMPT_CHUNK + 20)
    read(decoder, first, prefixes.cache_for(decoder, first))
    for rest in (1, 7, FEW + 3, PROMPT_CHUNK, PROMPT_CHUNK + 5):
        ids = first[: 2 * PROMPT_CHUNK + 9] + some(rest, seed=rest)
        alone = read(decoder, ids)
        cache = prefixes.cache_for(decoder, ids)
        assert cache.length == 2 * PROMPT_CHUNK
        passes.clear()
        assert same(read(decoder, ids, cache), alone)
        assert sum(passes) == 9 + rest + 3


@both_kinds
def test_how_threads_share_the_tokens_of_a_pass_changes_no_bit(decoder_of) -> None:
    """Where a thread's share of an activation ends within a vector, the rest of it is rounded otherwise."""
    decoder = decoder_of(random_model(replace(LLAMA, block_size=LONG, n_inner=344)), weights="float32")
    prefixes, ids, threads = Prefixes(most=1), some(LONG), torch.get_num_threads()
    try:
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            for length in (LONG - 3, 301, 383, 385, 258):
                begun = prefixes.cache_for(decoder, ids[:length])
                assert same(read(decoder, ids[:length], begun), read(decoder, ids[:length]))
    finally:
        torch.set_num_threads(threads)
    assert begun.length > PROMPT_CHUNK


def test_tokens_read_otherwise_have_other_bits() -> None:
    """So the test above can fail: a prefix of tokens that were generated would change a text."""
    decoder, ids = decoder_for(CompiledDecoder), some(PROMPT_CHUNK + 9)
    singly = decoder.new_cache()
    for token in ids[:PROMPT_CHUNK]:
        decoder.rows([token], singly)
    assert singly.prefix == []
    assert not same(read(decoder, ids, singly), read(decoder, ids))


def test_a_few_tokens_after_a_chunk_are_read_apart(passes) -> None:
    decoder = decoder_for(Decoder)
    for count, expected in {
        1: [1],
        PROMPT_CHUNK - 1: [PROMPT_CHUNK - 1],
        PROMPT_CHUNK: [PROMPT_CHUNK],
        PROMPT_CHUNK + 1: [PROMPT_CHUNK, 1],
        3 * PROMPT_CHUNK + 2: [3 * PROMPT_CHUNK, 2],
        PROMPT_CHUNK + FEW: [PROMPT_CHUNK, FEW],
        PROMPT_CHUNK + FEW + 1: [PROMPT_CHUNK + FEW + 1],
    }.items():
        passes.clear()
        cache = decoder.new_cache()
        decoder.rows(some(count), cache)
        assert (passes, cache.prefix) == (expected, some(count)[: count // PROMPT_CHUNK * PROMPT_CHUNK])


@both_kinds
def test_the_nearest_of_the_latest_texts_is_taken_and_one_token_left(decoder_of) -> None:
    decoder, other, prefixes = decoder_for(decoder_of), decoder_for(decoder_of, "no biases"), Prefixes(most=2)
    a, b = some(3 * PROMPT_CHUNK, 1), some(3 * PROMPT_CHUNK, 2)

    def begun(ids: list[int], by: Decoder = decoder) -> int:
        cache = prefixes.cache_for(by, ids)
        assert isinstance(cache, DecodeCache)
        length = cache.length
        read(by, ids, cache)
        return length

    assert begun(a) == 0
    assert begun(a) == 2 * PROMPT_CHUNK  # the last token's logits are needed
    assert begun(a[:-1] + b[:9]) == 2 * PROMPT_CHUNK
    assert begun(a, other) == 0  # other weights
    assert begun(a[: PROMPT_CHUNK + 1] + b[:4]) == PROMPT_CHUNK
    assert begun(b) == 0  # the latest two are of `other`, and share nothing with it
    assert begun(a) == PROMPT_CHUNK
    assert begun(a[:PROMPT_CHUNK]) == 0  # no longer than a chunk: it is not kept
    assert begun(b) == 2 * PROMPT_CHUNK


def test_a_decoder_that_has_gone_keeps_nothing_alive() -> None:
    decoder, prefixes, ids = decoder_for(Decoder), Prefixes(most=4), some(LONG)
    read(decoder, ids[:-3], prefixes.cache_for(decoder, ids[:-3]))
    gone = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert gone() is None
    assert prefixes.cache_for(decoder_for(Decoder), ids).length == 0


@both_kinds
@pytest.mark.parametrize("lookup", [False, True])
def test_a_conversation_has_the_text_of_one_that_is_read_anew(decoder_of, lookup) -> None:
    """Turn after turn, beyond the context, where the window moves and its tokens get other positions."""
    model = lively(GPT2(replace(SETTINGS, block_size=LONG)).eval())
    decoder, prefixes = decoder_of(model, weights="float32"), Prefixes(most=1)
    said, began, slid = some(40), [], []
    for turn in range(12):
        said += some(11, seed=turn)[:11] * 2  # something to look up
        ids = said[-LONG:]
        cache = prefixes.cache_for(decoder, ids)
        began.append(cache.length)
        kept, alone = (
            list(
                generate(
                    decoder, ids, max_new_tokens=30, generator=seeded(turn), cache=each, lookup=lookup,
                    on_slide=lambda: slid.append(turn),  # noqa: B023
                )
            )
            for each in (cache, None)
        )  # fmt: skip
        assert kept == alone
        said += kept
    assert max(began) >= 2 * PROMPT_CHUNK
    assert slid


def test_a_pass_that_fails_leaves_nothing_to_take(monkeypatch) -> None:
    """Neither what it was to read nor what an earlier text had there."""
    decoder, prefixes, ids = decoder_for(Decoder), Prefixes(most=2), some(2 * PROMPT_CHUNK + 5)
    with monkeypatch.context() as broken:
        broken.setattr(Decoder, "_through", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(decoder, ids, prefixes.cache_for(decoder, ids))
    cache = prefixes.cache_for(decoder, ids)
    assert cache.length == 0
    assert same(read(decoder, ids, cache), read(decoder, ids))


def test_a_graphed_decoder_reads_a_prompt_in_one_pass_and_keeps_nothing(passes) -> None:
    decoder = GraphDecoder(random_model(replace(LLAMA, block_size=LONG)), weights="float32")
    prefixes, ids = Prefixes(most=1), some(LONG - 4)
    for _ in range(2):
        passes.clear()
        cache = prefixes.cache_for(decoder, ids)
        assert cache.length == 0
        decoder.rows(ids, cache)
        assert (passes, cache.prefix) == ([LONG - 4], [])


def test_models_without_a_fast_decoder_get_a_cache_of_their_own() -> None:
    model = random_model(replace(SETTINGS, block_size=LONG))
    prefixes, ids = Prefixes(most=1), some(LONG)
    caches = [prefixes.cache_for(model, ids) for _ in range(2)]
    assert caches[0] is not caches[1]
    assert [cache.length for cache in caches] == [0, 0]
