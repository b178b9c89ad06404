"""Llama for the fast decoder: query, key and value in one product, gate and up in another."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milepost.generation.decoder_parts import Heads, Layer, Parts, by_row
from models.linears import Linear, float32_linear
from models.llama import Attention, Block, Llama, rotated, rotation


def parts_of(model: Llama, linear: Callable[..., Linear]) -> Parts:
    """Return the model's steps, with `linear` for its matrices."""
    s = model.settings
    turns = rotation(
        s, 0, s.block_size, model.embed_tokens.weight.device
    )  # once for all passes: their size changes no bit
    head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    return Parts(
        embed=lambda ids, _: model.embed_tokens.weight[ids],
        layers=[_layer(block, linear, turns) for block in cast(list[Block], model.layers)],
        norm=_norm(model.norm),
        head_weight=head,
        head_bias=head.new_zeros(()),
        cache_shape=(s.n_layer, s.n_kv_head, s.head_size),
        inner=s.n_inner,
    )


def _layer(block: Block, linear: Callable[..., Linear], turns: tuple[Tensor, Tensor]) -> Layer:
    attn, mlp = block.self_attn, block.mlp
    both = _together(linear, mlp.gate_proj, mlp.up_proj)
    return Layer(
        norm_1=_norm(block.input_layernorm),
        qkv=_together(linear, attn.q_proj, attn.k_proj, attn.v_proj),
        heads=_heads(attn, turns),
        project=linear(attn.o_proj.weight, attn.o_proj.bias),
        norm_2=_norm(block.post_attention_layernorm),
        widen=lambda x: _gated(both(x)),
        narrow=linear(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _together(linear: Callable[..., Linear], *layers: nn.Linear) -> Linear:
    """Return one linear layer whose outputs are those of the layers, one after the other; in float32 without a copy."""
    if linear is float32_linear:
        single = [linear(layer.weight, layer.bias) for layer in layers]
        return lambda x: torch.cat([each(x) for each in single], -1)
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)  # all of them have one, or none
    return linear(torch.cat(tuple(layer.weight for layer in layers)), torch.cat(biases) if biases else None)


@by_row
def _gated(both: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, -1)  # twice (R, n_inner)
    return F.silu(gate) * up


def _heads(attn: Attention, turns: tuple[Tensor, Tensor]) -> Heads:
    H, KV, hs = attn.shape

    def heads(qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        R = qkv.size(0)
        q, k, v = qkv.float().view(R, H + 2 * KV, hs).split((H, KV, KV), 1)  # (R, H, hs), twice (R, KV, hs)
        cosine, sine = (each[positions, None] for each in turns)  # twice (R, 1, hs / 2)
        return rotated(attn.q_norm(q), cosine, sine), rotated(attn.k_norm(k), cosine, sine), v

    return heads


def _norm(norm: nn.RMSNorm) -> Linear:
    return by_row(partial(F.rms_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, eps=norm.eps))
