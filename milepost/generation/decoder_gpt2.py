"""GPT-2 for the fast decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from milepost.generation.decoder_parts import Layer, Parts, Turn
from models.gpt2 import GPT2, Block
from models.linears import Linear


def parts_of(model: GPT2, linear: Callable[..., Linear]) -> Parts:
    """Return the model's steps, with `linear` for its matrices. Raise ValueError if it has TTT layers."""
    s = model.settings
    if s.ttt is not None:
        raise ValueError("a Decoder has no TTT layers: generate with the model itself")
    head = model.wte if model.lm_head is None else model.lm_head
    return Parts(
        embed=lambda ids, positions: model.wte.weight[ids] + model.wpe.weight[positions],
        turn=lambda _: None,
        layers=[_layer(block, linear, s.activation, s.n_head) for block in cast(list[Block], model.h)],
        norm=_norm(model.ln_f),
        head_weight=head.weight,
        head_bias=head.weight.new_zeros(()) if model.lm_head is None else model.lm_head.bias,
        cache_shape=(s.n_layer, s.n_head, s.n_embd // s.n_head),
        inner=4 * s.n_embd,
    )


def _layer(block: Block, linear: Callable[..., Linear], activation: str, n_head: int) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        norm_1=_norm(block.ln_1),
        qkv=linear(attn.c_attn.weight, attn.c_attn.bias),
        heads=_Heads(n_head),
        project=linear(attn.c_proj.weight, attn.c_proj.bias),
        norm_2=_norm(block.ln_2),
        widen=linear(mlp.c_fc.weight, mlp.c_fc.bias, activation),
        narrow=linear(mlp.c_proj.weight, mlp.c_proj.bias),
    )


@dataclass
class _Heads:
    n_head: int
    norms: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0

    def __call__(self, qkv: Tensor, _: Turn) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.float().view(qkv.size(0), 3, self.n_head, -1).unbind(1)  # each (R, H, hs)
        return q, k, v


@dataclass
class _Norm:
    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _norm(norm: nn.LayerNorm) -> _Norm:
    return _Norm(norm.weight, norm.bias, norm.eps)
