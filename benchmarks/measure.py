"""Shared by all benchmarks: alternating measurements, the machine's limits, and the rows of the table."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 5
COLUMNS = "{:<50} {:>18} {:>18} {:>16} {:>20} {:>7}"


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(arms: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, warmups: int = 1) -> dict[str, float]:
    """Return the median seconds of each arm. The arms alternate; the first `warmups` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-warmups, rounds):
        for name, arm in arms.items():
            elapsed = seconds(arm)
            print(f"  {name}: {elapsed:.4f} s{'' if number >= 0 else ' (warm-up)'}", file=sys.stderr)
            taken[name] += [elapsed] if number >= 0 else []
    return {name: statistics.median(times) for name, times in taken.items()}


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the FLOP/s of a square matrix product, the best of five: the limit of arithmetic."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(6))


def read_rate(size: int) -> float:
    """Return the bytes/s of reading `size` bytes once, the best of ten: a sum,
    which uses every thread and little arithmetic.
    """
    buffer = torch.ones(size // 8, dtype=torch.int64)
    return buffer.nbytes / min(seconds(buffer.sum) for _ in range(11))


def header() -> None:
    """Print the header of the table."""
    print(COLUMNS.format("metric", "ours", "peer", "ratio (bound)", "limit", "share"), flush=True)


def row(
    metric: str,
    *,
    ours: str,
    peer: str = "-",
    ratio: float | None = None,
    bound: str = "-",
    limit: str = "-",
    share: float | None = None,
) -> None:
    """Print a row: our figure, the peer's, their ratio and its bound, and the machine's limit with our share of it."""
    compared = "-" if ratio is None else f"{ratio:.2f} ({bound})"
    print(COLUMNS.format(metric, ours, peer, compared, limit, "-" if share is None else f"{share:.2f}"), flush=True)


def not_measured(metric: str, why: str) -> None:
    """Print the row of a figure that cannot be measured here, and why."""
    print(f"{metric:<50} not measured: {why}", flush=True)
