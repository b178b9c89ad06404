"""The head and its loss, a few rows of logits at a time: (N, V) of them would be the largest tensor of a step, several times over."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**25  # logits held at once, 128 MB in float32; smaller chunks only add passes over the weight's gradient


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of the logits x @ weight.T against targets; x (N, C), weight (V, C), targets int64 (N,).

    Beyond CHUNK logits they are made and used up chunk by chunk, with the gradients taken on the way. A compiler fuses by itself, and
    float16 needs its loss scaled before its gradients are rounded: both take the plain way.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    logits = x.size(0) * weight.size(0)
    if logits <= CHUNK or dtype == torch.float16 or torch.compiler.is_compiling():
        return F.cross_entropy(F.linear(x, weight).float(), targets)
    loss: Tensor = _ChunkedLoss.apply(x.to(dtype), weight, targets, -(-logits // CHUNK))
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy in `chunks` parts; d loss / d logits = softmax - one_hot needs nothing of the backward pass but its scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunks: int) -> Tensor:
        total = weight.new_zeros(())
        narrow = weight.to(x.dtype)  # the format that is multiplied in; sums over chunks are in the weight's own
        x_learns, weight_learns = ctx.needs_input_grad[:2]  # a frozen head's gradient is a third of the work
        dx, dweight = torch.zeros_like(x) if x_learns else None, torch.zeros_like(weight) if weight_learns else None
        for first in range(0, len(x), -(-len(x) // chunks)):
            part = slice(first, first + -(-len(x) // chunks))
            logits, target = x[part] @ narrow.t(), targets[part, None]  # (n, V), (n, 1)
            losses, probs = _losses(logits, target)
            total += losses.sum()
            if x_learns or weight_learns:
                probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
                logits.copy_(probs)  # their gradient from here on, rounded as autocast rounds it
            if dx is not None:
                torch.mm(logits, narrow, out=dx[part])
            if dweight is not None:
                dweight += (logits.t() @ x[part]).to(dweight.dtype)  # adding two formats at once is slow
        ctx.gradients, ctx.count = (dx, dweight), len(targets)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.count
        return *(one if one is None else one * scale.to(one.dtype) for one in ctx.gradients), None, None


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row and its softmax, both float32: (n, 1) and (n, V). targets (n, 1).

    The best logit's probability is never below 1 / V, so its logarithm gives the normaliser without a pass of its own.
    """
    probs = logits.float().softmax(-1)
    normaliser = logits.amax(-1, keepdim=True).float() - probs.amax(-1, keepdim=True).log()
    return normaliser - logits.gather(-1, targets).float(), probs
