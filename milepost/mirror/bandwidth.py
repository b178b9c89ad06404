"""An upper bound on the bytes that are sent per second."""

from collections.abc import Callable

from milepost.files import CHUNK


class Bandwidth:
    """Pauses after each piece that was sent, so that at most `rate` bytes per second leave; without a rate, never."""

    def __init__(self, rate: float, *, pause: Callable[[float], None], clock: Callable[[], float]) -> None:
        """`pause` waits some seconds, `clock` returns seconds."""
        self._rate, self._pause, self._clock = rate, pause, clock
        self._free_at = clock()  # when the next piece may leave
        self.piece = max(1, min(CHUNK, int(rate))) if rate else 0  # bytes: a pause takes a second at most; 0: any

    def sent(self, size: int) -> None:
        """Wait until `size` bytes, which have just left, fit into the rate. Time that was not used gives no credit."""
        if self._rate:
            now = self._clock()
            self._free_at = max(now, self._free_at) + size / self._rate
            self._pause(self._free_at - now)
