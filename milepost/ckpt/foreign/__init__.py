"""Translate another program's checkpoint: pure functions over its loaded content. Opens no file.

From torch, Lightning or MLX, flat or nested, with the name prefixes of torch.compile, DDP and Lightning. No value is
trusted: every failure is a CheckpointError, and nothing is loaded in part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from milepost.ckpt.foreign.keys import config_of, epoch_of, step_of, together, validation_loss_of, weights_of
from milepost.ckpt.foreign.optimizer import matched, saved_optimizer
from milepost.ckpt.foreign.rates import schedule_of, training_settings
from milepost.ckpt.foreign.weights import trained, translated
from milepost.ckpt.record import Json


@dataclass(kw_only=True)
class Foreign:
    """Another program's checkpoint, translated into the fields of a Checkpoint."""

    model_type: str
    model_settings: dict[str, Json]
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None = None
    step: int = 0
    epoch: float | None = None
    validation_loss: float | None = None
    hyperparameters: dict[str, Json] = field(default_factory=dict)
    schedule: dict[str, Json] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def understood(
    content: Mapping[Any, Any],
    config: Mapping[str, Json] | None = None,
    *,
    where: str,
    optimizer: bool = True,
    whole: bool = True,
) -> Foreign:
    """Translate a loaded archive; `config` is the config.json beside it, for values that the archive lacks.

    Raise CheckpointError if a tensor cannot be translated, or the archive contradicts itself or `config`. If not
    `whole`, the weights stay unread as in `translated`.
    """
    key, weights = weights_of(content, where=where, whole=whole)
    around = content if key else {}  # a bare state dict has nothing beside its weights
    beside = config_of({"config": config or {}})
    config = together(config_of(around), beside, where=where)
    model_type, settings, state, notes = translated(weights, config, where=where, whole=whole)
    moments, note = _optimizer(around, weights, settings, state, config, whole=whole) if optimizer else (None, None)
    step = step_of(around, where=where)
    schedule = schedule_of(around, step)
    peak = {"LEARNING_RATE": schedule["peak"]} if schedule else {}
    return Foreign(
        model_type=model_type,
        model_settings=settings,
        model_state=state,
        optimizer_state=moments,
        step=step,
        epoch=epoch_of(around, where=where),
        validation_loss=validation_loss_of(around),
        hyperparameters=training_settings(around, config) | peak,
        schedule=schedule,
        notes=notes + ([f"{where}: {note}"] if note else []),
    )


def _optimizer(
    content: Mapping[Any, Any],
    weights: Mapping[Any, Any],
    settings: Mapping[str, Json],
    state: Mapping[str, Tensor],
    config: Mapping[str, Json],
    *,
    whole: bool,
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the optimizer's state under our names, or None and the reason."""
    if (saved := saved_optimizer(content)) is None:
        return None, None
    theirs = trained(weights, tied=settings.get("tied", False))
    config = {**config, "tied": settings.get("tied", False)}

    def translate(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return translated(tensors, config, where="its moments", whole=whole)[2]

    return matched(saved, theirs, {name: tuple(tensor.shape) for name, tensor in state.items()}, translate, whole=whole)
