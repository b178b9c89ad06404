"""torch and numpy, imported at their first use: what only reads names, settings or metadata runs without them.

    from milepost.lazy import Tensor, torch

Type checkers see the modules themselves. A file that needs them in any case, such as training.py, imports them as usual.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor

__all__ = ["FirstUse", "Tensor", "dist", "import_torch", "np", "torch", "torch_is_in_use"]


class FirstUse:
    """The block in which a module is imported at its first use. milepost/cli.py sets one that signals leave at once."""

    block: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def torch_is_in_use() -> bool:
    """Return whether torch is imported. While it is not, there are no tensors, no devices and no groups of processes."""
    return "torch" in sys.modules


def import_torch() -> None:
    """Import torch now: where a file is read, an import that fails must not be taken for damage of the file."""
    torch.Tensor  # noqa: B018  (the first use)


if not TYPE_CHECKING:

    class _Module:
        """Stands for a module: the first attribute that is asked for imports it, in whichever thread that is."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            if self._name not in sys.modules:
                with FirstUse.block():
                    importlib.import_module(self._name)
            return getattr(importlib.import_module(self._name), attribute)  # waits while another thread imports it

    torch, dist, np = _Module("torch"), _Module("torch.distributed"), _Module("numpy")

    class _TensorType(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))

    class Tensor(metaclass=_TensorType):
        """Stands for torch.Tensor in annotations and in isinstance, which import nothing."""
