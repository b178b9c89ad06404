"""What can be extended by one file and one line: the names that settings offer, and the modules that implement them.

Imports nothing, so that settings are read without torch.
"""

from typing import NamedTuple


class Registered(NamedTuple):
    """Where an extension is; `saves=False`: it is only read, and no setting offers it."""

    module: str
    saves: bool = True


# The layouts of checkpoints, each the `LAYOUT` of its module. The first that detects a path reads it, so the more
# specific come first; settings list them from the last, the default, to the first.
LAYOUTS = {
    "sharded": Registered("milepost.ckpt.layouts.sharded"),
    "directory": Registered("milepost.ckpt.layouts.directory"),
    "shared_folder": Registered("milepost.ckpt.layouts.shared_folder", saves=False),
    "huggingface": Registered("milepost.ckpt.layouts.huggingface"),
    "consolidated": Registered("milepost.ckpt.layouts.consolidated"),
    "stepfiles": Registered("milepost.ckpt.layouts.stepfiles"),
    "mlx": Registered("milepost.ckpt.layouts.mlx", saves=False),
    "separated": Registered("milepost.ckpt.layouts.separated"),
    "lightning": Registered("milepost.ckpt.layouts.lightning", saves=False),
    "nanogpt": Registered("milepost.ckpt.layouts.nanogpt", saves=False),
    "lecture": Registered("milepost.ckpt.layouts.lecture", saves=False),
    "unified": Registered("milepost.ckpt.layouts.unified"),
}


def layouts_to_save() -> tuple[str, ...]:
    """Return the layouts that CHECKPOINT_LAYOUT offers, the default first."""
    return tuple(name for name, entry in reversed(LAYOUTS.items()) if entry.saves)
