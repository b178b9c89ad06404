"""TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from milepost.runtime.tracking.base import LACKING, Tracker

KEPT = "earlier"  # folder of events that metrics.jsonl lacks
FLUSH_SECONDS = 10  # how long events may stay in memory before TensorBoard sees them


class TensorBoard(Tracker):
    """Event files in the run's folder: after a resume the whole series again in a new file, which replaces the earlier
    one.

    With several files, readers order them by the clock in their names. A TensorBoard that has read the earlier file
    drops its events at the `purge_step` with which the new file begins.
    """

    def __init__(self, *, folder: Path, log: Callable[[str], None], **_: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._log, self._kept = log, folder / KEPT
        self._earlier = list(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_SECONDS)

    def next_step(self) -> int:
        return 0

    def write(self, step: int, when: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)

    def caught_up(self) -> None:
        self._writer.flush()
        for path in self._earlier:
            path.unlink(missing_ok=True)

    def keep_earlier(self) -> None:
        """Move the earlier files to a folder of their own, which TensorBoard shows as another run: beside the new file it
        would drop their events. Once only: later files hold the lines of metrics.jsonl.
        """
        if not self._earlier or self._kept.exists():
            self.caught_up()
            return
        self._kept.mkdir()
        for path in self._earlier:
            path.rename(self._kept / path.name)
        self._log(f"{LACKING}; the events so far are kept in {self._kept}")

    def close(self) -> None:
        self._writer.close()
