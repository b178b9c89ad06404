"""Files by step: `step_000100.safetensors`, `step_000100_optimizer.safetensors` and, last,
`step_000100_state.json`.

The names repeat from run to run, so they are written into the run's own folder. The state JSON is the manifest: step,
epoch and metrics for people, then everything else.
"""

from milepost.ckpt.layouts.manifest_layout import ManifestLayout, Safetensors
from milepost.ckpt.record import Checkpoint, Json

WEIGHTS, OPTIMIZER, STATE = ".safetensors", "_optimizer.safetensors", "_state.json"


def _head(record: Checkpoint) -> dict[str, Json]:
    losses = {"validation_loss": record.validation_loss, "best_loss": record.best_loss}
    metrics = {name: value for name, value in losses.items() if value is not None}
    return {"step": record.step, "epoch": record.epoch, "metrics": metrics}


LAYOUT = ManifestLayout(
    name="stepfiles",
    suffixes=(WEIGHTS, OPTIMIZER, STATE),
    primary=WEIGHTS,
    run_stem="step_{step:06d}",
    manifest=STATE,
    weights=Safetensors(WEIGHTS),
    optimizer=Safetensors(OPTIMIZER),
    head=_head,
)
