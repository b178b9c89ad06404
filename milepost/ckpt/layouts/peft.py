"""An adapter of peft: `adapter_config.json` and `adapter_model.safetensors`, LoRA for a GPT-2 or a Llama, read only.

It opens as our adapters without their base do: its base, a folder or file on this disk, gives the sizes and the tokenizer.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from milepost.ckpt import archive, layouts
from milepost.ckpt.layouts.base import Layout
from milepost.ckpt.layouts.foreign_layout import ForeignLayout, ForeignReader
from milepost.ckpt.manifest import is_regular, read_json
from milepost.ckpt.record import Checkpoint, CheckpointError, Json
from milepost.ckpt.tensors import checked_tensors, digest, read_safetensors
from milepost.lazy import Tensor
from models import MODELS

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = "base_model_name_or_path"
MERGE = "merge it into its base with peft (merge_and_unload, save_pretrained)"
PREFIXES = ("base_model.model.transformer.", "base_model.model.model.", "base_model.model.")
# With another value than the first of any of these, peft computes something else than our LoRA.
EXPECTED: dict[str, tuple[Json, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "modules_to_save": (None, []), "layers_to_transform": (None, []), "layer_replication": (None, []),
    "lora_bias": (False, None), "target_parameters": (None, []), "trainable_token_indices": (None, []),
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
        """Return the metadata of its base, and the settings of the adapter."""
        config, (source, layout) = _config(path), _base(path)
        values = layout.read_metadata(source)
        return {
            "model_type": values["model_type"],
            "model_settings": values["model_settings"] | {"lora": _lora(path, config, values["model_type"])},
            "tokenizer": values.get("tokenizer"),
            "base": {"source": str(source), "step": values.get("step")},
            "parts": ["adapters"],
            "written_by": f"another program ({self.layout})",
            "step": 0,
        }

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the adapters as a record; raise CheckpointError if they do not fit their base."""
        values, (source, layout) = self.read_metadata(path), _base(path)
        base = layout.read(source, optimizer=False, verify=verify)
        state = _translated(path, values["model_settings"]["lora"]["rank"], base)
        values["tokenizer"] = base.tokenizer
        values["base"]["sha256"] = digest(base.model_state)
        return Checkpoint(model_state=state, path=path, layout=self.layout, notes=list(base.notes), **values)

    def problems(self, path: Path) -> list[CheckpointError]:
        """Return why it cannot be translated; safetensors have no checksums."""
        try:
            self.read(path)
        except CheckpointError as error:
            return [error]
        return archive.verify(_weights(path)) if _weights(path).name == PICKLED else []


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
    names = sorted(targets) if isinstance(targets, list) and all(isinstance(name, str) for name in targets) else []
    layers = MODELS[model_type].lora_layers
    try:
        if not names or not set(names) <= set(layers):
            raise ValueError(f"target_modules is {targets!r:.80}, expected some of {', '.join(layers)}")
        if type(config["r"]) is not int or config["r"] < 1:
            raise ValueError(f"r is {config['r']!r:.80}, expected a whole number of at least 1")
        lora = LoraSettings(config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0, ",".join(names))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"does not describe a LoRA of these layers ({error})"
        raise CheckpointError(path / CONFIG, problem, MERGE, kind="not understood") from error
    return asdict(lora)


def _base(path: Path) -> tuple[Path, Layout]:
    """Return the base that adapter_config.json names, if it is a checkpoint on this disk, and its layout."""
    name = read_json(path / CONFIG).get(BASE)
    named = Path(name).expanduser() if isinstance(name, str) and name else None
    for place in (named, path.parent / named, path / named) if named else ():
        if place.exists() and (layout := layouts.layout_of(place)):
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
    name="peft", members=(CONFIG, WEIGHTS, PICKLED), suffixes=(), claims=_claims, reader=Adapter(layout="peft", checksums=None),
)  # fmt: skip
