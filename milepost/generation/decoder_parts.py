"""What a fast decoder needs to know of a model: its steps, as functions of a few rows (R, C), one for each new token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.linears import Linear

FEW: int = 16  # rows that are computed one by one: more than a draft has
# From the product of qkv and the positions of the rows (R,): queries (R, H, hs), keys and values (R, KV, hs), in float32.
Heads = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


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
    """A model's steps. `embed` returns the residual stream (R, C) of ids (R,) at positions (R,); `cache_shape` is (n_layer,
    KV, hs), and `inner` the width of the MLP. The head's weight is (V, C), its bias (V,) or a scalar 0.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
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
    return lambda x: torch.cat([function(row) for row in x.split(1)]) if x.size(0) <= FEW else function(x)
