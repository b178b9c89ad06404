"""Add a checkpoint's LoRA adapters to its weights: a checkpoint without adapters that answers as it did, in OUTPUT.

CHECKPOINT_PATH=latest OUTPUT=merged python3 scripts/merge_adapters.py
CHECKPOINT_PATH=latest BASE_CHECKPOINT=base.pt OUTPUT=merged CHECKPOINT_LAYOUT=huggingface python3 scripts/merge_adapters.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "OUTPUT", "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM", "CHECKPOINT_LAYOUT", "CHECKPOINT_PREFIX", "CHECKPOINT_DIR",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import dataclasses
from pathlib import Path

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.conversion import logits, size_of
from milepost.ckpt.restore import merged
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.run import with_its_base
from milepost.runtime.progress import Log, amount, command_line, shown, tell

LOAD_CHECKPOINT = config.ROOT / "scripts" / "load_checkpoint.py"
CLOSE = 1e-5  # how far the logits of float32 weights may move, against the largest of them


def main(settings: Config, log: Log) -> int:
    """Merges and saves; returns the exit code."""
    if settings.output is None:
        raise ConfigError(["OUTPUT: the merged checkpoint needs a folder of its own; set OUTPUT to its name"])
    path, notes = ckpt.resolve(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    record = with_its_base(ckpt.load(path, optimizer=False), settings, log)
    if not record.model_settings.get("lora"):
        raise ckpt.CheckpointError(f"{path}: has no LoRA adapters to merge; it is whole as it is")
    whole = alone(merged(record))
    difference = moved(record, whole)
    saved = ckpt.save(
        whole, Path(settings.output), layout=settings.checkpoint_layout, prefix=settings.checkpoint_prefix
    )
    tell(f"Merged: {shown(path)} -> {shown(saved)} ({amount(size_of(saved), 'B')})")
    tell(f"  logits within {difference:.1g} of those with adapters, relative to the largest")
    log("next: " + command_line(LOAD_CHECKPOINT, CHECKPOINT_PATH=saved))
    return 0


def alone(record: Checkpoint) -> Checkpoint:
    """The record as a model that no adapter trains any more: going on from it would train all of it."""
    off = {"LORA_RANK": 0, "CHECKPOINT_ADAPTERS_ONLY": False}
    return dataclasses.replace(record, hyperparameters=record.hyperparameters | off)


def moved(before: Checkpoint, after: Checkpoint) -> float:
    """The largest difference of the logits on fixed tokens, relative to the largest of them; raises CheckpointError if it is no rounding."""
    old, new = logits(before), logits(after)
    difference = ((new - old).abs().max() / old.abs().max()).item()
    if not difference <= CLOSE:  # true for NaN too
        problem = f"{before.path}: merged, its logits would be {difference:.2g} away from those with adapters"
        raise ckpt.CheckpointError(f"{problem}, relative to the largest; keep them apart")
    return difference


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
