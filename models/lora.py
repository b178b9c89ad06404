"""LoRA: the product of two low-rank matrices is trained beside a frozen one (Hu et al. 2021, arXiv 2106.09685).

In the shapes below r is the rank, `in` and `out` are the widths of the layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import LORA_NAMES


@dataclass(frozen=True)
class LoraSettings:
    """The adapters of a model. The product is scaled by alpha / rank; `targets` are names of layers, joined by commas, of
    those that the model registers as `lora_layers`.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = "c_attn,c_proj,c_fc"

    def __post_init__(self) -> None:
        names = self.targets.split(",")
        if len(set(names)) < len(names):
            raise ValueError(f"targets={self.targets!r:.80}: names a layer twice.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a probability from 0 to below 1.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: expected a number above 0.")


class LoraLinear(nn.Linear):
    """y = x W^T + b + (alpha / r) dropout(x) A^T B^T, with A (r, in) and B (out, r).

    B starts at 0, so y starts unchanged.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool, settings: LoraSettings) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.scale, self.dropout = settings.alpha / settings.rank, settings.dropout
        self.lora_A = nn.Parameter(torch.empty(settings.rank, n_in))
        self.lora_B = nn.Parameter(torch.empty(n_out, settings.rank))
        self.draw()

    def draw(self) -> None:
        """Initialise the adapters: A as torch initialises a linear layer's weight, B with zeros."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # (..., out)
        narrow = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., r)
        # Fused multiply and add: a separate product would be as large as y.
        return torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), self.lora_B.t(), alpha=self.scale).view(y.shape)


def linear(name: str, n_in: int, n_out: int, *, bias: bool, lora: LoraSettings | None) -> nn.Linear:
    """Return the layer `name` of a block, with adapters if `lora` targets it."""
    if lora is None or name not in lora.targets.split(","):
        return nn.Linear(n_in, n_out, bias=bias)
    return LoraLinear(n_in, n_out, bias=bias, settings=lora)


def merged(state: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """Return the state without adapters: each product added to its weight, in float32, since a narrower dtype of the
    weight would round off what the adapters learned."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(LORA_NAMES)}
    for name in (name for name in state if name.endswith(".lora_A")):
        layer = name.removesuffix(".lora_A")
        A, B = state[name].float(), state[f"{layer}.lora_B"].float()  # (r, in), (out, r)
        weight = f"{layer}.weight"
        plain[weight] = torch.addmm(plain[weight].float(), B, A, alpha=settings.alpha / settings.rank)
    return plain
