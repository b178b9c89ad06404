"""Settings that belong to other programs: torchrun, the terminal, trackers, tqdm."""

import os
from collections.abc import Iterable
from pathlib import Path

from milepost.config.parse import BOOLEANS
from milepost.config.variables import ConfigError
from milepost.places import can_be_written


def debug() -> bool:
    """Return whether errors show their traceback: DEBUG is exactly 1, because other programs use that name too."""
    return os.environ.get("DEBUG") == "1"


def torchrun() -> dict[str, int]:
    """Return rank, size, local_rank and local_size of this process; an empty dict without torchrun or with one process.

    Raises ConfigError if a variable is missing or not a number: other programs set some of these names too.
    """
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    size = os.environ.get("WORLD_SIZE", "").strip()
    if size in ("", "1"):
        return {}
    missing = [name for name in (*names.values(), "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if wrong := missing or [name for name in names.values() if not os.environ[name].isdecimal()]:
        problem = f"WORLD_SIZE={size:.20} without a valid {', '.join(wrong)}"
        raise ConfigError([f"{problem}: start with torchrun, or unset WORLD_SIZE"])
    return {field: int(os.environ[name]) for field, name in names.items()}


def omp_threads_is_one() -> bool:
    """Return whether OMP_NUM_THREADS is 1, to which torchrun sets it unless the user does."""
    return os.environ.get("OMP_NUM_THREADS") == "1"


def max_restarts() -> int:
    """Return torchrun's --max-restarts: how often it restarts all processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)


def was_restarted() -> bool:
    """Return whether torchrun started these processes after a failure of earlier ones."""
    return (os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0") != "0"


def environment(names: Iterable[str]) -> dict[str, str]:
    """Return those of another program's variables that are set and not empty."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def user_caches() -> Path:
    """Return the user's folder of caches: XDG_CACHE_HOME if it is an absolute path, else ~/.cache.

    Where there is no home folder, or none that can be written, as for an unknown user of a container: .cache of the
    current folder.
    """
    named, own = os.environ.get("XDG_CACHE_HOME", ""), Path(os.path.expanduser("~/.cache"))
    if os.path.isabs(named):
        return Path(named)
    return own if own.is_absolute() and can_be_written(own) else Path.cwd() / ".cache"


def no_color() -> bool:
    """Return whether NO_COLOR (https://no-color.org) or TERM=dumb turns colors off."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def tqdm_disabled() -> bool:
    """Return whether TQDM_DISABLE turns the progress bar off; unlike tqdm itself, false and 0 leave it on."""
    text = os.environ.get("TQDM_DISABLE", "").strip().lower()
    return bool(text) and BOOLEANS.get(text, True)
