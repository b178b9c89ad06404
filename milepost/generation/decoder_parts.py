"""What a fast decoder needs to know of a model: its steps, as functions of a few rows (R, C), one for each new token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.linears import Linear

Turn = tuple[Tensor, Tensor] | None  # of rotary positions: cosine and sine for each row, each (R, 1, hs)


class Norm(Protocol):
    """A norm of rows (R, C), and what it computes with; `centred` tells a layer norm from an RMS norm."""

    centred: bool
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor: ...


class Heads(Protocol):
    """From the product of qkv (R, (H + 2 KV) hs): queries (R, H, hs), keys and values (R, KV, hs), in float32."""

    n_head: int
    norms: tuple[Tensor, Tensor] | None  # weights of the norms of queries and of keys, each (hs,)
    eps: float

    def __call__(self, qkv: Tensor, turn: Turn, /) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Layer:
    """The steps of a block; `widen` includes the activation, `heads` the positions if they are rotary."""

    norm_1: Norm
    qkv: Linear
    heads: Heads
    project: Linear
    norm_2: Norm
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
    norm: Norm
    head_weight: Tensor
    head_bias: Tensor
    cache_shape: tuple[int, int, int]
    inner: int
