"""Llama for the fast decoder: query, key and value in one product, gate and up in another."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from milepost.generation.decoder_parts import Layer, Parts, Turn
from models.linears import Linear, activated, by_row, float32_linear
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
        norm=_Norm(model.norm),
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
    return Layer(
        norm_1=_Norm(block.input_layernorm),
        qkv=_together(linear, attn.q_proj, attn.k_proj, attn.v_proj),
        heads=_Heads(attn),
        project=linear(attn.o_proj.weight, attn.o_proj.bias),
        norm_2=_Norm(block.post_attention_layernorm),
        widen=_together(linear, mlp.gate_proj, mlp.up_proj, activation="swiglu"),
        narrow=linear(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _together(linear: Callable[..., Linear], *layers: nn.Linear, activation: str = "") -> Linear:
    """Return one linear layer whose outputs are those of the layers, one after the other; in float32 without a copy."""
    if linear is float32_linear:
        single = [linear(layer.weight, layer.bias) for layer in layers]
        return lambda x: activated(torch.cat([each(x) for each in single], -1), activation)
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)  # all of them have one, or none
    weight = torch.cat(tuple(layer.weight for layer in layers))
    return linear(weight, torch.cat(biases) if biases else None, activation)


class _Heads:
    def __init__(self, attn: Attention) -> None:
        self.n_head, self.n_kv_head, self.size = attn.shape
        self.norms: tuple[Tensor, Tensor] | None = None
        self.eps = 0.0
        if not isinstance(attn.q_norm, nn.Identity):
            self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
            self.norms, self.eps = (attn.q_norm.weight, cast(Tensor, attn.k_norm.weight)), cast(float, attn.q_norm.eps)

    def __call__(self, qkv: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        assert turn is not None
        H, KV = self.n_head, self.n_kv_head
        x = qkv.float().view(qkv.size(0), H + 2 * KV, self.size)
        turned, v = x[:, : H + KV], x[:, H + KV :]  # (R, H + KV, hs), (R, KV, hs)
        if self.norms:
            turned = torch.cat((self.q_norm(turned[:, :H]), self.k_norm(turned[:, H:])), 1)
        turned = turned * turn[0] + turned.roll(self.size // 2, -1) * turn[1]
        return turned[:, :H], turned[:, H:], v


class _Norm:
    """The norm of rows (R, C). On a CPU F.rms_norm is eight operations of PyTorch, each of which takes longer to start than to
    compute for a row; these are four.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        self.weight: Tensor = norm.weight
        self.bias: Tensor | None = None
        self.centred, self.eps, self._norm = False, cast(float, norm.eps), norm
        root = math.sqrt(norm.weight.numel())
        self._scaled, self._least = norm.weight * root, norm.weight.new_tensor(math.sqrt(self.eps) * root)
        self._rows = by_row(self._few)

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(x) if x.is_cuda else self._rows(x)

    def _few(self, x: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (R, 1)
        return x * self._scaled / lengths.hypot(self._least)  # the root of C (mean square + eps)
