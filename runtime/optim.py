"""Optimizers with their parameter groups, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

KINDS = ("constant", "cosine", "linear", "wsd")
WSD_DECAY = (
    0.2  # share of the run that a warmup-stable-decay schedule spends decaying (Haegele et al. 2024, arXiv 2405.18392)
)


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


class MuonWithAdamW:
    """Muon on the hidden matrices, AdamW on everything else, spoken to as one optimizer.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; `match_rms_adamw` (Liu et al. 2025, arXiv 2502.16982)
    scales its updates so that one learning rate, AdamW's, serves both.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
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
    model: nn.Module, kind: str, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimizer over `model`'s named parameters. Weight decay falls on matrices only, not on biases and norms (as GPT-2's)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if kind == "adamw":
        return _adamw(named, lr=lr, weight_decay=weight_decay, betas=betas)
    hidden = [(name, parameter) for name, parameter in named if _is_hidden_matrix(name, parameter)]
    rest = [(name, parameter) for name, parameter in named if not _is_hidden_matrix(name, parameter)]
    adamw = _adamw(rest, lr=lr, weight_decay=weight_decay, betas=betas)
    if not hidden:  # the bigram model is one embedding table
        return adamw
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return cast(torch.optim.Optimizer, MuonWithAdamW(muon, adamw))  # it has all that a caller of one uses


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices between the embeddings and the head, the only ones that Muon is meant for."""
    return parameter.dim() == 2 and name.startswith("h.")


def _adamw(
    named: list[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    matrices = [(name, parameter) for name, parameter in named if parameter.dim() >= 2]
    vectors = [(name, parameter) for name, parameter in named if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)
