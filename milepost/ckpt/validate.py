"""What a record must hold so that every checkpoint that is saved can be listed, verified and resumed."""

import json
from typing import Any

from milepost.ckpt.foreign.importing import lacks_n_head, n_head_problem
from milepost.ckpt.record import Checkpoint, CheckpointError, check_metadata, metadata
from milepost.ckpt.tensors import NO_OPTIMIZER_STATE, is_optimizer_state
from milepost.lazy import Tensor


def validate(record: Checkpoint) -> None:
    """Raise CheckpointError if what a save would write could not be loaded again.

    The parameters of an optimizer state without `param_names` are named in the model's order where the shapes fit.
    """
    try:
        json.dumps(metadata(record), allow_nan=False)
        check_metadata(metadata(record), "checkpoint")
    except (TypeError, ValueError, CheckpointError) as error:
        raise _refused(str(error).removeprefix("checkpoint: ")) from error
    if lacks_n_head(metadata(record)):
        raise n_head_problem(record)
    if not record.model_state:
        raise _refused("it has no weights")
    if record.optimizer_state is not None:
        _name_parameters(record)


def _name_parameters(record: Checkpoint) -> None:
    if not is_optimizer_state(record.optimizer_state):
        raise _refused(NO_OPTIMIZER_STATE)
    groups = (record.optimizer_state or {})["param_groups"]
    if all("param_names" in group for group in groups):
        return
    indices = [index for group in groups for index in group.get("params", ())]
    weights = list(record.model_state.items())
    if sorted(indices) != list(range(len(weights))):
        problem = f"its optimizer state has {len(indices)} parameters without names, its model {len(weights)}"
        raise _refused(f"{problem}: pass model.named_parameters() to the optimizer")
    for index, kinds in (record.optimizer_state or {})["state"].items():
        name, weight = weights[index]
        if not all(_fits(value, weight) for value in kinds.values()):
            raise _refused(f"its optimizer state for parameter {index} does not have the shape of {name}")
    named = [group | {"param_names": [weights[index][0] for index in group["params"]]} for group in groups]
    record.optimizer_state = {**(record.optimizer_state or {}), "param_groups": named}


def _fits(value: Any, weight: Tensor) -> bool:
    """Whether a tensor of the state belongs to the weight; scalars, such as Adam's step, fit any."""
    return not isinstance(value, Tensor) or value.dim() == 0 or value.shape == weight.shape


def _refused(problem: str) -> CheckpointError:
    return CheckpointError(f"nothing was saved: {problem}", kind="refused")
