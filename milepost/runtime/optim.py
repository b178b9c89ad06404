"""Optimizers with their parameter groups, and the learning rate as a pure function of the step."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from milepost.runtime.distributed import SINGLE, World, full, local, sharded_like
from milepost.runtime.hardware import multiplies_bfloat16

Arriving = Callable[[], Tensor]

KINDS = ("constant", "cosine", "linear", "wsd")
WSD_DECAY = (
    0.2  # share of the run that a warmup-stable-decay schedule spends decaying (Haegele et al. 2024, arXiv 2405.18392)
)

# Where the fused AdamW kernel divides gradients by `grad_scale` while it reads them. On MPS it ignores that.
READS_GRAD_SCALE = ("cpu", "cuda")

# Muon's quintic Newton-Schulz iteration: its coefficients and number of steps (Jordan et al. 2024).
QUINTIC, ITERATIONS, TINY = (3.4445, -4.7750, 2.0315), 5, 1e-7
# What TTT layers have for each head: vectors, though the tensor has two or three dimensions.
VECTOR_PER_HEAD = ("b1", "b2", "learnable_ttt_lr_bias", "ttt_norm_weight", "ttt_norm_bias")
# Matrices of one shape are iterated together, up to this many elements: small ones cost calls, large ones memory bandwidth.
TOGETHER = 2**18


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A plan of learning rates over the steps [start_step, end_step). Rates are AdamW's."""

    kind: str
    peak: float
    floor: float
    warmup_steps: int
    start_step: int
    end_step: int

    @property
    def total(self) -> int:
        """Steps in the plan."""
        return self.end_step - self.start_step


def lr_at(step: int, schedule: Schedule) -> float:
    """The learning rate of the update that follows `step` completed ones. Past the plan, the last rate of it is held."""
    done = min(step, schedule.end_step - 1) - schedule.start_step
    if done < schedule.warmup_steps:
        return schedule.peak * (done + 1) / (schedule.warmup_steps + 1)
    share = (done - schedule.warmup_steps) / max(1, schedule.total - schedule.warmup_steps)  # in [0, 1)
    return schedule.floor + (schedule.peak - schedule.floor) * _height(schedule.kind, share)


def _height(kind: str, share: float) -> float:
    """The schedule's height between floor (0) and peak (1), `share` of the way through its decay."""
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if kind == "linear":
        return 1 - share
    if kind == "wsd":
        return min(1.0, (1 - share) / WSD_DECAY)
    return 1.0


def replan(schedule: Schedule, *, peak: float, start_step: int, steps: int, warmup_steps: int) -> Schedule:
    """The same kind of schedule anew over `steps` steps from `start_step`; the floor keeps its ratio to the peak."""
    ratio = schedule.floor / schedule.peak if schedule.peak > 0 else 0.0
    floor = float(f"{ratio * peak:.12g}")  # 1e-5, not 9.999999999999999e-6: people read it
    end_step = start_step + steps
    return Schedule(
        kind=schedule.kind, peak=peak, floor=floor, warmup_steps=warmup_steps, start_step=start_step, end_step=end_step
    )


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalised, for the matrices between the embeddings and the head.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the update scaled to the size of AdamW's so that one
    learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon's `match_rms_adamw` is the same formula.
    Here a group's `blocks` says how many matrices lie one above the other in each of its weights (query, key and value are
    three), each orthogonalised on its own; and equal shapes go together, since small ones cost more in calls than in arithmetic.
    Processes that all have the same weights and gradients take turns, and tell the others each direction.
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
        """One update of every weight that has a gradient."""
        under_way: deque[tuple[dict[str, Any], list[tuple[Tensor, ...]], Arriving]] = deque()
        for number, (group, blocks) in enumerate(self._work()):
            source = number % self._world.size
            under_way.append((group, blocks, self._directions(group, blocks, source)))
            while len(under_way) >= self._world.size:  # no more than one of each process: memory
                _move(*under_way.popleft())
        for one in under_way:
            _move(*one)

    def _work(self) -> Iterator[tuple[dict[str, Any], list[tuple[Tensor, ...]]]]:
        """What is orthogonalised together, and its group; weights of which each process holds a part are moved on the way."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            if any(local(parameter) is not parameter for parameter in group["params"]):
                self._move_parts(group)
                continue
            for blocks in _equally_shaped(self._blocks(group)):
                yield group, blocks

    def _blocks(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, ...]]:
        """Weight, gradient and momentum of each matrix in the group, all views, all (rows, columns)."""
        for parameter in group["params"]:
            if parameter.grad is not None:
                each = (parameter, parameter.grad, self.state[parameter]["momentum_buffer"])
                yield from zip(*(tensor.chunk(group["blocks"]) for tensor in each), strict=True)

    def _directions(self, group: dict[str, Any], blocks: list[tuple[Tensor, ...]], source: int) -> Arriving:
        """The directions (N, R, C) of matrices of one shape, which process `source` finds out."""
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

    def _move_parts(self, group: dict[str, Any]) -> None:
        """One update of weights of which each process holds a part: a direction is made of the whole matrix, in every process alike."""
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            gradient, average = parameter.grad, self.state[parameter]["momentum_buffer"]
            average.lerp_(gradient, 1 - group["momentum"])
            ahead = full(gradient.lerp(average, group["momentum"]))
            matrices = torch.stack(ahead.chunk(group["blocks"]))  # (N, R, C)
            directions = orthogonalised(matrices, _iteration_dtype(ahead.device)).flatten(0, 1)
            part, rate = local(sharded_like(directions, parameter)), group["lr"]
            local(parameter).mul_(1 - rate * group["weight_decay"]).add_(part, alpha=-rate * _ratio(matrices[0]))


def _equally_shaped(blocks: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """The blocks in lists of one shape, none of more than TOGETHER elements unless it is one block."""
    by_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    for block in blocks:
        by_shape.setdefault(block[0].shape, []).append(block)
    for shape, equal in by_shape.items():
        count = max(1, TOGETHER // shape.numel())
        yield from (equal[first : first + count] for first in range(0, len(equal), count))


def _move(group: dict[str, Any], blocks: list[tuple[Tensor, ...]], directions: Arriving) -> None:
    """One update of the matrices of one shape along their directions."""
    lr = group["lr"]
    for (weight, _, _), direction in zip(blocks, directions(), strict=True):
        weight.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr * _ratio(weight))


def _ratio(matrix: Tensor) -> float:
    """What brings an orthogonal direction (R, C) to the size of AdamW's updates, whose root mean square is about 0.2."""
    return 0.2 * math.sqrt(max(matrix.shape))


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices (N, R, C) in `dtype`, their singular values brought to between 0.7 and 1.2 unless tiny, their directions kept."""
    wide = matrices if matrices.size(1) <= matrices.size(2) else matrices.mT  # for the smaller Gram matrix
    x = wide.to(dtype).contiguous()
    x = x / x.flatten(1).norm(dim=1).clamp(min=TINY).view(-1, 1, 1)  # no singular value is above 1 now
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)  # (N, R, R); `@` would copy a lone matrix
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


def _iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which the iteration bears, where the hardware multiplies it; imitated, it is slower than float32, up to thirty times."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else torch.float32


class MuonWithAdamW:
    """Muon on the hidden matrices, AdamW on everything else, spoken to as one optimizer."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, Muon's first; setting a group's `lr` sets it."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One update of every parameter."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both states in torch's form, AdamW's parameters numbered after Muon's."""
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
        """Takes what `state_dict` gave."""
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


def build_optimizer(
    model: nn.Module, kind: str, *, lr: float, weight_decay: float, betas: tuple[float, float], world: World = SINGLE
) -> torch.optim.Optimizer:
    """The optimizer over `model`'s named parameters, which `world`'s processes step together.

    Weight decay falls on matrices only, not on biases and norms (as GPT-2's).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if kind == "adamw":
        return _adamw(named, lr=lr, weight_decay=weight_decay, betas=betas)
    hidden = [(name, parameter) for name, parameter in named if _is_hidden_matrix(name, parameter)]
    rest = [(name, parameter) for name, parameter in named if not _is_hidden_matrix(name, parameter)]
    parts: list[torch.optim.Optimizer] = []
    if hidden:  # the bigram model is one embedding table
        triples = [one for one in hidden if _is_query_key_value(one[0])]
        single = [one for one in hidden if not _is_query_key_value(one[0])]
        groups: list[dict[str, Any]] = [{"params": triples, "blocks": 3}, {"params": single}]
        groups = [group for group in groups if group["params"]]
        parts.append(Muon(groups, lr=lr, weight_decay=weight_decay, world=world))
    if rest:  # adapters are all matrices
        parts.append(_adamw(rest, lr=lr, weight_decay=weight_decay, betas=betas))
    return (
        parts[0] if len(parts) == 1 else cast(torch.optim.Optimizer, MuonWithAdamW(*parts))
    )  # it has all that a caller of one uses


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices between the embeddings and the head, the only ones that Muon is meant for."""
    return parameter.dim() == 2 and _is_matrix(name, parameter) and name.startswith("h.")


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it multiplies, and so decays; one for each head counts."""
    return parameter.dim() >= 2 and name.rpartition(".")[2] not in VECTOR_PER_HEAD


def _is_query_key_value(name: str) -> bool:
    """Attention's first layer: three matrices in one weight."""
    return name.endswith(".c_attn.weight")


def _adamw(
    named: list[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    matrices = [one for one in named if _is_matrix(*one)]
    vectors = [one for one in named if not _is_matrix(*one)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of all gradients taken as one vector, 0-dim."""
    return full(nn.utils.get_total_norm(_gradients(optimizer)))


def clip_gradients(optimizer: torch.optim.Optimizer, norm: Tensor, *, limit: float) -> None:
    """Scales the gradients of the coming step by limit / `norm` if their `norm` is more than `limit` (0: no limit); call before each.

    The fused AdamW scales while it reads, which saves a pass over all gradients. Below the limit nothing is multiplied.
    """
    scale = (norm / limit).float() if limit and norm > limit else None
    for part in optimizer.parts if isinstance(optimizer, MuonWithAdamW) else (optimizer,):
        gradients = _gradients(part)
        parts = [local(gradient) for gradient in gradients]
        in_parts = any(one is not other for one, other in zip(parts, gradients, strict=True))
        if isinstance(part, torch.optim.AdamW) and norm.device.type in READS_GRAD_SCALE and not in_parts:
            part.grad_scale = scale  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it, and keeps ours
        elif scale is not None:
            torch._foreach_div_(parts, scale)


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
