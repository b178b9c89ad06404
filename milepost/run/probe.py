"""A probe: one training step of fixed numbers, whose bits tell whether another machine or version computes as this one.

A list of versions and settings is never complete: libraries choose kernels by variables of their own, by the processor
and by the number of threads, and a model's code may be edited. The probe takes a step at the widths of the run, with its
dtype and optimizer, through its model's own code. Compiled kernels and the sums between processes are not part of it.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import models
from milepost.ckpt.tensors import digest
from milepost.runtime import hardware
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.optim import build_optimizer, gradient_norm
from models.model import Model

ROWS = 2  # sequences in the micro-batch: as few as have a sum over them
PATTERN = 65521  # numbers before the pattern repeats: a prime, so that no two rows of a matrix are equal


def probe(model: Model, *, optimizer: str, device: torch.device, dtype: str, world: World = SINGLE) -> dict[str, Any]:
    """Return what the step is of, and the sha256 of its loss, gradients and updated weights in all processes.

    The small model has the widths of `model`, its adapters and its frozen weights, but the fewest blocks. A batch is
    ROWS sequences of its block size. No generator and no weight of the run changes.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        small = small_model(model, device).train()
        if any(not parameter.requires_grad for parameter in model.parameters()):
            models.freeze_base(small)
        each = world.all_gather(digest(_step(small, optimizer, device=device, dtype=dtype)))
    dropout = getattr(model.settings, "dropout", 0.0)
    inputs = {"optimizer": optimizer, "dtype": dtype, "dropout": dropout, "processes": world.size}
    return {"inputs": inputs, "sha256": hashlib.sha256("".join(each).encode()).hexdigest()}


def _step(small: Model, optimizer: str, *, device: torch.device, dtype: str) -> dict[str, Tensor]:
    """Return loss, gradient norm, gradients and updated weights by name."""
    x, y = (ids.to(device) for ids in fixed_ids(small, sequences=ROWS, tokens=small.settings.block_size))  # (B, T) both
    stepper = build_optimizer(small, optimizer, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    hardware.seed_step(device, 0, 0)
    with hardware.autocast(device, dtype):
        loss = small(x, y).loss
    loss.backward()
    computed = {"loss": loss.detach(), "norm": gradient_norm(stepper)}
    computed |= {f"gradient {name}": p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}
    stepper.step()
    return computed | {name: parameter.detach() for name, parameter in small.named_parameters()}


def small_model(model: Model, device: torch.device, *, pattern: Tensor | None = None) -> Model:
    """Return a model that computes as `model` does, with its widths and adapters, but the fewest blocks; its weights are
    the numbers of `pattern` over and over, by default of one that is the same on every machine.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device, _Undrawn():
        small = type(model)(model.probe_settings()).to(device)
    numbers = _pattern() if pattern is None else pattern
    for parameter in small.parameters():
        _repeat(numbers.to(device), parameter.data)
    return small


class _Undrawn(TorchFunctionMode):
    """Within its block `torch.nn.init` leaves zeros in weights: drawing millions of numbers takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = (kwargs or {}).get("tensor")
        if getattr(func, "__module__", None) == nn.init.__name__ and isinstance(weight, nn.Parameter):
            return weight.data.zero_()
        return func(*args, **(kwargs or {}))


def fixed_ids(model: Model, *, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a batch that is the same everywhere, (sequences, tokens) int64 both."""
    ids = torch.arange(sequences * tokens + 1) * 40503 % model.settings.vocab_size
    return ids[:-1].view(sequences, -1), ids[1:].view(sequences, -1)


def _pattern() -> Tensor:
    """Return PATTERN numbers in [-0.1, 0.1), the same on every machine: one rounding each."""
    return (torch.arange(PATTERN) * 40503 % PATTERN - PATTERN // 2).float() / (5 * PATTERN)


def _repeat(pattern: Tensor, values: Tensor) -> None:
    """Write the pattern into the values, over and over."""
    flat = values.view(-1)
    whole = len(flat) // len(pattern) * len(pattern)
    flat[:whole].view(-1, len(pattern)).copy_(pattern)
    flat[whole:].copy_(pattern[: len(flat) - whole])
