"""Faults of a device, put into the steps of a training on a CPU: bits that flip, products that are wrong, zeros."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.run import Run
from milepost.runtime.optim import parts

BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64}


def flip(tensor: Tensor, rng: random.Random, *, low: int | None = None) -> None:
    """Flip one bit of the tensor where it lies; one of its `low` lowest bits if that is given."""
    words = tensor.data.view(-1).view(BITS[tensor.element_size()])  # unseen by autograd, as a fault is
    place, bit = rng.randrange(len(words)), rng.randrange(low or 8 * tensor.element_size())
    words[place] ^= -(1 << bit) if bit == 8 * tensor.element_size() - 1 else 1 << bit


class Products(TorchDispatchMode):
    """A device whose products are wrong from row 9 on, or are zero."""

    def __init__(self, wrong: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.wrong = wrong

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            self.wrong(out)
        return out


def from_row_9(out: Tensor) -> None:
    """Repeat the first row from row 9 on."""
    rows = out.reshape(-1, out.shape[-1]) if out.is_contiguous() else out
    rows[9:] = rows[:1].clone()


def zeros(out: Tensor) -> None:
    """What a device gives that computes nothing."""
    out.zero_()


@contextlib.contextmanager
def weight(run: Run, rng: random.Random) -> Iterator[None]:
    """A bit of a weight flips while the step runs, and stays flipped."""
    module = rng.choice([module for module in run.model.modules() if not [*module.children()]])
    target = rng.choice([*run.model.parameters()])
    with _once(module.register_forward_hook, lambda *_: flip(target, rng)):
        yield


@contextlib.contextmanager
def activation(run: Run, rng: random.Random) -> Iterator[None]:
    """A bit of what a layer computes flips."""
    leaves = [module for module in run.model.modules() if not [*module.children()]]

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        flip(changed, rng)
        return changed

    with _once(rng.choice(leaves).register_forward_hook, hook):
        yield


@contextlib.contextmanager
def gradient(run: Run, rng: random.Random) -> Iterator[None]:
    """A bit of a gradient flips before the update."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]

    def hook(value: Tensor) -> Tensor:
        changed = value.clone()
        flip(changed, rng)
        return changed

    with _once(rng.choice(trained).register_hook, hook):
        yield


@contextlib.contextmanager
def moment(run: Run, rng: random.Random) -> Iterator[None]:
    """A bit of a moment flips before the update, or after it."""
    part = rng.choice([part for part in parts(run.optimizer) if part.state] or [*parts(run.optimizer)])
    after = not part.state or rng.random() < 0.5

    def hook(*_: Any) -> None:
        flip(rng.choice([value for kinds in part.state.values() for value in kinds.values()]), rng)

    with _once(part.register_step_post_hook if after else part.register_step_pre_hook, hook):
        yield


@contextlib.contextmanager
def batch(run: Run, rng: random.Random) -> Iterator[None]:
    """A bit of a token of the batch flips."""
    plain = run.batches.at

    def changed(step: int) -> tuple[Tensor, Tensor]:
        x, y = plain(step)
        flip(rng.choice((x, y)), rng, low=5)
        return x.clamp(max=run.tokenizer.vocab_size - 1), y.clamp(max=run.tokenizer.vocab_size - 1)

    run.batches.at = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del run.batches.at


@contextlib.contextmanager
def product(run: Run, rng: random.Random) -> Iterator[None]:
    """The products of one pass are wrong from row 9 on."""
    with Products(from_row_9):
        yield


@contextlib.contextmanager
def nothing(run: Run, rng: random.Random) -> Iterator[None]:
    """The products of one pass are zero."""
    with Products(zeros):
        yield


KINDS = (weight, activation, gradient, moment, batch, product, nothing)


@contextlib.contextmanager
def _once(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Have `hook` called at the first of the events."""
    called: list[bool] = []

    def first(*values: Any) -> Any:
        if not called:
            called.append(True)
            return hook(*values)
        return None

    handle = register(first)
    try:
        yield
    finally:
        handle.remove()
