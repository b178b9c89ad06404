"""What other programs say in the environment: torchrun, the terminal, Weights & Biases, tqdm."""

import os

from milepost.config.parse import BOOLEANS
from milepost.config.variables import ConfigError


def debug() -> bool:
    """Whether errors show their traceback: DEBUG is exactly 1, as others use the name too."""
    return os.environ.get("DEBUG") == "1"


def torchrun() -> dict[str, int]:
    """What torchrun tells each process that it starts: its rank and their number, in all and on this machine. Empty without it.

    Raises ConfigError if a part of it is missing or no number: other programs set some of these names too.
    """
    wanted = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return {}
    names = [*wanted.values(), "MASTER_ADDR", "MASTER_PORT"]
    if wrong := [name for name in names if not os.environ.get(name)] or [
        name for name in wanted.values() if not os.environ[name].isdecimal()
    ]:
        size = os.environ["WORLD_SIZE"]
        raise ConfigError(
            [f"WORLD_SIZE={size:.20} without a valid {', '.join(wrong)}: start with torchrun, or unset WORLD_SIZE"]
        )
    return {field: int(os.environ[name]) for field, name in wanted.items()}


def threads_left_at_one() -> bool:
    """Whether OMP_NUM_THREADS is 1, as torchrun leaves it if nobody sets it."""
    return os.environ.get("OMP_NUM_THREADS") == "1"


def restarts() -> int:
    """How often torchrun starts the processes anew if one fails (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)


def restarted() -> bool:
    """Whether torchrun has started the processes before, and one of them failed."""
    return (os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0") != "0"


def wandb_wishes() -> dict[str, str]:
    """Mode and project of Weights & Biases: its own variables', else offline, so that it never asks for a login, and `milepost`."""
    usual = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return {"mode": os.environ.get("WANDB_MODE") or usual, "project": os.environ.get("WANDB_PROJECT") or "milepost"}


def colour_unwanted() -> bool:
    """Whether NO_COLOR (https://no-color.org) or a terminal without any asks for none."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def tqdm_disabled() -> bool:
    """Whether TQDM_DISABLE asks for no progress bar; tqdm itself takes any text, 0 included, for yes."""
    text = os.environ.get("TQDM_DISABLE", "").strip().lower()
    return bool(text) and BOOLEANS.get(text, True)
