"""Columns as series that a browser draws fluently: at most a few thousand points, whatever a run wrote."""

from typing import Any

import numpy as np
import numpy.typing as npt

from milepost.page.columns import Columns, Splits

AXES = ("step", "tokens", "time")
LOSS_POINTS, POINTS = 2000, 600  # of a series, at most
FIGURES = 7  # significant digits
Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Window = tuple[str, float, float]  # an axis, and the values between which it is shown


def curves(splits: Splits, window: Window | None = None) -> dict[str, dict[str, Any]]:
    """Return every field of every split as a series, by split and field."""
    since = min((columns.fields["time"][0] for columns in splits.values()), default=0.0)
    return {
        split: {
            name: found
            for name in columns.fields
            if name not in AXES and (found := series(columns, name, since=since, points=points_of(name), window=window))
        }
        for split, columns in splits.items()
    }


def points_of(name: str) -> int:
    """Return how many points a series of a field has at most."""
    return LOSS_POINTS if name == "loss" else POINTS


def series(
    columns: Columns, name: str, *, since: float, points: int, window: Window | None = None
) -> dict[str, Any] | None:
    """Return a field with its steps, tokens and hours since a Unix time; None if it has no numbers within the window.

    `shown` keeps the lowest and the highest value of every bucket, so that no spike is lost; `mean` has the mean of every
    bucket, for smoothing, and is absent where `shown` holds all values.
    """
    y, axes = np.array(columns.fields[name]), axes_of(columns, since)
    keep = np.isfinite(y) & np.isfinite(axes["step"])
    if window:
        axis, low, high = window
        keep &= (axes[axis] >= low) & (axes[axis] <= high)
    at = np.flatnonzero(keep)
    at = at[np.argsort(axes["step"][at], kind="stable")]
    if not len(at):
        return None
    y, axes = y[at], {axis: values[at] for axis, values in axes.items()}
    chosen = extremes(y, points // 2)
    found = {"shown": as_json(y[chosen], {axis: values[chosen] for axis, values in axes.items()})}
    if len(chosen) < len(y):
        starts = bucket_starts(len(y), points // 2)
        sizes = np.diff(starts, append=len(y))
        mean = lambda values: np.add.reduceat(values, starts) / sizes  # noqa: E731
        found["mean"] = as_json(mean(y), {axis: mean(values) for axis, values in axes.items()})
    return found


def axes_of(columns: Columns, since: float) -> dict[str, Numbers]:
    """Return the steps, the tokens and the hours since a Unix time; NaN where a line has none."""
    missing = np.full(columns.count, np.nan)
    axes = {axis: np.array(columns.fields[axis]) if axis in columns.fields else missing for axis in AXES}
    return axes | {"time": (axes["time"] - since) / 3600}


def bucket_starts(count: int, buckets: int) -> Indices:
    """Return the index at which each of `buckets` begins; they differ by at most one value."""
    return np.arange(buckets) * count // buckets


def extremes(y: Numbers, buckets: int) -> Indices:
    """Return the indices of the first and the last value and of the lowest and the highest of each bucket, in order."""
    if len(y) <= 2 * buckets:
        return np.arange(len(y))
    starts = bucket_starts(len(y), buckets)
    longest = -(-len(y) // buckets)
    inside = np.minimum(starts[:, None] + np.arange(longest), len(y) - 1)  # (buckets, longest)
    inside = np.minimum(inside, np.append(starts[1:], len(y))[:, None] - 1)  # the last value of a short bucket twice
    rows, values = np.arange(buckets), y[inside]
    ends = inside[rows, values.argmin(axis=1)], inside[rows, values.argmax(axis=1)]
    return np.unique(np.concatenate([*ends, [0, len(y) - 1]]))


def as_json(y: Numbers, axes: dict[str, Numbers]) -> dict[str, list[float | None]]:
    """Return the arrays as lists, rounded; None where JSON has no number."""
    return {name: rounded(values) for name, values in {**axes, "y": y}.items()}


def rounded(values: Numbers) -> list[float | None]:
    """Return the numbers with FIGURES significant digits, and more in whole numbers."""
    return [
        None if not np.isfinite(value) else int(value) if value == int(value) else float(f"{value:.{FIGURES}g}")
        for value in values.tolist()
    ]
