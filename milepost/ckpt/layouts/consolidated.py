"""A folder for each step: `checkpoint_001000/consolidated/` with `consolidated.safetensors` (or, for
adapters without their base, `lora.safetensors`), `config.json` and `tokenizer.json` to share; beside it
`optimizer.safetensors` and `training_state.json` to resume from.

The names repeat from run to run, so they are written into the run's own folder. training_state.json is the manifest.
The folder `consolidated/` opens alone too: see layouts/shared_folder.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt.layouts.foreign_layout import ForeignReader
from milepost.ckpt.layouts.manifest_layout import ManifestLayout, Safetensors
from milepost.ckpt.manifest import is_regular
from milepost.ckpt.record import Checkpoint, Json
from milepost.ckpt.tensors import read_safetensors

WEIGHTS, ADAPTERS, CONFIG, TOKENIZER = (
    f"consolidated/{name}" for name in ("consolidated.safetensors", "lora.safetensors", "config.json", "tokenizer.json")
)
OPTIMIZER, STATE = "optimizer.safetensors", "training_state.json"


def _extra(record: Checkpoint) -> dict[str, Json]:
    # The name of the base, not its path on this machine: the folder is there to be shared.
    base = (
        {"base": record.base | {"source": Path(str(record.base.get("source"))).name}}
        if record.adapters_only and record.base
        else {}
    )
    files = {CONFIG: {"model_type": record.model_type, **record.model_settings, **base}}
    return files | ({TOKENIZER: record.tokenizer} if record.tokenizer else {})


def _foreign_content(path: Path, optimizer: bool) -> Mapping[str, Any]:
    return {"model": read_safetensors(_weights(path))}


def _weights(path: Path) -> Path:
    return path / (WEIGHTS if is_regular(path / WEIGHTS) else ADAPTERS)


LAYOUT = ManifestLayout(
    name="consolidated",
    members=(WEIGHTS, ADAPTERS, CONFIG, TOKENIZER, OPTIMIZER, STATE),
    run_stem="{prefix}_{step:06d}",
    manifest=STATE,
    weights=Safetensors(WEIGHTS),
    adapters=Safetensors(ADAPTERS),
    optimizer=Safetensors(OPTIMIZER),
    extra=_extra,
    head=lambda record: {"step": record.step, "epoch": record.epoch},
    markers=((WEIGHTS,), (ADAPTERS,)),
    foreign=ForeignReader(layout="consolidated", content=_foreign_content, source=_weights, checksums=None),
)
