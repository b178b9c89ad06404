"""Translate another program's checkpoint: pure functions over its loaded content. Opens no file.

From torch, Lightning or MLX, flat or nested, with the name prefixes of torch.compile, DDP and Lightning. No value is
trusted: every failure is a CheckpointError, and nothing is loaded in part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import models
from milepost.ckpt.foreign.keys import config_of, epoch_of, step_of, together, validation_loss_of, weights_of
from milepost.ckpt.foreign.optimizer import OPTIMIZERS, matched, saved_optimizer
from milepost.ckpt.foreign.rates import rate_in_use, schedule_of, training_settings
from milepost.ckpt.foreign.weights import of_ours, trained, translated
from milepost.ckpt.record import Json
from milepost.lazy import Tensor

__all__ = ["OPTIMIZERS", "Foreign", "understood"]


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
    rate: float | None = None  # the learning rate in use at its step
    unused: str | None = None  # why its optimizer state cannot be used
    adapters_only: bool = False
    base: dict[str, Json] | None = None  # of adapters
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
    config_beside = dict(config or {})
    config = together(config_of(around), config_of({"config": config_beside}), where=where)
    base: dict[str, Json] | None = None
    notes: list[str] = []
    if own := of_ours(weights, config_beside, where=where):
        model_type, settings, base = own
        state = weights
    else:
        model_type, settings, state, notes = translated(weights, config, where=where, whole=whole)
    saved = saved_optimizer(around) if optimizer else None
    if own:
        moments, note = matched(saved, shapes(state), shapes(state), lambda tensors: tensors, whole=whole)
    else:
        moments, note = _translated_optimizer(saved, weights, settings, state, config, whole=whole)
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
        rate=rate_in_use(around),
        unused=note,
        adapters_only=bool(own) and all(map(models.is_adapter, state)),
        base=base,
        notes=notes + ([f"{where}: {note}"] if note else []),
    )


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _translated_optimizer(
    saved: Any,
    weights: Mapping[Any, Any],
    settings: Mapping[str, Json],
    state: Mapping[str, Tensor],
    config: Mapping[str, Json],
    *,
    whole: bool,
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the optimizer's state under our names, or None and the reason."""
    if saved is None:
        return None, None
    config = {**config, "tied": settings.get("tied", False)}

    def translate(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return translated(tensors, config, where="its moments", whole=whole)[2]

    theirs = trained(weights, tied=settings.get("tied", False))
    return matched(saved, theirs, shapes(state), translate, whole=whole)
