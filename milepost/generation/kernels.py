"""The arithmetic of a decoder's pass over a few rows, compiled for this processor by numba, which is an extra.

PyTorch's products of one row read the weights at a third to a half of the speed of memory on most processors, and starting
its operations takes as long as computing them. These read them at the speed of memory, in a few calls for a layer. numba
keeps what it compiled beside this file, or in the user's cache, until this file changes; it looks at no other, so all of it is here.

The sums of a product are taken in one order, written down here as instructions of LLVM, so the bits of a row do not depend on how many are
computed with it. Other sums may be reordered, once and for all when they are compiled; no other rule of IEEE 754 is given up,
so what is not finite stays so.
"""

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
SUMS: Final = {"reassoc", "contract", "nsz"}
KEPT, GELU, GELU_ERF, RELU, SWIGLU, ADDED = range(6)  # what is done with a product; ADDED: added to what is there
CODES: Final = {"": KEPT, "gelu": GELU, "gelu_erf": GELU_ERF, "relu": RELU, "swiglu": SWIGLU}
FLOAT: Final = ir.FloatType()
_FEATURES = binding.get_host_cpu_features()
REGISTER: Final = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4  # numbers
LANES: Final = 4 * REGISTER  # a processor has so many additions under way
MOST: Final = 3  # rows at a time: 12 of 16 registers hold their sums
VECTOR: Final = ir.VectorType(FLOAT, LANES)
LINE: Final = 64  # bytes that a processor reads at once
WIDTHS: Final = {FLOAT: 4, ir.IntType(16): 2, ir.IntType(8): 1}  # bytes of a stored number
PIECE: Final = 16  # outputs that a thread computes for all rows, while their weights are in its cache
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


def _products_of(rows: int) -> Any:
    """Return a function (weights (out, in), number, x (R, in), row, totals): it writes the products of the weights of output `number`
    with so many rows of x, from `row` on, into totals. A weight is read and widened once for them.

    Each total is summed in the same order for all numbers of rows: LANES partial sums, then these, then what is left over.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def products(_: Any, weights: Any, number: Any, x: Any, row: Any, totals: Any) -> Any:
        if {weights.layout, x.layout, totals.layout} != {"C"}:
            return None  # numba then says that it has no such function

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, number, x, row, totals = (
                context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
                for kind, value in zip(signature.args, arguments, strict=True)
            )
            size = builder.extract_value(x.shape, 1)
            left = builder.gep(weights.data, [builder.mul(number, size)])
            at = (builder.add(row, row.type(each)) for each in range(rows))
            right = [builder.gep(x.data, [builder.mul(each, size)]) for each in at]
            for each, total in enumerate(_summed(builder, left, right, size)):
                builder.store(total, builder.gep(totals.data, [size.type(each)]))
            return context.get_dummy_value()

        return types.void(weights, number, x, row, totals), generate

    return products


def _summed(builder: Any, left: Any, right: list[Any], size: Any) -> list[Any]:
    """Return the sums of products of the row at `left` with each at `right`, `size` numbers."""
    line = max(LANES, LINE // WIDTHS[left.type.pointee])  # numbers
    lines, whole = builder.and_(size, size.type(-line)), builder.and_(size, size.type(-LANES))
    ahead = builder.mul(size, size.type(PIECE))
    sums = [cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in right]
    with cgutils.for_range_slice(builder, size.type(0), lines, size.type(line), inc=True) as (at, _):
        for step in range(0, line, LINE // WIDTHS[left.type.pointee]):
            _prefetch(builder, builder.gep(left, [builder.add(builder.add(at, size.type(step)), ahead)]))
        for step in range(0, line, LANES):
            _add_products(builder, sums, left, right, builder.add(at, size.type(step)), VECTOR)
    with cgutils.for_range_slice(builder, lines, whole, size.type(LANES), inc=True) as (at, _):
        _add_products(builder, sums, left, right, at, VECTOR)
    sums = [cgutils.alloca_once_value(builder, _total(builder, builder.load(lanes))) for lanes in sums]
    with cgutils.for_range_slice(builder, whole, size, size.type(1), inc=True) as (at, _):
        _add_products(builder, sums, left, right, at, FLOAT)
    return [builder.load(total) for total in sums]


def _add_products(builder: Any, sums: list[Any], left: Any, right: list[Any], at: Any, kind: Any) -> None:
    """Add to each sum the product of the numbers at `left` and in one row at `right`, from `at` on, one or LANES by `kind`."""
    weight = _widened(builder, left, at, kind)
    for slot, row in zip(sums, right, strict=True):
        builder.store(_fused(builder, weight, _widened(builder, row, at, kind), builder.load(slot)), slot)


def _prefetch(builder: Any, place: Any) -> None:
    """Ask for what is at a place, to be read soon."""
    i8, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [i8, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(place, i8), i32(0), i32(2), i32(1)])


def _widened(builder: Any, row: Any, at: Any, kind: Any) -> Any:
    """Return the stored numbers of a row from `at` on as float32, one or LANES by `kind`."""
    stored, count = row.type.pointee, getattr(kind, "count", 0)
    like = (lambda number: ir.VectorType(number, count)) if count else (lambda number: number)
    place = builder.bitcast(builder.gep(row, [at]), like(stored).as_pointer())
    value = builder.load(place, align=WIDTHS[stored])
    if stored == ir.IntType(8):
        return builder.sitofp(value, kind)
    if stored == ir.IntType(16):
        wide, half = like(ir.IntType(32)), [16] * count if count else 16
        return builder.bitcast(builder.shl(builder.zext(value, wide), ir.Constant(wide, half)), kind)
    return value


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once where the processor can."""
    name = f"llvm.fmuladd.{'f32' if a.type == FLOAT else f'v{LANES}f32'}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _total(builder: Any, lanes: Any) -> Any:
    """Return the sum of LANES numbers: the halves are added until one is left."""
    count = LANES
    while count > 1:
        count //= 2
        i32 = ir.IntType(32)
        halves = [ir.Constant(ir.VectorType(i32, count), [i32(at + i) for i in range(count)]) for at in (0, count)]
        low, high = (builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), half) for half in halves)
        lanes = builder.fadd(low, high)
    return builder.extract_element(lanes, ir.IntType(32)(0))


_products_1, _products_2, _products_3 = _products_of(1), _products_of(2), _products_of(3)


@_compiled
def _dot(weights: Array, x: Array) -> Any:
    total = ZERO
    for i in range(weights.shape[0]):
        total += weights[i] * x[i]
    return total


@_compiled
def _activated(value: Any, code: int) -> Any:
    if code == GELU:  # tanh takes twice as long
        return value / (ONE + math.exp(TWICE_ROOT * (value + CUBIC * value * value * value)))
    if code == GELU_ERF:
        return HALF * value * (ONE + math.erf(value * ROOT_HALF))
    if code == RELU and value < ZERO:
        return ZERO
    return value


@_compiled(fastmath=False)  # the order is fixed already
def _multiply(weights: Array, number: int, x: Array, row: int, rows: int, totals: Array) -> None:
    if rows == 1:
        _products_1(weights, number, x, row, totals)
    elif rows == 2:
        _products_2(weights, number, x, row, totals)
    else:
        _products_3(weights, number, x, row, totals)


@_compiled
def _write(matrix: Matrix, number: int, total: Any, gate: Any, code: int, y: Array) -> None:
    """Write output `number` of a row into y (out,), given its product; of SWIGLU also the product of its gate."""
    width = y.shape[0]
    value = total * matrix.scales[number] + matrix.biases[number]
    if code == ADDED:
        y[number] += value
    elif code == SWIGLU:
        gated = gate * matrix.scales[width + number] + matrix.biases[width + number]
        y[number] = value / (ONE + math.exp(-value)) * gated
    else:
        y[number] = _activated(value, code)


@_compiled
def _multiply_piece(matrix: Matrix, x: Array, y: Array, code: int, first: int, last: int) -> None:
    """Write the outputs from `first` to `last`, a few rows at a time."""
    totals, gates = np.empty(MOST, np.float32), np.empty(MOST, np.float32)
    width, row = y.shape[1], 0
    while row < x.shape[0]:
        rows = min(MOST, x.shape[0] - row)
        for number in range(first, last):
            _multiply(matrix.weights, number, x, row, rows, totals)
            if code == SWIGLU:
                _multiply(matrix.weights, width + number, x, row, rows, gates)
            for i in range(rows):
                _write(matrix, number, totals[i], gates[i], code, y[row + i])
        row += rows


@_compiled(parallel=True)
def multiply(matrix: Matrix, x: Array, y: Array, code: int) -> None:
    """Write the layer's outputs for rows x (R, in) into y (R, out), of SWIGLU (R, out / 2)."""
    width = y.shape[1]
    for piece in prange((width + PIECE - 1) // PIECE):
        _multiply_piece(matrix, x, y, code, piece * PIECE, min(width, (piece + 1) * PIECE))


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
