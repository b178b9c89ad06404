"""A safetensors file with flat names, as MLX saves a model, read only.

`<stem>_state.json` beside it has step, epoch and metrics.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import CONFIG
from milepost.ckpt.foreign.keys import LOSSES
from milepost.ckpt.layouts.foreign_layout import ForeignLayout, ForeignReader
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.tensors import read_safetensors

MODEL = "model.safetensors"  # of a folder of its own
WEIGHTS, STATE, OPTIMIZER = ".safetensors", "_state.json", "_optimizer.safetensors"


def _claims(path: Path) -> bool:
    """Whether `path` is a safetensors file with weights, or the state JSON of one."""
    if not path.name.endswith((STATE, WEIGHTS)) or path.is_dir():
        return False
    weights = _weights(path)
    if weights != path and not is_regular(weights):
        return False
    return not weights.name.endswith(OPTIMIZER) and not archive.is_archive(weights)


def _is_whole_model(path: Path) -> bool:
    """Whether it is `model.safetensors` beside a config.json: hub mixins write these two, without a state JSON.

    Any other file without its state may be half of a save.
    """
    return path.name == MODEL and is_regular(path) and is_regular(path.with_name(CONFIG))


def _weights(path: Path) -> Path:
    return LAYOUT.locate(path, WEIGHTS)


def _content(path: Path, optimizer: bool) -> Mapping[str, Any]:
    """Return the weights, and what the state JSON says of the training, its metrics included."""
    state = LAYOUT.locate(path, STATE)
    values = read_json(state) if is_regular(state) else {}
    metrics = values.get("metrics")
    words = (metrics if isinstance(metrics, dict) else {}) | values
    known = {name: words[name] for name in ("step", "epoch", *LOSSES) if name in words}
    return {**values, "model": read_safetensors(_weights(path)), **known}


LAYOUT = ForeignLayout(
    name="mlx",
    suffixes=(WEIGHTS, STATE),
    primary=WEIGHTS,
    yields_to_folder=True,
    claims=_claims,
    alone=_is_whole_model,
    beside={MODEL: CONFIG},
    reader=ForeignReader(layout="mlx", content=_content, source=_weights, checksums=None),
)
