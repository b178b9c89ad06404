"""Merge a checkpoint's LoRA adapters into its weights, and write a checkpoint without adapters to OUTPUT.

CHECKPOINT_PATH=latest OUTPUT=merged python3 scripts/merge_adapters.py
CHECKPOINT_PATH=latest BASE_CHECKPOINT=base.pt OUTPUT=merged CHECKPOINT_LAYOUT=huggingface python3 scripts/merge_adapters.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "OUTPUT", "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM", "CHECKPOINT_LAYOUT",
    "CHECKPOINT_PREFIX", "CHECKPOINT_DIR", "CACHE_GB",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import dataclasses
from pathlib import Path

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.conversion import logits, size_of
from milepost.ckpt.names import ENDS
from milepost.ckpt.restore import merged
from milepost.cli import guarded, naming_output
from milepost.config import Config, ConfigError
from milepost.places import SCRIPTS_FOLDER
from milepost.remote import local
from milepost.run import lineage, new_run_id, with_its_base
from milepost.runtime.progress import Log, amount, command_line, shown
from milepost.screen import write_stdout

LOAD_CHECKPOINT = SCRIPTS_FOLDER / "load_checkpoint.py"
TOLERANCE = 1e-5  # largest change of the logits of float32 weights, relative to the largest logit


def main(settings: Config, log: Log) -> int:
    """Merge and save; return the exit code."""
    if settings.output is None:
        raise ConfigError(["OUTPUT: not set; set it to a folder for the merged checkpoint"])
    folder = Path(settings.output)
    if folder.suffix in ENDS and not folder.is_dir():
        raise ConfigError([f"OUTPUT={folder}: names a file; name a folder, in which the merged checkpoint gets a name"])
    settings = local(settings, log)
    path, notes = ckpt.resolve(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    record = with_its_base(ckpt.load(path, optimizer=False), settings, log)
    if not record.model_settings.get("lora"):
        raise ckpt.CheckpointError(f"{path}: has no LoRA adapters to merge: use it as it is")
    whole = without_adapters(merged(record))
    difference = change_of_logits(record, whole)
    with naming_output(folder):
        saved = ckpt.save(whole, folder, layout=settings.checkpoint_layout, prefix=settings.checkpoint_prefix)
    write_stdout(f"Merged: {shown(path)} -> {shown(saved)} ({amount(size_of(saved), 'B')})")
    write_stdout(f"  logits within {difference:.1g} of those with adapters, relative to the largest")
    log("next: " + command_line(LOAD_CHECKPOINT, CHECKPOINT_PATH=saved))
    return 0


def without_adapters(record: Checkpoint) -> Checkpoint:
    """Return the record with adapters turned off, so that resuming from it trains all weights.

    It is a run of its own that began with the record: among the saves of that run it would be the last, and retention would
    delete the adapters for it.
    """
    off = {"LORA_RANK": 0, "CHECKPOINT_ADAPTERS_ONLY": False}
    runtime = record.runtime | ({"probe": {}} if record.runtime else {})  # the step that it took was one of adapters
    whole = dataclasses.replace(record, hyperparameters=record.hyperparameters | off, runtime=runtime)
    if record.run_id is None:  # retention leaves alone what no run saved
        return whole
    rank = record.hyperparameters.get("LORA_RANK")
    parent = lineage(record, {"LORA_RANK": [rank, 0]})
    return dataclasses.replace(whole, run_id=new_run_id(f"{record.model_type}-merged"), parent=parent)


def change_of_logits(before: Checkpoint, after: Checkpoint) -> float:
    """Return the largest change of the logits on fixed tokens, relative to the largest logit.

    Raise CheckpointError above TOLERANCE.
    """
    old, new = logits(before), logits(after)
    difference = ((new - old).abs().max() / old.abs().max()).item()
    if not difference <= TOLERANCE:  # true for NaN too
        problem = f"{before.path}: merging would change its logits by {difference:.2g} relative to the largest"
        raise ckpt.CheckpointError(f"{problem}, at most {TOLERANCE:g} is expected; keep the adapters separate")
    return difference


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
