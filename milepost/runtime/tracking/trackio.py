"""Trackio."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from milepost.runtime.tracking.base import Tracker


class Trackio(Tracker):
    """A run in Trackio's project `milepost`, continued after its last recorded step.

    Trackio's own output goes to stderr.
    """

    def __init__(self, *, run_id: str, settings: Mapping[str, Any], **_: Any) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(project="milepost", name=run_id, resume="allow", config=dict(settings))

    def next_step(self) -> int:
        # Trackio has no public attribute for the end of a series. If this one disappears, fail visibly instead of
        # doubling steps.
        return int(self._run._next_step)

    def write(self, step: int, when: float, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()
