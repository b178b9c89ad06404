"""Llama for the fast decoder: query, key and value in one product, gate and up in another."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milepost.generation.decoder_parts import Heads, Layer, Parts, Turn, by_row
from models.linears import Linear, float32_linear
from models.llama import Attention, Block, Llama, LlamaSettings, rotation


def parts_of(model: Llama, linear: Callable[..., Linear]) -> Parts:
    """Return the model's steps, with `linear` for its matrices."""
    s = model.settings
    turns = _turns(s, model.embed_tokens.weight.device)
    head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    return Parts(
        embed=lambda ids, _: model.embed_tokens.weight[ids],
        turn=lambda positions: (turns[0][positions], turns[1][positions]),
        layers=[_layer(block, linear) for block in cast(list[Block], model.layers)],
        norm=_norm(model.norm),
        head_weight=head,
        head_bias=head.new_zeros(()),
        cache_shape=(s.n_layer, s.n_kv_head, s.head_size),
        inner=s.n_inner,
    )


def _turns(settings: LlamaSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for each position and value of a head, (block_size, 1, hs): what x and x.roll(hs / 2) are
    multiplied with, so the sine of the first half is negative.
    """
    cosine, sine = rotation(settings, 0, settings.block_size, device)
    return torch.cat((cosine, cosine), -1)[:, None], torch.cat((-sine, sine), -1)[:, None]


def _layer(block: Block, linear: Callable[..., Linear]) -> Layer:
    attn, mlp = block.self_attn, block.mlp
    both = _together(linear, mlp.gate_proj, mlp.up_proj)
    return Layer(
        norm_1=_norm(block.input_layernorm),
        qkv=_together(linear, attn.q_proj, attn.k_proj, attn.v_proj),
        heads=_heads(attn),
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


def _heads(attn: Attention) -> Heads:
    H, KV, hs = attn.shape
    normed = not isinstance(attn.q_norm, nn.Identity)

    def heads(qkv: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        assert turn is not None
        x = qkv.float().view(qkv.size(0), H + 2 * KV, hs)
        turned, v = x[:, : H + KV], x[:, H + KV :]  # (R, H + KV, hs), (R, KV, hs)
        if normed:
            turned = torch.cat((attn.q_norm(turned[:, :H]), attn.k_norm(turned[:, H:])), 1)
        turned = turned * turn[0] + turned.roll(hs // 2, -1) * turn[1]
        return turned[:, :H], turned[:, H:], v

    return heads


def _norm(norm: nn.RMSNorm) -> Linear:
    """Return the norm of rows (R, C). On a CPU F.rms_norm is eight operations of PyTorch, each of which takes longer to start than
    to compute for a row; these are four.
    """
    if norm.weight.is_cuda:
        return norm
    root = math.sqrt(norm.weight.numel())
    weight, least = norm.weight * root, norm.weight.new_tensor(math.sqrt(cast(float, norm.eps)) * root)

    def normed(x: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (R, 1)
        return x * weight / lengths.hypot(least)  # the root of C (mean square + eps)

    return by_row(normed)
