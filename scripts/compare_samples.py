"""Draw texts from several checkpoints with one prompt and one seed, side by side.

CHECKPOINT_PATH=best,latest PROMPT="Dear Wren," python3 scripts/compare_samples.py
CHECKPOINT_PATH=checkpoints/*_step1000_*.pt SAMPLE_SEED=7 OUTPUT=compared.md python3 scripts/compare_samples.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "PROMPT", "PROMPT_FILE", "NUM_SAMPLES", "SAMPLE_SEED", "OUTPUT", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P",
    "REPETITION_PENALTY", "STOP", "QUANTIZE", "SPECULATE", "DEVICE", "DTYPE", "CHECKPOINT_DIR", "BASE_CHECKPOINT", "GPT2_MODEL_NAME",
    "INIT_FROM", "TRAINING_DATA_SOURCE",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import itertools
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from load_checkpoint import drawn_seed, obey, read_prompt, texts_of

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.run import with_tokenizer
from milepost.runtime.progress import Log, harmless, replacing, shown, tell

NARROWEST = 30  # columns of a text that stands beside another
BETWEEN = " | "
WRITTEN = (".json", ".md")
DRAWN_WITH = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "quantize")


class Sampled(NamedTuple):
    """A checkpoint, and what it made of the prompt: each text with the prompt at its head."""

    record: Checkpoint
    texts: list[str]


def main(settings: Config, log: Log) -> int:
    """Texts of what CHECKPOINT_PATH means to stdout, and to OUTPUT if that is given; returns the exit code."""
    output = Path(settings.output) if settings.output else None
    if output and (output.suffix not in WRITTEN or output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(
            [f"OUTPUT={output}: expected a file whose name ends in .json or .md, in a folder that is there"]
        )
    paths, notes = ckpt.several(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    prompt, seed = read_prompt(settings), drawn_seed(settings)
    sampled = [sample(path, settings, log, prompt=prompt, seed=seed) for path in paths]
    tell(beside(sampled, columns=shutil.get_terminal_size().columns))
    if output:
        write = as_json if output.suffix == ".json" else as_markdown
        with replacing(output) as temporary:
            temporary.write_text(write(sampled, settings, prompt=prompt, seed=seed), encoding="utf-8")
        log(f"written: {shown(output)}")
    return 0


def sample(path: Path, settings: Config, log: Log, *, prompt: str, seed: int) -> Sampled:
    """NUM_SAMPLES texts of one checkpoint, those that scripts/load_checkpoint.py draws with the same settings."""
    record = with_tokenizer(ckpt.load(path, optimizer=False), settings, log)
    for note in record.notes:
        log(note)
    drawn = texts_of(obey(record, settings, log), record, log, prompt=prompt, seed=seed)
    return Sampled(record, [prompt + "".join(pieces) for pieces in drawn])


# ---------------------------------------------------------------------------------------------------------------------
# On the terminal.


def beside(sampled: list[Sampled], *, columns: int) -> str:
    """All texts in columns, or one after another if they would be narrow; nothing in them can steer a terminal."""
    width = (columns - len(BETWEEN) * (len(sampled) - 1)) // len(sampled)
    if width < NARROWEST:
        return "\n\n".join("\n".join(itertools.chain(*parts(one, width=columns))) for one in sampled)
    rows = (
        itertools.zip_longest(*same, fillvalue="")
        for same in zip(*(parts(one, width=width) for one in sampled), strict=True)
    )
    return "\n".join(BETWEEN.join(line.ljust(width) for line in row).rstrip() for row in itertools.chain(*rows))


def parts(one: Sampled, *, width: int) -> list[list[str]]:
    """The lines of a checkpoint's heading and of each of its texts, at most `width` characters each."""
    name = one.record.path.name if one.record.path else ""
    heading = [*wrapped(title(one.record), width), *wrapped(name, width)]
    return [heading, *(["-" * width, *wrapped(text, width)] for text in one.texts)]


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, broken where they are longer than `width`."""
    lines = harmless(text).expandtabs(4).splitlines()
    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]]


def title(record: Checkpoint) -> str:
    """Model, step and, if it was measured there, the validation loss."""
    loss = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f}"
    return f"{record.model_type} at step {record.step}{loss}"


# ---------------------------------------------------------------------------------------------------------------------
# Into a file.


def as_json(sampled: list[Sampled], settings: Config, *, prompt: str, seed: int) -> str:
    """Prompt, seed and settings, and for each checkpoint who it is and its texts."""
    checkpoints = [
        {
            "path": str(one.record.path), "model_type": one.record.model_type, "step": one.record.step, "run_id": one.record.run_id,
            "validation_loss": one.record.validation_loss, "texts": one.texts,
        }
        for one in sampled
    ]  # fmt: skip
    values = {"prompt": prompt, "sample_seed": seed} | drawn_with(settings) | {"checkpoints": checkpoints}
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def as_markdown(sampled: list[Sampled], settings: Config, *, prompt: str, seed: int) -> str:
    """A heading for each checkpoint with its texts below, each in a fence that nothing in it can end."""
    how = ", ".join(f"{name.upper()}={value}" for name, value in drawn_with(settings).items())
    parts = [f"# Samples\n\nSAMPLE_SEED={seed}, {how}. Prompt:\n\n{fenced(prompt)}"]
    for one in sampled:
        parts += [f"## {title(one.record)}\n\n`{one.record.path}`", *map(fenced, one.texts)]
    return "\n\n".join(parts) + "\n"


def drawn_with(settings: Config) -> dict[str, Any]:
    """The settings that decide the texts, besides prompt and seed."""
    return {name: getattr(settings, name) for name in DRAWN_WITH}


def fenced(text: str) -> str:
    """A text as Markdown shows it letter by letter (CommonMark 0.31, 4.5: a longer fence holds a shorter one)."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
