"""The head and its loss in chunks of rows: all logits (N, V) would be the largest tensor of a step,
several times over.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**25  # logits held at once, 128 MB in float32; smaller chunks only add passes over the weight's gradient
# Devices that run behind the program: to ask for a value is to wait for all they still have to do. Their products with an
# odd number of columns take much longer than with a multiple of 64; a small vocabulary is not worth the copy.
BEHIND, MULTIPLE, PADDED_FROM = ("cuda",), 64, 4096


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of the logits x @ weight.T against targets; x (N, C), weight (V, C),
    targets int64 (N,), of which those below 0 do not count.

    Above CHUNK logits it is computed chunk by chunk, gradients included. A compiler fuses by itself, and float16 needs
    the loss scaled before the gradients are rounded: both use the plain formula.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    logits, compiling, counts = x.size(0) * weight.size(0), torch.compiler.is_compiling(), None
    if device in BEHIND:
        counts = targets >= 0  # the others are computed too: to leave them out is to wait for their number
    elif not compiling and (device == "cpu" or logits > CHUNK) and not (counted := targets >= 0).all():
        x, targets = x[counted], targets[counted]  # conversations: only answers need logits
        logits = x.size(0) * weight.size(0)
    padding = rows_to_add(weight.size(0)) if device in BEHIND else 0
    if logits <= CHUNK or dtype == torch.float16 or compiling:
        return plain_loss(x, weight, targets, padding=padding, dtype=dtype)
    loss: Tensor = _ChunkedLoss.apply(x.to(dtype), weight, targets, -(-logits // CHUNK), counts, padding)
    return loss


def rows_to_add(vocab_size: int) -> int:
    """Return how many rows make a large vocabulary a multiple of MULTIPLE."""
    return -vocab_size % MULTIPLE if vocab_size >= PADDED_FROM else 0


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor, *, padding: int, dtype: torch.dtype) -> Tensor:
    """Return the loss by PyTorch's own functions, all logits at once, with `padding` further rows of the weight whose
    logits do not count."""
    if not padding:
        return F.cross_entropy(F.linear(x, weight).float(), targets)
    padded = F.pad(weight.to(dtype), (0, 0, 0, padding))
    return F.cross_entropy(F.linear(x.to(dtype), padded)[:, : weight.size(0)].float(), targets)


class _ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy in `chunks` parts; d loss / d logits = softmax - one_hot needs only the scale of the
    backward pass. Of the targets only those that `counts` marks count, by default all; `padding` as in plain_loss.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunks: int, counts: Tensor | None, padding: int
    ) -> Tensor:
        if counts is not None:  # a row of zeros adds nothing to the weight's gradient
            x, targets = x * counts[:, None], targets.clamp(min=0)
        total, V = weight.new_zeros(()), weight.size(0)
        # The dtype of the products; sums over chunks keep the weight's own.
        narrow = F.pad(weight.to(x.dtype), (0, 0, 0, padding)) if padding else weight.to(x.dtype)
        x_learns, weight_learns = ctx.needs_input_grad[:2]  # a frozen head's gradient is a third of the work
        dx, dweight = torch.zeros_like(x) if x_learns else None, torch.zeros_like(weight) if weight_learns else None
        for first in range(0, len(x), -(-len(x) // chunks)):
            part = slice(first, first + -(-len(x) // chunks))
            logits, target = x[part] @ narrow.t(), targets[part, None]  # (n, V + padding), (n, 1)
            if padding:
                logits[:, V:] = -torch.inf
            losses, probs = _losses(logits, target)
            total += (losses if counts is None else losses * counts[part, None]).sum()
            if x_learns or weight_learns:
                probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
                logits.copy_(probs)  # now the gradient of the logits, rounded as autocast rounds it
            if dx is not None:
                torch.mm(logits, narrow, out=dx[part])
            if dweight is not None:
                dweight += (logits.t() @ x[part])[:V].to(dweight.dtype)  # adding two dtypes at once is slow
        if dx is not None and counts is not None:
            dx *= counts[:, None]
        ctx.gradients, ctx.count = (dx, dweight), len(targets) if counts is None else counts.sum()
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.count
        dx, dweight = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.gradients)
        return dx, dweight, None, None, None, None


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row (n, 1) and its softmax (n, V), both float32; targets are (n, 1).

    The largest logit's probability is at least 1 / V, so its logarithm gives the normaliser without another pass.
    """
    probs = logits.float().softmax(-1)
    normaliser = logits.amax(-1, keepdim=True).float() - probs.amax(-1, keepdim=True).log()
    return normaliser - logits.gather(-1, targets).float(), probs
