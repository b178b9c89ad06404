"""The folder that is published of a checkpoint: its files as other programs open them, the card, and the curve of its losses."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

import models
from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.exports.peft import Peft
from milepost.ckpt.restore import build_model
from milepost.ckpt.tensors import digest
from milepost.plots.curves import METRICS, drawable
from milepost.plots.picture import draw_file
from milepost.publish.card import CURVE, card
from milepost.publish.public import public_record
from milepost.runtime.progress import shown

Say = Callable[[str], object]


def write(record: Checkpoint, name: str, target: Path, *, runs_dir: Path, say: Say) -> None:
    """Write the folder that is published: the model for transformers, or LoRA adapters for peft; card and curve."""
    public = public_record(record)
    if record.model_settings.get("lora"):
        Peft().write(public, target.parent, target.name)
        trained = [tensor for name, tensor in record.model_state.items() if "lora" in name]
        parameters = sum(tensor.numel() for tensor in trained)
    else:
        ckpt.WRITERS["huggingface"].write(public, target.parent, target.name)
        parameters = models.parameter_count(build_model(record, device=torch.device("cpu")))
    curve = draw_curve(record, runs_dir, target / CURVE, say)
    text = card(public, name, parameters=parameters, sha256=digest(record.model_state), curve=curve)
    (target / "README.md").write_text(text, encoding="utf-8")


def draw_curve(record: Checkpoint, runs_dir: Path, target: Path, say: Say) -> bool:
    """Draw the losses of the record's run up to its step; return False if that is not possible, and report why."""
    folder = runs_dir / (record.run_id or "")
    if record.run_id is None or not (folder / METRICS).is_file():
        say(f"without a loss curve: {shown(runs_dir)} does not hold the run")
        return False
    if importlib.util.find_spec("matplotlib") is None:
        say("without a loss curve: pip install matplotlib")
        return False
    run = drawable(folder, requested=True)
    draw_file([run._replace(parent=None, lines=[line for line in run.lines if line["step"] <= record.step])], target)
    return True
