"""GPT-2 as published: pre-LN, learned positions, tanh-GELU, and a head that is the token embedding again.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and OpenAI's code for it,
https://github.com/openai/gpt-2/blob/master/src/model.py. In the shapes below B is the batch, T the tokens,
C = n_embd, H = n_head, hs = C / H and V = vocab_size.

Two settings make it the models of other projects: the activation, and a separate head (`tied=False`).
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import LORA_NAMES
from models.attention import KeyValueCache, attention_after, check_length, square_bytes, visible
from models.gelu import tanh_gelu
from models.head import CHUNK, head_loss
from models.lora import LoraSettings, linear
from models.model import Model, Output
from models.ttt import TTTMLP, VECTORS, TTTSettings, TTTState, activation_bytes

# "gelu" is the tanh approximation, as published; "gelu_erf" the exact one, as nanoGPT computes it; "relu" is the
# lecture model's.
ACTIVATIONS: Final = ("gelu", "gelu_erf", "relu")


@dataclass(frozen=True)
class GPT2Settings:
    """The settings of a GPT2. bias=False leaves the biases out of every Linear and LayerNorm, as nanoGPT can.

    tied=False adds a separate head, `lm_head`, which always has a bias. lora adds adapters to the blocks' linear
    layers, ttt adds layers that learn while they read.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu"
    tied: bool = True
    lora: LoraSettings | None = None
    ttt: TTTSettings | None = None

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} and n_head={self.n_head}: every head has the same size, "
                "so n_embd must be a multiple of n_head."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a probability from 0 to below 1.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r:.80}: expected one of {', '.join(ACTIVATIONS)}.")
        if self.ttt is not None and max(self.ttt.numbers) >= self.n_layer:
            raise ValueError(
                f"ttt.layers={self.ttt.layers:.80}: the model has n_layer={self.n_layer} blocks, "
                f"so expected numbers from 0 to {self.n_layer - 1}."
            )


def _published(n_layer: int, n_head: int, n_embd: int) -> GPT2Settings:
    return GPT2Settings(vocab_size=50257, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


SIZES: Final = {
    "gpt2": _published(12, 12, 768),  # 124,439,808 parameters
    "gpt2-medium": _published(24, 16, 1024),  # 354,823,168
    "gpt2-large": _published(36, 20, 1280),  # 774,030,080
    "gpt2-xl": _published(48, 25, 1600),  # 1,557,611,200
}


@dataclass
class GPT2Cache(KeyValueCache):
    """Keys, values, and in `learned` the states of the TTT layers by block."""

    learned: dict[int, TTTState] = field(default_factory=dict)

    def learner(self, layer: int, ttt: TTTMLP) -> TTTState:
        """Return the state of a block's TTT layer, a new state at length 0.

        Raises ValueError if it has read another number of tokens.
        """
        if self.length == 0:
            self.learned[layer] = ttt.new_state(self.batch_size)
        if self.learned[layer].seen != self.length:
            raise ValueError(
                f"the cache was set to {self.length} tokens, but a TTT layer has learned from "
                f"{self.learned[layer].seen}: "
                "what is learned cannot be forgotten one token at a time; set length = 0 and read the text again."
            )
        return self.learned[layer]


class Attention(nn.Module):
    """Causal self-attention: every position reads from itself and those before it."""

    def __init__(self, settings: GPT2Settings) -> None:
        super().__init__()
        self.n_head, self.dropout = settings.n_head, settings.dropout
        C = settings.n_embd
        self.c_attn = linear("c_attn", C, 3 * C, bias=settings.bias, lora=settings.lora)  # query, key, value in one
        self.c_proj = linear("c_proj", C, C, bias=settings.bias, lora=settings.lora)
        self.drop = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, cache: GPT2Cache | None, layer: int, seen: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        parts = self.c_attn(x).split(C, dim=2)  # three (B, T, C), whose gradients are one copy behind the fused kernel
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in parts)  # (B, H, T, hs)
        start = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, start + T, hs)
        dropout = self.dropout if self.training else 0.0
        y = attention_after(q, k, v, start=start, dropout=dropout, seen=seen)  # (B, H, T, hs)
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))  # (B, T, C)


class MLP(nn.Module):
    """Two layers with a hidden size of 4 C, applied to each position."""

    def __init__(self, settings: GPT2Settings) -> None:
        super().__init__()
        C = settings.n_embd
        self.c_fc = linear("c_fc", C, 4 * C, bias=settings.bias, lora=settings.lora)
        self.c_proj = linear("c_proj", 4 * C, C, bias=settings.bias, lora=settings.lora)
        self.drop = nn.Dropout(settings.dropout)
        self.activation = settings.activation

    def forward(self, x: Tensor) -> Tensor:
        x = _activated(self.c_fc(x), self.activation)  # (B, T, 4C)
        return self.drop(self.c_proj(x))  # (B, T, C)


def _activated(x: Tensor, activation: str) -> Tensor:
    """Return the activation of x. In bfloat16 on a CPU the exact GELU replaces its tanh approximation, whose kernel
    takes five times as long: they differ by less than 0.0005 everywhere, a quarter of the rounding error of a value of
    1, though more than that of small values."""
    if activation == "relu":
        return F.relu(x)
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return tanh_gelu(x) if activation == "gelu" and not slow else F.gelu(x)


class Block(nn.Module):
    """Attention and MLP, each reading the normalised residual stream and adding to it.

    A TTT layer, if the block has one, reads what attention adds, and adds to the stream too (Dalal et al. 2025, section
    3.2).
    """

    def __init__(self, settings: GPT2Settings) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(settings.n_embd, eps=1e-5, bias=settings.bias)
        self.attn = Attention(settings)
        self.ln_2 = nn.LayerNorm(settings.n_embd, eps=1e-5, bias=settings.bias)
        self.mlp = MLP(settings)
        self.ttt: TTTMLP | None = None

    def forward(self, x: Tensor, cache: GPT2Cache | None, layer: int, seen: Tensor | None = None) -> Tensor:
        attended = self.attn(self.ln_1(x), cache, layer, seen)
        x = x + attended
        if self.ttt is not None:
            x = x + self.ttt(attended, None if cache is None else cache.learner(layer, self.ttt))
        return x + self.mlp(self.ln_2(x))


class GPT2(Model):
    """The whole model. A tied head has no parameter of its own: the logits are products with the rows of wte."""

    settings_type: ClassVar = GPT2Settings
    position_tables: ClassVar = ("wpe.weight",)
    compile_pays: ClassVar = True
    published: ClassVar = SIZES
    settings: GPT2Settings

    def __init__(self, settings: GPT2Settings) -> None:
        super().__init__(settings)
        self.wte = nn.Embedding(settings.vocab_size, settings.n_embd)
        self.wpe = nn.Embedding(settings.block_size, settings.n_embd)
        self.drop = nn.Dropout(settings.dropout)
        self.h = nn.ModuleList(Block(settings) for _ in range(settings.n_layer))
        self.ln_f = nn.LayerNorm(settings.n_embd, eps=1e-5, bias=settings.bias)
        self.lm_head = None if settings.tied else nn.Linear(settings.n_embd, settings.vocab_size)
        self._initialise()
        if settings.ttt is not None:  # last, so that a seed draws the same base with and without them
            for number in settings.ttt.numbers:
                block = cast(Block, self.h[number])
                block.ttt = TTTMLP(settings.ttt, width=settings.n_embd, n_head=settings.n_head)

    @property
    def max_length(self) -> int:
        """The most tokens that forward() takes, including those in the cache."""
        return self.settings.block_size

    @property
    def packs(self) -> bool:
        """Whether a row may hold several texts; a TTT layer would learn from all of them."""
        return self.settings.ttt is None

    def _initialise(self) -> None:
        """Initialise matrices with Normal(0, 0.02), positions with 0.01, the 2 n_layer projections that add to the
        residual stream with 0.02 / sqrt(2 n_layer), biases with 0 and LayerNorm weights with 1.

        OpenAI's model.py has all but the scaling, which the paper gives in section 2.3. Adapters have initialised
        themselves.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(LORA_NAMES):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.settings.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.01 if name == "wpe.weight" else 0.02)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cache: GPT2Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """Return the logits (B, T, V) of each next token, (B, 1, V) with last_only; or, with targets, only the mean
        loss in nats.

        ids and targets are int64 (B, T). With a cache, the ids follow the tokens it holds, and it grows by T.
        `positions` are those of packed rows (`packs`). Raises ValueError when the tokens exceed block_size.
        """
        start, T = 0 if cache is None else cache.length, ids.size(1)
        check_length(start, T, self.settings.block_size)
        seen = None if positions is None else visible(positions)  # (B, 1, T, T)
        if positions is None:
            positions = torch.arange(start, start + T, device=ids.device)  # (T,)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer, seen)  # (B, T, C)
        if cache is not None:
            cache.length += T
        x = self.ln_f(x[:, -1:] if last_only else x)
        if targets is not None and self.lm_head is None:
            return Output(None, head_loss(x.flatten(0, 1), self.wte.weight, targets.flatten()), {})
        logits = F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)  # (B, T, V)
        if targets is None:
            return Output(logits, None, {})
        return Output(None, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), {})

    def new_cache(self, batch_size: int) -> GPT2Cache:
        """Return an empty key/value cache for forward(), for batch_size sequences of up to block_size tokens."""
        return GPT2Cache(batch_size, self.settings.block_size)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.h)

    def probe_settings(self) -> GPT2Settings:
        ttt = self.settings.ttt and replace(self.settings.ttt, layers="0")
        return replace(self.settings, n_layer=1, ttt=ttt)

    def muon_matrices(self) -> dict[str, int]:
        """Return the blocks' matrices; c_attn is three, query, key and value. Adapters beside them are matrices too."""
        inner = {f"h.{name}": parameter for name, parameter in self.h.named_parameters()}
        matrices = [name for name, parameter in inner.items() if parameter.dim() == 2 and self.decays(name, parameter)]
        return {name: 3 if name.endswith(".c_attn.weight") else 1 for name in matrices}

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Return whether weight decay applies: to matrices, including those that a TTT layer has for each head."""
        return parameter.dim() >= 2 and name.rpartition(".")[2] not in VECTORS

    def activation_bytes(self, batch_size: int, *, bytes_per_value: int, device_type: str | None = None) -> int:
        """Return about how many bytes a training step needs besides weights, gradients and optimizer state, from
        measured peaks.

        For each token and layer, and for one more layer, the one being computed: 22 C values and attention's scores (H,
        T, T). Logits, their float32 copy, softmax and gradient, of which a tied head holds at most CHUNK (on CUDA a
        compiler may hold all). The embedding's gradient twice more, because head and embedding add to it separately.
        TTT layers add theirs. `device_type` is by default that of the weights.
        """
        s, cuda = self.settings, (device_type or self.wte.weight.device.type) == "cuda"
        tokens = batch_size * s.block_size
        scores = (
            0 if cuda else s.n_head * s.block_size * square_bytes(s.block_size, bytes_per_value, dropout=s.dropout)
        )  # fused there
        per_layer = 22 * s.n_embd * bytes_per_value + scores
        logits = tokens * s.vocab_size if cuda or self.lm_head is not None else min(tokens * s.vocab_size, CHUNK)
        gradients = 8 * self.wte.weight.numel() if self.wte.weight.requires_grad else 0
        learned = (
            len(s.ttt.numbers) * activation_bytes(s.ttt, width=s.n_embd, n_head=s.n_head) if s.ttt is not None else 0
        )
        return (s.n_layer + 1) * tokens * per_layer + tokens * learned + logits * (bytes_per_value + 12) + gradients
