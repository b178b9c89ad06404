"""A layer that learns while it reads: TTT-MLP, added to a block of a pretrained transformer through a gate.

Its state is a small MLP per head, which takes a step of gradient descent on each token: it learns to map the token's
key to its value. The updated MLP is then applied to the token's query. Training the model learns the MLP's initial
weights, keys, values and step sizes.

Sources: Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv 2407.04620, for the layer and the dual form
(sections 2.4 and 2.5, appendix A); Dalal et al. 2025, "One-Minute Video Generation with Test-Time Training", arXiv
2504.05298, for the gate and for normalised keys, queries and targets, with the names of the parameters in their code
(test-time-training/ttt-video-dit). Theirs reads a mini-batch as a whole; here a token sees only the updates of itself
and earlier tokens, as a language model must.

In the shapes below B is the batch, T the tokens, C the width, H the heads, hs = C / H, and N = B H.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS: Final = 1e-6  # of both norms, as published
# Vectors per head, though the tensors have two or three dimensions: weight decay does not apply to them.
VECTORS: Final = ("b1", "b2", "learnable_ttt_lr_bias", "ttt_norm_weight", "ttt_norm_bias")


@dataclass(frozen=True)
class TTTSettings:
    """Which blocks have the layer, counted from 0 ("1,5,10"), and how it learns while it reads.

    mini_batch_size: tokens whose gradients are taken at the same weights. base_lr: the inner step size, before the
    learned factor.
    """

    layers: str
    base_lr: float = 1.0
    mini_batch_size: int = 16
    initial_gating_alpha: float = 0.1

    def __post_init__(self) -> None:
        words = self.layers.split(",")
        if not all(word.isdecimal() and word.isascii() and len(word) < 10 for word in words):
            raise ValueError(
                f"ttt.layers={self.layers!r:.80}: expected numbers of blocks like 1,5,10, the first being 0."
            )
        if len(set(self.numbers)) < len(words):
            raise ValueError(f"ttt.layers={self.layers!r:.80}: expected each block once.")
        if not 0 < self.base_lr < math.inf:
            raise ValueError(f"ttt.base_lr={self.base_lr}: expected a number above 0.")
        if self.mini_batch_size < 1:
            raise ValueError(f"ttt.mini_batch_size={self.mini_batch_size}: expected a whole number of at least 1.")
        if not math.isfinite(self.initial_gating_alpha):
            raise ValueError(f"ttt.initial_gating_alpha={self.initial_gating_alpha}: expected a number.")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The blocks that have the layer."""
        return tuple(int(word) for word in self.layers.split(","))


def activation_bytes(settings: TTTSettings, *, width: int, n_head: int) -> int:
    """Return about how many bytes per token a layer keeps for the backward pass: measured peaks, right within a third.

    Most are float32 values of each token; the rest is a copy of the inner weights per mini-batch.
    """
    return 4 * width * (80 + 12 * (width // n_head) // settings.mini_batch_size)


class Weights(NamedTuple):
    """The inner MLPs: (N, hs, 4hs), (N, 1, 4hs), (N, 4hs, hs) and (N, 1, hs)."""

    W1: Tensor
    b1: Tensor
    W2: Tensor
    b2: Tensor


@dataclass
class TTTState:
    """The inner MLPs after `seen` tokens, and at the start of the current mini-batch, where gradients are taken."""

    start: Weights
    now: Weights
    seen: int = 0


class TTTMLP(nn.Module):
    """The layer with its gate; its output is added to the residual stream."""

    def __init__(self, settings: TTTSettings, *, width: int, n_head: int) -> None:
        super().__init__()
        H, hs = n_head, width // n_head
        self.settings, self.n_head = settings, n_head
        self.W1 = nn.Parameter(torch.empty(H, hs, 4 * hs))
        self.b1 = nn.Parameter(torch.empty(H, 1, 4 * hs))
        self.W2 = nn.Parameter(torch.empty(H, 4 * hs, hs))
        self.b2 = nn.Parameter(torch.empty(H, 1, hs))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(H, 1, width))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.empty(H, 1))
        self.ttt_norm_weight = nn.Parameter(torch.empty(H, hs))
        self.ttt_norm_bias = nn.Parameter(torch.empty(H, hs))
        self.gating_alpha = nn.Parameter(torch.empty(width))
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))
        self.post_norm = nn.LayerNorm(width, eps=EPS)
        self.draw()

    def draw(self) -> None:
        """Initialise as published: weights Normal(0, 0.02), biases 0, norms 1,
        the gate tanh of initial_gating_alpha.
        """
        for name, parameter in self.named_parameters():
            if name == "gating_alpha":
                nn.init.constant_(parameter, self.settings.initial_gating_alpha)
            elif name in ("ttt_norm_weight", "post_norm.weight"):
                nn.init.ones_(parameter)
            elif name in ("b1", "b2") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def new_state(self, batch_size: int) -> TTTState:
        """Return the state before the first token, equal for all sequences."""
        weights = Weights(*(initial.repeat(batch_size, 1, 1) for initial in (self.W1, self.b1, self.W2, self.b2)))
        return TTTState(weights, weights)

    def forward(self, x: Tensor, state: TTTState | None = None) -> Tensor:
        """Return tanh(gating_alpha) times the layer's answer to x, both (B, T, C). A state continues from its tokens,
        and is updated.

        Autocast applies only to the five C x C products: the inner weights, updated by many small steps, keep the
        parameters' dtype.
        """
        B, T, C = x.shape
        projected = [projection(x) for projection in (self.wq, self.wk, self.wv)]
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W1.dtype)
            q, k, v = (self._split(each.to(x.dtype)) for each in projected)  # each (N, T, hs)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            target = self._norm(v - k)
            y = q + self._norm(self._read(q, k, target, self._step_sizes(x), state or self.new_state(B)))  # (N, T, hs)
        y = y.view(B, self.n_head, T, -1).transpose(1, 2).reshape(B, T, C)
        return self.gating_alpha.tanh() * cast(Tensor, self.wo(self.post_norm(y)))

    def _split(self, x: Tensor) -> Tensor:
        """Return x (B, T, C) split into heads, (N, T, hs)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2).flatten(0, 1)

    def _step_sizes(self, x: Tensor) -> Tensor:
        """Return each head's step size on each token of x (B, T, C), (N, T, 1): base_lr times a learned factor,
        over hs and mini-batch.
        """
        share = F.linear(x, self.learnable_ttt_lr_weight[:, 0], self.learnable_ttt_lr_bias[:, 0]).sigmoid()  # (B, T, H)
        scale = self.settings.base_lr / (self.W2.size(-1) * self.settings.mini_batch_size)
        return (scale * share).transpose(1, 2).flatten(0, 1).unsqueeze(-1)

    def _norm(self, z: Tensor) -> Tensor:
        """Return z (N, T, hs) normalised over hs, with a weight and bias per head."""
        weight, bias = self._norms(z.size(0))
        return F.layer_norm(z, z.shape[-1:], eps=EPS) * weight + bias

    def _norms(self, N: int) -> tuple[Tensor, Tensor]:
        """Return the inner norm's weight and bias per sequence and head, both (N, 1, hs)."""
        rows = N // self.n_head
        return self.ttt_norm_weight.repeat(rows, 1).unsqueeze(1), self.ttt_norm_bias.repeat(rows, 1).unsqueeze(1)

    def _read(self, q: Tensor, k: Tensor, target: Tensor, step: Tensor, state: TTTState) -> Tensor:
        """Return the inner MLPs' answers to the queries, (N, T, hs), one mini-batch after the other,
        and update the state.
        """
        K, T = self.settings.mini_batch_size, q.size(1)
        first = min(K - state.seen % K, T)  # the rest of the mini-batch in which the last call ended
        sizes = [end - begin for begin, end in pairwise([0, *range(first, T, K), T])]
        answers = []
        for tokens in zip(*(x.split(sizes, dim=1) for x in (q, k, target, step)), strict=True):
            answer, state.now = self._learn(*tokens, state=state)
            answers.append(answer)
            state.seen += answer.size(1)
            if state.seen % K == 0:
                state.start = state.now
        return torch.cat(answers, dim=1)

    def _learn(self, q: Tensor, k: Tensor, target: Tensor, step: Tensor, *, state: TTTState) -> tuple[Tensor, Weights]:
        """Return the inner MLPs' answers to tokens (N, T, ·) of one mini-batch, and their weights after these tokens.

        The dual form: W_t = now - sum over s <= t of step_s grad_s is never materialised for each t. For a row vector
        x, x W_t = x now - sum over s <= t of (x . input_s) step_s delta_s, because grad_s is the product of input_s and
        delta_s.
        """
        start, now = state.start, state.now
        hidden = torch.baddbmm(start.b1, k, start.W1)  # (N, T, 4hs)
        active = F.gelu(hidden, approximate="tanh")
        delta2 = step * self._loss_gradient(torch.baddbmm(start.b2, active, start.W2), target)  # (N, T, hs)
        delta1 = torch.ops.aten.gelu_backward(torch.bmm(delta2, start.W2.mT), hidden, approximate="tanh")  # (N, T, 4hs)
        answer1 = F.gelu(_answers(q, k, delta1, now.W1, now.b1), approximate="tanh")  # (N, T, 4hs)
        answer = _answers(answer1, active, delta2, now.W2, now.b2)  # (N, T, hs)
        W1, b1 = torch.baddbmm(now.W1, k.mT, delta1, alpha=-1), now.b1 - delta1.sum(1, keepdim=True)
        W2, b2 = torch.baddbmm(now.W2, active.mT, delta2, alpha=-1), now.b2 - delta2.sum(1, keepdim=True)
        return answer, Weights(W1, b1, W2, b2)

    def _loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the gradient, with respect to z, of half the squared distance of norm(z) to the target, (N, T, hs)."""
        weight, bias = self._norms(z.size(0))
        variance, mean = torch.var_mean(z, dim=-1, correction=0, keepdim=True)
        scale = (variance + EPS).rsqrt()
        unit = (z - mean) * scale
        slope = (unit * weight + bias - target) * weight
        return (slope - slope.mean(-1, keepdim=True) - unit * (slope * unit).mean(-1, keepdim=True)) * scale


def _answers(x: Tensor, inputs: Tensor, deltas: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return x W_t + b_t for each token t, where each token s <= t subtracted inputs_s deltas_s from W and deltas_s
    from b; x is (N, T, in).
    """
    moved = torch.tril(torch.bmm(x, inputs.mT) + 1)  # (N, T, T); the 1 is the bias
    return torch.baddbmm(torch.baddbmm(b, x, W), moved, deltas, alpha=-1)
