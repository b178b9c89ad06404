"""The arithmetic of a decoder's pass over a few rows, compiled for this processor by numba, which is an extra.

PyTorch's products of one row read the weights at a third to a half of the speed of memory on most processors, and starting
its operations takes as long as computing them. These read them at the speed of memory, in a few calls for a layer. numba
keeps what it compiled beside this file, or in the user's cache.

Each row is computed by itself, by the same instructions whatever the number of rows, so its bits do not depend on it. Sums may be
reordered, once and for all when they are compiled; no other rule of IEEE 754 is given up, so what is not finite stays so.
"""

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
SUMS: Final = {"reassoc", "contract", "nsz"}
KEPT, GELU, GELU_ERF, RELU, SWIGLU, ADDED = range(6)  # what is done with a product; ADDED: added to what is there
CODES: Final = {"": KEPT, "gelu": GELU, "gelu_erf": GELU_ERF, "relu": RELU, "swiglu": SWIGLU}
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
CUBIC, TWICE_ROOT, ROOT_HALF = np.float32(0.044715), np.float32(-2 * math.sqrt(2 / math.pi)), np.float32(math.sqrt(0.5))


class Matrix(NamedTuple):
    """A linear layer: weights (out, in) as float32, the upper half of float32 (bfloat16) as uint16, or int8; float32 scales and
    biases (out,).
    """

    weights: Array
    scales: Array
    biases: Array


class Norm(NamedTuple):
    """Weight and bias (C,) of a layer norm (`centred`) or an RMS norm."""

    weight: Array
    bias: Array
    eps: Any
    centred: bool


class Block(NamedTuple):
    """A layer. `activation` is one of CODES; the norms of queries' and keys' heads have no weights where the model has none."""

    norm_1: Norm
    qkv: Matrix
    q_norm: Norm
    k_norm: Norm
    project: Matrix
    norm_2: Norm
    widen: Matrix
    activation: int
    narrow: Matrix


def _compiled(function: Callable[..., Any] | None = None, **how: Any) -> Any:
    """Compile a function at its first call, without Python's lock; keep the result if there is a place for it."""
    if function is None:
        return lambda given: _compiled(given, **how)
    how = {"fastmath": SUMS, "nogil": True, "error_model": "numpy", **how}
    try:
        return njit(cache=True, **how)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(**how)(function)


@intrinsic  # type: ignore[untyped-decorator]
def _widened(_: Any, weight: Any) -> Any:
    """Return a stored weight as float32."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (stored,), (value,) = signature.args, arguments
        if stored == types.int8:
            return builder.sitofp(value, ir.FloatType())
        if stored == types.uint16:
            bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        return value

    return types.float32(weight), generate


@_compiled
def _dot(weights: Array, x: Array) -> Any:
    total = ZERO
    for i in range(weights.shape[0]):
        total += _widened(weights[i]) * x[i]  # type: ignore[call-arg]
    return total


@_compiled
def _output(matrix: Matrix, number: int, x: Array) -> Any:
    return _dot(matrix.weights[number], x) * matrix.scales[number] + matrix.biases[number]


@_compiled
def _activated(value: Any, code: int) -> Any:
    if code == GELU:
        return value / (
            ONE + math.exp(TWICE_ROOT * (value + CUBIC * value * value * value))
        )  # tanh takes twice as long
    if code == GELU_ERF:
        return HALF * value * (ONE + math.erf(value * ROOT_HALF))
    if code == RELU and value < ZERO:
        return ZERO
    return value


@_compiled(parallel=True)
def multiply(matrix: Matrix, x: Array, y: Array, code: int) -> None:
    """Write the layer's outputs for rows x (R, in) into y (R, out), of SWIGLU (R, out / 2)."""
    width = y.shape[1]
    for number in prange(width):
        for row in range(x.shape[0]):
            value = _output(matrix, number, x[row])
            if code == ADDED:
                y[row, number] += value
            elif code == SWIGLU:
                y[row, number] = value / (ONE + math.exp(-value)) * _output(matrix, width + number, x[row])
            else:
                y[row, number] = _activated(value, code)


@_compiled
def _normalize(norm: Norm, x: Array, y: Array) -> None:
    """Write the norm of a vector x (C,) into y, which may be x."""
    mean, squares = ZERO, ZERO
    size = np.float32(x.shape[0])
    if norm.centred:
        for i in range(x.shape[0]):
            mean += x[i]
        mean /= size
    for i in range(x.shape[0]):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = ONE / np.sqrt(squares / size + norm.eps)
    for i in range(x.shape[0]):
        y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i]


@_compiled
def normalize(norm: Norm, x: Array, y: Array) -> None:
    """Write the norm of each row of x (R, C) into y (R, C)."""
    for row in range(x.shape[0]):
        _normalize(norm, x[row], y[row])


@_compiled
def _turn(head: Array, cosine: Array, sine: Array) -> None:
    """Turn the pairs of a head (hs,) by their angles; the sine of the first half is negative."""
    half = head.shape[0] // 2
    for i in range(half):
        first, second = head[i], head[half + i]
        head[i] = first * cosine[i] + second * sine[i]
        head[half + i] = second * cosine[half + i] + first * sine[half + i]


@_compiled
def read_heads(block: Block, x: Array, normed: Array, heads: Array, n_head: int, cosine: Array, sine: Array) -> None:
    """Write the heads of rows x (R, C) into heads (R, H + 2 KV, hs), turned by cosine and sine (R, hs), which are empty if
    positions are learned. `normed` (R, C) is scratch memory.
    """
    rows, total, _ = heads.shape
    normalize(block.norm_1, x, normed)
    multiply(block.qkv, normed, heads.reshape(rows, -1), KEPT)
    for row in range(rows):
        for number in range((total + n_head) // 2):  # those of queries and of keys
            head, norm = heads[row, number], block.q_norm if number < n_head else block.k_norm
            if norm.weight.shape[0]:
                _normalize(norm, head, head)
            if cosine.shape[0]:
                _turn(head, cosine[row], sine[row])


@_compiled
def _attend(query: Array, keys: Array, values: Array, y: Array) -> None:
    """Write the attention of a query (hs,) to keys and values (T, hs) into y (hs,)."""
    scale = ONE / np.sqrt(np.float32(query.shape[0]))
    scores = np.empty(keys.shape[0], np.float32)
    best = np.float32(-np.inf)
    for at in range(keys.shape[0]):
        scores[at] = _dot(keys[at], query) * scale
        best = max(best, scores[at])
    total = ZERO
    y[:] = ZERO
    for at in range(keys.shape[0]):
        weight = math.exp(scores[at] - best)
        total += weight
        for i in range(y.shape[0]):
            y[i] += weight * values[at, i]
    y /= total


@_compiled(parallel=True)
def attend(heads: Array, keys: Array, values: Array, start: int, y: Array) -> None:
    """Write the attention of the tokens from position `start` on into y (R, H, hs).

    Of their heads (R, H + 2 KV, hs), keys and values are written to keys and values (KV, room, hs), and read up to each token.
    """
    rows, n_head, _ = y.shape
    n_kv_head = keys.shape[0]
    for row in range(rows):
        for number in range(n_kv_head):
            keys[number, start + row] = heads[row, n_head + number]
            values[number, start + row] = heads[row, n_head + n_kv_head + number]
    for index in prange(rows * n_head):
        row, number = index // n_head, index % n_head
        seen, shared = start + row + 1, number * n_kv_head // n_head
        _attend(heads[row, number], keys[shared, :seen], values[shared, :seen], y[row, number])


@_compiled
def go_on(block: Block, attended: Array, x: Array, normed: Array, wide: Array) -> None:
    """Add to rows x (R, C) what a layer adds to them, given the attention's output (R, H hs). `normed` (R, C) and `wide` (R, inner)
    are scratch memory.
    """
    multiply(block.project, attended, x, ADDED)
    normalize(block.norm_2, x, normed)
    multiply(block.widen, normed, wide, block.activation)
    multiply(block.narrow, wide, x, ADDED)


@_compiled
def rescore(weight: Array, bias: Array, x: Array, best: Array, logits: Array) -> None:
    """Compute the logits (V,) of the tokens `best` again from x (C,) and the float32 weight (V, C) and bias (V,), empty if none."""
    for number in best:
        logits[number] = _dot(weight[number], x) + (bias[number] if bias.shape[0] else ZERO)
