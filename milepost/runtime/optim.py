"""Parameter groups, AdamW and gradient clipping."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from milepost.runtime import optimizers
from milepost.runtime.distributed import SINGLE, World, full, local

# Where the fused AdamW kernel divides gradients by `grad_scale` while it reads them. On MPS it ignores that.
READS_GRAD_SCALE = ("cpu", "cuda")
# Devices that run behind the program: to ask whether a norm is above its limit is to wait for all they still have to do.
BEHIND = ("cuda",)
Named = list[tuple[str, nn.Parameter]]


class Trainable(Protocol):
    """What an optimizer reads of a model: see models.model.Model."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def decays(self, name: str, parameter: Tensor) -> bool: ...
    def muon_matrices(self) -> dict[str, int]: ...


def build_optimizer(
    model: Trainable, kind: str, *, lr: float, weight_decay: float, betas: tuple[float, float], world: World = SINGLE
) -> torch.optim.Optimizer:
    """Return the registered optimizer `kind` over the model's trainable parameters, stepped by all processes of `world`
    together.

    Raises ValueError if its groups do not carry the parameters' names: at a resume no state could be matched.
    """
    built: torch.optim.Optimizer = optimizers.load(kind)(
        model, lr=lr, weight_decay=weight_decay, betas=betas, world=world
    )
    if not all("param_names" in group for group in built.param_groups):
        raise ValueError(
            f"optimizer {kind!r}: its param_groups have no param_names; build it from "
            f"model.named_parameters(), not parameters()."
        )
    return built


def trainable(model: Trainable) -> Named:
    """Return the names and parameters that are trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def decay_groups(model: Trainable, named: Named, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay on what the model declares to decay (matrices, as GPT-2's),
    and none on the rest.
    """
    decaying = [(name, parameter) for name, parameter in named if model.decays(name, parameter)]
    others = [(name, parameter) for name, parameter in named if not model.decays(name, parameter)]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    model: Trainable,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    named: Named | None = None,
    **_: Any,
) -> torch.optim.AdamW:
    """Return AdamW over the `named` parameters, by default all that are trained."""
    groups = decay_groups(model, trainable(model) if named is None else named, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def parts(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of which one consists that steps several as one: its `parts`; else only itself."""
    found: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "parts", (optimizer,))
    return found


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm of all gradients as one vector, 0-dim."""
    return full(nn.utils.get_total_norm(_gradients(optimizer)))


def clip_gradients(optimizer: torch.optim.Optimizer, norm: Tensor, *, limit: float) -> None:
    """Scale the gradients of the next step by limit / `norm` if their `norm` is above `limit` (0: no limit); call
    before each step.

    The fused AdamW scales while it reads, which saves a pass over all gradients. Below the limit nothing is divided; on
    CUDA everything is divided by 1 instead, which changes no bit: to ask would be to wait for the device.
    """
    scale = clip_scale(norm, limit)
    for part in parts(optimizer):
        gradients = _gradients(part)
        held = [local(gradient) for gradient in gradients]
        sharded = any(shard is not whole for shard, whole in zip(held, gradients, strict=True))
        if isinstance(part, torch.optim.AdamW) and norm.device.type in READS_GRAD_SCALE and not sharded:
            part.grad_scale = scale  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it, and keeps ours
        elif scale is not None:
            torch._foreach_div_(held, scale)


def clip_scale(norm: Tensor, limit: float) -> Tensor | None:
    """Return by what to divide gradients of this `norm`, at least 1; None for nothing."""
    if not limit:
        return None
    if norm.device.type in BEHIND:
        return (norm / limit).float().clamp(min=1.0)
    return (norm / limit).float() if norm > limit else None


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
