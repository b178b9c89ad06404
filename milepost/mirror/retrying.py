"""Attempts that are repeated after pauses, a bounded number of times."""

import random
from collections.abc import Callable, Iterator
from typing import TypeVar

from milepost.mirror.store import StoreError

ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
DRAW = random.SystemRandom().random  # Python's own generator is the user's
Result = TypeVar("Result")


def pauses(draw: Callable[[], float]) -> Iterator[float]:
    """Yield the seconds between attempts: each up to twice as long as the one before.

    `draw` returns a number from 0 to 1. Half of a pause is drawn, so that machines that failed together do not ask together.
    """
    for number in range(ATTEMPTS - 1):
        longest = min(FIRST_PAUSE * 2.0**number, LONGEST_PAUSE)
        yield longest * (0.5 + 0.5 * draw())


def attempted(
    action: Callable[[], Result],
    *,
    pause: Callable[[float], None],
    draw: Callable[[], float] = DRAW,
) -> Result:
    """Return what `action` returns, after a StoreError that may pass by another attempt; raise the last one."""
    for seconds in pauses(draw):
        try:
            return action()
        except StoreError as error:
            if error.kind != "passing":
                raise
            pause(seconds)
    return action()
