"""What the exports share: which models another program's GPT-2 can represent, and the proof that an export is complete."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milepost.ckpt.record import Checkpoint, CheckpointError
from milepost.ckpt.restore import logits
from milepost.ckpt.tensor_listing import differing
from milepost.ckpt.tensors import digest
from models import with_trait
from models.sizes import skeleton

GELUS = {"gelu": "GELU's tanh form", "gelu_erf": "the exact GELU", "relu": "ReLU"}


SHAPE = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias", "tied")  # what a GPT-2's weights depend on


@dataclass(frozen=True)
class Proof:
    """The result of reading an export back from the disk: what was equal, and how far its logits are from ours."""

    tensors: int
    sha256: str  # over all tensors, as the export holds them
    logits: tuple[int, ...]  # the shape of the logits that were compared
    difference: float  # the largest absolute difference of two logits
    spread: float  # the standard deviation of our logits, to judge the difference by
    remark: str  # the reason for a difference; empty if there is none


HERE_ONLY = "generate with scripts/load_checkpoint.py"
TO_HUGGINGFACE = "use CONVERT_TO=huggingface, which can represent it"
TO_LECTURE = "use CONVERT_TO=lecture, which can represent it"


def cannot_represent(record: Checkpoint, problem: str, remedy: str) -> CheckpointError:
    """Return the error for a part of `record` that the other program lacks."""
    return CheckpointError(record.path or "checkpoint", problem, remedy, kind="refused")


def elsewhere(record: Checkpoint) -> str:
    """Return the remedy for a model that a program cannot represent: another program that can, or none but this one."""
    settings, bias = record.model_settings, record.model_state.get("lm_head.bias")
    if settings.get("lora") or settings.get("ttt"):
        return HERE_ONLY
    if record.model_type in with_trait("transformers") and (bias is None or not bias.any()):
        return TO_HUGGINGFACE
    tokens = (record.tokenizer or {}).get("kind") in ("char", "gpt2")
    biased = any(name.endswith("attn.c_attn.bias") and tensor.any() for name, tensor in record.model_state.items())
    relu = record.model_type == "gpt2" and settings.get("activation") == "relu" and not biased
    return TO_LECTURE if tokens and (relu or record.model_type == "bigram") else HERE_ONLY


def check_adapters(record: Checkpoint, model: str) -> None:
    """Raise CheckpointError if the record has adapters; `model` is the other program's, such as "nanoGPT's GPT-2"."""
    if record.model_settings.get("ttt"):
        problem = f"has TTT layers, which have no place in {model}, nor in transformers'"
        raise cannot_represent(record, problem, HERE_ONLY)
    if record.model_settings.get("lora"):
        problem = f"has LoRA adapters, which have no place in {model}"
        raise cannot_represent(record, problem, "merge them first (scripts/merge_adapters.py)")


def check_additions(record: Checkpoint, program: str) -> None:
    """Raise CheckpointError if the record has adapters, or other tensors than a GPT-2 of its sizes."""
    check_adapters(record, f"{program}'s GPT-2")
    if others := sorted(record.model_state.keys() - weight_shapes(record.model_settings).keys()):
        problem = f"{others[0]} and {len(others) - 1} more of its tensors have no place in {program}'s GPT-2"
        raise cannot_represent(record, problem, HERE_ONLY)


def not_the_same(path: Path, part: str, record: Checkpoint, details: str = "") -> CheckpointError:
    """Return the error for a file that does not read back as it was written."""
    more = f" ({details})" if details else ""
    problem = f"its {part} are not those of {record.path}{more}"
    return CheckpointError(path, problem, "it was removed; check the disk, and try again", kind="damaged")


def weight_shapes(settings: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return name and shape of every weight of a plain GPT-2 of these sizes, in the order of its modules; nothing is allocated."""
    sizes = {name: settings[name] for name in SHAPE if name in settings}
    return {name: tensor.shape for name, tensor in skeleton("gpt2", sizes).state_dict().items()}


def check_gpt2(record: Checkpoint, program: str) -> None:
    """Raise CheckpointError unless the record is a plain GPT-2 with a GELU and no bias of its own in the head."""
    settings = record.model_settings
    if record.model_type != "gpt2":
        problem = f"is a {record.model_type}; {program} has no such model"
        raise cannot_represent(record, problem, elsewhere(record))
    check_additions(record, program)
    if settings.get("activation", "gelu") == "relu":
        problem = f"its activation is relu; {program}'s GPT-2 has only GELU"
        raise cannot_represent(record, problem, elsewhere(record))
    bias = record.model_state.get("lm_head.bias")
    if bias is not None and bias.any():
        problem = f"lm_head.bias {tuple(bias.shape)} has no place in {program}'s GPT-2, nor in transformers'"
        raise cannot_represent(record, problem, HERE_ONLY)


def with_biases(record: Checkpoint) -> dict[str, Tensor]:
    """Return the record's weights with zeros for the biases that a bias=False model lacks."""
    shapes = weight_shapes(dict(record.model_settings) | {"bias": True})
    dtype = record.model_state["wte.weight"].dtype
    return {
        name: record.model_state[name] if name in record.model_state else torch.zeros(shape, dtype=dtype)
        for name, shape in shapes.items()
    }


def proved(
    record: Checkpoint,
    again: Checkpoint,
    *,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor] | None = None,
    rounded: str = "",
) -> Proof:
    """Return the proof that `again`, read back from the disk, has the `expected` tensors; `rounded` describes their
    rounding, `found` are the tensors of the file if the model uses only a part of them.

    Raises CheckpointError naming the tensors that differ.
    """
    found = again.model_state if found is None else found
    if other := differing(expected, found):
        named = "; ".join(f"{name}: {how}" for name, how in list(other.items())[:3])
        raise not_the_same(again.path or Path(), "tensors", record, named)
    ours, theirs = logits(record), logits(again)
    return Proof(
        tensors=len(expected),
        sha256=digest(found),
        logits=tuple(theirs.shape),
        difference=(ours - theirs).abs().max().item(),
        spread=ours.std().item(),
        remark="; ".join(filter(None, [rounded, _other_gelu(record, again)])),
    )


def _other_gelu(record: Checkpoint, again: Checkpoint) -> str:
    """Return a remark if the program computes the other form of GELU; the two differ by at most 0.0005."""
    ours, theirs = (GELUS[model.model_settings.get("activation", "gelu")] for model in (record, again))
    return "" if ours == theirs else f"it computes {theirs} where this model has {ours}"


def as_gpt2(record: Checkpoint, path: Path, state: dict[str, Tensor], **settings: object) -> Checkpoint:
    """Return the record with the weights and settings that another program finds at `path`."""
    return replace(record, model_state=state, model_settings=dict(record.model_settings) | settings, path=path)
