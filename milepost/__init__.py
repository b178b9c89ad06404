"""Milepost trains small language models and never loses a step.

    import milepost

    run = milepost.train(model_type="gpt2", training_steps=100, enable_checkpoints=True)
    checkpoint = milepost.load("latest")
    print(milepost.generate(checkpoint, "Dear Wren", max_new_tokens=100))

The names below are the whole public interface; docs/python.md describes them. They are loaded when first used, so that
`import milepost` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from milepost.start import check

check()  # this Python's version and packages, before anything that needs them

if TYPE_CHECKING:
    from milepost.api import best, convert, find, generate, latest, load, prune, save, train, verify

__version__ = "0.1.0"
__all__ = ["best", "convert", "find", "generate", "latest", "load", "prune", "save", "train", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'milepost' has no attribute {name!r}")
    return getattr(importlib.import_module("milepost.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
