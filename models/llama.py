"""Llama and its kin: pre-norm with RMSNorm, rotary positions, SwiGLU, and fewer heads of keys and values than of queries.

Sources: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971), and 2023b, "Llama 2"
(2307.09288); Su et al. 2021, "RoFormer" (2104.09864); Shazeer 2020, "GLU Variants Improve Transformer" (2002.05202); Ainslie
et al. 2023, "GQA" (2305.13245). In the shapes below B is the batch, T the tokens, C = n_embd, H = n_head, KV = n_kv_head,
hs = head_size and V = vocab_size. Parameters have the names that Hugging Face transformers gives them.

A few settings make it the models of others: biases of query, key and value (Qwen2), norms of query and key (Qwen3), a head
of its own (`tied=False`), and the scaling of rotary positions (Llama 3).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import LORA_NAMES
from models.attention import KeyValueCache, attention_after, check_length, square_bytes, visible
from models.head import CHUNK, head_loss
from models.lora import LoraSettings, linear
from models.model import Model, Output

SCALINGS: Final = ("linear", "llama3")
MULTIPLE: Final = 32  # the default width of the MLP is a multiple of this


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are lowered, so that a model reads longer texts than it was first trained on.

    `linear` divides all by `factor` (Chen et al. 2023, arXiv 2306.15595). `llama3` divides those whose wavelength is above
    original_length / low_factor, keeps those below original_length / high_factor, and blends between (Llama 3.1).
    """

    kind: str
    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"kind={self.kind!r:.80}: expected one of {', '.join(SCALINGS)}.")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor={self.factor}: expected a number of at least 1.")
        if not 0 < self.low_factor < self.high_factor < math.inf:
            raise ValueError(f"low_factor={self.low_factor}, high_factor={self.high_factor}: expected 0 < low < high.")


@dataclass(frozen=True)
class LlamaSettings:
    """The settings of a Llama.

    What is 0 follows from the others: n_kv_head is n_head, head_size is n_embd / n_head, and n_inner, the width of the MLP,
    8/3 n_embd, which gives its three matrices the parameters of the two that are 4 n_embd wide (Shazeer 2020).
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0
    head_size: int = 0
    n_inner: int = 0
    dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} and n_head={self.n_head}: every head has the same size, "
                "so n_embd must be a multiple of n_head."
            )
        resolved = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_size": self.head_size or self.n_embd // self.n_head,
            "n_inner": self.n_inner or -(-8 * self.n_embd // (3 * MULTIPLE)) * MULTIPLE,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} and n_kv_head={self.n_kv_head}: every head of keys serves as many heads of queries, "
                "so n_head must be a multiple of n_kv_head."
            )
        if self.head_size % 2:
            raise ValueError(
                f"n_embd={self.n_embd} and n_head={self.n_head}: rotary positions turn pairs of values, "
                f"so the size of a head must be even, and it is {self.head_size}: n_embd={(self.head_size + 1) * self.n_head} fits."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a probability from 0 to below 1.")
        if not (0 < self.rope_theta < math.inf and 0 < self.norm_eps < 1):
            raise ValueError(f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: expected numbers above 0.")


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions.


def frequencies(settings: LlamaSettings, device: torch.device | None = None) -> Tensor:
    """Return the angle by which each pair of a head's values turns from one position to the next, (hs / 2,), in radians."""
    exponents = torch.arange(0, settings.head_size, 2, dtype=torch.float32, device=device) / settings.head_size
    angles = 1.0 / settings.rope_theta**exponents
    scaling = settings.rope_scaling
    if scaling is None:
        return angles
    if scaling.kind == "linear":
        return angles / scaling.factor
    turns = scaling.original_length * angles / (2 * math.pi)  # within the original length
    share = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    kept = share.clamp(0, 1)  # 0: divided by the factor, 1: as it was
    return (1 - kept) * angles / scaling.factor + kept * angles


def rotation(
    settings: LlamaSettings, start: int, T: int, device: torch.device, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles at T positions from `start` on, each (T, hs / 2) in float32; at `positions` (B, T)
    of packed rows, each (B, 1, T, hs / 2).
    """
    if positions is not None:
        angles = positions[:, None, :, None].float() * frequencies(settings, device)
        return angles.cos(), angles.sin()
    from_start = torch.arange(start, start + T, dtype=torch.float32, device=device)
    angles = from_start[:, None] * frequencies(settings, device)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return x (B, H, T, hs) with each pair of values turned; value i is paired with value i + hs / 2."""
    first, second = x.chunk(2, -1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


# ---------------------------------------------------------------------------------------------------------------------
# The model.


class Attention(nn.Module):
    """Causal self-attention in which every head of keys and values serves H / KV heads of queries."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        s, lora = settings, settings.lora
        self.shape, self.dropout = (s.n_head, s.n_kv_head, s.head_size), s.dropout
        C, wide, narrow = s.n_embd, s.n_head * s.head_size, s.n_kv_head * s.head_size
        self.q_proj = linear("q_proj", C, wide, bias=s.qkv_bias, lora=lora)
        self.k_proj = linear("k_proj", C, narrow, bias=s.qkv_bias, lora=lora)
        self.v_proj = linear("v_proj", C, narrow, bias=s.qkv_bias, lora=lora)
        self.o_proj = linear("o_proj", wide, C, bias=s.output_bias, lora=lora)
        self.q_norm = nn.RMSNorm(s.head_size, eps=s.norm_eps) if s.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(s.head_size, eps=s.norm_eps) if s.qk_norm else nn.Identity()
        self.drop = nn.Dropout(s.dropout)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
        layer: int,
        seen: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        H, KV, hs = self.shape
        q = rotated(self.q_norm(self.q_proj(x).view(B, T, H, hs)).transpose(1, 2), *turn)  # (B, H, T, hs)
        k = rotated(self.k_norm(self.k_proj(x).view(B, T, KV, hs)).transpose(1, 2), *turn)  # (B, KV, T, hs)
        v = self.v_proj(x).view(B, T, KV, hs).transpose(1, 2)  # (B, KV, T, hs)
        start = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, KV, start + T, hs)
        if KV < H:
            k, v = (heads.repeat_interleave(H // KV, 1) for heads in (k, v))  # (B, H, start + T, hs)
        dropout = self.dropout if self.training else 0.0
        y = attention_after(q, k, v, start=start, dropout=dropout, seen=seen)  # (B, H, T, hs)
        return self.drop(self.o_proj(y.transpose(1, 2).reshape(B, T, H * hs)))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), applied to each position."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        s, C, wide = settings, settings.n_embd, settings.n_inner
        self.gate_proj = linear("gate_proj", C, wide, bias=s.mlp_bias, lora=s.lora)
        self.up_proj = linear("up_proj", C, wide, bias=s.mlp_bias, lora=s.lora)
        self.down_proj = linear("down_proj", wide, C, bias=s.mlp_bias, lora=s.lora)
        self.drop = nn.Dropout(s.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))  # (B, T, C)


class Block(nn.Module):
    """Attention and MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(settings.n_embd, eps=settings.norm_eps)
        self.self_attn = Attention(settings)
        self.post_attention_layernorm = nn.RMSNorm(settings.n_embd, eps=settings.norm_eps)
        self.mlp = MLP(settings)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
        layer: int,
        seen: Tensor | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, cache, layer, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Model):
    """The whole model. A tied head has no parameter of its own: the logits are products with the rows of embed_tokens."""

    settings_type: ClassVar = LlamaSettings
    compile_pays: ClassVar = True
    settings: LlamaSettings

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__(settings)
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.n_embd)
        self.drop = nn.Dropout(settings.dropout)
        self.layers = nn.ModuleList(Block(settings) for _ in range(settings.n_layer))
        self.norm = nn.RMSNorm(settings.n_embd, eps=settings.norm_eps)
        self.lm_head = None if settings.tied else nn.Linear(settings.n_embd, settings.vocab_size, bias=False)
        self._initialise()

    @property
    def max_length(self) -> int:
        """The most tokens that forward() takes, including those in the cache."""
        return self.settings.block_size

    @property
    def packs(self) -> bool:
        return True

    def _initialise(self) -> None:
        """Initialise matrices with Normal(0, 0.02), as transformers does, the 2 n_layer projections that add to the residual
        stream with 0.02 / sqrt(2 n_layer), as for GPT-2, and biases with 0. Adapters have initialised themselves.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(LORA_NAMES):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.settings.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Output:
        """Return the logits (B, T, V) of each next token, (B, 1, V) with last_only; or, with targets, only the mean
        loss in nats.

        ids and targets are int64 (B, T). With a cache, the ids follow the tokens it holds, and it grows by T.
        `positions` are those of packed rows (`packs`). Raises ValueError when the tokens exceed block_size.
        """
        start, T = 0 if cache is None else cache.length, ids.size(1)
        check_length(start, T, self.settings.block_size)
        x = self.drop(self.embed_tokens(ids))  # (B, T, C)
        seen = None if positions is None else visible(positions)  # (B, 1, T, T)
        turn = rotation(self.settings, start, T, ids.device, positions)  # one for all blocks
        for layer, block in enumerate(self.layers):
            x = block(x, turn, cache, layer, seen)  # (B, T, C)
        if cache is not None:
            cache.length += T
        x = self.norm(x[:, -1:] if last_only else x)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if targets is not None:
            return Output(None, head_loss(x.flatten(0, 1), head, targets.flatten()), {})
        return Output(F.linear(x, head), None, {})  # (B, T, V)

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Return an empty key/value cache for forward(), for batch_size sequences of up to block_size tokens."""
        return KeyValueCache(batch_size, self.settings.block_size)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.layers)

    def probe_settings(self) -> LlamaSettings:
        return replace(self.settings, n_layer=1)

    def muon_matrices(self) -> dict[str, int]:
        """Return the blocks' matrices, and the adapters beside them."""
        return {f"layers.{name}": 1 for name, parameter in self.layers.named_parameters() if parameter.dim() == 2}

    def activation_bytes(self, batch_size: int, *, bytes_per_value: int, device_type: str | None = None) -> int:
        """Return about how many bytes a training step needs besides weights, gradients and optimizer state.

        For each token and layer, and for one more layer, the one being computed: the values that the backward pass reads, in
        the residual stream, the norms, the heads and the MLP, and attention's scores (H, T, T). Logits as for GPT-2.
        """
        s, cuda = self.settings, (device_type or self.embed_tokens.weight.device.type) == "cuda"
        tokens = batch_size * s.block_size
        scores = (
            0 if cuda else s.n_head * s.block_size * square_bytes(s.block_size, bytes_per_value, dropout=s.dropout)
        )  # fused there
        heads = (4 * s.n_head + 4 * s.n_kv_head) * s.head_size
        per_layer = 4 * 5 * s.n_embd + bytes_per_value * (4 * s.n_embd + heads + 4 * s.n_inner) + scores
        logits = tokens * s.vocab_size if cuda else min(tokens * s.vocab_size, CHUNK)
        gradients = 8 * self.embed_tokens.weight.numel() if self.embed_tokens.weight.requires_grad else 0
        return (s.n_layer + 1) * tokens * per_layer + logits * (bytes_per_value + 12) + gradients
