"""Whether a device computes what the CPU computes, before it trains or generates.

Two looks, both at a model of the run's widths with as few blocks as there are. A few short sequences go through the
whole model, forward and backward, on both: logits, loss and gradients must agree. Then a batch of the step's own size
goes through it on the device, and of each kind and shape of product some rows and columns are computed again in
float64. docs/devices.md says what this finds and what it cannot.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.run.probe import PATTERN, fixed_ids, small_model
from milepost.runtime import hardware
from models.model import Model

Value = TypeVar("Value")
Compute = Callable[[Callable[[], Value]], Value]

SEQUENCES, TOKENS = 2, 8  # of the short look: 16 rows, as some devices are wrong only from the ninth on
SAMPLED = 16  # rows and columns of a product, the first and the last among them
WINDOW = 32  # tokens of the prompt, of the look at the first token
MATRICES = 2  # of a batch of products
LONGEST = 2048  # tokens up to which attention is computed again, with its (T, T) scores
FLOOR = 0.05  # of the largest gradient: smaller ones may be nothing but rounding

# The relative errors that rounding may cause, several times those seen on devices that are right: of a whole model and of
# attention, by norm, and of the elements of a single product.
WHOLE = {"float32": 1e-3, "tf32": 0.02, "float16": 0.02, "bfloat16": 0.05}
ATTENTION = {"float32": 2e-3, "tf32": 0.05, "float16": 0.05, "bfloat16": 0.2}
SINGLE = {"float32": 2e-6, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 0.03}
SMALLEST = {"float16": 2.0**-23}  # errors below are those of numbers too small for the dtype
LOSS_SCALE = 4096.0  # keeps the gradients of float16 from vanishing


def device_problem(
    model: Model,
    *,
    device: torch.device,
    dtype: str,
    rows: int,
    seed: int,
    backward: bool = True,
    compute: Compute[Any] = lambda work: work(),
) -> str | None:
    """Return what the device computes wrongly, with figures, in a step of `rows` sequences; None if nothing.

    Without `backward` the step ends with its loss, as when a model is evaluated. `compute` runs the work of the device: tests put faults around it. No weight and no generator of the run changes.
    """
    drawn = torch.from_numpy(np.random.default_rng(seed).uniform(-0.1, 0.1, PATTERN).astype(np.float32))
    small = small_model(model, device, pattern=drawn).eval()  # without dropout, whose draws differ between devices
    reference = copy.deepcopy(small).to("cpu")
    short = fixed_ids(small, sequences=SEQUENCES, tokens=min(TOKENS, small.settings.block_size))
    here = compute(lambda: _computed(small, short, device=device, dtype=dtype, backward=backward))
    there = _computed(reference, short, device=torch.device("cpu"), dtype="float32", backward=backward)
    if problem := _disagreement(here, there, limit=WHOLE[_precision(dtype, device)]):
        return problem
    whole = fixed_ids(small, sequences=rows, tokens=small.settings.block_size)
    products = Products(seed)
    with torch.set_grad_enabled(backward):
        compute(lambda: _watched(products, small, whole, device=device, dtype=dtype))
    return products.problem


def first_token_problem(
    model: Model, reference: Model, ids: list[int], *, compute: Compute[Any] = lambda work: work()
) -> str | None:
    """Return how the logits of the next token differ between `model`, on its device, and `reference`, on the CPU."""
    device = next(model.parameters()).device
    window = torch.tensor([ids[-WINDOW:]])

    @torch.no_grad()
    def logits(of: Model, where: torch.device) -> dict[str, Tensor]:
        found = of(window.to(where), last_only=True).logits
        return {"logits of the first token": found.float().cpu()}

    here, there = compute(lambda: logits(model, device)), logits(reference, torch.device("cpu"))
    return _disagreement(here, there, limit=WHOLE[_precision("float32", device)])


def _precision(dtype: str, device: torch.device) -> str:
    """Return the dtype of products; "tf32" for float32 where the device may round it to 10 bits."""
    rounded = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == "float32" and rounded else dtype


def _computed(
    model: Model, ids: tuple[Tensor, Tensor], *, device: torch.device, dtype: str, backward: bool
) -> dict[str, Tensor]:
    """Return logits and loss, and with `backward` gradients, in main memory."""
    x, y = (each.to(device) for each in ids)
    with hardware.autocast(device, dtype):
        with torch.no_grad():
            logits = model(x).logits
        with torch.set_grad_enabled(backward):
            loss = model(x, y).loss
    scale = _backward(loss, dtype)
    found = {"logits": logits, "loss": loss.detach()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"gradient of {name}": grad if scale == 1.0 else grad / scale for name, grad in gradients.items()}
    model.zero_grad(set_to_none=True)
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def _backward(loss: Tensor, dtype: str) -> float:
    """Compute the gradients, if the loss has any; return the factor by which they are too large."""
    scale = LOSS_SCALE if dtype == "float16" else 1.0
    if loss.requires_grad:
        (loss * scale).backward()
    return scale


def _disagreement(here: dict[str, Tensor], there: dict[str, Tensor], *, limit: float) -> str | None:
    """Return the first tensor whose distance from the CPU's, relative to its size, is above the limit; None if none.

    NaN is above every limit. A gradient that is mathematically zero consists of rounding errors, so it is compared
    with the size of the largest one.
    """
    sizes = {name: float(tensor.norm()) / math.sqrt(tensor.numel()) for name, tensor in there.items()}
    largest = max((size for name, size in sizes.items() if name.startswith("gradient")), default=0.0)
    for name, right in there.items():
        distance = float(here[name].sub_(right).norm()) / math.sqrt(right.numel())  # in place: a table is large
        size = sizes[name] + FLOOR * largest * name.startswith("gradient")
        if not distance <= limit * size:
            of = tuple(right.shape)
            return f"{name} {of} differ from the CPU's by {distance:.3g}, their size is {size:.3g}, {limit:g} of it is allowed"
    return None


def _watched(
    products: "Products", small: Model, ids: tuple[Tensor, Tensor], *, device: torch.device, dtype: str
) -> None:
    x, y = (each.to(device) for each in ids)
    with products:
        with hardware.autocast(device, dtype):
            loss = small(x, y).loss
        _backward(loss, dtype)
    small.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# The products of a step, each kind and shape once.


class Product(NamedTuple):
    """out = beta * added + alpha * first @ second, matrices or batches of them; first is (M, K), second (K, N)."""

    out: Tensor
    first: Tensor
    second: Tensor
    added: Tensor | None = None
    beta: float = 1.0
    alpha: float = 1.0


class Products(TorchDispatchMode):
    """Computes a sample of the products within its block again; `problem` says which was wrong first."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.problem: str | None = None
        self.seen: set[Any] = set()
        self._random = np.random.default_rng(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if self.problem is None and (name in PRODUCTS or name.startswith("_scaled_dot_product_")):
            named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
            tensors = [value for value in named.values() if isinstance(value, Tensor)]
            key = (name, *((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
            if key not in self.seen:
                self.seen.add(key)
                with torch.no_grad():
                    self.problem = self._checked(name, named, out)
        return out

    def _checked(self, name: str, named: dict[str, Any], out: Any) -> str | None:
        if name.startswith("_scaled_dot_product_"):
            return _attention_problem(name, named, out, self._random)
        return next(filter(None, (self._wrong(name, each) for each in PRODUCTS[name](named, out))), None)

    def _wrong(self, name: str, product: Product) -> str | None:
        """Return the element that is furthest from its value, if rounding does not explain it."""
        if product.out.dim() == 3:
            batch = self._drawn(len(product.out), MATRICES)
            return next(filter(None, (self._wrong(name, _matrix(product, number)) for number in batch)), None)
        (M, K), N = product.first.shape, product.second.shape[1]
        rows, columns = self._drawn(M, SAMPLED), self._drawn(N, SAMPLED)
        got = _sample(product.out, rows, columns)
        a, b = _sample(product.first, rows, None), _sample(product.second, None, columns)
        c = 0.0 if product.added is None else _sample(product.added.expand(M, N), rows, columns) * product.beta
        right = c + product.alpha * (a @ b)
        # What K terms of random signs would add up to: rounding errors are in proportion to it.
        scale = np.sqrt(np.where(np.isfinite(c), c, 0.0) ** 2 + product.alpha**2 * (a**2 @ b**2))
        dtype = str(product.out.dtype).removeprefix("torch.")
        limit = SINGLE[_precision(dtype, product.out.device)]
        limit *= math.sqrt(K) if dtype == "float32" else 1.0
        same = got == right  # both may be infinite
        with np.errstate(invalid="ignore"):
            error = np.abs(got - right) / np.maximum(limit * (np.abs(right) + scale), SMALLEST.get(dtype, 1e-30))
        excess = np.where(same, 0.0, error)
        if np.all(excess <= 1.0):  # false for NaN
            return None
        i, j = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
        where = f"row {rows[i]}, column {columns[j]}"
        return (
            f"{name} of ({M}, {K}) and ({K}, {N}) in {dtype}: {where} is {got[i, j]:.6g}, on the CPU {right[i, j]:.6g}"
        )

    def _drawn(self, size: int, count: int) -> list[int]:
        """Return up to `count` indices below `size`, the first and the last always among them."""
        drawn = self._random.choice(size, min(size, count), replace=False).tolist()
        return sorted({0, size - 1, *drawn[2:]})


def _linear(named: dict[str, Any], out: Any) -> Iterator[Product]:
    """The layer as one operation, as on MPS."""
    yield Product(out.flatten(0, -2), named["input"].flatten(0, -2), named["weight"].t(), named.get("bias"))


def _linear_backward(named: dict[str, Any], out: Any) -> Iterator[Product]:
    x, gradient = (named[name].flatten(0, -2) for name in ("self", "grad_output"))
    if out[0] is not None:
        yield Product(out[0].flatten(0, -2), gradient, named["weight"])
    if out[1] is not None:
        yield Product(out[1], gradient.t(), x)


# How each operation's arguments make products.
PRODUCTS: dict[str, Callable[[dict[str, Any], Any], Iterator[Product]]] = {
    "mm": lambda named, out: iter([Product(out, named["self"], named["mat2"])]),
    "bmm": lambda named, out: iter([Product(out, named["self"], named["mat2"])]),
    "addmm": lambda named, out: iter([_added(out, named, "mat1", "mat2")]),
    "baddbmm": lambda named, out: iter([_added(out, named, "batch1", "batch2")]),
    "linear": _linear,
    "linear_backward": _linear_backward,
}


def _added(out: Tensor, named: dict[str, Any], first: str, second: str) -> Product:
    factors = {name: float(named.get(name, 1)) for name in ("beta", "alpha")}
    return Product(out, named[first], named[second], named["self"], **factors)


def _matrix(product: Product, number: int) -> Product:
    """Return one of a batch of products."""
    added = product.added.expand(product.out.shape)[number] if product.added is not None else None
    parts = {name: getattr(product, name)[number] for name in ("out", "first", "second")}
    return product._replace(added=added, **parts)


def _sample(matrix: Tensor, rows: list[int] | None, columns: list[int] | None) -> np.ndarray:
    """Return rows and columns of a matrix as float64 in main memory; None takes all."""
    for dim, chosen in enumerate((rows, columns)):
        if chosen is not None:
            matrix = matrix.index_select(dim, torch.tensor(chosen, device=matrix.device))
    return matrix.detach().cpu().double().numpy()


def _attention_problem(name: str, named: dict[str, Any], out: Any, random: np.random.Generator) -> str | None:
    """Return how the fused attention of a head differs from softmax(q k^T) v, or its gradients do."""
    q = named["query"]  # (B, H, T, hs)
    masked = any(named.get(mask) is not None for mask in ("attn_mask", "attn_bias"))
    if masked or named.get("dropout_p") or q.dim() != 4 or q.shape[2] > LONGEST:
        return None
    dtype = str(q.dtype).removeprefix("torch.")
    gradient = named.get("grad_out", named.get("grad_out_"))
    limit = ATTENTION[_precision(dtype, q.device)]
    place = int(random.integers(q.shape[0])), int(random.integers(q.shape[1]))  # a sequence and a head
    heads = [named[each][place].cpu().float().numpy() for each in ("query", "key", "value")]  # ample for the limit
    factor = float(named.get("scale") or 1 / math.sqrt(q.shape[3]))
    upstream = None if gradient is None else gradient[place].cpu().float().numpy()
    right = attention(*heads, scale=factor, causal=bool(named.get("is_causal")), gradient=upstream)
    names = ("output",) if upstream is None else ("dq", "dk", "dv")
    for what, value, got in zip(names, right, out, strict=False):
        distance = float(np.linalg.norm(got[place].cpu().float().numpy() - value))
        error = distance / max(float(np.linalg.norm(value)), 1e-30)
        if not error <= limit:
            return (
                f"{name} {tuple(q.shape)} in {dtype}: the relative error of {what} is {error:.3g}, {limit:g} is allowed"
            )
    return None


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, causal: bool, gradient: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    """Return the attention (T, hs) of one head, or with `gradient`, that of the loss by it, those by q, k and v."""
    scores = scale * (q @ k.T)  # (T, T)
    if causal:
        scores[~np.tri(len(q), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    if gradient is None:
        return (weights @ v,)
    by_weights = gradient @ v.T
    by_scores = scale * weights * (by_weights - (by_weights * weights).sum(1, keepdims=True))
    return by_scores @ k, by_scores.T @ q, weights.T @ gradient
