"""Adapters by the names of their parameters: which kinds there are, what they hold, and training only them.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

ADAPTERS: Final = {
    "lora": "LoRA",
    "ttt": "TTT",
}  # the field of a model's settings that adds them -> their name in messages
LORA_NAMES: Final = ("lora_A", "lora_B")


def is_ttt(name: str) -> bool:
    """Return whether the parameter of this name belongs to a TTT layer: h.{block}.ttt.*"""
    words = name.split(".")
    return len(words) > 3 and (words[0], words[2]) == ("h", "ttt")


def adapter_kind(name: str) -> str | None:
    """Return which of ADAPTERS the parameter of this name belongs to; None for one of the base."""
    if is_ttt(name):
        return "ttt"
    return "lora" if name.endswith(LORA_NAMES) else None


def is_adapter(name: str) -> bool:
    """Return whether the parameter of this name belongs to an adapter, not to the base."""
    return adapter_kind(name) is not None


def adapter_counts(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return how many tensors and elements the adapters of each kind have, as text;
    `shapes` are those of the model's tensors by name.
    """
    counts, sizes = {}, {name: math.prod(shape) for name, shape in shapes.items()}
    for kind, called in ADAPTERS.items():
        own = [size for name, size in sizes.items() if adapter_kind(name) == kind]
        if own:
            counts[kind] = f"{len(own)} {called} tensors, {sum(own):,} elements of {sum(sizes.values()):,}"
    return counts


def draw_adapters(model: nn.Module, missing: Iterable[str]) -> None:
    """Initialise the adapters that have a parameter among the `missing`, from torch's global generator."""
    names = {name for name in missing if is_adapter(name)}
    for path, module in model.named_modules():
        if hasattr(module, "draw") and names & {f"{path}.{name}" for name, _ in module.named_parameters()}:
            module.draw()


def freeze_base(model: nn.Module) -> None:
    """Make the adapters the only parameters that are trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
