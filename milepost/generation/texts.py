"""Continue a prompt: choose what computes the logits, draw tokens, and decode them to text as they arrive."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor

from milepost.generation.decoder import Decoder, decoder_of
from milepost.generation.graphed import FEWEST_TOKENS, GraphDecoder
from milepost.generation.prefixes import Prefixes
from milepost.generation.sampling import generate
from milepost.generation.stream import StreamDecoder
from milepost.runtime import hardware
from milepost.splitmix import mix
from milepost.text.tokenization.base import Tokenizer, edge
from models.model import Cache, Model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, as in sampling.generate, and the strings and tokens that end a text."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # besides those of the tokenizer


# Tokens: to load compiled kernels takes about as long as they save on so many of a GPT-2 with 124 million parameters.
FEWEST_COMPILED: Final = 128


def choose_decoder(
    model: Model,
    *,
    device: torch.device,
    dtype: str,
    quantize: str,
    tokens: int,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[Decoder | None, str]:
    """Return the fast decoder if it pays for generating `tokens` tokens; else None, and the reason.

    `quantize` is the dtype of its weights, or "none" to choose one by `dtype`. `log` gets a line on what takes a while. Raise
    DeviceError for a dtype that the device does not support.
    """
    width = getattr(model.settings, "n_embd", 0)
    hardware.choose_dtype(dtype, device, width=width)
    build, reason = decoder_of(model)
    if build is None:
        return None, reason
    if device.type == "cuda" and quantize == "none" and tokens >= FEWEST_TOKENS:
        return GraphDecoder(cast(Any, model), weights=hardware.choose_dtype(dtype, device, width=width)), ""
    if device.type != "cpu":
        return None, f"this runs on {device.type}"
    compiled = tokens >= FEWEST_COMPILED and importlib.util.find_spec("numba") is not None
    dtype_of = partial(hardware.decode_dtype, dtype, device, width=width, tokens=tokens)
    weights = dtype_of(compiled=compiled) if quantize == "none" else quantize
    if weights == "float32" and width < hardware.BFLOAT16_DECODE_WIDTH:
        return None, f"a model with an embedding dimension of {width} spends its time elsewhere"
    if compiled:
        if decoder := _compiled(model, weights, log):
            return decoder, ""
        weights = dtype_of(compiled=False) if quantize == "none" else quantize
    return build(model, weights=weights), ""


def _compiled(model: Model, weights: str, log: Callable[[str], None]) -> Decoder | None:
    """Return the decoder with compiled kernels; None if numba does not run here."""
    try:
        from milepost.generation.compiled import CompiledDecoder

        return CompiledDecoder(model, weights=weights, log=log)
    except Exception as error:  # a version that does not fit, a full disk, a damaged file of what was compiled before
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log(f"numba is installed and cannot be used ({reason:.200}); generating without it")
        return None


def no_lookup_reason(decoder: Decoder | None, reason: str) -> str:
    """Return why drafts cannot be verified, given the result of choose_decoder; "" if they can."""
    if decoder is not None and not decoder.agrees():
        return "this processor rounds a pass of several tokens differently, which could change the text"
    if decoder is not None and not decoder.together:
        return (
            "this processor reads bfloat16 weights anew for each token of a draft, which gains nothing; "
            "numba (pip install numba), DTYPE=float32 and QUANTIZE=int8 gain by it"
        )
    return reason


def texts(
    model: Model | Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    sampling: Sampling,
    seed: int,
    count: int,
    first: int = 0,
    lookup: bool = False,
    on_slide: Callable[[], None] | None = None,
    prefixes: Prefixes | None = None,
) -> Iterator[Iterator[str]]:
    """Yield `count` continuations of the prompt `ids`, each as an iterator over pieces of text, numbered from `first`.

    Text number i depends only on (seed, i). An empty prompt starts at `first_id`. `prefixes` keeps what was read for further
    calls. Raise ValueError if the logits are not finite.
    """
    prefixes = prefixes or Prefixes(most=1)
    for number in range(first, first + count):
        drawn = steps(
            model,
            tokenizer,
            ids,
            sampling=sampling,
            seed=seed,
            number=number,
            lookup=lookup,
            on_slide=on_slide,
            cache=prefixes.cache_for(model, ids),
        )
        yield (step.text for step in drawn)


class Step(NamedTuple):
    """What one token adds to a text: the text that it releases, and the logits (V,) that it was drawn from.

    `token` is None where text follows without a token of its own; the last may be a token that ends the text.
    `finish` is why the text ends: "stop" for one of the strings or tokens that end it, "length" after max_new_tokens;
    else "".
    """

    text: str
    token: int | None = None
    logits: Tensor | None = None
    finish: Literal["", "stop", "length"] = ""


def steps(
    model: Model | Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    sampling: Sampling,
    seed: int,
    number: int = 0,
    lookup: bool = False,
    on_slide: Callable[[], None] | None = None,
    cache: Cache | None = None,
) -> Iterator[Step]:
    """Yield the steps of text number `number` of texts(); the last has a `finish`, unless a caller ends it before.

    `cache` is one of the model's new_cache(), empty or with a beginning of the prompt; None creates one.
    """
    generator = torch.Generator().manual_seed(mix(seed, number))
    decoder = StreamDecoder(tokenizer, stop=sampling.stop)
    if not ids:
        ids = [first_id(tokenizer, generator)]
        if ids[0] != edge(tokenizer):
            yield Step(decoder.push(ids[0]))  # part of the text, perhaps the first byte of a character
    latest: list[Tensor] = []
    drawn = generate(
        model,
        ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        generator=generator,
        vocab_size=tokenizer.vocab_size,
        cache=cache,
        on_slide=on_slide,
        on_logits=lambda logits: latest.__setitem__(slice(None), [logits]),
        lookup=lookup,
    )
    stops = frozenset((*tokenizer.stop_ids, *sampling.stop_ids))
    for token in drawn:
        if token in stops:
            yield Step(decoder.flush(), token, latest[0], "stop")
            return
        yield Step(decoder.push(token), token, latest[0], "stop" if decoder.stopped else "")
        if decoder.stopped:
            return
    text = decoder.flush()  # which may find a stop string that the beginning of another one held back
    yield Step(text, finish="stop" if decoder.stopped else "length")


def first_id(tokenizer: Tokenizer, generator: torch.Generator) -> int:
    """Return the first token of a text without a prompt: the one that begins a text, else the end of text, or if there is
    neither, a token drawn uniformly.
    """
    first = edge(tokenizer)
    if first is not None:
        return first
    return int(torch.randint(tokenizer.vocab_size, (), generator=generator))
