"""Signals that stop a program: SIGINT, SIGTERM, and SIGHUP of a closed terminal unless it was ignored at the start (nohup).

A signal sets a flag. While a script imports its libraries, and before training starts, it also ends the work; in the training loop
the flag alone does, after the step. The flag is what counts: an exception can be swallowed by a library.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

INTERRUPTED = 130  # the shells' exit code for it
TOGETHER = 1.0  # seconds; a double tap, or what a terminal and a launcher both send, is one signal

Handler = Callable[[int, FrameType | None], None]


class _Heard:
    """What this process has heard since `raise_on_signal`."""

    first: float | None = None  # when the request came that is being obeyed
    obeyed = False  # an Interrupt has ended since
    ever = False


def stopping_signals() -> list[int]:
    """The signals that ask for a stop. SIGHUP stays ignored where it is ignored."""
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def exit_on_signal() -> None:
    """From now on a signal ends the process at once: for the imports, in which an exception could be swallowed."""
    _install(_exit)


def raise_on_signal() -> None:
    """From now on a signal sets the flag and raises KeyboardInterrupt; a second one ends the process at once."""
    _Heard.first, _Heard.obeyed, _Heard.ever = None, False, False
    _install(_raise)


def was_interrupted() -> bool:
    """Whether a signal came since `raise_on_signal`, whatever became of its exception."""
    return _Heard.ever


def _install(handler: Handler) -> dict[int, object]:
    return {number: signal.signal(number, handler) for number in stopping_signals()}


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    if _is_first():
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    # The handler only sets a flag: saving inside it would meet half-done work.
    _is_first()


def _is_first() -> bool:
    """Sets the flag and returns whether it was not set; ends the process at a second signal that is not the first one again."""
    _Heard.ever, now = True, time.monotonic()
    if _Heard.first is None:
        _Heard.first = now
        return True
    if now - _Heard.first >= TOGETHER:
        os.write(2, b"\nstopped at once; what was saved before is whole\n")
        os._exit(INTERRUPTED)
    return False


class Interrupt:
    """While the block lasts, a signal only sets `requested`. Handlers of before come back at its end.

    A signal that came before, and whose exception was swallowed, counts.
    """

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return _Heard.first is not None

    def __enter__(self) -> "Interrupt":
        if _Heard.obeyed:  # one training after another begins without a request
            _Heard.first, _Heard.obeyed = None, False
        self._before = _install(_note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        _Heard.obeyed = True
