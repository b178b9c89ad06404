"""Signals that stop a program, and SIGUSR1, which makes training save and continue.

What stops: SIGINT, SIGTERM, SIGQUIT, the warnings of batch systems SIGUSR2 and SIGXCPU, and SIGHUP of a closed terminal
unless it was ignored at the start (nohup). Each sets a flag. While a script imports its libraries, and before training
starts, it also stops the program at once; the training loop checks the flag after each step. The flag decides, because
a library can swallow an exception.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

INTERRUPTED = 130  # exit code, as shells use it
SAME_REQUEST = 1.0  # seconds in which signals count as one: a double key press, or one each from terminal and launcher

STOPPING = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR2", "SIGXCPU")  # as far as the system has them
SAVING = "SIGUSR1"

Handler = Callable[[int, FrameType | None], None]


class _State:
    """The signals that this process has received since `raise_on_signal`."""

    requested_at: float | None = None  # when the pending request to stop arrived (monotonic seconds)
    handled = False  # whether an Interrupt block has ended since
    received = False  # whether any signal to stop arrived
    save_requested = False  # whether a signal to save arrived that no save has followed


def stopping_signals() -> list[int]:
    """Return the signals that request a stop. SIGHUP stays ignored if it is (nohup)."""
    numbers: list[int] = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [*numbers, *hangup]


def exit_on_signal() -> None:
    """Make a signal end the process at once. For imports, which could swallow an exception."""
    _install(_exit)


def raise_on_signal() -> None:
    """Make a signal set the flag and raise KeyboardInterrupt, and a second signal end the process at once."""
    _State.requested_at, _State.handled, _State.received, _State.save_requested = None, False, False, False
    _install(_raise)


def was_interrupted() -> bool:
    """Return whether a signal to stop arrived since `raise_on_signal`, even if its exception was swallowed."""
    return _State.received


def _install(handler: Handler) -> dict[int, object]:
    """Set the handler, and return the earlier ones. Only the main thread may: in another, no signal stops a training."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    saving = {getattr(signal, SAVING): _note_save} if hasattr(signal, SAVING) else {}
    handlers: dict[int, Handler] = dict.fromkeys(stopping_signals(), handler) | saving
    return {number: signal.signal(number, each) for number, each in handlers.items()}


def _exit(number: int, frame: FrameType | None) -> None:
    _end(b"interrupted\n")


def _end(line: bytes) -> None:
    with contextlib.suppress(OSError):  # stderr is closed or full
        os.write(2, line)
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    if _is_first(number):
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    # The handler only sets a flag: saving inside it would see half-done work.
    _is_first(number)


def _note_save(number: int, frame: FrameType | None) -> None:
    _State.save_requested = True


def _is_first(number: int) -> bool:
    """Set the flag; return whether it was unset. End the process at a second request.

    The system repeats SIGXCPU every second, so that it is never a second request.
    """
    _State.received, now = True, time.monotonic()
    if _State.requested_at is None:
        _State.requested_at = now
        return True
    if now - _State.requested_at >= SAME_REQUEST and number != getattr(signal, "SIGXCPU", None):
        _end(b"\nstopped at once; earlier saves are complete\n")
    return False


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """A block in which a signal ends the process at once, where it would raise KeyboardInterrupt. For imports, as above."""
    main = threading.current_thread() is threading.main_thread()  # only there is it raised, and may handlers change
    raising = [number for number in stopping_signals() if main and signal.getsignal(number) is _raise]
    for number in raising:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in raising:
            signal.signal(number, _raise)


@contextlib.contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """A block in which SIGINT, as Ctrl-C sends it, raises KeyboardInterrupt each time and asks for nothing else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """A block in which SIGINT only sets what the yielded function returns: whether it arrived since the block began."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupt:
    """A block in which a signal only sets `requested` or `save_requested`. The earlier handlers return at its end.

    A signal that arrived before the block, and whose exception was swallowed, counts.
    """

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return _State.requested_at is not None

    @property
    def save_requested(self) -> bool:
        """Whether a signal has asked to save, since the last call of `note_save`."""
        return _State.save_requested

    def note_save(self) -> None:
        """Note that the request to save was obeyed."""
        _State.save_requested = False

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
