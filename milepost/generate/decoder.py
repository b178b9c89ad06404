"""GPT-2 for generating on a CPU: the model's own mathematics, laid out for a few new tokens at a time.

One token reads every weight once and does little else, so its time is that of reading them. Here they are kept as
models.linears reads them fastest; the residual stream, norms, attention, keys and values stay in float32. In the
shapes below R is the new tokens, and C, H, hs and V are as in models.gpt2.

Each token of a pass comes out the same, to the last bit, however many the pass has. That is what lets drafted tokens
be verified together (models.lookup) without changing the text, and it rests on two things. oneDNN multiplies one row
by a kernel of its own, so a lone row is computed twice, which costs little where reading the weights is the work. And
each token attends in a call of its own: in a shared one its bits would depend on the thread that it falls to.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.gpt2 import GPT2, Block
from models.linears import LINEARS, Linear
from models.model import Model

# The most tokens of a draft: a pass that verifies them takes at most half as long again as one of a single token.
LONGEST_DRAFT: Final = {"float32": 11, "bfloat16": 11, "int8": 3}
RESCORED: Final = 256  # best tokens whose logits are computed again in float32: more than the default of TOP_K


class DecodeCache:
    """Keys and values of the `length` tokens seen, in one buffer that never grows. Set `length` lower to forget the last."""

    def __init__(self, model: GPT2) -> None:
        s = model.settings
        self.length = 0
        self.kept = torch.empty(s.n_layer, 2, 1, s.n_head, s.block_size, s.n_embd // s.n_head)


@dataclass(frozen=True)
class _Layer:
    """A Block's six steps; the activation is part of `widen`."""

    norm_1: Linear
    qkv: Linear
    project: Linear
    norm_2: Linear
    widen: Linear
    narrow: Linear


class Decoder:
    """A trained GPT2 on the CPU as models.sampling.generate() takes it: one text, no gradients.

    `weights` is one of LINEARS: how the matrices are kept. What the model learns later is not seen.
    """

    def __init__(self, model: GPT2, *, weights: str) -> None:
        if model.settings.ttt is not None:
            raise ValueError("a Decoder has no TTT layers; generate with the model itself.")
        linear, head = LINEARS[weights], model.wte if model.lm_head is None else model.lm_head
        self.model, self.settings, self.max_length = model, model.settings, model.max_length
        self.weights, self.exact, self.longest_draft = weights, weights == "float32", LONGEST_DRAFT[weights]
        with torch.inference_mode():
            self.layers = [_layer(block, linear, model.settings.activation) for block in cast(list[Block], model.h)]
            self.head, self.head_weight = linear(head.weight), head.weight
            self.head_bias = head.weight.new_zeros(()) if model.lm_head is None else model.lm_head.bias
            self.norm = _norm(model.ln_f)

    def new_cache(self, batch_size: int = 1) -> DecodeCache:
        """An empty cache for rows()."""
        return DecodeCache(self.model)

    def modules(self) -> Iterable[nn.Module]:
        """None: nothing here has a mode."""
        return ()

    @torch.inference_mode()
    def rows(self, ids: Sequence[int], cache: DecodeCache, *, last: int = 1) -> Iterable[Tensor]:
        """The float32 logits (V,) of what follows each of the `last` ids; they go on where the cache ends, and it grows.

        Each is finished as it is taken, so that of a draft that fails early the rest costs less.
        """
        x = self._read(ids, cache)[-last:]  # (last, C)
        logits = self.head(_no_lone_row(x))[:last] + self.head_bias  # (last, V)
        return logits if self.exact else map(self._rescored, x.split(1), logits.float())

    def _read(self, ids: Sequence[int], cache: DecodeCache) -> Tensor:
        """The last norm's output for each token, (R, C)."""
        start, R = cache.length, len(ids)
        x = self.model.wte.weight[torch.tensor(ids)] + self.model.wpe.weight[start : start + R]
        x = _no_lone_row(x)  # (max(2, R), C)
        for layer, kept in zip(self.layers, cache.kept.unbind(), strict=True):
            x = x + layer.project(_no_lone_row(_attend(layer.qkv(layer.norm_1(x))[:R], kept, start)))
            x = x + layer.narrow(layer.widen(layer.norm_2(x)))
        cache.length += R
        return self.norm(x)[:R]

    @torch.inference_mode()
    def agrees(self) -> bool:
        """Whether a row comes out with the same bits in passes of any size that drafts have, tried on a layer and the head.

        It does on the processors that this was written on. On others, drafting could change the text. The rest of a pass
        takes each token by itself.
        """
        largest, generator = 1 + self.longest_draft, torch.Generator().manual_seed(0)
        narrow = torch.randn(largest, self.settings.n_embd, generator=generator)
        wide = torch.randn(largest, 4 * self.settings.n_embd, generator=generator)
        layer = self.layers[0]
        tried = [(one, narrow) for one in (layer.qkv, layer.project, layer.widen, self.head)] + [(layer.narrow, wide)]
        return all(_rows_agree(linear, x) for linear, x in tried)

    @torch.inference_mode()
    def _rescored(self, x: Tensor, logits: Tensor) -> Tensor:
        """Logits (V,) with the best ones computed again from x (1, C) and the float32 weights.

        bfloat16 has 8 bits: logits between 8 and 16 are multiples of 1/16, by which the best ones would often tie.
        """
        best = logits.topk(min(RESCORED, logits.numel())).indices
        bias = self.head_bias[best] if self.head_bias.dim() else self.head_bias
        return logits.index_copy(0, best, F.linear(x, self.head_weight[best])[0] + bias)


# The models that have a fast decoder.
DECODERS: Final[dict[type[Model], Callable[..., Decoder]]] = {GPT2: Decoder}


def decoder_of(model: Model) -> tuple[Callable[..., Decoder] | None, str]:
    """Return the model's fast decoder; without one None, and the reason."""
    if getattr(model.settings, "ttt", None) is not None:
        return None, "TTT layers learn from each token, and cannot take it back"
    found = DECODERS.get(type(model))
    return found, "" if found else f"{type(model).__name__} has no fast decoder"


def _layer(block: Block, linear: Callable[..., Linear], activation: str) -> _Layer:
    attn, mlp = block.attn, block.mlp
    return _Layer(
        norm_1=_norm(block.ln_1),
        qkv=linear(attn.c_attn.weight, attn.c_attn.bias),
        project=linear(attn.c_proj.weight, attn.c_proj.bias),
        norm_2=_norm(block.ln_2),
        widen=linear(mlp.c_fc.weight, mlp.c_fc.bias, activation),
        narrow=linear(mlp.c_proj.weight, mlp.c_proj.bias),
    )


def _norm(norm: nn.LayerNorm) -> Linear:
    return partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps)  # fmt: skip


def _no_lone_row(x: Tensor) -> Tensor:
    """x (R, C), or its one row twice."""
    return x if x.size(0) > 1 else torch.cat([x, x])


def _rows_agree(linear: Linear, x: Tensor) -> bool:
    """Whether the last rows of x (R, in), from one of them up to all but one, come out as they do among all R."""
    whole = linear(x)
    return all(torch.equal(linear(_no_lone_row(x[-rows:]))[-rows:], whole[-rows:]) for rows in range(1, len(x)))


def _attend(qkv: Tensor, kept: Tensor, start: int) -> Tensor:
    """(R, C) from the qkv (R, 3C) of tokens at `start`, whose keys and values go into kept (2, 1, H, block_size, hs)."""
    R, H = qkv.size(0), kept.size(2)
    heads = qkv.view(R, 3, H, -1)  # (R, 3, H, hs)
    kept[:, 0, :, start : start + R] = heads[:, 1:].permute(1, 2, 0, 3)
    q, (keys, values) = heads[:, :1].float(), kept.unbind()  # (R, 1, H, hs), twice (1, H, block_size, hs)
    if start == 0:  # a prompt: all at once, as there are no drafts in it
        y = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3), keys[:, :, :R], values[:, :, :R], is_causal=True
        )  # (1, H, R, hs)
        return y[0].transpose(0, 1).flatten(1)
    each = [
        F.scaled_dot_product_attention(q[r, :, :, None], keys[:, :, :seen], values[:, :, :seen]).view(1, -1)
        for r, seen in enumerate(range(start + 1, start + R + 1))
    ]
    return torch.cat(each)
