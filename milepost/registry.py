"""What can be extended by one file and one line: the names that settings offer, and the modules that implement them.

Imports nothing at its start, so that settings are read without torch.
"""

import importlib
import re
from collections.abc import Container, Iterable
from typing import Any, NamedTuple


def check_name(kind: str, name: str, *, taken: Container[str]) -> None:
    """Raise ValueError if the name of a new optimizer, tracker, ... is taken or could not be set."""
    if name in taken or not re.fullmatch("[a-z][a-z0-9_-]*", name):
        raise ValueError(f"{kind} {name!r}: expected a new name of lower-case letters, digits, _ and -.")


def imported(target: Any) -> Any:
    """Return the class or function that a registry names as "module:name"; return anything else as it is."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def undefined(cls: type, interface: type, names: Iterable[str]) -> list[str]:
    """Return those of `names` that a class does not define: it has none, or None, or only that of its `interface`."""
    definers = {name: next((base for base in cls.__mro__ if name in vars(base)), interface) for name in names}
    return [name for name, by in definers.items() if by in (interface, object) or vars(by)[name] is None]


class Registered(NamedTuple):
    """Where an extension is; `saves=False`: it is only read, and no setting offers it."""

    module: str
    saves: bool = True


# The layouts of checkpoints, each the `LAYOUT` of its module. The first that detects a path reads it, so the more
# specific come first; settings list them from the last, the default, to the first.
LAYOUTS = {
    "sharded": Registered("milepost.ckpt.layouts.sharded"),
    "directory": Registered("milepost.ckpt.layouts.directory"),
    "shared_folder": Registered("milepost.ckpt.layouts.shared_folder", saves=False),
    "peft": Registered("milepost.ckpt.layouts.peft", saves=False),
    "huggingface": Registered("milepost.ckpt.layouts.huggingface"),
    "consolidated": Registered("milepost.ckpt.layouts.consolidated"),
    "stepfiles": Registered("milepost.ckpt.layouts.stepfiles"),
    "mlx": Registered("milepost.ckpt.layouts.mlx", saves=False),
    "separated": Registered("milepost.ckpt.layouts.separated"),
    "lightning": Registered("milepost.ckpt.layouts.lightning", saves=False),
    "nanogpt": Registered("milepost.ckpt.layouts.nanogpt", saves=False),
    "lecture": Registered("milepost.ckpt.layouts.lecture", saves=False),
    "unified": Registered("milepost.ckpt.layouts.unified"),
}


def layouts_to_save() -> tuple[str, ...]:
    """Return the layouts that CHECKPOINT_LAYOUT offers, the default first."""
    return tuple(name for name, entry in reversed(LAYOUTS.items()) if entry.saves)
