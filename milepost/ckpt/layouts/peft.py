"""An adapter of peft: `adapter_config.json` and `adapter_model.safetensors`, LoRA for a GPT-2 or a Llama, read only.

It opens as our adapters without their base do: its base, a folder or file on this disk, gives the sizes, and the tokenizer unless
one lies beside the adapter. transformers' Trainer saves its progress and its optimizer there too.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.ckpt import archive, layouts
from milepost.ckpt.foreign import trainer
from milepost.ckpt.foreign.huggingface_tokenizer import tokenizer_over
from milepost.ckpt.layouts.base import Layout, raise_first
from milepost.ckpt.layouts.foreign_layout import ForeignLayout, ForeignReader
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import Checkpoint, CheckpointError, Json
from milepost.ckpt.tensors import checked_tensors, digest, read_safetensors
from milepost.lazy import Tensor
from models import MODELS, is_adapter

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = "base_model_name_or_path"
MERGE = "merge it into its base with peft (merge_and_unload, save_pretrained)"
PREFIXES = ("base_model.model.transformer.", "base_model.model.model.", "base_model.model.")
# With another value than the first of any of these, peft computes something else than our LoRA.
EXPECTED: dict[str, tuple[Json, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "modules_to_save": (None, []), "layers_to_transform": (None, []), "layer_replication": (None, []),
    "lora_bias": (False, None), "target_parameters": (None, []), "trainable_token_indices": (None, []),
    # These begin with an adapter of zero over the base as it is; PiSSA, OLoRA, CorDA, LoftQ and others change the base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None,), "use_qalora": (False, None), "use_bdlora": (None, False), "arrow_config": (None,),
    "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
}  # fmt: skip


def _weights(path: Path) -> Path:
    return path / (WEIGHTS if is_regular(path / WEIGHTS) else PICKLED)


def _claims(path: Path) -> bool:
    """Whether `path` is a folder with an adapter and no model of its own."""
    return is_regular(path / CONFIG) and is_regular(_weights(path)) and not is_regular(path / "config.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter(ForeignReader):
    """Reads the adapter; its base is opened for its metadata and its sha256."""

    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the settings of its base and of the adapter, and the training's progress."""
        values = _described(path)
        try:
            training = _training(path, values, whole=False)
        except CheckpointError as error:  # damage keeps nobody from generating; `read` raises it for a resume
            training = trainer.Training(note=str(error))
        return {**values, **_trained(path, training)[0]}

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the adapters as a record; raise CheckpointError if they do not fit their base."""
        values, (source, layout) = _described(path), _base(path)
        if verify and optimizer:
            raise_first(trainer.problems(path))
        base = layout.read(source, optimizer=False, verify=verify)
        state = _translated(path, values["model_settings"]["lora"]["rank"], base)
        values["tokenizer"], note = tokenizer_over(base.tokenizer, path, values["model_settings"]["vocab_size"])
        values["base"]["sha256"] = digest(base.model_state)
        training = _training(path, values) if optimizer else trainer.Training()
        progress, left_out = _trained(path, training)
        notes = [*base.notes, *([note] if note else []), *([f"{path}: {training.note}"] if training.note else [])]
        return Checkpoint(
            model_state=state,
            optimizer_state=training.optimizer_state,
            path=path,
            layout=self.layout,
            notes=notes,
            left_out=left_out,
            **values | progress,
        )

    def problems(self, path: Path) -> list[CheckpointError]:
        """Return why it cannot be translated, and what is damaged; safetensors have no checksums."""
        try:
            self.read(path, verify=True)
        except CheckpointError as error:
            return [error]
        return archive.verify(_weights(path)) if _weights(path).name == PICKLED else []


def _described(path: Path) -> dict[str, Any]:
    """Return the metadata that the adapter has by its base and its config."""
    config, (source, layout) = _config(path), _base(path)
    values = layout.read_metadata(source)
    settings, model_type = values["model_settings"], values["model_type"]
    if "adapters" in values.get("parts", ()):
        problem, remedy = f"its base {source} holds only adapters", f"set {BASE} in {CONFIG} to a whole model"
        raise CheckpointError(path, problem, remedy, kind="lacking")
    return {
        "model_type": model_type,
        "model_settings": settings | {"lora": _lora(path, config, model_type)},
        "tokenizer": tokenizer_over(values.get("tokenizer"), path, settings["vocab_size"])[0],
        "base": {"source": str(source), "step": values.get("step")},
        "written_by": "another program (peft)",
    }


def _training(path: Path, values: dict[str, Any], *, whole: bool = True) -> trainer.Training:
    """Return what the Trainer saved besides the adapter; raise CheckpointError if its optimizer's file is damaged."""
    from models.sizes import skeleton  # it imports torch

    if trainer.optimizer_file(path) is None:
        return trainer.Training(left_out=trainer.unread(path))
    model = skeleton(values["model_type"], values["model_settings"])  # its matrices are in the order of peft's
    theirs = {name: tuple(matrix.shape) for name, matrix in model.named_parameters() if is_adapter(name)}
    return trainer.training_of(path, theirs, theirs, lambda tensors: tensors, whole=whole)


def _trained(path: Path, training: trainer.Training) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the training, and what is not taken."""
    progress, left_out = trainer.progress(path, training)
    return {"parts": ["adapters", *(["optimizer"] if training.optimizer_state else [])], **progress}, left_out


def _config(path: Path) -> dict[str, Json]:
    """Return adapter_config.json; raise CheckpointError unless it describes a LoRA that ours computes too."""
    config = read_json(path / CONFIG)
    for name, allowed in EXPECTED.items():
        if config.get(name, allowed[0]) not in allowed:
            problem = f"{name} is {config[name]!r:.80}, expected {allowed[0]!r}: another adapter is computed"
            raise CheckpointError(path / CONFIG, problem, MERGE, kind="not understood")
    return config


def _lora(path: Path, config: dict[str, Json], model_type: str) -> dict[str, Json]:
    """Return our settings of LoRA; raise CheckpointError if the model has no such layers."""
    from models.lora import LoraSettings  # it imports torch

    targets = config.get("target_modules")
    listed = targets if isinstance(targets, list) and all(isinstance(name, str) for name in targets) else []
    names = sorted({name.rpartition(".")[2] for name in listed})  # each is a layer's own name, or its whole one
    layers = MODELS[model_type].lora_layers
    try:
        if not names or not set(names) <= set(layers):
            raise ValueError(f"target_modules is {targets!r:.80}, expected some of {', '.join(layers)}")
        if type(config["r"]) is not int or config["r"] < 1:
            raise ValueError(f"r is {config['r']!r:.80}, expected a whole number of at least 1")
        if type(config["lora_alpha"]) not in (int, float):
            raise ValueError(f"lora_alpha is {config['lora_alpha']!r:.80}, expected a number above 0")
        lora = LoraSettings(config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0, ",".join(names))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"does not describe a LoRA of these layers ({error})"
        raise CheckpointError(path / CONFIG, problem, MERGE, kind="not understood") from error
    return asdict(lora)


def _base(path: Path) -> tuple[Path, Layout]:
    """Return the base that adapter_config.json names, if it is a checkpoint on this disk, and its layout. No adapter is a base."""
    name = read_json(path / CONFIG).get(BASE)
    named = Path(os.path.expanduser(name)) if isinstance(name, str) and name else None
    for place in (named, path.parent / named, path / named) if named else ():
        layout = layouts.layout_of(place) if os.path.exists(place) else None
        if layout is not None and layout is not LAYOUT:
            return place.resolve(), layout
    problem = f"its base {name!r:.200} is not a checkpoint on this disk, and an adapter alone has no sizes"
    remedy = f"download the base, and set {BASE} in {CONFIG} to its folder"
    raise CheckpointError(path, problem, remedy, kind="lacking")


def _translated(path: Path, rank: int, base: Checkpoint) -> dict[str, Tensor]:
    """Return the matrices under our names, A (r, in) and B (out, r); raise CheckpointError unless they are all there."""
    file = _weights(path)
    theirs = read_safetensors(file) if file.name == WEIGHTS else archive.load(file)[0]
    found = {_our_name(name): tensor for name, tensor in checked_tensors(theirs, str(file)).items()}
    targets = set(_lora(path, _config(path), base.model_type)["targets"].split(","))
    linear = {
        name.removesuffix(".weight"): tensor.shape for name, tensor in base.model_state.items() if tensor.dim() == 2
    }
    layers = {name: shape for name, shape in linear.items() if name.rpartition(".")[2] in targets}
    expected = {f"{name}.lora_A": (rank, shape[1]) for name, shape in layers.items()}
    expected |= {f"{name}.lora_B": (shape[0], rank) for name, shape in layers.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if besides := sorted(name for name in found if not is_adapter(name)):
        problem = (
            f"holds {besides[0]:.80} {shapes[besides[0]]} besides matrices of LoRA, as of an embedding with more tokens"
        )
        raise CheckpointError(file, problem, MERGE, kind="not understood")
    if lacking := sorted(expected.keys() - shapes) if shapes.items() < expected.items() else []:
        problem = f"adapts only some of the layers of a name: it has nothing for {lacking[0].rpartition('.')[0]:.80}"
        raise CheckpointError(file, problem, MERGE, kind="not understood")
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
        problem = f"does not fit its base {base.path}: {wrong[0]:.80} is {shapes.get(wrong[0])}, expected {expected.get(wrong[0])}"
        raise CheckpointError(file, problem, f"correct {BASE} in {CONFIG}", kind="refused")
    return {name: found[name] for name in sorted(expected)}


def _our_name(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.removesuffix(".weight").removesuffix(".default")


LAYOUT = ForeignLayout(
    name="peft",
    members=(CONFIG, WEIGHTS, PICKLED, *trainer.OPTIMIZERS),
    others=trainer.OTHERS,
    optimizers=trainer.OPTIMIZERS,
    suffixes=(),
    claims=_claims,
    reader=Adapter(layout="peft", checksums=None),
)
