"""Generate texts from several checkpoints with the same prompt and seed, side by side.

CHECKPOINT_PATH=best,latest PROMPT="Dear Wren," python3 scripts/compare_samples.py
CHECKPOINT_PATH=checkpoints/*_step1000_*.pt SAMPLE_SEED=7 OUTPUT=compared.md python3 scripts/compare_samples.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "PROMPT", "PROMPT_FILE", "RAW_PROMPT", "NUM_SAMPLES", "SAMPLE_SEED", "OUTPUT", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P",
    "REPETITION_PENALTY", "STOP", "QUANTIZE", "SPECULATE", "DEVICE", "DEVICE_CHECK", "DTYPE", "CHECKPOINT_DIR", "CACHE_GB", "BASE_CHECKPOINT", "GPT2_MODEL_NAME",
    "INIT_FROM", "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "PROMPT_FIELD", "ANSWER_FIELD", "TOKENIZER", "UNKNOWN_CHARACTERS", "N_HEAD",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import itertools
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.files import replacing
from milepost.remote import local
from milepost.run import completed
from milepost.runtime.progress import Log, shown
from milepost.samples import drop_conflicts, read_prompt, sample_seed, sample_texts
from milepost.screen import harmless, write_stdout

MIN_WIDTH = 30  # columns of a text beside another
SEPARATOR = " | "
FORMATS = (".json", ".md")
SAMPLING_SETTINGS = (
    "raw_prompt", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "dtype", "quantize", "unknown_characters",
)  # fmt: skip


class Sampled(NamedTuple):
    """A checkpoint and the texts generated from it, each with the prompt that it continues; answers stand alone."""

    record: Checkpoint
    texts: list[str]


def main(settings: Config, log: Log) -> int:
    """Write texts of the checkpoints of CHECKPOINT_PATH to stdout, and to OUTPUT if it is set; return the exit code."""
    output = Path(settings.output) if settings.output else None
    if output and (output.suffix not in FORMATS or output.is_dir() or not output.parent.is_dir()):
        raise ConfigError([f"OUTPUT={output}: expected a file name that ends in .json or .md, in an existing folder"])
    settings = local(settings, log, every=True)
    paths, notes = ckpt.several(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    prompt, seed = read_prompt(settings), sample_seed(settings)
    sampled = [sample(path, settings, log, prompt=prompt, seed=seed) for path in paths]
    write_stdout(beside(sampled, columns=shutil.get_terminal_size().columns))
    if output:
        write = as_json if output.suffix == ".json" else as_markdown
        with replacing(output) as temporary:
            temporary.write_text(write(sampled, settings, prompt=prompt, seed=seed), encoding="utf-8")
        log(f"wrote {shown(output)}")
    return 0


def sample(path: Path, settings: Config, log: Log, *, prompt: str, seed: int) -> Sampled:
    """Return NUM_SAMPLES texts of one checkpoint, equal to those of scripts/load_checkpoint.py with the same settings."""
    record = completed(ckpt.load(path, optimizer=False), settings, log)
    for note in record.notes:
        log(note)
    texts = sample_texts(drop_conflicts(record, settings, log), record, log, prompt=prompt, seed=seed)
    return Sampled(record, [before + "".join(pieces) for before, pieces in texts])


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def beside(sampled: list[Sampled], *, columns: int) -> str:
    """Return all texts in columns, or one below another if columns would be too narrow. Control characters are escaped."""
    width = (columns - len(SEPARATOR) * (len(sampled) - 1)) // len(sampled)
    if width < MIN_WIDTH:
        return "\n\n".join("\n".join(itertools.chain(*parts(item, width=columns))) for item in sampled)
    rows = (
        itertools.zip_longest(*same, fillvalue="")
        for same in zip(*(parts(item, width=width) for item in sampled), strict=True)
    )
    return "\n".join(SEPARATOR.join(line.ljust(width) for line in row).rstrip() for row in itertools.chain(*rows))


def parts(item: Sampled, *, width: int) -> list[list[str]]:
    """Return the lines of a checkpoint's heading and of each of its texts, at most `width` characters per line."""
    name = item.record.path.name if item.record.path else ""
    heading = [*wrapped(title(item.record), width), *wrapped(name, width)]
    return [heading, *(["-" * width, *wrapped(text, width)] for text in item.texts)]


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text, wrapped at `width`."""
    lines = harmless(text).expandtabs(4).splitlines()
    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]]


def title(record: Checkpoint) -> str:
    """Return model, step and, if it was evaluated at that step, the validation loss."""
    loss = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f}"
    return f"{record.model_type} at step {record.step}{loss}"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def as_json(sampled: list[Sampled], settings: Config, *, prompt: str, seed: int) -> str:
    """Return JSON with prompt, seed, settings, and the texts of each checkpoint."""
    checkpoints = [
        {
            "path": str(item.record.path), "model_type": item.record.model_type, "step": item.record.step,
            "run_id": item.record.run_id, "validation_loss": item.record.validation_loss, "texts": item.texts,
        }
        for item in sampled
    ]  # fmt: skip
    values = {"prompt": prompt, "sample_seed": seed} | sampling_settings(settings) | {"checkpoints": checkpoints}
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def as_markdown(sampled: list[Sampled], settings: Config, *, prompt: str, seed: int) -> str:
    """Return Markdown: a heading per checkpoint with its texts below, each in a fence longer than any inside it."""
    values = {name.upper(): config.as_text(value) for name, value in sampling_settings(settings).items()}
    how = ", ".join(f"{name}={text}" for name, text in values.items() if text)
    parts = [f"# Samples\n\nSAMPLE_SEED={seed}, {how}. Prompt:\n\n{fenced(prompt)}"]
    for item in sampled:
        parts += [f"## {title(item.record)}\n\n`{item.record.path}`", *map(fenced, item.texts)]
    return "\n\n".join(parts) + "\n"


def sampling_settings(settings: Config) -> dict[str, Any]:
    """Return the settings that determine the texts, besides prompt and seed."""
    return {name: getattr(settings, name) for name in SAMPLING_SETTINGS}


def fenced(text: str) -> str:
    """Return a text as a Markdown code block (CommonMark 0.31, 4.5: a fence may contain shorter ones)."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
