"""Fast decoders, which generate on a CPU: a model's own mathematics, laid out for a few new tokens at a time.

Generating a token reads every weight once and does little else, so its time is that of reading them. The weights are
stored in the layout that models.linears reads fastest; the residual stream, norms, attention, keys and values stay in
float32. A file for each model names its steps (decoder_gpt2, decoder_llama). In the shapes below R is the number of new tokens,
and C, H, KV, hs and V are as in models.llama.

The results for a token are bit-identical whatever the number of tokens in the pass. So drafted tokens can be verified
together (generate.lookup) without changing the text. Two measures ensure it. oneDNN has a separate kernel for a single
row, so a single row is computed twice, which costs little where reading the weights dominates. And each token attends
in a call of its own: in a shared call its bits would depend on the thread that computes it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milepost.generation import decoder_gpt2, decoder_llama
from milepost.generation.decoder_parts import Parts
from models.attention import SMALLEST_ROOM
from models.gpt2 import GPT2
from models.linears import LINEARS, Linear
from models.llama import Llama
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
    """Keys and values of the `length` tokens seen, in one buffer that grows to `block_size` tokens.

    Lower `length` to forget the latest tokens.
    """

    def __init__(self, shape: tuple[int, int, int], block_size: int, device: torch.device | None = None) -> None:
        self.length, self.block_size = 0, block_size
        self.ahead: Ahead | None = None
        n_layer, KV, hs = shape
        self.states = torch.empty(n_layer, 2, 1, KV, min(block_size, SMALLEST_ROOM), hs, device=device)

    def states_for(self, tokens: int) -> Tensor:
        """Return the buffer (n_layer, 2, 1, KV, room, hs) with room for so many tokens."""
        room = self.states.size(4)
        if tokens > room:
            size = min(self.block_size, max(tokens, 2 * room))
            larger = self.states.new_empty(*self.states.shape[:4], size, self.states.size(5))
            larger[..., : self.length, :] = self.states[..., : self.length, :]
            self.states = larger
        return self.states


class Decoder:
    """A trained model on the CPU for sampling.generate(): one sequence, no gradients.

    `weights` is one of LINEARS: the dtype of the stored matrices, by default made by its function there. They are copies:
    later training of the model has no effect.
    """

    fewest_rows = 2  # of a product; see above

    def __init__(self, model: Model, *, weights: str, linear: Callable[..., Linear] | None = None) -> None:
        linear = linear or LINEARS[weights]
        self.settings, self.max_length = model.settings, model.settings.block_size
        self.weights, self.exact = weights, weights == "float32"
        self.longest_draft = LONGEST_DRAFT.get(weights, 0)
        with torch.inference_mode():
            self.parts = PARTS[type(model)](model, linear)
            self.head = linear(self.parts.head_weight)

    def new_cache(self, batch_size: int = 1) -> DecodeCache:
        """Return an empty cache for rows()."""
        return DecodeCache(self.parts.cache_shape, self.settings.block_size)

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
        states = cache.states_for(start + R)
        positions = torch.arange(start, start + R, device=states.device)
        x = self._read(
            torch.tensor(ids, device=states.device),
            positions,
            lambda number, q, k, v: _attend(q, k, v, states[number], start),
        )
        cache.length += R
        return self._logits(x[-last:])

    @torch.inference_mode()
    def read_ahead(self, tokens: Sequence[int], caches: Sequence[DecodeCache]) -> None:
        """Compute in one pass what rows() will return next for each of several texts: one token each, after its cache.

        The bits are those of rows() alone if agrees(len(tokens)). A text that then continues otherwise loses only time.
        """
        lengths, states = [cache.length for cache in caches], [cache.states_for(cache.length + 1) for cache in caches]

        def attend(number: int, *heads: Tensor) -> Tensor:
            each = zip(*(part.split(1) for part in heads), (one[number] for one in states), lengths, strict=True)
            return torch.cat([_attend(*row) for row in each])

        x = self._read(torch.tensor(tokens), torch.tensor(lengths), attend)
        for token, cache, logits in zip(tokens, caches, self._logits(x), strict=True):
            cache.ahead = Ahead(cache.length, token, logits)

    def _logits(self, x: Tensor) -> Iterable[Tensor]:
        """Return the logits (V,) of each row of x (R, C)."""
        logits = self.head(self._enough(x))[: len(x)] + self.parts.head_bias  # (R, V)
        return logits if self.exact else map(self._rescored, x.split(1), logits.float())

    def _enough(self, x: Tensor) -> Tensor:
        return x if self.fewest_rows == 1 else _at_least_two(x)

    def _read(self, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Return the output of the last norm for each token, (R, C). `attend` takes a layer's number and the heads of the tokens."""
        R = len(ids)
        x = self._enough(self.parts.embed(ids, positions))  # (max(fewest_rows, R), C)
        for number, layer in enumerate(self.parts.layers):
            heads = layer.heads(layer.qkv(layer.norm_1(x))[:R], positions)
            x = x + layer.project(self._enough(attend(number, *heads)))
            x = x + layer.narrow(layer.widen(layer.norm_2(x)))
        return self.parts.norm(x)[:R]

    @torch.inference_mode()
    def agrees(self, rows: int | None = None) -> bool:
        """Return whether rows are bit-identical in passes of any size up to `rows`, by default a draft's, tested on one
        layer and the head.

        If this processor computes them differently, drafting could change the text. The rest of a pass handles each
        token separately.
        """
        largest, generator = rows or 1 + self.longest_draft, torch.Generator().manual_seed(0)
        layer = self.parts.layers[0]
        _, KV, hs = self.parts.cache_shape
        attended = getattr(self.settings, "n_head", KV) * hs
        stream, heads, wide = (
            torch.randn(largest, width, generator=generator)
            for width in (self.settings.n_embd, attended, self.parts.inner)
        )
        steps = (layer.norm_1, layer.qkv, layer.norm_2, layer.widen, self.parts.norm, self.head)
        tested = [*((step, stream) for step in steps), (layer.project, heads), (layer.narrow, wide)]
        return all(_rows_agree(step, x) for step, x in tested)

    @torch.inference_mode()
    def _rescored(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return logits (V,) with the best ones recomputed from x (1, C) and the float32 weights.

        bfloat16 has 8 significant bits: logits between 8 and 16 are multiples of 1/16, so the best ones would often
        tie.
        """
        best = logits.topk(min(RESCORED, logits.numel())).indices
        weight, bias = self.parts.head_weight, self.parts.head_bias
        return logits.index_copy(0, best, F.linear(x, weight[best])[0] + (bias[best] if bias.dim() else bias))


# The models that have a fast decoder, and what makes one.
PARTS: Final[dict[type[Model], Callable[..., Parts]]] = {GPT2: decoder_gpt2.parts_of, Llama: decoder_llama.parts_of}
DECODERS: Final[dict[type[Model], Callable[..., Decoder]]] = dict.fromkeys(PARTS, Decoder)


def decoder_of(model: Model) -> tuple[Callable[..., Decoder] | None, str]:
    """Return the model's fast decoder; without one None, and the reason."""
    if getattr(model.settings, "ttt", None) is not None:
        return None, "TTT layers learn from each token, and cannot take it back"
    found = DECODERS.get(type(model))
    return found, "" if found else f"{type(model).__name__} has no fast decoder"


def _at_least_two(x: Tensor) -> Tensor:
    """Return x (R, C), with its row repeated if there is only one."""
    return x if x.size(0) > 1 else torch.cat([x, x])


def _rows_agree(linear: Linear, x: Tensor) -> bool:
    """Return whether any number of the last rows of x (R, in) give the same bits as among all R."""
    whole = linear(x)
    return all(torch.equal(linear(_at_least_two(x[-rows:]))[-rows:], whole[-rows:]) for rows in range(1, len(x)))


def _attend(q: Tensor, k: Tensor, v: Tensor, states: Tensor, start: int) -> Tensor:
    """Return the attention's output (R, H hs) for the heads of tokens from position `start` on.

    Their keys and values (R, KV, hs) are written to states (2, 1, KV, room, hs); each head of them serves H / KV of q (R, H, hs).
    """
    R, H, hs = q.shape
    KV = k.size(1)
    states[:, 0, :, start : start + R] = torch.stack((k, v)).transpose(1, 2)
    if start == 0:  # the prompt: one call, because it contains no drafts
        k, v = (heads.transpose(0, 1).repeat_interleave(H // KV, 0)[None] for heads in (k, v))  # (1, H, R, hs)
        y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True)  # (1, H, R, hs)
        return y[0].transpose(0, 1).flatten(1)
    q, (keys, values) = (
        q.view(R, 1, KV, H // KV, hs),
        states.unbind(),
    )  # (R, 1, KV, H / KV, hs), twice (1, KV, room, hs)
    outputs = [
        F.scaled_dot_product_attention(q[r], keys[:, :, :seen], values[:, :, :seen]).view(1, -1)
        for r, seen in enumerate(range(start + 1, start + R + 1))
    ]
    return torch.cat(outputs)
