"""Mirror metrics.jsonl in a tracker.

metrics.jsonl is the record. A tracker gets one row per step; on a resume it continues where its own series ends, so
that no step is doubled or missing after a kill. Nothing here draws a random number or touches the model.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from milepost.runtime.tracking.base import Tracker

NOT_PLOTTED = ("step", "time")


class Mirror:
    """A run's lines in a tracker. An error of the tracker is logged once and ends the mirror, never the training."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker] | None,
        *,
        log: Callable[[str], None],
        lines: Iterable[Mapping[str, Any]] = (),
        whole: bool = True,
    ) -> None:
        """Open a tracker, if `start` is given, and write those `lines` of the run's metrics so far that it lacks. They replace
        what it recorded earlier only if they are `whole`: begin where the run began.
        """
        self._name, self._log = name, log
        self._tracker: Tracker | None = None
        self._first, self._step, self._time, self._row = 0, -1, 0.0, dict[str, float]()
        if start:
            with self._guarded():
                tracker = start()
                self._first = tracker.next_step()
                self._tracker = tracker
        for line in lines:
            self.write(line)
        with self._guarded():
            if self._tracker:
                (self._tracker.caught_up if whole else self._tracker.keep_earlier)()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl.

        The training and validation lines of a step become one row when the next step begins.
        """
        step, when = line.get("step"), line.get("time")
        if self._tracker is None or not isinstance(step, int) or step < self._first:
            return
        if step != self._step:
            self._send()
            self._step, self._time = step, when if isinstance(when, float) else 0.0
        self._row |= {f"{line.get('split')}/{name}": value for name, value in line.items() if _is_figure(name, value)}

    def close(self, *, complete: bool) -> None:
        """End the series; leave out its last step unless it is `complete`, since a resume adds lines to it."""
        if complete:
            self._send()
        with self._guarded():
            if self._tracker:
                self._tracker.close()
        self._tracker = None

    def _send(self) -> None:
        row, self._row = self._row, {}
        with self._guarded():
            if self._tracker and row:
                self._tracker.write(self._step, self._time, row)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            why = " ".join(str(error).split()) or type(error).__name__
            self._log(f"warning: {self._name} failed ({why}); training continues, and metrics.jsonl has every value")


def _is_figure(name: str, value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and name not in NOT_PLOTTED
