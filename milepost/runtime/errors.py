"""The errors of a training that must stop."""

from collections.abc import Sequence


class TrainingError(Exception):
    """Training cannot continue: a loss, a gradient or a weight is NaN or Inf. Exit code 1."""


class DeviceFaultError(Exception):
    """The device computed the same step twice and unequally, or a tensor changed in memory. Exit code 7.

    `tensors` are the names of what differed; `odd_pass` is the pass, 1 or 2, that a third one contradicts, if it is known.
    """

    def __init__(self, message: str, *, tensors: Sequence[str] = (), odd_pass: int | None = None) -> None:
        super().__init__(message)
        self.tensors, self.odd_pass = tuple(tensors), odd_pass
