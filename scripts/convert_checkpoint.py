"""Write a checkpoint, or a whole folder of them, in another layout or as another program has it, and prove that nothing was lost.

CHECKPOINT_PATH=latest CONVERT_TO=huggingface OUTPUT=to-share CHECKPOINT_MODEL_ONLY=true python3 scripts/convert_checkpoint.py
CHECKPOINT_PATH=latest CONVERT_TO=gguf GGUF_TYPE=q8_0 python3 scripts/convert_checkpoint.py
CHECKPOINT_PATH=checkpoints CONVERT_TO=separated OUTPUT=new-checkpoints python3 scripts/convert_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "CONVERT_TO", "OUTPUT", "CHECKPOINT_LAYOUT", "CHECKPOINT_MODEL_ONLY", "CHECKPOINT_PREFIX", "CHECKPOINT_DIR", "GGUF_TYPE",
    "TRAINING_DATA_SOURCE", "TEXT_FIELD", "TOKENIZER",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import importlib.util
import shlex
from pathlib import Path
from typing import Any

from milepost import ckpt
from milepost.ckpt import BEST_FOLDER, Checkpoint, CheckpointError, Found
from milepost.ckpt.conversion import Converted, modified_at
from milepost.ckpt.finding import scan
from milepost.ckpt.layouts import known_layout
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.run import names_complete_tokenizer, with_tokenizer
from milepost.runtime.progress import Log, shown, write_stdout

BAD = 3


NAME_ONE = "set TRAINING_DATA_SOURCE to the text it was trained on, or TOKENIZER=byte or gpt2, and convert it again"


def main(settings: Config, log: Log) -> int:
    """Converts what CHECKPOINT_PATH means; returns the exit code, 3 if something could not be converted."""
    source = ckpt.whole_folder(settings.checkpoint_path)
    exports = settings.convert_to in ckpt.EXPORTS
    if source is not None and exports:
        raise ConfigError(
            [f"CONVERT_TO={settings.convert_to}: {source} is a whole folder; set CHECKPOINT_PATH to one of it"]
        )
    if source is not None:
        return convert_folder(source, settings, log)
    path, notes = ckpt.resolve(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    if exports:
        return export(path, settings, log)
    folder = None if settings.output is None else Path(settings.output)
    if folder is None and not settings.checkpoint_model_only and layout_of(settings) == known_layout(path).name:
        variable = "CONVERT_TO" if settings.convert_to else "CHECKPOINT_LAYOUT"
        problem = f"{variable}={layout_of(settings)}: {path} is laid out so already"
        raise ConfigError([f"{problem}; set another, or OUTPUT to a folder for a copy"])
    done = ckpt.convert(path, folder, **form(settings, log))
    say(done, settings, log)
    if not done.has_tokenizer:
        log(f"{shown(done.target)} is written without a tokenizer: {NAME_ONE}")
        return BAD
    write_stdout("Conversion complete!")
    return 0


def layout_of(settings: Config) -> str:
    """The layout to write, by CONVERT_TO or else by CHECKPOINT_LAYOUT."""
    return settings.convert_to or settings.checkpoint_layout


def form(settings: Config, log: Log) -> dict[str, Any]:
    """How it is to be written, with the tokenizer that the settings name if it carries none."""
    return {
        "layout": layout_of(settings),
        "model_only": settings.checkpoint_model_only,
        "prefix": prefix(settings),
        "complete": lambda record: completed(record, settings, log),
    }


def completed(record: Checkpoint, settings: Config, log: Log) -> Checkpoint:
    """The record, with the tokenizer that the settings name if it carries none and they name one."""
    named = names_complete_tokenizer(settings) or settings.is_set("TRAINING_DATA_SOURCE")
    return with_tokenizer(record, settings, log) if named else record


def prefix(settings: Config) -> str | None:
    """How the name begins, if it was said; else as the run's own names do."""
    return settings.checkpoint_prefix if settings.is_set("CHECKPOINT_PREFIX") else None


def say(done: Converted, settings: Config, log: Log) -> None:
    """What was converted, its proof and its bytes."""
    for note in done.notes:
        log(note)
    size = "Model-only size" if settings.checkpoint_model_only else "New size"
    write_stdout(f"Converted: {shown(done.source)} -> {shown(done.target)}")
    answers = f"logits equal: {' x '.join(map(str, done.logits))}" if done.logits else "adapters alone have no logits"
    equal = f"{answers}; fields of metadata equal: {done.fields}"
    write_stdout(f"  tensors equal: {done.tensors}, sha256 {done.sha256}; {equal}")
    write_stdout(f"  Original size: {done.bytes_before / 1e6:,.2f} MB ({done.bytes_before:,} bytes)")
    write_stdout(f"  {size}: {done.bytes_after / 1e6:,.2f} MB ({done.bytes_after:,} bytes)")
    if (done.layout_before, layout_of(settings)) == ("unified", "separated"):
        write_stdout("  Unified checkpoint split into separated format!")


# ---------------------------------------------------------------------------------------------------------------------
# For another program.


def export(path: Path, settings: Config, log: Log) -> int:
    """Exports the checkpoint at `path` as CONVERT_TO says, into OUTPUT or exports/. Raises ConfigError if that needs what is not here."""
    to = ckpt.exporter(str(settings.convert_to), gguf_type=settings.gguf_type)
    for package in to.needs:
        if importlib.util.find_spec(package) is None:
            raise ConfigError([f"CONVERT_TO={to.name} needs the package {package}: pip install {package}"])
    folder = config.ROOT / "exports" if settings.output is None else Path(settings.output)
    if folder.resolve().is_relative_to(Path(settings.checkpoint_dir).resolve()):
        raise ConfigError([f"OUTPUT={folder}: lies in the folder of checkpoints, which this is none of; name another"])
    complete = form(settings, log)["complete"]
    done = ckpt.export(path, folder, to=to, prefix=prefix(settings), complete=complete)
    for note in done.notes:
        log(note)
    proof, shape = done.proof, " x ".join(map(str, done.proof.logits))
    why = f": {proof.remark}" if proof.remark else ""
    write_stdout(f"Exported: {shown(done.source)} -> {shown(done.target)}")
    write_stdout(f"  tensors equal: {proof.tensors}, sha256 {proof.sha256}")
    apart = f"differ by at most {proof.difference:.2g}, of a standard deviation of {proof.spread:.2g}{why}"
    write_stdout(f"  logits ({shape}) {apart}" if shape else "  adapters alone have no logits")
    write_stdout(f"  Size: {done.bytes_after / 1e6:,.2f} MB ({done.bytes_after:,} bytes)")
    write_stdout(f"next: {to.how.format(path=shlex.quote(str(done.target)), name=done.target.name)}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# A whole folder.


def convert_folder(source: Path, settings: Config, log: Log) -> int:
    """Converts every checkpoint of `source` into OUTPUT, oldest first; damaged ones are named and left out."""
    output = target_folder(source, settings)
    found = ckpt.find(source)
    if not found:
        raise CheckpointError(ckpt.listing(source))
    done = {identity(one) for one in ckpt.find(output)}
    kept_as_best = {one.metadata.get("save_id") for one in scan(source) if one.path.parent.name == BEST_FOLDER}
    bad = without = 0
    for one in found:
        if (*identity(one)[:-1], layout_of(settings)) in done:
            log(f"{shown(one.path)} is in {shown(output)} already")
            continue
        in_best = one.path.parent.name == BEST_FOLDER
        best_too = not in_best and one.metadata.get("save_id") is not None and one.metadata["save_id"] in kept_as_best
        try:
            made = ckpt.convert(one.path, output, in_best=in_best, best_too=best_too, **form(settings, log))
            say(made, settings, log)
            without += not made.has_tokenizer
        except CheckpointError as error:
            bad += 1
            log(f"skipped: {error}")
    left_out = f"{bad} of {len(found)} could not be converted. " if bad else ""
    if without:
        log(f"{without} of {len(found)} are written without a tokenizer: {NAME_ONE}")
    write_stdout(f"{'Conversion complete! ' if not without else ''}{left_out}Check {shown(output)}")
    return BAD if bad or without else 0


def target_folder(source: Path, settings: Config) -> Path:
    """OUTPUT; raises ConfigError if it is not given or would mix old and new."""
    if settings.output is None:
        raise ConfigError([f"OUTPUT: a whole folder ({source}) is converted to a new one; set OUTPUT to its name"])
    output = Path(settings.output)
    if output.resolve().is_relative_to(source.resolve()):
        raise ConfigError([f"OUTPUT={output}: lies in {source}, which stays untouched; name another folder"])
    return output


def identity(one: Found) -> tuple[Any, ...]:
    """What a conversion keeps of a save, and the layout that it has."""
    saved_at = one.metadata.get("saved_at") or (None if one.problem else modified_at(one.path))
    return *(one.metadata.get(name) for name in ("run_id", "save_number", "step")), saved_at, one.layout


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
