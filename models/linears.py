"""Linear layers for generating on a CPU: the weights in a format, and in an order, in which one row is multiplied fast.

Each function takes a weight (out, in), a bias and an activation of a GPT2's settings, and returns what maps rows
(R, in) to (R, out). Between two and any number of rows, a row comes out the same to the last bit.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]

# What oneDNN applies to a product before it is rounded, and by which algorithm.
FUSED: Final = {"": ("none", ""), "gelu": ("gelu", "tanh"), "gelu_erf": ("gelu", "none"), "relu": ("relu", "")}
CHUNK: Final = 1 << 20  # weights quantized at a time, so that what is in between stays in the processor's cache


def float32_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Linear:
    """In float32, the weight where it is: F.linear in oneDNN's order of sums, which uses all threads for one row too."""
    return _onednn(weight, bias, activation)


def bfloat16_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Linear:
    """Weight, bias and rows rounded to bfloat16, products summed in float32, and the result in bfloat16."""
    half, narrow_bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        multiply = _onednn(torch.ops.mkldnn._reorder_linear_weight(half, 1), narrow_bias, activation)
    else:
        multiply = _plain(half, narrow_bias, activation)
    return lambda x: multiply(x.bfloat16())


def _plain(weight: Tensor, bias: Tensor | None, activation: str) -> Linear:
    return lambda x: _activated(F.linear(x, weight, bias), activation)


def _onednn(weight: Tensor, bias: Tensor | None, activation: str) -> Linear:
    if not torch.backends.mkldnn.is_available():
        return _plain(weight, bias, activation)
    multiply, (kernel, algorithm) = torch.ops.mkldnn._linear_pointwise, FUSED[activation]
    return lambda x: multiply(x, weight, bias, kernel, [], algorithm)


def int8_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Linear:
    """Weights as 8-bit integers with one scale for each output; rows and products as bfloat16_linear has them."""
    whole, scales = quantized(weight)
    scales = scales.bfloat16()

    def multiply(x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.bfloat16(), whole, scales)
        return _activated(y if bias is None else y + bias, activation)

    return multiply


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (out, in) from -127 to 127 and scales (out,), whose product is the weight to half a scale."""
    whole, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.size(0))
    rows = max(1, CHUNK // weight.size(1))
    for part, target, scale in zip(weight.split(rows), whole.split(rows), scales.split(rows), strict=True):
        low, high = part.aminmax(dim=1)
        # Rounded as the product will read it; a row of zeros has any scale.
        scale.copy_((torch.maximum(high, -low) / 127).clamp(min=1e-30).bfloat16())
        target.copy_((part / scale[:, None]).round_().clamp_(-127, 127))
    return whole, scales


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    if activation:
        return F.gelu(x, approximate="tanh" if activation == "gelu" else "none")
    return x


LINEARS: Final = {"float32": float32_linear, "bfloat16": bfloat16_linear, "int8": int8_linear}
