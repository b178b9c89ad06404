"""The default layout: one `.pt` file, a torch archive with `model_state_dict`, `optimizer_state_dict`, ... and the record's metadata.

The metadata is there twice: in the pickle, for programs that use torch.load, and as the archive's JSON member. An
archive without it is another program's: `model`, `state_dict` or `model_state_dict`, `optimizer`, `global_step`,
`iter_num` and the like are understood.
"""

from pathlib import Path
from typing import Any

from milepost.ckpt.layouts.archive_layout import ArchiveLayout, Values
from milepost.ckpt.record import Checkpoint


def _keys(record: Checkpoint, values: Values) -> dict[str, Any]:
    return {
        "model_state_dict": record.model_state,
        "optimizer_state_dict": record.optimizer_state,
        "hyperparameters": values["hyperparameters"],
        "vocab_size": values["model_settings"].get("vocab_size"),
        "block_size": values["model_settings"].get("block_size"),
        "batch_size": values["hyperparameters"].get("BATCH_SIZE"),
        "step": record.step,
        "metadata": values,
    }


def _optimizer_state(content: dict[Any, Any], path: Path) -> Any:
    return content.get("optimizer_state_dict")


LAYOUT = ArchiveLayout(name="unified", suffixes=(".pt",), model_keys=_keys, optimizer_state=_optimizer_state)
