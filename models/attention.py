"""Causal self-attention by the fastest kernel, which is a fixed rule on device and size, and its key/value cache."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

# On a CPU the backward pass of the fused kernel is slow (2.5 times as long as plain products at T = 256, ten times at T
# = 64). Above this many tokens the (T, T) scores no longer fit into a cache.
SHORT = 512
# The same for float32 with AVX2, where both passes of the fused kernel together take 0.85 of the time of plain products at T = 256,
# 0.96 at T = 128 and 1.15 at T = 64.
SHORT_AVX2 = 64
SMALLEST_ROOM = 256  # tokens of a new key/value cache


@dataclass
class KeyValueCache:
    """Keys and values of the `length` tokens seen so far, so that a new token costs one position, not all of them.

    A buffer per layer, (B, KV, room, hs) for KV heads of keys, is allocated at first use, because only the keys know their
    dtype under autocast, and grows with the text to at most block_size: few texts fill a long context. Set length = 0 to
    start over in the same buffers. For use without gradients.
    """

    batch_size: int
    block_size: int
    length: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, KV, T, hs) of new tokens; return those of all tokens, (B, KV, length + T, hs)."""
        end = self.length + k.size(2)
        return self._stored(self.keys, layer, k, end), self._stored(self.values, layer, v, end)

    def _stored(self, buffers: list[Tensor], layer: int, new: Tensor, end: int) -> Tensor:
        _, KV, _, hs = new.shape
        if layer == len(buffers):
            buffers.append(new.new_empty(self.batch_size, KV, 0, hs))
        if (room := buffers[layer].size(2)) < end:
            larger = new.new_empty(self.batch_size, KV, min(self.block_size, max(SMALLEST_ROOM, end, 2 * room)), hs)
            larger[:, :, : self.length] = buffers[layer][:, :, : self.length]
            buffers[layer] = larger
        buffers[layer][:, :, self.length : end] = new
        return buffers[layer][:, :, :end]


def offset_mask(T: int, start: int, device: torch.device) -> Tensor | None:
    """Return which of start + T keys each of T new queries may see, (T, start + T); None for one query,
    which sees all.
    """
    if T == 1:
        return None
    return torch.ones(T, start + T, dtype=torch.bool, device=device).tril(diagonal=start)


def visible(positions: Tensor) -> Tensor:
    """Return which keys each query may see where a row holds several texts, (B, 1, T, T): those of its own text up to itself.

    `positions` (B, T) are those of the tokens in their texts: 0 begins a text.
    """
    text = (positions == 0).cumsum(1)  # (B, T): the number of each token's text
    return (text[:, None, :, None] == text[:, None, None, :]).tril()


def attention_after(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, dropout: float, seen: Tensor | None = None
) -> Tensor:
    """Return causal attention (B, H, T, hs) of T new queries over the keys of the `start` tokens before them and their
    own, (B, H, start + T, hs), with dropout on the attention weights. `seen` is what `visible` returned, of packed rows.
    """
    if seen is not None:
        return packed_attention(q, k, v, seen, dropout=dropout)
    if start == 0:
        return causal_attention(q, k, v, dropout=dropout)
    mask = offset_mask(q.size(2), start, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def check_length(start: int, T: int, block_size: int) -> None:
    """Raise ValueError if T tokens after `start` in the cache are more than a context of block_size tokens."""
    if start + T > block_size:
        cached = f" after {start} in the cache" if start else ""
        raise ValueError(
            f"the input has {T} tokens{cached}, but the model's context is block_size={block_size} "
            "tokens; pass no more than the last of them, or train with a larger BLOCK_SIZE."
        )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """Return causal attention of q, k and v, all (B, H, T, hs), with dropout on the attention weights."""
    if q.device.type == "cpu" and q.size(2) <= longest_plain(q.element_size(), dropout=dropout):
        return plain_attention(q, k, v, dropout=dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def longest_plain(bytes_per_value: int, *, dropout: float) -> int:
    """Return up to how many tokens attention on a CPU computes the scores explicitly. With dropout PyTorch has no fused kernel there."""
    avx2 = bytes_per_value == 4 and not dropout and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return SHORT_AVX2 if avx2 else SHORT


def square_bytes(block_size: int, bytes_per_value: int, *, dropout: float) -> int:
    """Return the bytes per attention score of a layer in training on a CPU: one tensor of scores where they are explicit, four
    with dropout, none where attention is fused.
    """
    if block_size > longest_plain(bytes_per_value, dropout=dropout):
        return 4 * 4 if dropout else 0  # with dropout PyTorch computes explicit scores in float32
    return bytes_per_value * (4 if dropout else 1)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, dropout: float) -> Tensor:
    """Return attention of q, k and v, all (B, H, T, hs), to the keys `seen` (B, 1, T, T), with dropout on its weights."""
    if q.device.type == "cpu" and q.size(2) <= SHORT:
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3))).masked_fill(~seen, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(hs)) v, computed with explicit scores (B H, T, T); Vaswani et al. 2017, section
    3.2.1.

    In bfloat16 the scores have 8 bits, where the fused kernel keeps float32. Compared with float64, for normal q, k and
    v (2, 6, 256, 64), the relative error is 0.003 (fused: 0.002), with scores 8 times as large 0.011 (0.002), and of
    the gradients up to 0.020 (0.005). A softmax in float32 changes none of these; float32 scores double the time.
    """
    B, H, T, hs = q.shape
    q, k, v = (heads.reshape(B * H, T, hs) for heads in (q, k, v))
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(hs))
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ v).view(B, H, T, hs)
