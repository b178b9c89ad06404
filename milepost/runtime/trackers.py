"""The registry of trackers. A tracker is one file with a milepost.runtime.tracking.base.Tracker, and one `register`
call here.

Imports no torch and no tracker: the settings take their choices from here, and are read before torch is imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from milepost.registry import check_name, imported

if TYPE_CHECKING:
    from milepost.runtime.tracking.base import Tracker


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a tracker before it is imported."""

    tracker: str | type[Tracker]  # the class, or "module:Class", which is imported at its first use
    package: str | None = None  # that it needs: `pip install` takes the name and `import` too
    variables: tuple[str, ...] = ()  # of the environment, which belong to that package and which the class is given


TRACKERS: Final[dict[str, Entry]] = {}


def register(
    name: str, tracker: str | type[Tracker], *, package: str | None = None, variables: tuple[str, ...] = ()
) -> None:
    """Add a tracker: TRACKER takes its name from then on.

    Raises ValueError for a name that is taken or not in lower case.
    """
    check_name("tracker", name, taken=TRACKERS)
    TRACKERS[name] = Entry(tracker=tracker, package=package, variables=variables)


register("tensorboard", "milepost.runtime.tracking.tensorboard:TensorBoard", package="tensorboard")
register(
    "wandb",
    "milepost.runtime.tracking.wandb:WeightsAndBiases",
    package="wandb",
    variables=("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"),
)
register("trackio", "milepost.runtime.tracking.trackio:Trackio", package="trackio")


def load(name: str) -> type[Tracker]:
    """Return the class of a registered tracker.

    Raises ValueError naming a package that is not installed, or what the class lacks.
    """
    from milepost.runtime.tracking.base import undeclared

    entry = TRACKERS[name]
    if entry.package and not is_installed(entry.package):
        raise ValueError(f"{entry.package} is not installed: pip install {entry.package}")
    found = imported(entry.tracker)
    if problem := undeclared(found):
        raise ValueError(problem)
    return found


def is_installed(package: str) -> bool:
    """Return whether the package can be imported. The folder `wandb` that W&B creates is not a package."""
    spec = importlib.util.find_spec(package)
    return bool(spec and spec.origin)
