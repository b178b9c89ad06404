"""Muon: momentum whose updates are orthogonalised, for the matrices that a model declares;
AdamW for its other parameters.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from milepost.runtime.distributed import SINGLE, World, full, local, sharded_like
from milepost.runtime.hardware import multiplies_bfloat16
from milepost.runtime.optim import Trainable, adamw, trainable

Arriving = Callable[[], Tensor]

# The quintic Newton-Schulz iteration: its coefficients and number of steps (Jordan et al. 2024).
QUINTIC, ITERATIONS, TINY = (3.4445, -4.7750, 2.0315), 5, 1e-7
# Matrices of one shape are iterated together, up to this many elements: small ones cost calls, large ones memory
# bandwidth.
TOGETHER = 2**18


def muon_with_adamw(
    model: Trainable, *, lr: float, weight_decay: float, betas: tuple[float, float], world: World = SINGLE
) -> torch.optim.Optimizer:
    """Return Muon over the matrices that the model declares, and AdamW over the rest of what is trained."""
    stacked, named = model.muon_matrices(), trainable(model)
    hidden = [(name, parameter) for name, parameter in named if name in stacked]
    rest = [(name, parameter) for name, parameter in named if name not in stacked]
    built: list[torch.optim.Optimizer] = []
    if hidden:
        counts = sorted({stacked[name] for name, _ in hidden}, reverse=True)
        groups = [
            {"params": [pair for pair in hidden if stacked[pair[0]] == count], "blocks": count} for count in counts
        ]
        built.append(Muon(groups, lr=lr, weight_decay=weight_decay, world=world))
    if rest:  # adapters are all matrices
        built.append(adamw(model, named=rest, lr=lr, weight_decay=weight_decay, betas=betas))
    if len(built) == 1:
        return built[0]
    return cast(torch.optim.Optimizer, MuonWithAdamW(*built))  # it has all that a caller of an optimizer uses


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalised, for the matrices between the embeddings and the head.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the update scaled to the size of AdamW's so that
    one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon's `match_rms_adamw` is the same
    formula. Here a group's `blocks` is the number of matrices stacked by rows in each of its weights (query, key and
    value are three), each orthogonalised by itself. Matrices of equal shape are iterated together, since small ones
    cost more in calls than in arithmetic. With the same weights and gradients on every process, each computes a part of
    the directions and broadcasts it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        world: World = SINGLE,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "blocks": 1})
        self._world = world

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Update every weight that has a gradient."""
        pending: deque[tuple[dict[str, Any], list[tuple[Tensor, ...]], Arriving]] = deque()
        for number, (group, blocks) in enumerate(self._work()):
            source = number % self._world.size
            pending.append((group, blocks, self._directions(group, blocks, source)))
            while len(pending) >= self._world.size:  # at most one from each process, to save memory
                _move(*pending.popleft())
        for directions in pending:
            _move(*directions)

    def _work(self) -> Iterator[tuple[dict[str, Any], list[tuple[Tensor, ...]]]]:
        """Yield the matrices that are orthogonalised together, with their group;
        sharded weights are updated on the way.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            if any(local(parameter) is not parameter for parameter in group["params"]):
                self._move_shards(group)
                continue
            for blocks in _equally_shaped(self._blocks(group)):
                yield group, blocks

    def _blocks(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, ...]]:
        """Yield weight, gradient and momentum of each matrix in the group, all views, all (rows, columns)."""
        for parameter in group["params"]:
            if parameter.grad is not None:
                stacked = (parameter, parameter.grad, self.state[parameter]["momentum_buffer"])
                yield from zip(*(tensor.chunk(group["blocks"]) for tensor in stacked), strict=True)

    def _directions(self, group: dict[str, Any], blocks: list[tuple[Tensor, ...]], source: int) -> Arriving:
        """Return the directions (N, R, C) of matrices of one shape, computed by process `source`."""
        momentum, (weight, _, _) = group["momentum"], blocks[0]
        for _, gradient, average in blocks:
            average.lerp_(gradient, 1 - momentum)
        dtype = _iteration_dtype(weight.device)
        if source != self._world.rank:
            return self._world.broadcast_tensor(weight.new_empty((len(blocks), *weight.shape), dtype=dtype), source)
        ahead = torch.stack(
            [gradient.lerp(average, momentum) for _, gradient, average in blocks]
        )  # Nesterov's; (N, R, C)
        return self._world.broadcast_tensor(orthogonalised(ahead, dtype), source)

    def _move_shards(self, group: dict[str, Any]) -> None:
        """Update sharded weights: every process computes the direction from the whole matrix,
        and applies its shard of it.
        """
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            gradient, average = parameter.grad, self.state[parameter]["momentum_buffer"]
            average.lerp_(gradient, 1 - group["momentum"])
            ahead = full(gradient.lerp(average, group["momentum"]))
            matrices = torch.stack(ahead.chunk(group["blocks"]))  # (N, R, C)
            directions = orthogonalised(matrices, _iteration_dtype(ahead.device)).flatten(0, 1)
            shard, lr = local(sharded_like(directions, parameter)), group["lr"]
            local(parameter).mul_(1 - lr * group["weight_decay"]).add_(shard, alpha=-lr * _ratio(matrices[0]))


def _equally_shaped(blocks: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield the blocks in lists of one shape, of at most TOGETHER elements unless a single block has more."""
    by_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    for block in blocks:
        by_shape.setdefault(block[0].shape, []).append(block)
    for shape, equal in by_shape.items():
        count = max(1, TOGETHER // shape.numel())
        yield from (equal[first : first + count] for first in range(0, len(equal), count))


def _move(group: dict[str, Any], blocks: list[tuple[Tensor, ...]], directions: Arriving) -> None:
    """Update the matrices of one shape along their directions."""
    lr = group["lr"]
    for (weight, _, _), direction in zip(blocks, directions(), strict=True):
        weight.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr * _ratio(weight))


def _ratio(matrix: Tensor) -> float:
    """Return the factor that scales an orthogonal direction (R, C) to the size of AdamW's updates,
    whose root mean square is about 0.2.
    """
    return 0.2 * math.sqrt(max(matrix.shape))


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrices (N, R, C) in `dtype` with singular values between 0.7 and 1.2 unless tiny,
    and the same singular vectors.
    """
    wide = matrices if matrices.size(1) <= matrices.size(2) else matrices.mT  # for the smaller Gram matrix
    x = wide.to(dtype).contiguous()
    x = x / x.flatten(1).norm(dim=1).clamp(min=TINY).view(-1, 1, 1)  # no singular value is above 1 now
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)  # (N, R, R); `@` would copy a lone matrix
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


def _iteration_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, which is precise enough for the iteration, where the hardware multiplies it;
    emulated it is up to 30 times slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else torch.float32


class MuonWithAdamW:
    """Muon on the hidden matrices and AdamW on everything else, with the interface of one optimizer."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, Muon's first."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Update every parameter."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return both states in torch's form, AdamW's parameters numbered after Muon's."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part in self.parts:
            offset, values = sum(len(group["params"]) for group in groups), part.state_dict()
            state |= {offset + index: value for index, value in values["state"].items()}
            groups += [
                group | {"params": [offset + index for index in group["params"]]} for group in values["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        groups, offset = list(values["param_groups"]), 0
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            count = sum(len(group["params"]) for group in own)
            state = {
                index - offset: value for index, value in values["state"].items() if offset <= index < offset + count
            }
            own = [group | {"params": [index - offset for index in group["params"]]} for group in own]
            part.load_state_dict({"state": state, "param_groups": own})
            offset += count
