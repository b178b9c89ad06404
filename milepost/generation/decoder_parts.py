"""What a fast decoder needs to know of a model: its steps, as functions of a few rows (R, C), one for each new token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from models.linears import Linear

FEW: Final = 32  # rows that are computed one by one: more than a draft has, and as many as a server reads together
Turn = tuple[Tensor, Tensor] | None  # of rotary positions: cosine and sine for each row, each (R, 1, hs)
# From the product of qkv (R, (H + 2 KV) hs): queries (R, H, hs), keys and values (R, KV, hs), in float32.
Heads = Callable[[Tensor, Turn], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """The steps of a block; `widen` includes the activation, `heads` the positions if they are rotary."""

    norm_1: Linear
    qkv: Linear
    heads: Heads
    project: Linear
    norm_2: Linear
    widen: Linear
    narrow: Linear


@dataclass(frozen=True)
class Parts:
    """A model's steps. `embed` returns the residual stream (R, C) of ids (R,) at positions (R,), `turn` what `heads` needs of
    the positions; `cache_shape` is (n_layer, KV, hs), and `inner` the width of the MLP. The head's weight is (V, C), its bias
    (V,) or a scalar 0.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    turn: Callable[[Tensor], Turn]
    layers: list[Layer]
    norm: Linear
    head_weight: Tensor
    head_bias: Tensor
    cache_shape: tuple[int, int, int]
    inner: int


def by_row(function: Linear) -> Linear:
    """Return the function of rows, computed row by row where they are few: where vectors end, it may round otherwise, and in a
    call of its own a row has the same vectors whatever follows it.
    """

    def rows(x: Tensor) -> Tensor:
        return function(x) if x.size(0) == 1 or x.size(0) > FEW else torch.cat([function(row) for row in x.split(1)])

    return rows
