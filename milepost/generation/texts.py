"""Continue a prompt: choose what computes the logits, draw tokens, and decode them to text as they arrive."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from milepost.generation.decoder import Decoder, decoder_of
from milepost.generation.sampling import generate
from milepost.generation.stream import StreamDecoder
from milepost.runtime import hardware
from milepost.splitmix import mix
from milepost.text.tokenization.base import Tokenizer
from models.model import Model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, as in sampling.generate, and the strings and tokens that end a text."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None  # None: those of the tokenizer


def choose_decoder(
    model: Model, *, device: torch.device, dtype: str, quantize: str, tokens: int
) -> tuple[Decoder | None, str]:
    """Return the fast decoder if it pays for generating `tokens` tokens; else None, and the reason.

    `quantize` is the dtype of its weights, or "none" to choose one by `dtype`. Raise DeviceError for a dtype that the
    device does not support.
    """
    width = getattr(model.settings, "n_embd", 0)
    hardware.choose_dtype(dtype, device, width=width)
    build, reason = decoder_of(model)
    if build is None:
        return None, reason
    if device.type != "cpu":
        return None, f"this runs on {device.type}"
    if quantize != "none":
        return build(model, weights=quantize), ""
    weights = hardware.decode_dtype(dtype, device, width=width, tokens=tokens)
    if weights == "float32" and width < hardware.BFLOAT16_DECODE_WIDTH:
        return None, f"a model with an embedding dimension of {width} spends its time elsewhere"
    return build(model, weights=weights), ""


def no_lookup_reason(decoder: Decoder | None, reason: str) -> str:
    """Return why drafts cannot be verified, given the result of choose_decoder; "" if they can."""
    if decoder is not None and not decoder.agrees():
        return "this processor rounds a pass of several tokens differently, which could change the text"
    return reason


def texts(
    model: Model | Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    sampling: Sampling,
    seed: int,
    count: int,
    lookup: bool = False,
    on_slide: Callable[[], None] | None = None,
) -> Iterator[Iterator[str]]:
    """Yield `count` continuations of the prompt `ids`, each as an iterator over pieces of text.

    Text number i depends only on (seed, i). An empty prompt starts at `first_id`. Raise ValueError if the logits are
    not finite.
    """
    for number in range(count):
        generator = torch.Generator().manual_seed(mix(seed, number))
        yield _text(model, tokenizer, ids, sampling, generator=generator, lookup=lookup, on_slide=on_slide)


def _text(
    model: Model | Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    *,
    generator: torch.Generator,
    lookup: bool,
    on_slide: Callable[[], None] | None,
) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer, stop=sampling.stop)
    if not ids:
        ids = [first_id(tokenizer, generator)]
        if ids[0] != tokenizer.end_of_text:
            yield decoder.push(ids[0])  # part of the text, perhaps the first byte of a character
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
        stop_ids=tokenizer.stop_ids if sampling.stop_ids is None else sampling.stop_ids,
        on_slide=on_slide,
        lookup=lookup,
    )
    for token in drawn:
        yield decoder.push(token)
        if decoder.stopped:
            return
    yield decoder.flush()


def first_id(tokenizer: Tokenizer, generator: torch.Generator) -> int:
    """Return the first token of a text without a prompt: the end of text, or if there is none,
    a token drawn uniformly.
    """
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    return int(torch.randint(tokenizer.vocab_size, (), generator=generator))
