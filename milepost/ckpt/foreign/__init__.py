"""Translate another program's checkpoint: pure functions over its loaded content. Opens no file.

From torch, Lightning or MLX, flat or nested, with the name prefixes of torch.compile, DDP and Lightning. No value is
trusted: every failure is a CheckpointError, and nothing is loaded in part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from milepost.ckpt.foreign.keys import config_of, epoch_of, plain, step_of, together, validation_loss_of, weights_of
from milepost.ckpt.foreign.weights import translated
from milepost.ckpt.record import CheckpointError, Json
from milepost.ckpt.tensors import check_dense

OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states")
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's state of a parameter


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
    config = together(config_of(around), dict(config or {}), where=where)
    model_type, settings, state, notes = translated(weights, config, where=where, whole=whole)
    moments, note = _optimizer(around, state) if optimizer else (None, None)
    return Foreign(
        model_type=model_type,
        model_settings=settings,
        model_state=state,
        optimizer_state=moments,
        step=step_of(around, where=where),
        epoch=epoch_of(around, where=where),
        validation_loss=validation_loss_of(around),
        notes=notes + ([f"{where}: {note}"] if note else []),
    )


def _optimizer(content: Mapping[Any, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any] | None, str | None]:
    saved = next((content[word] for word in OPTIMIZERS if content.get(word) is not None), None)
    if isinstance(saved, list | tuple) and len(saved) == 1:  # Lightning saves a list of optimizers
        saved = saved[0]
    if saved is None or (isinstance(saved, list | tuple) and not saved):
        return None, None
    return nanogpt_optimizer(saved, {name: tuple(tensor.shape) for name, tensor in state.items()})


def nanogpt_optimizer(
    optimizer_state: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any] | None, str | None]:
    """Return nanoGPT's AdamW state with `param_names` in its groups, or None and the reason for leaving it out.

    nanoGPT's configure_optimizers() puts the 2D parameters into the first group and the rest into the second, both in
    the order of named_parameters(). `shapes` has our names in that order, as `translated` returns them.
    """
    names = [name for name, shape in shapes.items() if len(shape) >= 2]
    count = len(names)
    names += [name for name, shape in shapes.items() if len(shape) < 2]
    groups, moments = _two_groups(optimizer_state, count, len(names))
    if groups is None:
        return None, "its optimizer state names no parameters and was left out"
    for index, name in enumerate(names):
        if not _are_moments(moments.get(index), shapes[name]):
            return None, f"its optimizer state does not fit {name} {shapes[name]} and was left out"
    settings = [{str(word): plain(value)[1] for word, value in group.items() if plain(value)[0]} for group in groups]
    named = [
        group | {"params": indices, "param_names": [names[index] for index in indices]}
        for group, indices in zip(settings, (list(range(count)), list(range(count, len(names)))), strict=True)
    ]
    return {"state": {index: dict(moments[index]) for index in range(len(names))}, "param_groups": named}, None


def _two_groups(values: Any, first: int, total: int) -> tuple[list[dict[str, Any]] | None, Mapping[Any, Any]]:
    """Return groups and state if they have nanoGPT's numbers of parameters, indexed as in torch; else None and {}."""
    groups = values.get("param_groups") if isinstance(values, Mapping) else None
    state = values.get("state") if isinstance(values, Mapping) else None
    if not isinstance(groups, list) or len(groups) != 2 or not isinstance(state, Mapping) or len(state) != total:
        return None, {}
    wanted = (list(range(first)), list(range(first, total)))
    for group, indices in zip(groups, wanted, strict=True):
        saved = group.get("params") if isinstance(group, dict) else None
        if not isinstance(saved, list) or any(type(index) is not int for index in saved) or saved != indices:
            return None, {}
        if not all(isinstance(word, str) and word.isprintable() for word in group):
            return None, {}
    return groups, state


def _are_moments(moments: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(moments, dict) or moments.keys() != MOMENTS:
        return False
    for kind, value in moments.items():
        try:
            check_dense(value, "", kind)
        except CheckpointError:
            return False
        if tuple(value.shape) != (() if kind == "step" else shape):
            return False
    return True
