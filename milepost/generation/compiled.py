"""The fast decoder on a CPU with numba, which is an extra: passes of a few tokens by kernels compiled for the processor (kernels.py).

Prompts are read by PyTorch from the same weights: its products of many rows are at the processor's limit.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, cast

import numba
import numpy as np
import torch
from filelock import FileLock, Timeout
from numba.core import event
from torch import Tensor
from torch.nn import functional as F

from milepost.generation import kernels
from milepost.generation.decoder import RESCORED, DecodeCache, Decoder, positions_of
from milepost.generation.decoder_parts import Layer, Norm
from models.linears import FEW, Linear, activated, in_chunks, multiplies_rows_together, quantized
from models.model import Model

LONGEST_DRAFT: Final = {"float32": 5, "bfloat16": 5, "int8": 3}  # as decoder.LONGEST_DRAFT: here more rows take longer
# Held while kernels run in several threads: where numba finds no OpenMP, its own threads serve one caller, and a second ends the process.
ONE_CALLER: Final = threading.Lock()
BYTES: Final = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight
ALIGNED: Final = 64  # bytes: a line of the processor's cache
SOON: Final = 3.0  # seconds that loading what was compiled may take another process
NONE: Final = np.empty(0, np.float32)
NO_ANGLES: Final = np.empty((0, 0), np.float32)


class Store:
    """Memory for the weights of a model in one piece, for which numpy asks the system for huge pages: to read them takes up to a
    fifth less time. So float32 weights are copied too. What is not used is not taken.
    """

    def __init__(self, model: Model, weights: str) -> None:
        sizes = [parameter.numel() * BYTES[weights] + ALIGNED for parameter in model.parameters()]
        self.free = torch.from_numpy(np.empty(sum(sizes), np.uint8))

    def put(self, weight: Tensor) -> Tensor:
        """Return a copy of a weight."""
        place = self.free[: weight.nbytes].view(weight.dtype).view(weight.shape)
        self.free = self.free[-(-weight.nbytes // ALIGNED) * ALIGNED :]
        return place.copy_(weight)


class Stored:
    """A linear layer whose weights are stored once, for the kernels and for PyTorch: a function of rows (R, in)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: str = "", *, weights: str, store: Store
    ) -> None:
        self.width, self.bias, self.activation = weight.size(0), bias, activation
        self.scales: Tensor | None = None
        if weights == "int8":
            whole, self.scales = quantized(weight)
            self.stored = store.put(whole)
        else:
            self.stored = store.put(weight.bfloat16() if weights == "bfloat16" else weight)
        numbers = self.stored.view(torch.uint16) if weights == "bfloat16" else self.stored
        scales = torch.ones(self.width) if self.scales is None else self.scales
        biases = torch.zeros(self.width) if bias is None else bias
        self.matrix = kernels.Matrix(_array(numbers), _array(scales), _array(biases))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows' outputs (R, out) in float32."""
        if x.size(0) > FEW or self.activation:
            return self._many(x)
        y = torch.empty(x.size(0), self.width)
        with ONE_CALLER:
            kernels.multiply(self.matrix, _array(x), _array(y), kernels.KEPT)
        return y

    def _many(self, x: Tensor) -> Tensor:
        """Return the outputs by PyTorch's product, in bfloat16 where the processor has it; to convert the weights takes less time."""
        narrow = self.stored.dtype != torch.float32 and multiplies_rows_together()
        dtype = torch.bfloat16 if narrow else torch.float32
        weight = self.stored.to(dtype)

        def multiply(x: Tensor) -> Tensor:
            y = F.linear(x, weight).float()
            y = y if self.scales is None else y * self.scales
            return activated(y if self.bias is None else y + self.bias, self.activation)

        return in_chunks(multiply, x.to(dtype))


class CompiledDecoder(Decoder):
    """A trained model on the CPU for sampling.generate(), as Decoder. The kernels are compiled, or loaded if they were compiled
    before, when it is made; `log` gets a line if they are compiled, which takes some twenty seconds.
    """

    def __init__(self, model: Model, *, weights: str, log: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(model, weights=weights, linear=partial(Stored, weights=weights, store=Store(model, weights)))
        self.together, self.longest_draft = True, LONGEST_DRAFT[weights]
        self.n_head = self.parts.layers[0].heads.n_head
        self.blocks, self.norm = [_block(layer) for layer in self.parts.layers], _norm(self.parts.norm)
        bias = self.parts.head_bias
        self.exact_head = _array(self.parts.head_weight), _array(bias) if bias.dim() else NONE
        with _alone(log), event.install_listener("numba:compile", _Told(log)):
            list(self.rows([0], self.new_cache()))

    def agrees(self, rows: int | None = None) -> bool:
        """Return whether passes of up to so many rows are the kernels', in which no row's bits depend on the others."""
        return rows is None or rows <= FEW

    def _through(self, ids: Sequence[int], spans: Sequence[tuple[DecodeCache, int]]) -> Tensor:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        if len(ids) > FEW:
            return super()._through(ids, spans)
        positions = torch.tensor(positions_of(spans))
        x = _array(self.parts.embed(torch.tensor(ids), positions))
        (R, C), (_, n_kv_head, size) = x.shape, self.parts.cache_shape
        turn = self.parts.turn(positions)
        angles = (NO_ANGLES, NO_ANGLES) if turn is None else [_array(each[:, 0]) for each in turn]
        normed, heads = _floats(R, C), _floats(R, self.n_head + 2 * n_kv_head, size)
        attended, wide = _floats(R, self.n_head, size), _floats(R, self.parts.inner)
        with ONE_CALLER:
            for number, block in enumerate(self.blocks):
                kernels.read_heads(block, x, normed, heads, self.n_head, *angles)
                first = 0
                for cache, count in spans:
                    rows = slice(first, first + count)
                    keys, values = (_array(states[0]) for states in cache.layers[number])
                    kernels.attend(heads[rows], keys, values, cache.length, attended[rows])
                    first += count
                kernels.go_on(block, attended.reshape(R, -1), x, normed, wide)
        kernels.normalize(self.norm, x, normed)
        return torch.from_numpy(normed)

    def _rescored(self, x: Tensor, logits: Tensor) -> Tensor:
        best = logits.topk(min(RESCORED, logits.numel())).indices
        kernels.rescore(*self.exact_head, _array(x[0]), _array(best), _array(logits))
        return logits


@contextlib.contextmanager
def _alone(log: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from compiling meanwhile: numba would keep under one name what two compile at once.

    Where nothing is kept, or there are no locks, do nothing.
    """
    folder = kernels.multiply.stats.cache_path
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, NotImplementedError):
            if folder is not None:
                os.makedirs(folder, exist_ok=True)
                lock = FileLock(os.path.join(folder, "kernels.lock"))
                try:
                    held.enter_context(lock.acquire(timeout=SOON))
                except Timeout:
                    log("waiting for another process that compiles the decoder")
                    held.enter_context(lock)
        yield


class _Told(event.Listener):  # type: ignore[misc]
    """Logs that something is compiled, once."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._told = log, False

    def on_start(self, _: Any) -> None:
        if not self._told:
            self._told = True
            self._log("compiling the decoder for this processor: some twenty seconds, once")

    def on_end(self, _: Any) -> None:
        pass


def _block(layer: Layer) -> kernels.Block:
    eps = np.float32(layer.heads.eps)
    q_norm, k_norm = (
        kernels.Norm(_array(weight), _array(torch.zeros_like(weight)), eps, False)
        for weight in layer.heads.norms or (torch.empty(0), torch.empty(0))
    )
    return kernels.Block(
        norm_1=_norm(layer.norm_1),
        qkv=_matrix(layer.qkv),
        q_norm=q_norm,
        k_norm=k_norm,
        project=_matrix(layer.project),
        norm_2=_norm(layer.norm_2),
        widen=_matrix(layer.widen),
        activation=kernels.CODES[cast(Stored, layer.widen).activation],
        narrow=_matrix(layer.narrow),
    )


def _matrix(linear: Linear) -> kernels.Matrix:
    return cast(Stored, linear).matrix


def _norm(norm: Norm) -> kernels.Norm:
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return kernels.Norm(_array(norm.weight), _array(bias), np.float32(norm.eps), norm.centred)


def _array(tensor: Tensor) -> Any:
    """Return the numbers of a tensor, without a copy."""
    return tensor.detach().numpy()


def _floats(*shape: int) -> Any:
    return np.empty(shape, np.float32)
