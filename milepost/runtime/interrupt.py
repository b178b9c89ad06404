"""Signals: the first SIGINT or SIGTERM asks for a stop after the step, the second stops at once."""

import os
import signal
from types import FrameType, TracebackType

INTERRUPTED = 130  # the shells' exit code for it


class Interrupt:
    """While the block lasts, `requested` turns true at the first signal. Handlers of before come back at its end."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The handler only sets a flag: saving inside one would meet half-done work.
        if self.requested:
            os.write(2, b"\nstopped at once; what was saved before is whole\n")
            os._exit(INTERRUPTED)
        self.requested = True
