"""What tells runs apart: the settings in which they differ."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from milepost.config.parse import as_text
from milepost.config.variables import VARIABLES

MOST = 4  # settings of a label
LAST = ("TRAINING_STEPS", "WARMUP_STEPS", "MIN_LEARNING_RATE")  # which differ with every resume and follow from others


def labels(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return for each run the settings that change its weights and in which the runs differ: `DROPOUT=0.2 N_EMBD=64`.

    Values may be those of metadata or texts of an env file. A run whose settings are unknown has an empty label, and counts for none.
    """
    known = {run: {name: _text(value) for name, value in own.items()} for run, own in settings.items() if own}
    names = [name for name, each in VARIABLES.items() if each.metadata["scope"] in ("identity", "math")]
    values = {name: {own.get(name, "") for own in known.values()} for name in names}
    differing = [name for name in names if len(values[name]) > 1 and "auto" not in values[name]]  # auto may be either
    shown = _telling(differing, list(known.values()))
    more = f" and {len(differing) - MOST} more" if len(differing) > MOST else ""
    return {
        run: " ".join(f"{name}={known[run].get(name, '')}" for name in shown) + more if run in known else ""
        for run in settings
    }


def _telling(names: list[str], runs: list[dict[str, str]]) -> list[str]:
    """Return the MOST names that tell most of the runs apart, the best first; those of LAST only where others are used up."""
    chosen: list[str] = []
    while len(chosen) < min(MOST, len(names)):
        left = [name for name in names if name not in chosen]
        apart = {name: len({tuple(own.get(each, "") for each in (*chosen, name)) for own in runs}) for name in left}
        chosen.append(max(left, key=lambda name: (name not in LAST, apart[name])))
    return chosen


def env_values(path: Path) -> dict[str, str]:
    """Return the settings of a run's config.env; an empty dict if it cannot be read."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead anywhere, and reading a pipe would block
            return {}
        return {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()}
    except (OSError, ValueError):
        return {}


def _text(value: Any) -> str:
    """Return the value as its variable is written: 0.001 and `1e-3` are alike."""
    try:
        return as_text(float(value)) if not isinstance(value, bool) else as_text(value)
    except (TypeError, ValueError):
        return as_text(value)
