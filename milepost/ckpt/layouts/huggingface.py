"""A folder as Hugging Face transformers saves a GPT-2 or a Llama: `config.json`, `*.safetensors`, tokenizer files.

The pretrained weights of GPT-2 come in this form, in safetensors or in torch archives. Transformers ignores what is
written here besides: `optimizer.safetensors`, and the manifest `milepost.json`, from which a run resumes bit-exactly. A
bigram model has the same files, but transformers has no such model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.ckpt import foreign
from milepost.ckpt.foreign import trainer
from milepost.ckpt.foreign.architecture import CONFIG, Architecture, not_ours
from milepost.ckpt.foreign.architectures import ARCHITECTURES
from milepost.ckpt.foreign.huggingface_tokenizer import GENERATION, read_tokenizer
from milepost.ckpt.foreign.weights import trained
from milepost.ckpt.layouts.base import raise_first
from milepost.ckpt.layouts.manifest_layout import ManifestLayout, Safetensors
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError, Json
from milepost.ckpt.saved_tokenizer import build_tokenizer, tokenizer_files
from milepost.ckpt.tensors import same_tensor
from milepost.ckpt.weight_files import (
    PICKLED,
    SAFETENSORS,
    checksum_problems,
    has_weights,
    mapped,
    passed_over,
    read_weights,
)
from milepost.lazy import Tensor

WEIGHTS = SAFETENSORS.whole
OPTIMIZER, MANIFEST = "optimizer.safetensors", "milepost.json"
CONFIGS = (CONFIG, GENERATION)
ADAPTER_CONFIG = "adapter_config.json"  # of peft
WRITER = "another program (transformers)"
OTHER_WEIGHTS = (
    "consolidated.safetensors"  # of a folder whose config.json names a model_type too, and is not transformers'
)


def _claims(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model_type, as transformers' do,
    and no other weights than its own: Mistral's folders hold both.
    """
    if not is_regular(path / CONFIG) or (is_regular(path / OTHER_WEIGHTS) and not has_weights(path)):
        return False
    try:
        return "model_type" in read_json(path / CONFIG)
    except CheckpointError:
        return any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def _to_disk(record: Checkpoint) -> Mapping[str, Tensor]:
    """Return the weights for transformers; raise CheckpointError naming what its model cannot hold."""
    _refuse_adapters(record)
    known = ARCHITECTURES.get(record.model_type)
    return known.theirs(record) if known else record.model_state


def _refuse_adapters(record: Checkpoint) -> None:
    where, problem = record.path or "checkpoint", "which have no place in transformers' model"
    if record.model_settings.get("ttt"):
        raise CheckpointError(where, f"has TTT layers, {problem}", "keep it in another layout", kind="refused")
    if record.model_settings.get("lora"):
        remedy = "merge them first (scripts/merge_adapters.py), or keep them separate with CONVERT_TO=peft"
        raise CheckpointError(where, f"has LoRA adapters, {problem}", remedy, kind="refused")


def _extra(record: Checkpoint) -> dict[str, Json]:
    known = ARCHITECTURES.get(record.model_type)
    config = known.config(record) if known else _own_config(record)
    tokenizer = tokenizer_files(record)
    ends = _ends(record)
    return {CONFIG: config | ends, GENERATION: {"_from_model_config": True} | ends, **tokenizer}


def _own_config(record: Checkpoint) -> dict[str, Json]:
    return {"model_type": f"milepost-{record.model_type}", **record.model_settings}


def _ends(record: Checkpoint) -> dict[str, Json]:
    """Return the ids of the tokens that begin and end a text, null if the tokenizer has none: transformers would take GPT-2's
    50256. A tokenizer with an end alone begins texts with it.
    """
    tokenizer = build_tokenizer(record) if record.tokenizer else None
    ids = list(tokenizer.stop_ids) if tokenizer else []
    begin = tokenizer.begin_of_text if tokenizer else None
    return {
        "bos_token_id": begin if begin is not None else ids[0] if ids else None,
        "eos_token_id": ids if ids[1:] else ids[0] if ids else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def _load_weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a folder of ours, under our names and in our orientation."""
    values = manifest["metadata"]
    known = ARCHITECTURES.get(values["model_type"])
    return read_weights(path, lambda weights: known.ours(path, weights, values["model_settings"]) if known else weights)


@dataclass(frozen=True)
class Transformers:
    """Reads a folder that transformers saved: no manifest, no checksums but those of torch archives.

    Its Trainer records step and epoch in a file of its own, and the optimizer in another; otherwise the step is 0.
    """

    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the model's shape and the training's progress."""
        model, settings = _described(path)
        try:
            training = _training(path, model, settings, whole=False)
        except CheckpointError as error:  # damage keeps nobody from generating; `read` raises it for a resume
            training = trainer.Training(note=str(error))
        progress, _ = trainer.progress(path, training, CONFIGS)
        return {
            "model_type": model.model_type,
            "model_settings": settings,
            "parts": ["model", *(["optimizer"] if training.optimizer_state else [])],
            "written_by": WRITER,
            **progress,
        }

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record, its weights under our names and in our orientation."""
        model, settings = _described(path)
        if verify:
            raise_first([*checksum_problems(path), *(trainer.problems(path) if optimizer else [])])
        _check_head(path, model, settings)
        tokenizer, note = read_tokenizer(path, settings["vocab_size"])
        training = _training(path, model, settings) if optimizer else trainer.Training()
        progress, left_out = trainer.progress(path, training, CONFIGS)
        adapter = _adapter_beside(path)
        notes = [f"{path}: {training.note}"] if training.note else []
        notes += [beside] if (beside := passed_over(path)) else []
        return Checkpoint(
            model_state=read_weights(path, lambda weights: model.ours(path, weights, settings)),
            optimizer_state=training.optimizer_state,
            model_type=model.model_type,
            model_settings=settings,
            tokenizer=tokenizer,
            path=path,
            layout="huggingface",
            owned=True,
            notes=notes + ([note] if note else []) + ([f"{path}: {adapter} is left out"] if adapter else []),
            left_out=left_out + ([adapter] if adapter else []),
            parts=["model", *(["optimizer"] if training.optimizer_state else [])],
            written_by=WRITER,
            **progress,
        )

    def problems(self, path: Path) -> list[CheckpointError]:
        """Return what is wrong with checksums, where there are any, and structure."""
        try:
            model, settings = _described(path)
            if problems := [*checksum_problems(path), *trainer.problems(path)]:
                return problems
            _check_head(path, model, settings)
            read_weights(path, lambda weights: model.ours(path, weights, settings))
        except CheckpointError as error:
            return [error]
        return []


def _described(path: Path) -> tuple[Architecture, dict[str, Json]]:
    """Return the model that config.json describes, and our settings of it; raise CheckpointError unless ours computes it."""
    config = read_json(path / CONFIG)
    kinds = {kind: each for each in ARCHITECTURES.values() for kind in each.kinds}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise not_ours(path, "model_type", kind, f"one of {', '.join(kinds)}: milepost computes no other")
    return kinds[kind], kinds[kind].settings(path, config)


def _training(path: Path, model: Architecture, settings: dict[str, Json], *, whole: bool = True) -> trainer.Training:
    """Return what the Trainer saved besides the model; raise CheckpointError if its optimizer's file is damaged."""
    if trainer.optimizer_file(path) is None:
        return trainer.Training(left_out=trainer.unread(path))
    weights = mapped(path)
    theirs = trained(dict(sorted(weights.items())), tied=settings["tied"])
    return trainer.training_of(
        path,
        {name: theirs[name] for name in model.order(theirs)},
        foreign.shapes(model.ours(path, weights, settings)),
        lambda tensors: _contiguous(model.ours(path, tensors, settings), whole=whole),
        whole=whole,
    )


def _contiguous(tensors: dict[str, Tensor], *, whole: bool) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()} if whole else tensors


def _adapter_beside(path: Path) -> str | None:
    """Return the words for an adapter of peft in the folder, with which transformers would compute;
    None if there is none.
    """
    if not is_regular(path / ADAPTER_CONFIG):
        return None
    return f"the adapter in it ({ADAPTER_CONFIG}), with which transformers would compute,"


def _check_head(path: Path, model: Architecture, settings: dict[str, Json]) -> None:
    """Raise CheckpointError if the config ties the head to the embedding, but the weights differ."""
    weights = mapped(path)
    head = weights.get("lm_head.weight")
    name = next((name for name in model.embedding if name in weights), None)
    if settings["tied"] and head is not None and name is not None and not same_tensor(head, weights[name]):
        problem = f"lm_head.weight differs from {model.embedding[0]}, but {CONFIG} ties them"
        raise CheckpointError(path, problem, "set tie_word_embeddings to false there", kind="refused")


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
    others=(*trainer.OTHERS, OTHER_WEIGHTS),
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
