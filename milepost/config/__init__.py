"""The settings: one environment variable each, read once at the start. Nothing here imports torch.

`variables.py` declares them and is the only file to edit for a new one. Only this package reads or writes os.environ.
"""

from milepost.config.command_line import from_command_line
from milepost.config.docs import as_env, describe, env_example, help_text, reference
from milepost.config.host import (
    colour_unwanted,
    debug,
    restarted,
    restarts,
    threads_left_at_one,
    torchrun,
    tqdm_disabled,
    wandb_wishes,
)
from milepost.config.parse import expected
from milepost.config.resolve import (
    changes,
    contradictions,
    from_saved,
    frozen_base,
    read,
    replaced,
    same_everywhere,
    to_dict,
    without,
)
from milepost.config.variables import (
    LAYERS,
    MAY_BE_BLANK,
    ROOT,
    SCOPES,
    VARIABLES,
    Config,
    ConfigError,
)

__all__ = [
    "LAYERS",
    "MAY_BE_BLANK",
    "ROOT",
    "SCOPES",
    "VARIABLES",
    "Config",
    "ConfigError",
    "as_env",
    "changes",
    "colour_unwanted",
    "contradictions",
    "debug",
    "describe",
    "env_example",
    "expected",
    "from_command_line",
    "from_saved",
    "frozen_base",
    "help_text",
    "read",
    "reference",
    "replaced",
    "restarted",
    "restarts",
    "same_everywhere",
    "threads_left_at_one",
    "to_dict",
    "torchrun",
    "tqdm_disabled",
    "wandb_wishes",
    "without",
]
