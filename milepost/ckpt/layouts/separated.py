"""Two torch archives: `<stem>-model.pt` to share and to generate from, `<stem>-optimizer.pt` to resume
from.
"""

from pathlib import Path
from typing import Any

from milepost.ckpt.layouts.archive_layout import ArchiveLayout, Values
from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError


def _model_keys(record: Checkpoint, values: Values) -> dict[str, Any]:
    return {
        "model_state_dict": record.model_state,
        "global_step": record.step,
        "config": values["model_settings"] | {"model_type": record.model_type},
        "metadata": values,
    }


def _optimizer_keys(record: Checkpoint, values: Values) -> dict[str, Any]:
    return {
        "optimizer_states": [record.optimizer_state],
        "lr_scheduler_states": [values["schedule"]],
        "global_step": record.step,
        "epoch": record.epoch,
    }


def _optimizer_state(content: dict[Any, Any], path: Path) -> Any:
    states = content.get("optimizer_states")
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        problem = "is damaged: expected optimizer_states with the state of one optimizer"
        raise CheckpointError(path, problem, EARLIER, kind="damaged")
    return states[0]


LAYOUT = ArchiveLayout(
    name="separated",
    suffixes=("-optimizer.pt", "-model.pt"),
    model_keys=_model_keys,
    optimizer_keys=_optimizer_keys,
    optimizer_state=_optimizer_state,
)
