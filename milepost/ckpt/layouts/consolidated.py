"""A folder for each step: `checkpoint_001000/consolidated/` with `consolidated.safetensors` (or, for
adapters without their base, `lora.safetensors`) and `config.json` to share; beside it `optimizer.safetensors` and
`training_state.json` to resume from.

The names repeat from run to run, so they are written into the run's own folder. training_state.json is the manifest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt.layouts.foreign_layout import ForeignReader
from milepost.ckpt.layouts.manifest_layout import ManifestLayout, Safetensors
from milepost.ckpt.record import Checkpoint, Json
from milepost.ckpt.tensors import read_safetensors

WEIGHTS, ADAPTERS, CONFIG = (
    f"consolidated/{name}" for name in ("consolidated.safetensors", "lora.safetensors", "config.json")
)
OPTIMIZER, STATE = "optimizer.safetensors", "training_state.json"


def _config(record: Checkpoint) -> dict[str, Json]:
    return {CONFIG: {"model_type": record.model_type, **record.model_settings}}


def _foreign_content(path: Path, optimizer: bool) -> Mapping[str, Any]:
    return {"model": read_safetensors(path / WEIGHTS)}


LAYOUT = ManifestLayout(
    name="consolidated",
    members=(WEIGHTS, ADAPTERS, CONFIG, OPTIMIZER, STATE),
    run_stem="{prefix}_{step:06d}",
    manifest=STATE,
    weights=Safetensors(WEIGHTS),
    adapters=Safetensors(ADAPTERS),
    optimizer=Safetensors(OPTIMIZER),
    extra=_config,
    head=lambda record: {"step": record.step, "epoch": record.epoch},
    markers=((WEIGHTS,), (ADAPTERS,)),
    foreign=ForeignReader(
        layout="consolidated", content=_foreign_content, source=lambda path: path / WEIGHTS, checksums=None
    ),
)
