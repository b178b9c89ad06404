"""The interface of a tracker."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milepost.registry import undefined

LACKING = "metrics.jsonl lacks the first steps of this run"


class Tracker:
    """An open series of a run in a tracker. Subclass it and define the methods of REQUIRED.

    metrics.jsonl is the record, and a tracker mirrors it. An error that a method raises is logged once and ends the
    mirror, never the training.
    """

    def __init__(
        self,
        *,
        folder: Path,
        run_id: str,
        settings: Mapping[str, Any],
        variables: Mapping[str, str],
        log: Callable[[str], None],
    ) -> None:
        """Open the run's series, or continue it after a resume. Take `**_` for arguments that are not needed.

        `folder` is the tracker's own in the run's folder, and may not exist yet. `settings` are shown beside the
        series. `variables` are those of the environment that the registry declares, if they are set. `log` prints a
        line.
        """
        raise NotImplementedError

    def next_step(self) -> int:
        """Return the lowest step that the series lacks: every row from there on is written, those before are not.

        After a kill the series may be ahead of the checkpoint that the run resumes from, or behind it.
        """
        raise NotImplementedError

    def write(self, step: int, when: float, values: dict[str, float]) -> None:
        """Add one row: the finite values of a step, such as "train/loss", and its time in Unix seconds.

        Steps only grow.
        """
        raise NotImplementedError

    def caught_up(self) -> None:
        """Delete the files that the series replaces. Called once, when the rows of earlier processes are written."""

    def keep_earlier(self) -> None:
        """Keep the files that the series would replace, since metrics.jsonl lacks the beginning of what they hold. Called in
        place of `caught_up`.
        """

    def close(self) -> None:
        """End the series; every row must be on disk or sent."""
        raise NotImplementedError


# What a tracker must define, and what it is for.
REQUIRED = {
    "__init__": "opens the series",
    "next_step": "returns the lowest step that the series lacks",
    "write": "adds the row of a step",
    "close": "ends the series",
}


def undeclared(tracker: type[Tracker]) -> str | None:
    """Return one sentence naming what a class of tracker must define and does not; None if it defines all."""
    lacks = undefined(tracker, Tracker, REQUIRED)
    if not lacks:
        return None
    named = ", ".join(f"{name} ({REQUIRED[name]})" for name in lacks)
    return f"{tracker.__module__}.{tracker.__name__} does not define {named}; see milepost/runtime/tracking/base.py"
