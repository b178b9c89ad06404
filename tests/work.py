"""Counts of work, equal on every computer, however slow: function calls, files opened, bytes allocated for tensors."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Seconds after which a process counts as hanging: far more than any needs at a tenth of a core.
HANGING = int(os.environ.get("HANGING_SECONDS", "3600"))

_opened: list[str] | None = None


def calls(action: Callable[[], Any], *, most: float = float("inf")) -> tuple[Any, int]:
    """Return the result of `action`, and how many functions it called in this thread, Python's and C's.

    Fail at once beyond `most`.
    """
    count = 0

    def each(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")
        if count > most:
            raise AssertionError(f"more than {most:,} calls, the last by {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(each)
    try:
        return action(), count
    finally:
        sys.setprofile(before)


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


sys.addaudithook(_note_opening)  # Python cannot remove it; it notes nothing outside of `opened`


def opened(action: Callable[[], Any], folder: Any) -> tuple[Any, int]:
    """Return the result of `action`, and how often it opened a file below `folder`."""
    global _opened
    _opened = []
    try:
        return action(), sum(name.startswith(str(folder)) for name in _opened)
    finally:
        _opened = None


@contextlib.contextmanager
def limited(seconds: float = HANGING) -> Iterator[None]:
    """End whatever hangs, in Python or in a call of the system, with a TimeoutError."""

    def late(*_: object) -> None:
        raise TimeoutError(f"hanging for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class NoTensorAbove(TorchDispatchMode):
    """Fails at the first operation whose result takes more than so many bytes of memory."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        for each in tree_leaves(answer):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                size = each.untyped_storage().nbytes()
                assert size <= self.most, f"{function} made a tensor of {size:,} bytes"
        return answer
