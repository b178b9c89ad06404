"""Open a checkpoint: MODE=inference generates text from it, MODE=resume trains on from it as a child run.

CHECKPOINT_PATH=latest PROMPT="Dear Wren," python3 scripts/load_checkpoint.py
CHECKPOINT_PATH=latest MODE=resume RESUME_TRAINING_STEPS=2000 RESUME_LEARNING_RATE=1e-4 python3 scripts/load_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "MODE", "PROMPT", "MAX_NEW_TOKENS", "TEMPERATURE", "RESUME_TRAINING_STEPS", "RESUME_LEARNING_RATE",
    "Generation", "Training", "Logging", "Hardware and seed", "Checkpoints",
    "TRAINING_DATA_SOURCE", "VALIDATION_FRACTION", "DROPOUT", "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.finding import folder_of
from milepost.ckpt.restore import build_model, build_tokenizer, merged
from milepost.cli import guarded, processes
from milepost.config import Config, ConfigError
from milepost.generate.decoder import Decoder
from milepost.generate.sampling import generate
from milepost.generate.stream import StreamDecoder
from milepost.resume import explain, fixed_settings, let_go, resumed, saved_schedule, saved_settings
from milepost.run import agreed, planned, with_its_base, with_tokenizer
from milepost.runtime import hardware
from milepost.runtime.distributed import World
from milepost.runtime.hardware import mix
from milepost.runtime.optim import Schedule, replan
from milepost.runtime.progress import Log, harmless, ignore_stdout, tell
from milepost.text.tokenization import Tokenizer, UnknownCharacters
from models import Model, adapter_counts
from models.gpt2 import GPT2
from training import train


def main(settings: Config, log: Log) -> int:
    """Does what MODE says with the checkpoint that CHECKPOINT_PATH means; returns the exit code."""
    resuming = settings.mode == "resume"
    if config.torchrun() and not resuming:
        raise ConfigError(["MODE=inference is the work of one process: start it without torchrun"])
    with processes(settings, log) as world:
        found = agreed(lambda: opened(settings, log, resuming=resuming), world)
        assert found is not None  # `opened` raises
        record = with_tokenizer(found, settings, log)
        for note in record.notes:
            log(note)
        settings = obey(record, settings, log)
        return resume(settings, record, log, world) if resuming else infer(settings, record, log)


def opened(settings: Config, log: Log, *, resuming: bool) -> Checkpoint:
    """The checkpoint that is meant, every byte of it checked before a resume; of `latest`, the newest that passes."""
    path, notes = ckpt.resolve(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    while True:
        try:
            return ckpt.load(path, optimizer=resuming, verify=resuming)
        except CheckpointError as error:
            earlier = previous(path, Path(settings.checkpoint_dir)) if settings.checkpoint_path == "latest" else None
            if earlier is None:
                raise
            log(f"skipped: {error}")
            log(f"taking {earlier}")
            path = earlier


def previous(path: Path, folder: Path) -> Path | None:
    """The readable checkpoint of `folder` that was saved before the one at `path`."""
    readable = [one.path for one in ckpt.find(folder) if one.problem is None]
    return readable[readable.index(path) - 1] if path in readable[1:] else None


def obey(record: Checkpoint, settings: Config, log: Log) -> Config:
    """The settings without what contradicts the checkpoint's model and tokenizer: an env file's is ignored with a line.

    Raises ConfigError if it was given in the process environment: somebody meant it.
    """
    meant: list[tuple[str, str]] = []
    ignored: list[tuple[str, str]] = []
    for name, given, saved in config.contradictions(settings, fixed_settings(record)):
        problem = f"{name}={given} ({settings.sources[name]}): the checkpoint has {saved}"
        (meant if settings.sources[name] == "environment" else ignored).append((name, problem))
    if meant:
        raise ConfigError([f"{problem}; unset {name}" for name, problem in meant])
    for _, problem in ignored:
        log(f"{problem}, which is taken")
    return config.without(settings, [name for name, _ in ignored])


# ---------------------------------------------------------------------------------------------------------------------
# MODE=inference


def infer(settings: Config, record: Checkpoint, log: Log) -> int:
    """Prompt and continuation to stdout, everything else to stderr."""
    prompt = read_prompt(settings)
    try:
        for pieces in texts_of(settings, record, log, prompt=prompt, seed=drawn_seed(settings)):
            show(itertools.chain([prompt], pieces), stream=settings.stream)
    except BrokenPipeError:
        ignore_stdout()  # whoever read has enough, as `| head` does
    return 0


def drawn_seed(settings: Config) -> int:
    """SAMPLE_SEED, or one that is drawn now."""
    return int.from_bytes(os.urandom(4), "little") if settings.sample_seed is None else settings.sample_seed


def texts_of(settings: Config, record: Checkpoint, log: Log, *, prompt: str, seed: int) -> Iterator[Iterator[str]]:
    """What the record's model makes of the prompt, NUM_SAMPLES times: the pieces of each text, to be read before the next one's.

    Raises CheckpointError if its logits are not finite.
    """
    record = with_its_base(record, settings, log)
    for count in adapter_counts({name: tensor.shape for name, tensor in record.model_state.items()}).values():
        log(f"Loaded {count}")
    record = merged(record)
    device = hardware.choose_device(settings.device)
    model, tokenizer = build_model(record, device=device, shared=True).eval(), build_tokenizer(record)
    ids = encode_prompt(tokenizer, prompt, settings)
    fast, lookup = what_generates(model, settings, device, log, prompt_tokens=len(ids))
    form = getattr(fast, "weights", "float32")  # a model that is no Decoder computes in its own
    kind = f"{record.model_type} at step {record.step}, {tokenizer.kind} tokenizer"
    log(f"{record.path}: {kind}, on {device.type} in {form}; SAMPLE_SEED={seed}")
    slid: set[str] = set()
    for number in range(settings.num_samples):
        if settings.num_samples > 1:
            log(f"sample {number + 1} of {settings.num_samples}")
        pieces = text_of(
            fast,
            tokenizer,
            ids,
            generator=torch.Generator().manual_seed(mix(seed, number)),
            settings=settings,
            lookup=lookup,
            on_slide=lambda: slid.add("once"),
        )
        yield blamed(pieces, record)
    if slid:  # told now, because on a terminal it would stand in the middle of the text
        log(f"the text outgrew the model's {model.settings.block_size} tokens; from there on it saw only the latest")


def blamed(pieces: Iterator[str], record: Checkpoint) -> Iterator[str]:
    """The pieces, with logits that are not finite told as the checkpoint's fault."""
    try:
        yield from pieces
    except ValueError as error:
        raise CheckpointError(f"{record.path}: {error}") from error


def what_generates(
    model: Model, settings: Config, device: torch.device, log: Log, *, prompt_tokens: int
) -> tuple[Model | Decoder, bool]:
    """What generates, and whether it verifies drafts: a Decoder where that pays, else the model itself.

    Raises ConfigError if QUANTIZE cannot be followed.
    """
    tokens = prompt_tokens + settings.max_new_tokens * settings.num_samples
    weights, reason = weights_for(model, settings, device, tokens=tokens)
    if reason and settings.quantize != "none":
        raise ConfigError([f"QUANTIZE={settings.quantize} is for a GPT-2 on a CPU: {reason}; set QUANTIZE=none"])
    lookup = settings.speculate == "lookup"
    fast: Model | Decoder = model
    if isinstance(model, GPT2) and not reason:
        fast = decoder = Decoder(model, weights=weights)
        if lookup and not decoder.agrees():
            reason = "this processor rounds a pass of several tokens in another way, which could change the text"
    if lookup and reason:
        log(f"SPECULATE=lookup is not used: {reason}")
    return fast, lookup and not reason


def weights_for(model: Model, settings: Config, device: torch.device, *, tokens: int) -> tuple[str, str]:
    """The format in which a Decoder keeps the weights, and if there should be none, the reason. Raises DeviceError for a DTYPE that
    the device does not compute in."""
    width = getattr(model.settings, "n_embd", 0)
    hardware.choose_dtype(settings.dtype, device, width=width)
    if not isinstance(model, GPT2):
        return "", "a bigram model has no matrices"
    if model.settings.ttt is not None:
        return "", "TTT layers learn from each token, and cannot take it back"
    if device.type != "cpu":
        return "", f"this runs on {device.type}"
    if settings.quantize != "none":
        return settings.quantize, ""
    weights = hardware.decode_dtype(settings.dtype, device, width=width, tokens=tokens)
    if weights == "float32" and width < hardware.BFLOAT16_DECODE_WIDTH:
        return "", f"a model of N_EMBD={width} spends its time elsewhere"
    return weights, ""


def encode_prompt(tokenizer: Tokenizer, prompt: str, settings: Config) -> list[int]:
    """The prompt's tokens; raises ConfigError naming the characters that the checkpoint's vocabulary lacks."""
    try:
        return tokenizer.encode(prompt)
    except UnknownCharacters as error:
        name = "PROMPT" if settings.prompt_file is None else f"PROMPT_FILE={settings.prompt_file}"
        raise ConfigError([f"{name}: {error}; leave them out, the model has never seen them"]) from error


def read_prompt(settings: Config) -> str:
    """The prompt from its variable, from a file, or from stdin (PROMPT_FILE=-); empty if none is given."""
    if settings.prompt_file is None:
        return settings.prompt or ""
    try:
        data = sys.stdin.buffer.read() if settings.prompt_file == "-" else Path(settings.prompt_file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"PROMPT_FILE={settings.prompt_file}: is not UTF-8 at byte {error.start}; save it as UTF-8"]
        ) from error
    except OSError as error:
        raise ConfigError(
            [f"PROMPT_FILE={settings.prompt_file}: cannot be read ({error.strerror}); name a text file, or - for stdin"]
        ) from error


def text_of(
    model: Model | Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    generator: torch.Generator,
    settings: Config,
    lookup: bool,
    on_slide: Callable[[], None],
) -> Iterator[str]:
    """What follows the prompt's `ids`, piece by piece as far as it may be shown; without a prompt, from its first token on."""
    decoder = StreamDecoder(tokenizer, stop=settings.stop)
    if not ids:
        ids = [first_id(tokenizer, generator)]
        if ids[0] != tokenizer.end_of_text:
            yield decoder.push(ids[0])  # a part of the text, perhaps the first byte of a character
    drawn = generate(
        model,
        ids,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        generator=generator,
        vocab_size=tokenizer.vocab_size,
        stop_ids=() if tokenizer.end_of_text is None else (tokenizer.end_of_text,),
        on_slide=on_slide,
        lookup=lookup,
    )
    for one in drawn:
        yield decoder.push(one)
        if decoder.stopped:
            return
    yield decoder.flush()


def first_id(tokenizer: Tokenizer, generator: torch.Generator) -> int:
    """Where a text without a prompt begins: <|endoftext|>, or without one a token drawn by SAMPLE_SEED."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    return int(torch.randint(tokenizer.vocab_size, (), generator=generator))


def show(pieces: Iterator[str], *, stream: bool) -> None:
    """Writes the pieces and a last newline to stdout; on a terminal, nothing in them can steer it."""
    clean = harmless if sys.stdout.isatty() else str
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    for piece in pieces if stream else ["".join(pieces)]:
        sys.stdout.write(clean(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# MODE=resume

# What the plan of the added steps does not look at; keeping the saved one, it looks at nothing.
UNUSED = ("LEARNING_RATE", "TRAINING_STEPS")
UNUSED_KEEPING = (*UNUSED, "LR_SCHEDULE", "MIN_LEARNING_RATE", "WARMUP_STEPS")


def resume(settings: Config, record: Checkpoint, log: Log, world: World) -> int:
    """Trains RESUME_TRAINING_STEPS more steps; with 0 it prints what it would do and stops."""
    for name in filter(settings.is_set, UNUSED_KEEPING if settings.resume_learning_rate == "keep" else UNUSED):
        log(f"{name} is not used: MODE=resume follows RESUME_LEARNING_RATE and RESUME_TRAINING_STEPS")
    schedule = plan(settings, record)
    end = record.step + settings.resume_training_steps
    run, restored = resumed(settings, record, log, world, schedule=schedule, end=end)
    run.settings = config.replaced(run.settings, "plan", **destination(settings, record))
    tell(explain(run, record, restored))
    let_go(record)
    if settings.resume_training_steps == 0:
        log("RESUME_TRAINING_STEPS=0: nothing is trained")
        return 0
    return train(run)


def destination(settings: Config, record: Checkpoint) -> dict[str, Any]:
    """Where the result is saved, asked for or not: in CHECKPOINT_DIR if it is given, else beside the checkpoint."""
    saves = {} if settings.is_set("ENABLE_CHECKPOINTS") else {"enable_checkpoints": True}
    if settings.is_set("CHECKPOINT_DIR") or record.path is None:
        return saves
    return saves | {"checkpoint_dir": str(folder_of(record.path, record.run_id))}


def plan(settings: Config, record: Checkpoint) -> Schedule:
    """The learning rates of the added steps: the run's kind of schedule anew from RESUME_LEARNING_RATE, or with `keep` the saved one.

    No second warm-up unless WARMUP_STEPS is given, and the floor keeps its ratio to the peak unless MIN_LEARNING_RATE is given.
    Raises ConfigError if that is above the peak.
    """
    saved = saved_schedule(record) if record.schedule else planned(config.from_saved(settings, saved_settings(record)))
    if settings.resume_learning_rate == "keep":
        return saved
    new = replan(
        saved,
        peak=float(settings.resume_learning_rate),
        start_step=record.step,
        steps=max(1, settings.resume_training_steps),
        warmup_steps=settings.warmup_steps if settings.is_set("WARMUP_STEPS") else 0,
    )
    given = {"lr_schedule": "kind", "min_learning_rate": "floor"}
    new = dataclasses.replace(
        new, **{field: getattr(settings, name) for name, field in given.items() if settings.is_set(name.upper())}
    )
    if new.floor > new.peak:
        problem = f"MIN_LEARNING_RATE={new.floor:g} is above RESUME_LEARNING_RATE={new.peak:g}"
        raise ConfigError([f"{problem}: set a lower MIN_LEARNING_RATE"])
    return new


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
