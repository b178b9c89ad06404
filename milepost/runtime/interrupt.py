"""Signals that stop a program: SIGINT, SIGTERM, and SIGHUP of a closed terminal unless it was ignored at the start
(nohup).

A signal sets a flag. While a script imports its libraries, and before training starts, it also stops the program at
once; the training loop checks the flag after each step. The flag decides, because a library can swallow an exception.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

INTERRUPTED = 130  # exit code, as shells use it
SAME_REQUEST = 1.0  # seconds in which signals count as one: a double key press, or one each from terminal and launcher

Handler = Callable[[int, FrameType | None], None]


class _State:
    """The signals that this process has received since `raise_on_signal`."""

    requested_at: float | None = None  # when the pending request to stop arrived (monotonic seconds)
    handled = False  # whether an Interrupt block has ended since
    received = False  # whether any signal arrived


def stopping_signals() -> list[int]:
    """Return the signals that request a stop. SIGHUP stays ignored if it is (nohup)."""
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def exit_on_signal() -> None:
    """Make a signal end the process at once. For imports, which could swallow an exception."""
    _install(_exit)


def raise_on_signal() -> None:
    """Make a signal set the flag and raise KeyboardInterrupt, and a second signal end the process at once."""
    _State.requested_at, _State.handled, _State.received = None, False, False
    _install(_raise)


def was_interrupted() -> bool:
    """Return whether a signal arrived since `raise_on_signal`, even if its exception was swallowed."""
    return _State.received


def _install(handler: Handler) -> dict[int, object]:
    return {number: signal.signal(number, handler) for number in stopping_signals()}


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    if _is_first():
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    # The handler only sets a flag: saving inside it would see half-done work.
    _is_first()


def _is_first() -> bool:
    """Set the flag; return whether it was unset. End the process at a second request."""
    _State.received, now = True, time.monotonic()
    if _State.requested_at is None:
        _State.requested_at = now
        return True
    if now - _State.requested_at >= SAME_REQUEST:
        os.write(2, b"\nstopped at once; earlier saves are complete\n")
        os._exit(INTERRUPTED)
    return False


class Interrupt:
    """A block in which a signal only sets `requested`. The earlier handlers return at its end.

    A signal that arrived before the block, and whose exception was swallowed, counts.
    """

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return _State.requested_at is not None

    def __enter__(self) -> "Interrupt":
        if _State.handled:  # a second training in this process starts without a request
            _State.requested_at, _State.handled = None, False
        self._before = _install(_note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        _State.handled = True
