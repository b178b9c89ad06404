"""The settings: environment variables, read once at the start. Nothing here imports torch.

`variables.py` declares them and is the only file to edit for a new setting. Only this package reads or writes
os.environ.
"""

from milepost.config.command_line import from_command_line
from milepost.config.docs import as_env, declared, describe, env_example, help_text, reference
from milepost.config.effects import EVERYWHERE, conditions, no_effect, no_effect_beside
from milepost.config.host import (
    debug,
    environment,
    max_restarts,
    no_color,
    omp_threads_is_one,
    torchrun,
    tqdm_disabled,
    user_caches,
    was_restarted,
)
from milepost.config.labels import env_values, labels
from milepost.config.parse import as_text, expected
from milepost.config.resolve import (
    changes,
    contradictions,
    from_saved,
    frozen_base,
    public,
    read,
    shared_settings,
    to_dict,
    with_text,
    with_values,
    without,
)
from milepost.config.variables import (
    ALLOW_BLANK,
    SCOPES,
    VARIABLES,
    Config,
    ConfigError,
)
from milepost.places import ROOT

__all__ = [
    "ALLOW_BLANK",
    "EVERYWHERE",
    "ROOT",
    "SCOPES",
    "VARIABLES",
    "Config",
    "ConfigError",
    "as_env",
    "as_text",
    "changes",
    "conditions",
    "contradictions",
    "debug",
    "declared",
    "describe",
    "env_example",
    "env_values",
    "environment",
    "expected",
    "from_command_line",
    "from_saved",
    "frozen_base",
    "help_text",
    "labels",
    "max_restarts",
    "no_color",
    "no_effect",
    "no_effect_beside",
    "omp_threads_is_one",
    "public",
    "read",
    "reference",
    "shared_settings",
    "to_dict",
    "torchrun",
    "tqdm_disabled",
    "user_caches",
    "was_restarted",
    "with_text",
    "with_values",
    "without",
]
