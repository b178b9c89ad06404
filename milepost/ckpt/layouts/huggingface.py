"""A folder as Hugging Face transformers saves a GPT-2: `config.json`, `*.safetensors`, tokenizer files.

The pretrained weights of GPT-2 come in this form, in safetensors or in torch archives. Transformers ignores what is
written here besides: `optimizer.safetensors`, and the manifest `milepost.json`, from which a run resumes bit-exactly. A
bigram model has the same files, but transformers has no such model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from milepost.ckpt import archive
from milepost.ckpt.foreign import trainer
from milepost.ckpt.foreign.huggingface_tokenizer import GENERATION, read_tokenizer
from milepost.ckpt.foreign.importing import imported
from milepost.ckpt.foreign.keys import epoch_of, step_of, validation_loss_of
from milepost.ckpt.foreign.other_values import plain_values
from milepost.ckpt.layouts.base import raise_first
from milepost.ckpt.layouts.manifest_layout import ManifestLayout, Safetensors
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError, Json
from milepost.ckpt.restore import build_tokenizer, tokenizer_files
from milepost.ckpt.tensors import same_tensor
from milepost.ckpt.weight_files import PICKLED, SAFETENSORS, checksum_problems, mapped, passed_over, read_weights

CONFIG, WEIGHTS = "config.json", SAFETENSORS.whole
OPTIMIZER, MANIFEST = "optimizer.safetensors", "milepost.json"
TRAINER = "trainer_state.json"  # of transformers' Trainer
ADAPTER_CONFIG = "adapter_config.json"  # of peft
WRITER = "another program (transformers)"
OTHER_WEIGHTS = (
    "consolidated.safetensors"  # of a folder whose config.json names a model_type too, and is not transformers'
)

# transformers stores these four as Conv1D, whose weight is (in, out): the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Causal masks that old versions stored beside the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu": "relu"}  # theirs -> ours
SIZES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# What our GPT-2 computes; with another value of any of these it is another model.
EXPECTED: dict[str, tuple[Json, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _claims(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model_type, as transformers' do,
    and no other weights.
    """
    if not is_regular(path / CONFIG) or is_regular(path / OTHER_WEIGHTS):
        return False
    try:
        return "model_type" in read_json(path / CONFIG)
    except CheckpointError:
        return any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def _to_disk(record: Checkpoint) -> Mapping[str, Tensor]:
    """Return the weights for transformers; raise CheckpointError naming what its GPT-2 cannot hold."""
    _refuse_adapters(record)
    return _their_weights(record) if _is_known(record.model_type) else record.model_state


def _is_known(model_type: str) -> bool:
    """Return whether transformers has the model."""
    return model_type in models.with_trait("transformers")


def _refuse_adapters(record: Checkpoint) -> None:
    where, problem = record.path or "checkpoint", "which have no place in transformers' GPT-2"
    if record.model_settings.get("ttt"):
        raise CheckpointError(where, f"has TTT layers, {problem}", "keep it in another layout", kind="refused")
    if record.model_settings.get("lora"):
        remedy = "merge them first (scripts/merge_adapters.py), or keep them separate with CONVERT_TO=peft"
        raise CheckpointError(where, f"has LoRA adapters, {problem}", remedy, kind="refused")


def _extra(record: Checkpoint) -> dict[str, Json]:
    config = _their_config(record) if record.model_type == "gpt2" else _own_config(record)
    tokenizer = tokenizer_files(record)
    ends = _ends(record)
    return {CONFIG: config | ends, GENERATION: {"_from_model_config": True} | ends, **tokenizer}


def _own_config(record: Checkpoint) -> dict[str, Json]:
    return {"model_type": f"milepost-{record.model_type}", **record.model_settings}


def _their_config(record: Checkpoint) -> dict[str, Json]:
    ours = record.model_settings
    sizes = {theirs: ours[name] for name, theirs in SIZES.items()}
    dropout = {f"{part}_pdrop": ours.get("dropout", 0.0) for part in ("resid", "embd", "attn")}
    theirs = next(theirs for theirs, name in ACTIVATIONS.items() if name == ours.get("activation", "gelu"))
    return {
        "architectures": [models.MODELS[record.model_type].transformers],
        "model_type": "gpt2",
        **sizes,
        "n_ctx": ours["block_size"],
        **dropout,
        "activation_function": theirs,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": ours.get("tied", True),
        "dtype": str(record.model_state["wte.weight"].dtype).removeprefix("torch."),
    }


def _ends(record: Checkpoint) -> dict[str, Json]:
    """Return the ids of the tokens that end a text, null if the tokenizer has none: transformers would take GPT-2's 50256."""
    ids = list(build_tokenizer(record).stop_ids) if record.tokenizer else []
    return {"bos_token_id": ids[0] if ids else None, "eos_token_id": ids if ids[1:] else ids[0] if ids else None}


def _their_weights(record: Checkpoint) -> dict[str, Tensor]:
    """Return the weights under transformers' names and in its orientation,
    with zeros for biases that the model lacks.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in record.model_state.items():
        if name == "lm_head.bias":
            if tensor.any():
                problem = f"lm_head.bias {tuple(tensor.shape)}: transformers' GPT-2 has none"
                remedy = "keep it in another layout"
                raise CheckpointError(record.path or "checkpoint", problem, remedy, kind="refused")
            continue
        theirs = name if name.startswith("lm_head.") else f"transformer.{name}"
        weights[theirs] = tensor.t() if name.endswith(CONV1D) else tensor
        bias = theirs.removesuffix("weight") + "bias"
        has_bias = not theirs.endswith((".wte.weight", ".wpe.weight", "lm_head.weight"))
        if has_bias and not record.model_settings.get("bias", True):
            weights[bias] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def _load_weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a folder of ours, under our names and in our orientation."""
    values = manifest["metadata"]
    if values["model_type"] != "gpt2":
        return read_weights(path, lambda weights: weights)
    return read_weights(path, lambda weights: _translate(path, weights, values["model_settings"]))


@dataclass(frozen=True)
class Transformers:
    """Reads a folder that transformers saved: no manifest, no checksums but those of torch archives.

    Its Trainer records step and epoch in a file of its own, and the optimizer in another; otherwise the step is 0.
    """

    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the model's shape and the training's progress."""
        settings = _settings(path)
        try:
            training = _training(path, settings, whole=False)
        except CheckpointError as error:  # damage keeps nobody from generating; `read` raises it for a resume
            training = trainer.Training(note=str(error))
        progress, _ = _progress(path, training)
        return {
            "model_type": "gpt2",
            "model_settings": settings,
            "parts": ["model", *(["optimizer"] if training.optimizer_state else [])],
            "written_by": WRITER,
            **progress,
        }

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record, its weights under our names and in our orientation."""
        settings = _settings(path)
        if verify:
            raise_first([*checksum_problems(path), *(_training_problems(path) if optimizer else [])])
        _check_head(path, settings)
        tokenizer, note = read_tokenizer(path, settings["vocab_size"])
        training = _training(path, settings) if optimizer else trainer.Training()
        progress, left_out = _progress(path, training)
        adapter = _adapter_beside(path)
        notes = [f"{path}: {training.note}"] if training.note else []
        notes += [beside] if (beside := passed_over(path)) else []
        return Checkpoint(
            model_state=read_weights(path, lambda weights: _translate(path, weights, settings)),
            optimizer_state=training.optimizer_state,
            model_type="gpt2",
            model_settings=settings,
            tokenizer=tokenizer,
            path=path,
            layout="huggingface",
            owned=True,
            notes=notes
            + ([note] if note and tokenizer else [])
            + ([f"{path}: {adapter} is left out"] if adapter else []),
            left_out=left_out + ([adapter] if adapter else []),
            parts=["model", *(["optimizer"] if training.optimizer_state else [])],
            written_by=WRITER,
            **progress,
        )

    def problems(self, path: Path) -> list[CheckpointError]:
        """Return what is wrong with checksums, where there are any, and structure."""
        try:
            settings = _settings(path)
            if problems := [*checksum_problems(path), *_training_problems(path)]:
                return problems
            _check_head(path, settings)
            read_weights(path, lambda weights: _translate(path, weights, settings))
        except CheckpointError as error:
            return [error]
        return []


def _training(path: Path, settings: dict[str, Json], *, whole: bool = True) -> trainer.Training:
    """Return what the Trainer saved besides the model; raise CheckpointError if its optimizer's file is damaged."""
    if not any(is_regular(path / name) for name in trainer.OPTIMIZERS):
        return trainer.Training(left_out=trainer.unread(path))
    state = read_json(path / TRAINER) if is_regular(path / TRAINER) else {}
    return trainer.training_of(
        path,
        state,
        mapped(path),
        lambda tensors: _contiguous(_translate(path, tensors, settings), whole=whole),
        step=step_of(state, where=str(path / TRAINER)),
        tied=settings["tied"],
        whole=whole,
    )


def _contiguous(tensors: dict[str, Tensor], *, whole: bool) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()} if whole else tensors


def _training_problems(path: Path) -> list[CheckpointError]:
    files = [path / name for name in trainer.OPTIMIZERS if is_regular(path / name)]
    return [problem for file in files for problem in archive.verify(file) if problem.kind == "damaged"]


def _progress(path: Path, training: trainer.Training) -> tuple[dict[str, Json], list[str]]:
    """Return step, epoch and settings by the files of transformers' Trainer, the other values of the folder,
    and what is not taken.
    """
    state = read_json(path / TRAINER) if is_regular(path / TRAINER) else {}
    configs = [(name, read_json(path / name)) for name in (CONFIG, GENERATION) if is_regular(path / name)]
    step, history = step_of(state, where=str(path / TRAINER)), state.get("log_history")
    entries = history if isinstance(history, list) else []
    evaluated = [
        entry for entry in entries if isinstance(entry, dict) and entry.get("step") == step and "eval_loss" in entry
    ]
    scheduler = [(trainer.SCHEDULER, training.scheduler)] if training.scheduler else []
    kept, left_out = plain_values([*state.items(), *configs, *scheduler])
    return {
        "step": step,
        "epoch": epoch_of(state, where=str(path / TRAINER)),
        "validation_loss": validation_loss_of({"val_loss": evaluated[-1]["eval_loss"]} if evaluated else {}),
        "hyperparameters": dict(training.hyperparameters),
        "schedule": dict(training.schedule),
        "imported": imported(kept, rate=training.rate, unused=training.note),
    }, [*left_out, *training.left_out]


def _adapter_beside(path: Path) -> str | None:
    """Return the words for an adapter of peft in the folder, with which transformers would compute;
    None if there is none.
    """
    if not is_regular(path / ADAPTER_CONFIG):
        return None
    return f"the adapter in it ({ADAPTER_CONFIG}), with which transformers would compute,"


def _settings(path: Path) -> dict[str, Json]:
    """Return our settings by config.json; raise CheckpointError unless it describes a GPT-2 as ours computes it."""
    config = read_json(path / CONFIG)
    for name, allowed in EXPECTED.items():
        if config.get(name, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise _not_ours(path, name, config[name], f"{expected}: this is not a GPT-2 that milepost computes")
    for field in SIZES.values():
        if not isinstance(config.get(field), int) or isinstance(config.get(field), bool) or config[field] < 1:
            raise _not_ours(path, field, config.get(field), "a positive whole number")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise _not_ours(path, "n_inner", config["n_inner"], "null or 4 * n_embd")
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise _not_ours(path, "tie_word_embeddings", tied, "true or false")
    dropout = config.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise _not_ours(path, "resid_pdrop", dropout, "a number from 0 to below 1")
    activation = ACTIVATIONS[config.get("activation_function", "gelu_new")]
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    return sizes | {"dropout": float(dropout), "bias": True, "activation": activation, "tied": tied}


def _not_ours(path: Path, name: str, value: Json, expected: str) -> CheckpointError:
    return CheckpointError(path / CONFIG, f"{name} is {value!r:.80}, expected {expected}", kind="not understood")


def _check_head(path: Path, settings: dict[str, Json]) -> None:
    """Raise CheckpointError if the config ties the head to the embedding, but the weights differ."""
    weights = mapped(path)
    head = weights.get("lm_head.weight")
    embedding = next((weights[name] for name in ("wte.weight", "transformer.wte.weight") if name in weights), head)
    if settings["tied"] and head is not None and embedding is not None and not same_tensor(head, embedding):
        problem = f"lm_head.weight differs from wte.weight, but {CONFIG} ties them"
        raise CheckpointError(path, problem, "set tie_word_embeddings to false there", kind="refused")


def _translate(path: Path, weights: dict[str, Tensor], settings: dict[str, Json]) -> dict[str, Tensor]:
    """Return views of the parameters under our names and in our orientation,
    without what is not a parameter of ours.
    """
    model_state: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        name = theirs.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith(BUFFERS):
            continue
        if not tensor.is_floating_point():
            problem = f"{theirs!r:.80} is {tensor.dtype}, expected floating point weights"
            raise CheckpointError(path, problem, kind="not understood")
        if name in model_state:
            problem = f"{name!r:.80} is there twice, with and without `transformer.`"
            raise CheckpointError(path, problem, kind="not understood")
        model_state[name] = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
    if not settings.get("bias", True):
        model_state = {name: tensor for name, tensor in model_state.items() if not name.endswith(".bias")}
    head = weights.get("lm_head.weight")
    if not settings.get("tied", True) and head is not None:  # transformers' has no bias
        model_state |= {"lm_head.weight": head, "lm_head.bias": torch.zeros(head.shape[:1], dtype=head.dtype)}
    return model_state


LAYOUT = ManifestLayout(
    name="huggingface",
    members=(
        WEIGHTS,
        CONFIG,
        GENERATION,
        "tokenizer.json",
        "tokenizer_config.json",
        OPTIMIZER,
        MANIFEST,
        SAFETENSORS.index,
        SAFETENSORS.shards,
        PICKLED.whole,
        PICKLED.shards,
        PICKLED.index,
        *trainer.OPTIMIZERS,
    ),
    others=(TRAINER, *trainer.OTHERS),
    manifest=MANIFEST,
    weights=Safetensors(WEIGHTS),
    optimizer=Safetensors(OPTIMIZER),
    foreign_optimizers=trainer.OPTIMIZERS,
    extra=_extra,
    head=lambda record: {"format": "milepost"},
    remedy=f"{EARLIER}, or remove {MANIFEST} to open the folder as transformers would",
    claims=_claims,
    to_disk=_to_disk,
    load_weights=_load_weights,
    foreign=Transformers(),
)
