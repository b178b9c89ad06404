"""Texts generated from a checkpoint as the settings ask: what load_checkpoint.py and compare_samples.py share."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import cast

import torch

from milepost import config
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.restore import build_model, build_tokenizer, merged
from milepost.config import Config, ConfigError
from milepost.generation.decoder import Decoder
from milepost.generation.texts import Sampling, choose_decoder, no_lookup_reason, texts
from milepost.resume import fixed_settings
from milepost.run import first_token_problem, refused, template_of, with_its_base
from milepost.runtime import hardware
from milepost.runtime.progress import Log
from milepost.text.blocks import decoded, normalized, not_decoded
from milepost.text.errors import UnknownCharacters
from milepost.text.known import has_carriage_returns
from milepost.text.templates import chat_ids, chat_stops
from milepost.text.tokenization import Tokenizer
from milepost.text.unknown import Mode, lenient, occurrences, told, unknown_characters
from models import adapter_counts
from models.model import Model

PROMPT_LIMIT = 1 << 26  # bytes: a model reads no more than its context, and a prompt is held in memory


def drop_conflicts(record: Checkpoint, settings: Config, log: Log) -> Config:
    """Return the settings without those that contradict the checkpoint's model and tokenizer; log each one dropped.

    Raise ConfigError if one was set in the process environment, where it was surely intended.
    """
    refused: list[str] = []
    dropped: list[str] = []
    for name, requested, saved in config.contradictions(settings, fixed_settings(record)):
        problem = f"{name}={requested} ({settings.sources[name]}): the checkpoint has {saved}"
        if settings.sources[name] == "environment":
            refused.append(f"{problem}; unset {name}")
        else:
            dropped.append(name)
            log(f"{problem}, which is used")
    if refused:
        raise ConfigError(refused)
    return config.without(settings, dropped)


def read_prompt(settings: Config) -> str:
    """Return the prompt of PROMPT, of the file PROMPT_FILE, or of stdin (PROMPT_FILE=-); empty if none is set."""
    return (settings.prompt or "") if settings.prompt_file is None else _read_prompt_file(settings.prompt_file)


def prompt_for(record: Checkpoint, prompt: str) -> str:
    """Return the prompt with normalized line ends, as a training text has them, unless the vocabulary has carriage returns."""
    return prompt.removeprefix("\ufeff") if has_carriage_returns(record.tokenizer) else normalized(prompt)


def is_question(record: Checkpoint, settings: Config, prompt: str) -> bool:
    """Return whether the prompt is a user's turn that the model answers: it was trained on conversations."""
    return bool(prompt) and "template" in record.data and not settings.raw_prompt


def _read_prompt_file(name: str) -> str:
    """Return the text of a file, or of stdin for `-`. Raise ConfigError if it is not text or has more than PROMPT_LIMIT bytes."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(PROMPT_LIMIT + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(PROMPT_LIMIT + 1)
        if len(data) <= PROMPT_LIMIT:
            return decoded(data)
        problem = f"has more than {PROMPT_LIMIT:,} bytes; set a shorter text"
    except UnicodeDecodeError as error:
        problem = not_decoded(error)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); set a text file, or - for stdin"
    raise ConfigError([f"PROMPT_FILE={name}: {problem}"])


def sample_seed(settings: Config) -> int:
    """Return SAMPLE_SEED, or a random seed if it is not set."""
    return int.from_bytes(os.urandom(4), "little") if settings.sample_seed is None else settings.sample_seed


def sample_texts(settings: Config, record: Checkpoint, log: Log, *, prompt: str, seed: int) -> Iterator[Iterator[str]]:
    """Yield NUM_SAMPLES continuations of the prompt, each as an iterator over pieces, to be read before the next.

    Raise CheckpointError if the model's logits are not finite.
    """
    record = with_its_base(record, settings, log)
    for count in adapter_counts({name: tensor.shape for name, tensor in record.model_state.items()}).values():
        log(f"Loaded {count}")
    record = merged(record)
    device = hardware.choose_device(settings.device)
    model, tokenizer = build_model(record, device=device, shared=True).eval(), build_tokenizer(record)
    encoder = _encoder_for(tokenizer, prompt_for(record, prompt), settings, log)
    ids, stop_ids, stops = encoder.encode(prompt_for(record, prompt)), tuple[int, ...](), tuple[str, ...]()
    if is_question(record, settings, prompt):
        question, template = (
            {"role": "user", "content": prompt_for(record, prompt)},
            template_of(record.data, tokenizer),
        )
        ids = chat_ids([question], encoder, template, answer=True)
        stop_ids, stops = chat_stops(tokenizer, template)
    check_device(record, model, ids, settings, device=device)
    generator, lookup = _choose_generator(model, settings, device, log, prompt_tokens=len(ids))
    dtype = generator.weights if isinstance(generator, Decoder) else "float32"
    what = f"{record.model_type} at step {record.step}, {tokenizer.kind} tokenizer"
    log(f"{record.path}: {what}, on {device.type} in {dtype}; SAMPLE_SEED={seed}")
    slid: set[bool] = set()
    drawn = texts(
        generator,
        tokenizer,
        ids,
        sampling=dataclasses.replace(
            _sampling(settings), stop=(*settings.stop, *stops), stop_ids=(*tokenizer.stop_ids, *stop_ids)
        ),
        seed=seed,
        count=settings.num_samples,
        lookup=lookup,
        on_slide=lambda: slid.add(True),
    )
    for number, pieces in enumerate(drawn, 1):
        if settings.num_samples > 1:
            log(f"sample {number} of {settings.num_samples}")
        yield _blame_checkpoint(pieces, record)
    if slid:  # not while the text is shown: on a terminal the line would break it
        log(f"the context window of {model.settings.block_size} tokens was full; the oldest tokens were dropped")


def check_device(record: Checkpoint, model: Model, ids: list[int], settings: Config, *, device: torch.device) -> None:
    """Raise DeviceError if the first token's logits come out otherwise on the device than on the CPU."""
    if device.type == "cpu" or not settings.device_check:
        return
    reference = build_model(record, device=torch.device("cpu"), shared=True).eval()
    if problem := first_token_problem(model, reference, ids):
        raise refused(device, problem)


def _sampling(settings: Config) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        stop=settings.stop,
    )


def _encoder_for(tokenizer: Tokenizer, prompt: str, settings: Config, log: Log) -> Tokenizer:
    """Return what encodes the prompt, without characters that the vocabulary lacks if UNKNOWN_CHARACTERS says so.

    Raise ConfigError with these characters if they are refused.
    """
    unknown = unknown_characters(tokenizer, prompt)
    if not unknown:
        return tokenizer
    name = "PROMPT" if settings.prompt_file is None else f"PROMPT_FILE={settings.prompt_file}"
    try:
        encoder, done = lenient(tokenizer, unknown, cast(Mode, settings.unknown_characters))
    except UnknownCharacters as error:
        remedy = "remove them, the model has never seen them, or set UNKNOWN_CHARACTERS=skip or replace"
        raise ConfigError([f"{name}: {error}; {remedy}"]) from error
    log(f"{name}: {told(occurrences([(prompt, True)], unknown), done)}")
    return encoder


def _choose_generator(
    model: Model, settings: Config, device: torch.device, log: Log, *, prompt_tokens: int
) -> tuple[Model | Decoder, bool]:
    """Return the decoder, or the model itself where a decoder does not pay, and whether it verifies drafts.

    Raise ConfigError if QUANTIZE cannot be applied.
    """
    tokens = prompt_tokens + settings.max_new_tokens * settings.num_samples
    decoder, reason = choose_decoder(
        model, device=device, dtype=settings.dtype, quantize=settings.quantize, tokens=tokens
    )
    if decoder is None and settings.quantize != "none":
        raise ConfigError([f"QUANTIZE={settings.quantize} needs a fast decoder: {reason}; set QUANTIZE=none"])
    if settings.speculate == "lookup":
        reason = no_lookup_reason(decoder, reason)
        if reason:
            log(f"SPECULATE=lookup is not used: {reason}")
    return decoder or model, settings.speculate == "lookup" and not reason


def _blame_checkpoint(pieces: Iterator[str], record: Checkpoint) -> Iterator[str]:
    """Yield the pieces. Logits that are not finite are the checkpoint's fault."""
    try:
        yield from pieces
    except ValueError as error:
        raise CheckpointError(f"{record.path}: {error}") from error
