"""The registry of optimizers. An optimizer is one function that builds it and one `register` call here.

Imports no torch: the settings take their choices from here, and are read before it is imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from milepost.registry import check_name, imported


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of an optimizer without torch."""

    # A function (model, *, lr, weight_decay, betas, world) -> torch.optim.Optimizer, or "module:function", imported at
    # its first use. It builds from model.named_parameters(), so that the state can be matched by name at a resume.
    build: str | Callable[..., Any]
    hidden_matrices: bool = False  # whether it needs a model that declares matrices for it


OPTIMIZERS: Final[dict[str, Entry]] = {}


def register(name: str, build: str | Callable[..., Any], *, hidden_matrices: bool = False) -> None:
    """Add an optimizer: OPTIMIZER takes its name from then on.

    Raises ValueError for a name that is taken or not in lower case.
    """
    check_name("optimizer", name, taken=OPTIMIZERS)
    OPTIMIZERS[name] = Entry(build=build, hidden_matrices=hidden_matrices)


register("adamw", "milepost.runtime.optim:adamw")
register("muon", "milepost.runtime.muon:muon_with_adamw", hidden_matrices=True)


def load(name: str) -> Callable[..., Any]:
    """Return the function that builds a registered optimizer."""
    build: Callable[..., Any] = imported(OPTIMIZERS[name].build)
    return build
