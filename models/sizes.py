"""How large a model would be, before it is built."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

import models
from models.model import Model

TENSOR_BYTES = 3000  # that a parameter and its share of the layers' objects take besides its numbers, as measured


class Size(NamedTuple):
    """The number of tensors of a model's state, and of the numbers in them."""

    tensors: int
    elements: int

    @property
    def bytes(self) -> int:
        """The memory that building the model takes, in float32."""
        return 4 * self.elements + TENSOR_BYTES * self.tensors


def size_of(model_type: str, settings: Mapping[str, Any]) -> Size:
    """Return the size of a model without its adapters, in a time that does not depend on the settings.

    Layers take time and memory even without weights, so only one and two of them are measured. Raise what `skeleton` raises.
    """
    layers = settings.get("n_layer")
    if type(layers) is not int or layers < 3:
        return _measured(model_type, settings)
    first, more = _measured(model_type, {**settings, "n_layer": 1}), layer_size(model_type, settings)
    return Size(first.tensors + (layers - 1) * more.tensors, first.elements + (layers - 1) * more.elements)


def layer_size(model_type: str, settings: Mapping[str, Any]) -> Size:
    """Return the size of one layer of a model that has the setting n_layer, without its adapters."""
    one, two = (_measured(model_type, {**settings, "n_layer": count}) for count in (1, 2))
    return Size(two.tensors - one.tensors, two.elements - one.elements)


def _measured(model_type: str, settings: Mapping[str, Any]) -> Size:
    plain = {name: value for name, value in settings.items() if name not in models.ADAPTERS}
    state = skeleton(model_type, plain).state_dict().values()
    return Size(len(state), sum(tensor.numel() for tensor in state))


def skeleton(model_type: str, settings: Mapping[str, Any]) -> Model:
    """Return a model of these settings whose weights have shapes but no memory.

    Raises what models.build raises, and torch's RuntimeError for a shape with more elements than can be counted.
    """
    with torch.device("meta"), _Unfilled():
        return models.build(model_type, settings)


class _Unfilled(TorchFunctionMode):
    """Skip torch.nn.init: for weights without memory, torch would import its compiler first, which takes a second."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))
