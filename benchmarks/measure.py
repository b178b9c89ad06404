"""What every benchmark shares: arms that take turns, the machine's own limits, and one row of the table."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 5
COLUMNS = "{:<50} {:>18} {:>18} {:>16} {:>20} {:>7}"


def seconds(action: Callable[[], object]) -> float:
    """The wall time of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(arms: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, warmups: int = 1) -> dict[str, float]:
    """The median seconds of each arm, the arms taking turns; the first `warmups` rounds are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-warmups, rounds):
        for name, arm in arms.items():
            one = seconds(arm)
            print(f"  {name}: {one:.4f} s{'' if number >= 0 else ' (not counted)'}", file=sys.stderr)
            taken[name] += [one] if number >= 0 else []
    return {name: statistics.median(each) for name, each in taken.items()}


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a square matrix product of `size`, the best of five: what arithmetic allows."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(6))


def read_rate(size: int) -> float:
    """Bytes/s of reading a buffer of `size` bytes once, the best of ten: a sum, which uses every thread and hardly computes."""
    buffer = torch.ones(size // 8, dtype=torch.int64)
    return buffer.nbytes / min(seconds(buffer.sum) for _ in range(11))


def header() -> None:
    """The first line of the table, on stdout."""
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
    """One line of the table: our figure, the peer's, their ratio with the bound it should keep, and the machine's limit with our share of it."""
    compared = "-" if ratio is None else f"{ratio:.2f} ({bound})"
    print(COLUMNS.format(metric, ours, peer, compared, limit, "-" if share is None else f"{share:.2f}"), flush=True)


def not_measured(metric: str, why: str) -> None:
    """The line of a figure that this machine or this environment cannot give."""
    print(f"{metric:<50} not measured: {why}", flush=True)
