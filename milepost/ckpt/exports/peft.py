"""peft's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, only LoRA, for transformers' GPT-2 and Llama.

The format: https://huggingface.co/docs/peft/en/developer_guides/checkpoint. The base is not part of it.
"""

from pathlib import Path

from torch import Tensor

from milepost.ckpt.exports.common import HERE_ONLY, Proof, cannot_represent, elsewhere, not_the_same
from milepost.ckpt.foreign.architectures import ARCHITECTURES
from milepost.ckpt.record import Checkpoint, Json, metadata
from milepost.ckpt.tensor_listing import differing
from milepost.ckpt.tensors import digest, read_safetensors, write_safetensors
from milepost.files import new_folder, write_json

NAME = "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Peft:
    """Implements ckpt.exports.Export: a folder of two files."""

    name = NAME
    needs: tuple[str, ...] = ()
    trains = False
    run_stem = ""

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the folder that peft opens."""
        return [folder / stem]

    def how(self, path: Path) -> str:
        """Return the call of peft that puts the adapters over their base."""
        call = f"peft.PeftModel.from_pretrained(base, {str(path)!r})"
        return f"in Python: {call}, where base is transformers' model of the base"

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the folder. Raises CheckpointError for a model without LoRA, or with other adapters."""
        (path,) = self.targets(folder, stem)
        weights, config = _their_weights(record), _their_config(record)
        with new_folder(path) as hidden:
            write_safetensors(hidden / WEIGHTS, weights)
            write_json(hidden / CONFIG, config)
        return path

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Prove that peft finds the record's adapters; without a base they have no logits to compare."""
        expected, found = _their_weights(record), read_safetensors(path / WEIGHTS)
        if other := differing(expected, found):
            raise not_the_same(path, "tensors", record, ", ".join(other))
        return Proof(len(expected), digest(found), logits=(), difference=0.0, spread=0.0, remark="")


def _their_weights(record: Checkpoint) -> dict[str, Tensor]:
    """Return the adapters under peft's names: A (r, in) and B (out, r), as ours."""
    if record.model_settings.get("ttt"):
        raise cannot_represent(record, "has TTT layers, which peft does not have", HERE_ONLY)
    if not record.model_settings.get("lora"):
        raise cannot_represent(record, "has no LoRA adapters, and peft holds nothing else", elsewhere(record))
    state = record.model_state
    prefix = PREFIX + ARCHITECTURES[record.model_type].prefix
    return {f"{prefix}{name}.weight": state[name] for name in state if name.endswith((".lora_A", ".lora_B"))}


def _their_config(record: Checkpoint) -> dict[str, Json]:
    lora = record.model_settings["lora"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": metadata(record)["base"].get("source") if record.base else None,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": lora["targets"].split(","),
        "fan_in_fan_out": ARCHITECTURES[record.model_type].transposed,
        "bias": "none",
        "inference_mode": True,
    }
