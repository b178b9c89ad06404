"""Checkpoints opened to generate, and texts as the settings ask: what the scripts that generate share."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch

from milepost import ckpt, config
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.restore import build_model, build_tokenizer, merged, with_base
from milepost.ckpt.tensors import digest
from milepost.config import Config, ConfigError
from milepost.config.variables import DIRECT_SOURCES
from milepost.generation.conversation import answer_stops, message_ids
from milepost.generation.decoder import Decoder
from milepost.generation.texts import Sampling, choose_decoder, no_lookup_reason, texts
from milepost.resume import fixed_settings
from milepost.run import completed, first_token_problem, refused, with_its_base
from milepost.runtime import hardware
from milepost.runtime.progress import Log
from milepost.text.blocks import decoded, normalized, not_decoded
from milepost.text.errors import UnknownCharacters
from milepost.text.known import has_carriage_returns
from milepost.text.templates import NO_TEMPLATE, template_of
from milepost.text.tokenization import Tokenizer
from milepost.text.unknown import Mode, lenient, occurrences, told, unknown_characters
from models import adapter_counts, adapter_kind
from models.model import Model

PROMPT_LIMIT = 1 << 26  # bytes: a model reads no more than its context, and a prompt is held in memory
MANY = 1 << 20  # tokens of a conversation or a server: as many as pay for preparing the weights


def drop_conflicts(record: Checkpoint, settings: Config, log: Log) -> Config:
    """Return the settings without those that contradict the checkpoint's model and tokenizer; log each one dropped.

    Raise ConfigError if one was set for this very run, where it was surely intended.
    """
    refused: list[str] = []
    dropped: list[str] = []
    for name, requested, saved in config.contradictions(settings, fixed_settings(record)):
        problem = (
            f"{name}={requested} ({settings.sources[name]}): the checkpoint has {'none' if saved is None else saved}"
        )
        if settings.sources[name] in DIRECT_SOURCES:
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


class Loaded(NamedTuple):
    """A checkpoint that is ready to generate: its record with its base and merged adapters, and what continues texts.

    `base` is the record without adapters, over which others can be opened. `adapted` is whether the record has adapters.
    """

    record: Checkpoint
    base: Checkpoint
    model: Model
    tokenizer: Tokenizer
    generator: Model | Decoder
    lookup: bool
    adapted: bool

    @property
    def template(self) -> str | None:
        """The chat template of the model, as `template_of` returns it."""
        return template_of(self.record.data, self.tokenizer)

    @property
    def dtype(self) -> str:
        """The dtype of the weights that generate."""
        return self.generator.weights if isinstance(self.generator, Decoder) else "float32"


def open_named(name: str, settings: Config, log: Log, *, bases: Iterable[Checkpoint] = ()) -> Loaded:
    """Return the checkpoint that `name` selects, as CHECKPOINT_PATH does, ready to generate many texts.

    If it holds only adapters over one of `bases`, they are put over that record, and nothing else is read.
    """
    record = ckpt.load_named(name, Path(settings.checkpoint_dir), say=log, optimizer=False)
    needed = (record.base or {}).get("sha256") if record.adapters_only else None
    base = next((base for base in bases if digest(base.model_state) == needed), None) if needed else None
    record = completed(with_base(record, base) if base else record, settings, log)
    for note in record.notes:
        log(note)
    loaded = opened(drop_conflicts(record, settings, log), record, log, tokens=MANY)
    return loaded._replace(base=base) if base else loaded


def opened(settings: Config, record: Checkpoint, log: Log, *, tokens: int, prompt: str = "", name: str = "") -> Loaded:
    """Return the record ready to generate about `tokens` tokens after `prompt`, with which a device is checked; `name` is what to call it."""
    record = with_its_base(record, settings, log)
    counts = adapter_counts({name: tensor.shape for name, tensor in record.model_state.items()}).values()
    for count in counts:
        log(f"Loaded {count}")
    base, record = without_adapters(record), merged(record)
    device = hardware.choose_device(settings.device)
    model, tokenizer = build_model(record, device=device, shared=True).eval(), build_tokenizer(record)
    text = prompt_for(record, prompt)
    ids = encoder_for(tokenizer, text, settings, log, name=name).encode(text)
    check_device(record, model, ids or [0], settings, device=device)
    generator, lookup = _choose_generator(model, settings, device, log, tokens=len(ids) + tokens)
    return Loaded(record, base, model, tokenizer, generator, lookup, adapted=bool(counts))


def without_adapters(record: Checkpoint) -> Checkpoint:
    """Return a whole record's weights without its adapters: those of the base, if it was frozen."""
    state = {name: tensor for name, tensor in record.model_state.items() if adapter_kind(name) is None}
    settings = {name: value for name, value in record.model_settings.items() if name not in ("lora", "ttt")}
    left_out = ["adapters"] if len(state) < len(record.model_state) else []
    return dataclasses.replace(
        record, model_state=state, model_settings=settings, base=None, parts=["model"], notes=[], left_out=left_out
    )


def sample_texts(
    settings: Config, record: Checkpoint, log: Log, *, prompt: str, seed: int
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield NUM_SAMPLES texts, each as the prompt that it continues and an iterator over its pieces, to be read before the next.

    A model of conversations answers the prompt instead, and the text that it continues is empty. Raise CheckpointError if the
    model's logits are not finite.
    """
    tokens = settings.max_new_tokens * settings.num_samples
    name = "PROMPT" if settings.prompt_file is None else f"PROMPT_FILE={settings.prompt_file}"
    loaded = opened(settings, record, log, tokens=tokens, prompt=prompt, name=name)
    device = next(loaded.model.parameters()).device
    what = f"{record.model_type} at step {record.step}, {loaded.tokenizer.kind} tokenizer"
    log(f"{record.path}: {what}, on {device.type} in {loaded.dtype}; SAMPLE_SEED={seed}")
    slid: set[bool] = set()
    asked = bool(prompt) and not settings.raw_prompt and loaded.template != NO_TEMPLATE
    if asked:
        log("the prompt is a user's turn that the model answers; RAW_PROMPT=true continues it as a text")
    ids, how = (_question if asked else _beginning)(loaded, settings, prompt)
    before = "" if asked else prompt_for(record, prompt)
    drawn = texts(
        loaded.generator,
        loaded.tokenizer,
        ids,
        sampling=how,
        seed=seed,
        count=settings.num_samples,
        lookup=loaded.lookup,
        on_slide=lambda: slid.add(True),
    )
    for number, pieces in enumerate(drawn, 1):
        if settings.num_samples > 1:
            log(f"sample {number} of {settings.num_samples}")
        yield before, blame_checkpoint(pieces, record)
    if slid:  # not while the text is shown: on a terminal the line would break it
        log(f"the context window of {loaded.model.settings.block_size} tokens was full; the oldest tokens were dropped")


def check_device(record: Checkpoint, model: Model, ids: list[int], settings: Config, *, device: torch.device) -> None:
    """Raise DeviceError if the first token's logits come out otherwise on the device than on the CPU."""
    if device.type == "cpu" or not settings.device_check:
        return
    reference = build_model(record, device=torch.device("cpu"), shared=True).eval()
    if problem := first_token_problem(model, reference, ids):
        raise refused(device, problem)


def sampling(settings: Config) -> Sampling:
    """Return how the settings ask tokens to be drawn."""
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        stop=settings.stop,
    )


def _beginning(loaded: Loaded, settings: Config, prompt: str) -> tuple[list[int], Sampling]:
    """Return the tokens of a text that is continued, and how tokens are drawn after them."""
    text = prompt_for(loaded.record, prompt)
    return encoder_for(loaded.tokenizer, text, settings).encode_whole(text), sampling(settings)


def _question(loaded: Loaded, settings: Config, prompt: str) -> tuple[list[int], Sampling]:
    """Return the tokens of a user's turn up to where its answer begins, and how the answer is drawn and ends."""
    text, how = prompt_for(loaded.record, prompt), sampling(settings)
    encoder = encoder_for(loaded.tokenizer, text, settings)
    ids, strings = answer_stops(loaded.tokenizer, loaded.template)
    asked = message_ids([{"role": "user", "content": text}], encoder, loaded.template)
    return asked, dataclasses.replace(how, stop=(*how.stop, *strings), stop_ids=ids)


def encoder_for(
    tokenizer: Tokenizer,
    prompt: str,
    settings: Config,
    log: Callable[[str], object] = lambda line: None,
    *,
    name: str = "the text",
) -> Tokenizer:
    """Return what encodes the prompt, without characters that the vocabulary lacks if UNKNOWN_CHARACTERS says so.

    Raise ConfigError with these characters if they are refused.
    """
    unknown = unknown_characters(tokenizer, prompt)
    if not unknown:
        return tokenizer
    try:
        encoder, done = lenient(tokenizer, unknown, cast(Mode, settings.unknown_characters))
    except UnknownCharacters as error:
        remedy = "remove them, the model has never seen them, or set UNKNOWN_CHARACTERS=skip or replace"
        raise ConfigError([f"{name}: {error}; {remedy}"]) from error
    log(f"{name}: {told(occurrences([(prompt, True)], unknown), done)}")
    return encoder


def _choose_generator(
    model: Model, settings: Config, device: torch.device, log: Log, *, tokens: int
) -> tuple[Model | Decoder, bool]:
    """Return the decoder, or the model itself where a decoder does not pay, and whether it verifies drafts.

    Raise ConfigError if QUANTIZE cannot be applied.
    """
    decoder, reason = choose_decoder(
        model, device=device, dtype=settings.dtype, quantize=settings.quantize, tokens=tokens, log=log
    )
    if decoder is None and settings.quantize != "none":
        raise ConfigError([f"QUANTIZE={settings.quantize} needs a fast decoder: {reason}; set QUANTIZE=none"])
    if settings.speculate == "lookup":
        reason = no_lookup_reason(decoder, reason)
        if reason:
            log(f"SPECULATE=lookup is not used: {reason}")
    return decoder or model, settings.speculate == "lookup" and not reason


def blame_checkpoint(pieces: Iterator[str], record: Checkpoint) -> Iterator[str]:
    """Yield the pieces. Logits that are not finite are the checkpoint's fault."""
    try:
        yield from pieces
    except ValueError as error:
        raise CheckpointError(f"{record.path}: {error}") from error
