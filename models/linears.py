"""Linear layers for generating on a CPU: weights in a dtype and memory order in which a single row is multiplied fast.

Each function takes a weight (out, in), a bias and an activation of a model, and returns a function from rows (R, in) to
(R, out), or to (R, out / 2) if the activation is "swiglu". The result of a row is bit-identical whatever their number, as far
as is known: Decoder.agrees() tests it. bfloat16 without oneDNN's product promises that up to ROW_BY_ROW rows. Rows of a prompt
are multiplied PROMPT_CHUNK at a time, so what follows a chunk does not change its bits.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]

# The activation that oneDNN applies to a product before rounding, and its algorithm.
FUSED: Final = {"": ("none", ""), "gelu": ("gelu", "tanh"), "gelu_erf": ("gelu", "none"), "relu": ("relu", "")}
FEW: Final = 32  # rows that are computed one by one: more than a draft has, and as many as a server reads together
ROW_BY_ROW: Final = 16  # the most rows that PyTorch's bfloat16 product takes; a draft has fewer
# Rows: products of 64 take up to a quarter longer, and a conversation reads up to a chunk again.
PROMPT_CHUNK: Final = 128
INT8_INPUTS: Final = 16  # that PyTorch's int8 product reads at once, beyond the end of other rows
CHUNK: Final = 1 << 20  # weights quantized at a time, so that intermediate values stay in the processor's cache


def float32_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Linear:
    """Return the layer in float32, without a copy of the weight: F.linear in oneDNN's order of sums,
    which uses all threads for one row too.
    """
    return _onednn(weight, bias, activation)


def bfloat16_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Linear:
    """Return the layer with weight, bias, rows and result in bfloat16; products are summed in float32."""
    half, narrow_bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
    if multiplies_rows_together():
        multiply = _onednn(torch.ops.mkldnn._reorder_linear_weight(half, 1), narrow_bias, activation)
    else:
        multiply = _row_by_row(half, narrow_bias, activation)
    return lambda x: multiply(x.bfloat16())


def multiplies_rows_together() -> bool:
    """Return whether a product in bfloat16 of several rows reads the weights once for all of them: oneDNN does, which has it for
    processors with AVX-512. PyTorch's own product reads them for each row, at the speed of the memory.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _row_by_row(half: Tensor, bias: Tensor | None, activation: str) -> Linear:
    """Return the layer by PyTorch's bfloat16 product, whose time grows with the rows; of a prompt, by the float32 one, for which
    the weight is converted.
    """
    few, wide_bias = _plain(half, bias, activation), None if bias is None else bias.float()

    def multiply(x: Tensor) -> Tensor:
        if x.size(0) <= ROW_BY_ROW:
            return few(x)
        return in_chunks(_plain(half.float(), wide_bias, activation), x.float()).bfloat16()

    return multiply


def _plain(weight: Tensor, bias: Tensor | None, activation: str) -> Linear:
    return lambda x: activated(F.linear(x, weight, bias), activation)


def _onednn(weight: Tensor, bias: Tensor | None, activation: str) -> Linear:
    if not torch.backends.mkldnn.is_available():
        return _plain(weight, bias, activation)
    if activation not in FUSED:
        product = _onednn(weight, bias, "")
        return lambda x: activated(product(x), activation)
    multiply, (kernel, algorithm) = torch.ops.mkldnn._linear_pointwise, FUSED[activation]

    def apply(x: Tensor) -> Tensor:
        # oneDNN has a kernel of its own for a single row, whose sums round otherwise: such a row is computed twice, which
        # costs little where reading the weights dominates.
        single = x.size(0) == 1
        y = multiply(torch.cat((x, x)) if single else x, weight, bias, kernel, [], algorithm)
        return y[:1] if single else y

    return lambda x: in_chunks(apply, x)


def cast_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "", *, dtype: torch.dtype) -> Linear:
    """Return the layer with weight, bias, rows and result in `dtype`, on any device, by PyTorch's own product."""
    multiply = _plain(weight.to(dtype), None if bias is None else bias.to(dtype), activation)
    return lambda x: multiply(x.to(dtype))


def int8_linear(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Linear:
    """Return the layer with 8-bit integer weights and a scale per output; rows and products as in bfloat16_linear."""
    whole, scales = quantized(weight)
    scales, missing = scales.bfloat16(), -weight.size(1) % INT8_INPUTS
    whole = F.pad(whole, (0, missing))

    def multiply(x: Tensor) -> Tensor:
        rows = F.pad(x.bfloat16(), (0, missing)) if missing else x.bfloat16()
        y = torch._weight_int8pack_mm(rows, whole, scales)
        return activated(y if bias is None else y + bias, activation)

    return lambda x: in_chunks(multiply, x)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers (out, in) from -127 to 127 and scales (out,) whose product is the weight, up to half a scale."""
    whole, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.size(0))
    rows = max(1, CHUNK // weight.size(1))
    for part, target, scale in zip(weight.split(rows), whole.split(rows), scales.split(rows), strict=True):
        low, high = part.aminmax(dim=1)
        # Rounded as the product reads it; a row of zeros may have any scale.
        scale.copy_((torch.maximum(high, -low) / 127).clamp(min=1e-30).bfloat16())
        target.copy_((part / scale[:, None]).round_().clamp_(-127, 127))
    return whole, scales


def in_chunks(function: Linear, x: Tensor) -> Tensor:
    """Return the function of rows x (R, in), computed for PROMPT_CHUNK of them at a time."""
    if x.size(0) <= PROMPT_CHUNK:
        return function(x)
    return torch.cat([function(chunk) for chunk in x.split(PROMPT_CHUNK)])


def by_row(function: Linear) -> Linear:
    """Return the function of rows, computed row by row where they are few, else in chunks: where vectors end, and where threads
    share the rows, it may round otherwise. In a call of its own a row, or a chunk, has the same vectors whatever follows it.
    A GPU has no such vectors.
    """

    def rows(x: Tensor) -> Tensor:
        if x.size(0) == 1 or x.is_cuda:
            return function(x)
        if x.size(0) > FEW:
            return in_chunks(function, x)
        return torch.cat([function(row) for row in x.split(1)])

    return rows


@by_row
def _gated(both: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, -1)  # twice (R, n_inner)
    return F.silu(gate) * up


def activated(x: Tensor, activation: str) -> Tensor:
    """Return the activation of rows (R, out); of "swiglu", whose rows are gates and values, (R, out / 2)."""
    if activation == "swiglu":
        return _gated(x)
    if activation == "relu":
        return F.relu(x)
    if activation:
        return F.gelu(x, approximate="tanh" if activation == "gelu" else "none")
    return x


LINEARS: Final = {"float32": float32_linear, "bfloat16": bfloat16_linear, "int8": int8_linear}
