"""Fast decoders, which generate on a CPU: a model's own mathematics, laid out for a few new tokens at a time.

Generating a token reads every weight once and does little else, so its time is that of reading them. The weights are
stored in the layout that models.linears reads fastest; the residual stream, norms, attention, keys and values stay in
float32. In the shapes below R is the number of new tokens, and C, H, hs and V are as in models.gpt2.

The results for a token are bit-identical whatever the number of tokens in the pass. So drafted tokens can be verified
together (generate.lookup) without changing the text. Two measures ensure it. oneDNN has a separate kernel for a single
row, so a single row is computed twice, which costs little where reading the weights dominates. And each token attends
in a call of its own: in a shared call its bits would depend on the thread that computes it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.gpt2 import GPT2, Block
from models.linears import LINEARS, Linear
from models.model import Model

# The most tokens of a draft: a pass that verifies them takes at most 1.5 times as long as a pass of one token.
LONGEST_DRAFT: Final = {"float32": 11, "bfloat16": 11, "int8": 3}
RESCORED: Final = 256  # best tokens whose logits are recomputed in float32: more than the default top_k


class Ahead(NamedTuple):
    """What read_ahead() computed for a token at a position: the logits (V,) after it."""

    position: int
    token: int
    logits: Tensor


class DecodeCache:
    """Keys and values of the `length` tokens seen, in one buffer of fixed size.

    Lower `length` to forget the latest tokens.
    """

    def __init__(self, model: GPT2) -> None:
        s = model.settings
        self.length = 0
        self.ahead: Ahead | None = None
        self.states = torch.empty(s.n_layer, 2, 1, s.n_head, s.block_size, s.n_embd // s.n_head)


@dataclass(frozen=True)
class _Layer:
    """The six steps of a Block; `widen` includes the activation."""

    norm_1: Linear
    qkv: Linear
    project: Linear
    norm_2: Linear
    widen: Linear
    narrow: Linear


class Decoder:
    """A trained GPT2 on the CPU for sampling.generate(): one sequence, no gradients.

    `weights` is one of LINEARS: the dtype of the stored matrices. They are copies: later training of the model has no
    effect.
    """

    def __init__(self, model: GPT2, *, weights: str) -> None:
        if model.settings.ttt is not None:
            raise ValueError("a Decoder has no TTT layers: generate with the model itself")
        linear, head = LINEARS[weights], model.wte if model.lm_head is None else model.lm_head
        self.model, self.settings, self.max_length = model, model.settings, model.max_length
        self.weights, self.exact, self.longest_draft = weights, weights == "float32", LONGEST_DRAFT[weights]
        with torch.inference_mode():
            self.layers = [_layer(block, linear, model.settings.activation) for block in cast(list[Block], model.h)]
            self.head, self.head_weight = linear(head.weight), head.weight
            self.head_bias = head.weight.new_zeros(()) if model.lm_head is None else model.lm_head.bias
            self.norm = _norm(model.ln_f)

    def new_cache(self, batch_size: int = 1) -> DecodeCache:
        """Return an empty cache for rows()."""
        return DecodeCache(self.model)

    def modules(self) -> Iterable[nn.Module]:
        """Return no modules: a Decoder has no training mode."""
        return ()

    @torch.inference_mode()
    def rows(self, ids: Sequence[int], cache: DecodeCache, *, last: int = 1) -> Iterable[Tensor]:
        """Return the float32 logits (V,) after each of the `last` ids. The ids follow the tokens in the cache, which
        grows.

        Rescoring is lazy, so a draft that fails early does not pay for the rest.
        """
        ahead, cache.ahead = cache.ahead, None
        if ahead is not None and (ahead.position, [ahead.token]) == (cache.length, list(ids)):
            cache.length += 1
            return [ahead.logits]
        start, R = cache.length, len(ids)
        positions = torch.arange(start, start + R)
        x = self._read(ids, positions, lambda number, qkv: _attend(qkv, cache.states[number], start))
        cache.length += R
        return self._logits(x[-last:])

    @torch.inference_mode()
    def read_ahead(self, tokens: Sequence[int], caches: Sequence[DecodeCache]) -> None:
        """Compute in one pass what rows() will return next for each of several texts: one token each, after its cache.

        The bits are those of rows() alone if agrees(len(tokens)). A text that then continues otherwise loses only time.
        """

        def attend(number: int, qkv: Tensor) -> Tensor:
            each = zip(qkv.split(1), caches, strict=True)
            return torch.cat([_attend(row, cache.states[number], cache.length) for row, cache in each])

        x = self._read(tokens, torch.tensor([cache.length for cache in caches]), attend)
        for token, cache, logits in zip(tokens, caches, self._logits(x), strict=True):
            cache.ahead = Ahead(cache.length, token, logits)

    def _logits(self, x: Tensor) -> Iterable[Tensor]:
        """Return the logits (V,) of each row of x (R, C)."""
        logits = self.head(_at_least_two(x))[: len(x)] + self.head_bias  # (R, V)
        return logits if self.exact else map(self._rescored, x.split(1), logits.float())

    def _read(self, ids: Sequence[int], positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Return the output of the last norm for each token, (R, C). `attend` takes a layer's number and qkv (R, 3C)."""
        R = len(ids)
        x = self.model.wte.weight[torch.tensor(ids)] + self.model.wpe.weight[positions]
        x = _at_least_two(x)  # (max(2, R), C)
        for number, layer in enumerate(self.layers):
            x = x + layer.project(_at_least_two(attend(number, layer.qkv(layer.norm_1(x))[:R])))
            x = x + layer.narrow(layer.widen(layer.norm_2(x)))
        return self.norm(x)[:R]

    @torch.inference_mode()
    def agrees(self, rows: int | None = None) -> bool:
        """Return whether rows are bit-identical in passes of any size up to `rows`, by default a draft's, tested on one
        layer and the head.

        If this processor computes them differently, drafting could change the text. The rest of a pass handles each
        token separately.
        """
        largest, generator = rows or 1 + self.longest_draft, torch.Generator().manual_seed(0)
        narrow = torch.randn(largest, self.settings.n_embd, generator=generator)
        wide = torch.randn(largest, 4 * self.settings.n_embd, generator=generator)
        layer = self.layers[0]
        tested = [(linear, narrow) for linear in (layer.qkv, layer.project, layer.widen, self.head)]
        return all(_rows_agree(linear, x) for linear, x in [*tested, (layer.narrow, wide)])

    @torch.inference_mode()
    def _rescored(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return logits (V,) with the best ones recomputed from x (1, C) and the float32 weights.

        bfloat16 has 8 significant bits: logits between 8 and 16 are multiples of 1/16, so the best ones would often
        tie.
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
    return partial(
        F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )


def _at_least_two(x: Tensor) -> Tensor:
    """Return x (R, C), with its row repeated if there is only one."""
    return x if x.size(0) > 1 else torch.cat([x, x])


def _rows_agree(linear: Linear, x: Tensor) -> bool:
    """Return whether any number of the last rows of x (R, in) give the same bits as among all R."""
    whole = linear(x)
    return all(torch.equal(linear(_at_least_two(x[-rows:]))[-rows:], whole[-rows:]) for rows in range(1, len(x)))


def _attend(qkv: Tensor, states: Tensor, start: int) -> Tensor:
    """Return the attention's output (R, C) for the qkv (R, 3C) of tokens from position `start` on.

    Their keys and values are written to states (2, 1, H, block_size, hs).
    """
    R, H = qkv.size(0), states.size(2)
    heads = qkv.view(R, 3, H, -1)  # (R, 3, H, hs)
    states[:, 0, :, start : start + R] = heads[:, 1:].permute(1, 2, 0, 3)
    q, (keys, values) = heads[:, :1].float(), states.unbind()  # (R, 1, H, hs), twice (1, H, block_size, hs)
    if start == 0:  # the prompt: one call, because it contains no drafts
        q = q.permute(1, 2, 0, 3)  # (1, H, R, hs)
        y = F.scaled_dot_product_attention(q, keys[:, :, :R], values[:, :, :R], is_causal=True)  # (1, H, R, hs)
        return y[0].transpose(0, 1).flatten(1)
    outputs = [
        F.scaled_dot_product_attention(q[r, :, :, None], keys[:, :, :seen], values[:, :, :seen]).view(1, -1)
        for r, seen in enumerate(range(start + 1, start + R + 1))
    ]
    return torch.cat(outputs)
