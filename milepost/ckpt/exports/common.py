"""What the exports share: which models have a place in another program's GPT-2, and the proof that one was written whole."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.restore import logits, skeleton
from milepost.ckpt.tensor_listing import differing
from milepost.ckpt.tensors import digest

GELUS = {"gelu": "GELU's tanh form", "gelu_erf": "the exact GELU"}


SHAPE = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias", "tied")  # what a GPT-2's weights depend on


@dataclass(frozen=True)
class Proof:
    """What was the same after reading the export back from the disk, and how far the model that it is there is from ours."""

    tensors: int
    sha256: str  # over all tensors, as the export keeps them
    logits: tuple[int, ...]  # the shape of those that were compared
    difference: float  # the largest of two logits, and
    spread: float  # the standard deviation of ours, to judge it by
    remark: str  # why there is a difference; empty if there is none


def weight_shapes(settings: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return name and shape of every weight of a plain GPT-2 of these sizes, in the order of its modules; nothing is allocated."""
    sizes = {name: settings[name] for name in SHAPE if name in settings}
    return {name: tensor.shape for name, tensor in skeleton("gpt2", sizes).state_dict().items()}


def check_gpt2(record: Checkpoint, program: str) -> None:
    """Raises CheckpointError, naming the next step, unless the record is a plain GPT-2 with a GELU, whose head adds nothing of its own."""
    settings = record.model_settings
    if record.model_type != "gpt2":
        raise CheckpointError(
            f"{record.path}: is a {record.model_type}, and {program} has no such model: export a gpt2"
        )
    if settings.get("activation", "gelu") == "relu":
        raise CheckpointError(
            f"{record.path}: its activation is relu, and {program}'s GPT-2 has GELU alone: "
            "CONVERT_TO=huggingface keeps it, and transformers opens that"
        )
    if settings.get("lora"):
        raise CheckpointError(
            f"{record.path}: has LoRA adapters, which have no place in {program}'s GPT-2: "
            "merge them into the weights first (scripts/merge_adapters.py)"
        )
    if others := sorted(record.model_state.keys() - weight_shapes(dict(settings) | {"ttt": None}).keys()):
        raise CheckpointError(
            f"{record.path}: {others[0]} and {len(others) - 1} more of its tensors have no place in {program}'s GPT-2: "
            "it generates with scripts/load_checkpoint.py alone"
        )
    bias = record.model_state.get("lm_head.bias")
    if bias is not None and bias.any():
        raise CheckpointError(
            f"{record.path}: lm_head.bias {tuple(bias.shape)} has no place in {program}'s GPT-2, nor in transformers': "
            "it generates with scripts/load_checkpoint.py alone"
        )


def with_biases(record: Checkpoint) -> dict[str, Tensor]:
    """The record's weights with zeros for the biases that a bias=False model leaves out."""
    shapes = weight_shapes(dict(record.model_settings) | {"bias": True})
    dtype = record.model_state["wte.weight"].dtype
    return {
        name: record.model_state[name] if name in record.model_state else torch.zeros(shape, dtype=dtype)
        for name, shape in shapes.items()
    }


def proved(record: Checkpoint, again: Checkpoint, *, expected: Mapping[str, Tensor], rounded: str = "") -> Proof:
    """The proof, if `again`, what was read back, has the `expected` tensors; `rounded` says to what. Raises CheckpointError naming those that differ."""
    if other := differing(expected, again.model_state):
        named = "; ".join(f"{name}: {how}" for name, how in list(other.items())[:3])
        raise CheckpointError(f"{again.path}: its tensors are not those of {record.path} ({named}): removed")
    ours, theirs = logits(record), logits(again)
    return Proof(
        tensors=len(expected),
        sha256=digest(again.model_state),
        logits=tuple(theirs.shape),
        difference=(ours - theirs).abs().max().item(),
        spread=ours.std().item(),
        remark="; ".join(filter(None, [rounded, _other_gelu(record, again)])),
    )


def _other_gelu(record: Checkpoint, again: Checkpoint) -> str:
    """That the program computes the other form of GELU, as it does of every GPT-2; the two are at most 0.0005 apart."""
    ours, theirs = (GELUS[each.model_settings.get("activation", "gelu")] for each in (record, again))
    return "" if ours == theirs else f"it computes {theirs} where this model has {ours}"


def as_gpt2(record: Checkpoint, path: Path, state: dict[str, Tensor], **settings: object) -> Checkpoint:
    """The record with the weights and settings that another program finds at `path`."""
    return replace(record, model_state=state, model_settings=dict(record.model_settings) | settings, path=path)
