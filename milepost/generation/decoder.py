"""Fast decoders, which generate on a CPU: a model's own mathematics, laid out for a few new tokens at a time.

Generating a token reads every weight once and does little else, so its time is that of reading them. The weights are
stored in the layout that models.linears reads fastest; the residual stream, norms, attention, keys and values stay in
float32. A file for each model names its steps (decoder_gpt2, decoder_llama). In the shapes below R is the number of new tokens,
and C, H, KV, hs and V are as in models.llama.

The results for a token are bit-identical whatever the number of tokens in the pass. So drafted tokens can be verified
together (generate.lookup) without changing the text. Two measures ensure it. The products of models.linears give a row the
same bits among any number of rows. And each token attends in a call of its own: in a shared call its bits would depend on
the thread that computes it.

A prompt is many tokens, and read in whole chunks of PROMPT_CHUNK and what is left over. Products and attention of a chunk are calls of
their own, of the same shapes wherever the prompt ends. So its keys and values serve every text that begins with the same chunks (prefixes).
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
from models.linears import FEW, LINEARS, PROMPT_CHUNK, Linear, multiplies_rows_together
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

    Lower `length` to forget the latest tokens. `prefix` are the first of them, as far as they were read in whole chunks.
    """

    def __init__(self, shape: tuple[int, int, int], block_size: int, device: torch.device | None = None) -> None:
        self.length, self.block_size = 0, block_size
        self.ahead: Ahead | None = None
        self.prefix: list[int] = []
        n_layer, KV, hs = shape
        self.states = torch.empty(n_layer, 2, 1, KV, min(block_size, SMALLEST_ROOM), hs, device=device)
        self.layers = _by_layer(self.states)

    def states_for(self, tokens: int) -> Tensor:
        """Return the buffer (n_layer, 2, 1, KV, room, hs) with room for so many tokens. `layers` are the keys and the values
        of each layer in it, (1, KV, room, hs).
        """
        room = self.states.size(4)
        if tokens > room:
            size = min(self.block_size, max(tokens, 2 * room))
            larger = self.states.new_empty(*self.states.shape[:4], size, self.states.size(5))
            larger[..., : self.length, :] = self.states[..., : self.length, :]
            self.states, self.layers = larger, _by_layer(larger)
        return self.states

    def begin_as(self, other: "DecodeCache", tokens: int) -> None:
        """Begin with the first `tokens` tokens of another cache's prefix, which are whole chunks."""
        states = self.states_for(tokens + 1)
        states[..., :tokens, :] = other.states[..., :tokens, :]
        self.length, self.prefix = tokens, other.prefix[:tokens]


def _by_layer(states: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(layer[0], layer[1]) for layer in states]


class Decoder:
    """A trained model on the CPU for sampling.generate(): one sequence, no gradients.

    `weights` is one of LINEARS: the dtype of the stored matrices, by default made by its function there. They are copies:
    later training of the model has no effect.
    """

    chunk = PROMPT_CHUNK  # tokens of a prompt that are read in the same way whatever follows them

    def __init__(self, model: Model, *, weights: str, linear: Callable[..., Linear] | None = None) -> None:
        linear = linear or LINEARS[weights]
        self.settings, self.max_length = model.settings, model.settings.block_size
        self.weights, self.exact = weights, weights == "float32"
        # Whether a pass reads the weights once for all its rows.
        self.together = weights != "bfloat16" or multiplies_rows_together()
        self.longest_draft = LONGEST_DRAFT.get(weights, 0) if self.together else 0
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
        cache.states_for(cache.length + len(ids))
        read = [self._follow(part, cache) for part in self._passes(ids, cache)]
        return self._logits((read[-1] if len(read[-1]) >= last else torch.cat(read))[-last:])

    def _passes(self, ids: Sequence[int], cache: DecodeCache) -> Iterable[Sequence[int]]:
        """Return the ids of each pass: those of a prompt, but a few after its whole chunks in a pass of their own."""
        if cache.length == 0:
            cache.prefix = []
        rest = len(ids) % self.chunk
        if len(cache.prefix) < cache.length or rest > FEW or rest in (0, len(ids)):
            return [ids]
        return [ids[:-rest], ids[-rest:]]

    def _follow(self, ids: Sequence[int], cache: DecodeCache) -> Tensor:
        """Return the output of the last norm for each of the ids (R, C), which follow the cache; it grows."""
        x = self._through(ids, [(cache, len(ids))])
        if len(cache.prefix) == cache.length:
            cache.prefix += ids[: len(ids) // self.chunk * self.chunk]
        cache.length += len(ids)
        return x

    @torch.inference_mode()
    def read_ahead(self, tokens: Sequence[int], caches: Sequence[DecodeCache]) -> None:
        """Compute in one pass what rows() will return next for each of several texts: one token each, after its cache.

        The bits are those of rows() alone if agrees(len(tokens)). A text that then continues otherwise loses only time.
        """
        for cache in caches:
            cache.states_for(cache.length + 1)
        x = self._through(tokens, [(cache, 1) for cache in caches])
        for token, cache, logits in zip(tokens, caches, self._logits(x), strict=True):
            cache.ahead = Ahead(cache.length, token, logits)

    def _through(self, ids: Sequence[int], spans: Sequence[tuple[DecodeCache, int]]) -> Tensor:
        """Return the output of the last norm for each id, (R, C). Each cache is followed by so many of the ids, has room for
        them, and keeps its length.
        """
        device, counts = spans[0][0].states.device, [count for _, count in spans]
        positions = positions_of(spans)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(q.split(counts), k.split(counts), v.split(counts), spans, strict=True)
            outputs = [
                _attend(q, k, v, *cache.layers[number], cache.length, self.chunk) for q, k, v, (cache, _) in parts
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return self._read(torch.tensor(ids, device=device), torch.tensor(positions, device=device), attend)

    def _logits(self, x: Tensor) -> Iterable[Tensor]:
        """Return the logits (V,) of each row of x (R, C)."""
        logits = self.head(x) + self.parts.head_bias if self.parts.head_bias.dim() else self.head(x)  # (R, V)
        return logits if self.exact else map(self._rescored, x.split(1), logits.float())

    def _read(self, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Return the output of the last norm for each token, (R, C). `attend` takes a layer's number and the heads of the tokens."""
        x, turn = self.parts.embed(ids, positions), self.parts.turn(positions)  # (R, C)
        for number, layer in enumerate(self.parts.layers):
            heads = layer.heads(layer.qkv(layer.norm_1(x)), turn)
            x = x + layer.project(attend(number, *heads))
            x = x + layer.narrow(layer.widen(layer.norm_2(x)))
        return self.parts.norm(x)

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


def positions_of(spans: Sequence[tuple[DecodeCache, int]]) -> list[int]:
    """Return the position of each of the tokens that follow the caches, so many each."""
    return [position for cache, count in spans for position in range(cache.length, cache.length + count)]


# The models that have a fast decoder, and what makes one.
PARTS: Final[dict[type[Model], Callable[..., Parts]]] = {GPT2: decoder_gpt2.parts_of, Llama: decoder_llama.parts_of}
DECODERS: Final[dict[type[Model], Callable[..., Decoder]]] = dict.fromkeys(PARTS, Decoder)


def decoder_of(model: Model) -> tuple[Callable[..., Decoder] | None, str]:
    """Return the model's fast decoder; without one None, and the reason."""
    if getattr(model.settings, "ttt", None) is not None:
        return None, "TTT layers learn from each token, and cannot take it back"
    found = DECODERS.get(type(model))
    return found, "" if found else f"{type(model).__name__} has no fast decoder"


def _rows_agree(linear: Linear, x: Tensor) -> bool:
    """Return whether any number of the last rows of x (R, in) give the same bits as among all R."""
    whole = linear(x)
    return all(torch.equal(linear(x[-rows:]), whole[-rows:]) for rows in range(1, len(x)))


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, chunk: int) -> Tensor:
    """Return the attention's output (R, H hs) for the heads of tokens from position `start` on.

    Their k and v (R, KV, hs) are written to keys and values (1, KV, room, hs); each head of them serves H / KV of q (R, H, hs).
    Tokens of a prompt attend `chunk` at a time, a few after it one at a time.
    """
    R = q.size(0)
    keys.narrow(2, start, R).copy_(k.transpose(0, 1))
    values.narrow(2, start, R).copy_(v.transpose(0, 1))
    size = chunk if start == 0 or R > FEW else 1
    outputs = [_attended(part, keys, values, start + at * size) for at, part in enumerate(q.split(size))]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attended(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Return the attention's output (R, H hs) of consecutive tokens, the first at position `start`, to those up to each."""
    (R, H, hs), KV = q.shape, keys.size(1)
    k, v = keys.narrow(2, 0, start + R), values.narrow(2, 0, start + R)
    if R == 1 and start:
        return F.scaled_dot_product_attention(q.view(1, KV, H // KV, hs), k, v).view(1, H * hs)
    k, v = (heads.repeat_interleave(H // KV, 1) for heads in (k, v))  # (1, H, start + R, hs)
    seen = torch.ones(R, start + R, dtype=torch.bool, device=q.device).tril(start) if start else None
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=seen, is_causal=not start)
    return y[0].transpose(0, 1).flatten(1)  # (1, H, R, hs) before
