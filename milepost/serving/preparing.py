"""From what a request asks for to the work that the generating thread does: its text as tokens, and how to sample."""

import dataclasses
import os

from milepost.generation.conversation import answer_stops, message_ids
from milepost.generation.texts import Sampling
from milepost.samples import prompt_for
from milepost.serving.catalogue import Served
from milepost.serving.faults import ApiError, invalid
from milepost.serving.pieces import Work
from milepost.serving.requests import Asked, Prompt
from milepost.text.errors import UnknownCharacters
from milepost.text.templates import TemplateError
from milepost.text.tokenization.base import Tokenizer
from milepost.text.unknown import Mode, lenient, unknown_characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds where a request does not say: how to sample, and the seed (None: random)."""

    sampling: Sampling
    seed: int | None
    unknown: Mode


def work_for(asked: Asked, served: Served, defaults: Defaults) -> Work:
    """Return the work that a request asks for. Raise ApiError for a text that the model cannot read."""
    loaded = served.loaded
    sampling = dataclasses.replace(defaults.sampling, **asked.sampling)
    if asked.messages is None:
        prompts = [_prompt_ids(prompt, served, defaults.unknown) for prompt in asked.prompts]
    else:
        prompts = [_message_ids(asked, served, defaults.unknown)]
        ids, strings = answer_stops(loaded.tokenizer, loaded.template)
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *strings), stop_ids=ids)
    for prompt in prompts:
        check_length(len(prompt), served, "prompt" if asked.messages is None else "messages")
    seeds = (asked.seed, defaults.seed, int.from_bytes(os.urandom(4), "little"))
    return Work(
        model=loaded.model,
        generator=loaded.generator,
        lookup=loaded.lookup,
        tokenizer=loaded.tokenizer,
        prompts=prompts,
        sampling=sampling,
        seed=next(seed for seed in seeds if seed is not None),
        n=asked.n,
        logprobs=asked.logprobs,
        echo=asked.echo,
    )


def check_length(count: int, served: Served, param: str) -> None:
    """Raise ApiError if so many tokens are more than the context."""
    context = served.loaded.model.settings.block_size
    if count > context:
        problem = f"the prompt has {count} tokens, but the context of {served.name} is {context} tokens"
        raise invalid(f"{problem}; send a shorter text", param, code="context_length_exceeded")


def _prompt_ids(prompt: Prompt, served: Served, unknown: Mode) -> list[int]:
    tokenizer = served.loaded.tokenizer
    if isinstance(prompt, list):
        if largest := max((i for i in prompt if i >= tokenizer.vocab_size), default=0):
            raise invalid(f"prompt: token {largest} is outside the vocabulary of {tokenizer.vocab_size}", "prompt")
        return prompt
    text = prompt_for(served.loaded.record, prompt)
    return _encoder(tokenizer, text, unknown, "prompt").encode_whole(text)


def _message_ids(asked: Asked, served: Served, unknown: Mode) -> list[int]:
    loaded = served.loaded
    if not served.chats:
        problem = f"{served.name} has no chat template: it was not trained on conversations"
        raise ApiError(400, f"{problem}; use /v1/completions", code="no_chat_template", param="model")
    messages = [dict(each, content=prompt_for(loaded.record, each["content"])) for each in asked.messages or ()]
    encoder = _encoder(loaded.tokenizer, "".join(each["content"] for each in messages), unknown, "messages")
    try:
        return message_ids(messages, encoder, loaded.template)
    except (TemplateError, UnknownCharacters) as error:
        raise invalid(f"messages: {error}", "messages") from error


def _encoder(tokenizer: Tokenizer, text: str, mode: Mode, param: str) -> Tokenizer:
    """Return what encodes the text; raise ApiError if it has characters that are refused."""
    unknown = unknown_characters(tokenizer, text)
    try:
        return lenient(tokenizer, unknown, mode)[0] if unknown else tokenizer
    except UnknownCharacters as error:
        remedy = "remove them, or start the server with UNKNOWN_CHARACTERS=skip or replace"
        raise invalid(f"{param}: {error}; {remedy}", param) from error
