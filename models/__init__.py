"""The registry of models, and how to build one from plain values such as a checkpoint's JSON.

A model is one file and one `register` call here. The file holds the class, a `models.model.Model`; the call holds what
the settings need before torch is imported, so that a mistake in them is reported at once: this file imports no torch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from models.adapters import ADAPTERS, adapter_counts, adapter_kind, draw_adapters, freeze_base, is_adapter

if TYPE_CHECKING:
    from torch import nn

    from models.model import Model

__all__ = [
    "ADAPTERS", "FINE_TUNING", "MODELS", "Entry", "adapter_counts", "adapter_kind", "build", "draw_adapters", "fields_of", "freeze_base",
    "is_adapter", "load", "lora_layers", "parameter_count", "plain", "register", "settings_from", "trained_count", "training_bytes",
    "with_trait",
]  # fmt: skip

# Variables whose default every model declares: no other model's suits it.
OF_EVERY_MODEL: Final = (
    "block_size", "training_steps", "batch_size", "learning_rate", "warmup_steps", "lr_schedule", "optimizer",
)  # fmt: skip

# Of their variables where the weights are those of a pretrained model, which brings its own sizes.
FINE_TUNING: Final[Mapping[str, Any]] = {
    "n_layer": None, "n_head": None, "n_embd": None, "block_size": 256, "training_steps": 2000, "batch_size": 4,
    "learning_rate": 5e-5, "warmup_steps": 100, "lr_schedule": "cosine", "optimizer": "adamw",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a model without torch."""

    model: str | type[Model]  # the class, or "module:Class", which is imported at its first use
    defaults: Mapping[str, Any]  # of its variables, in lower case
    pretrained: Mapping[str, Any] | None = None  # the same with GPT2_MODEL_NAME; None: it has no pretrained weights
    adapters: tuple[str, ...] = ()  # of ADAPTERS, those that its settings take
    lora_layers: tuple[str, ...] = ()  # the names of its linear layers that LoRA may adapt, all by default
    hidden_matrices: bool = False  # whether it has matrices for Muon to orthogonalize
    adamw_learning_rate: float | None = None  # at N_EMBD=128, where its default optimizer is Muon and AdamW is used
    transformers: str | None = None  # the architecture that Hugging Face transformers opens it as


MODELS: Final[dict[str, Entry]] = {}


def register(name: str, model: str | type[Model], *, defaults: Mapping[str, Any], **traits: Any) -> None:
    """Add a model: MODEL_TYPE takes its name from then on. `traits` are the other fields of Entry.

    Raises ValueError for a name that is taken or not in lower case, and for a default that is not declared.
    """
    if name in MODELS or not re.fullmatch("[a-z][a-z0-9_-]*", name):
        raise ValueError(f"model {name!r}: expected a new name of lower-case letters, digits, _ and -.")
    if lacks := [variable for variable in OF_EVERY_MODEL if variable not in defaults]:
        raise ValueError(f"model {name!r}: its defaults do not declare {', '.join(lacks)}.")
    entry = Entry(model=model, defaults=defaults, **traits)
    targets = {"lora_targets": ",".join(entry.lora_layers)} if entry.lora_layers else {}
    MODELS[name] = replace(entry, defaults={**defaults, **targets})


# fmt: off
register("bigram", "models.bigram:Bigram",
         defaults={"block_size": 64, "training_steps": 2000, "batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 0,
                   "lr_schedule": "cosine", "optimizer": "adamw"})
register("gpt2", "models.gpt2:GPT2",
         defaults={"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "dropout": 0.0,
                   "training_steps": 1000, "batch_size": 12, "learning_rate": 1e-2, "warmup_steps": 100,
                   "lr_schedule": "linear", "optimizer": "muon"},
         pretrained={**FINE_TUNING, "dropout": 0.1},
         adapters=("lora", "ttt"), lora_layers=("c_attn", "c_proj", "c_fc"), hidden_matrices=True,
         adamw_learning_rate=3e-3, transformers="GPT2LMHeadModel")
register("llama", "models.llama:Llama",
         defaults={"n_layer": 4, "n_head": 4, "n_embd": 128, "n_kv_head": None, "n_inner": None, "block_size": 128,
                   "dropout": 0.0, "training_steps": 1000, "batch_size": 12, "learning_rate": 1e-2,
                   "warmup_steps": 100, "lr_schedule": "linear", "optimizer": "muon"},
         adapters=("lora",), hidden_matrices=True, adamw_learning_rate=3e-3, transformers="LlamaForCausalLM",
         lora_layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
# fmt: on


def with_trait(trait: str, value: object = None) -> list[str]:
    """Return the names of the models whose Entry has the trait, or has `value` among its values."""
    held = {name: getattr(entry, trait) for name, entry in MODELS.items()}
    return [name for name, own in held.items() if (value in own if value is not None else own)]


def lora_layers() -> tuple[str, ...]:
    """Return the names of the layers that LoRA may adapt, of all models."""
    return tuple(dict.fromkeys(name for entry in MODELS.values() for name in entry.lora_layers))


def load(model_type: str) -> type[Model]:
    """Return the class of a registered model.

    Raises ValueError for an unknown name, and naming the traits that a class does not declare.
    """
    from models.model import undeclared

    if model_type not in MODELS:
        raise ValueError(f"model_type={model_type!r}: expected one of {', '.join(MODELS)}.")
    found = MODELS[model_type].model
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(importlib.import_module(module), name)
    if problem := undeclared(found):
        raise ValueError(f"model {model_type!r}: {problem}.")
    return found


def build(model_type: str, settings: Mapping[str, object]) -> Model:
    """Return a freshly initialised float32 model, drawn from torch's global generator.

    Raises ValueError, naming field and value, for an unknown model, for fields that are unknown, missing or of
    the wrong type, and for sizes that make no model.
    """
    return load(model_type)(settings_from(model_type, settings))


def settings_from(model_type: str, values: Mapping[str, object]) -> Any:
    """Return a model's settings from plain values, checked as build() says; nothing is allocated yet."""
    settings = _checked(load(model_type).settings_type, values, of=f"the {model_type} model")
    _check_targets(model_type, settings)
    return settings


def fields_of(model_type: str) -> tuple[str, ...]:
    """Return the names of a model's settings."""
    return tuple(field.name for field in fields(load(model_type).settings_type))


def plain(settings: Any) -> dict[str, Any]:
    """Return the settings as JSON values, without adapters that are not there:
    a version that knows no adapters reads them too.
    """
    return {name: value for name, value in asdict(settings).items() if value is not None}


def _checked(kind: Any, values: Mapping[str, object], *, of: str) -> Any:
    """Return the settings of dataclass `kind` from plain values; raises ValueError."""
    known, kinds = {f.name: f for f in fields(kind)}, get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name}={value!r:.80}: {of} has {', '.join(known)} and no such setting.")
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in values]:
        raise ValueError(f"{', '.join(missing)}: missing from the settings of {of}.")
    return kind(**{name: _typed(name, value, kinds[name]) for name, value in values.items()})


def _check_targets(model_type: str, settings: Any) -> None:
    lora, layers = getattr(settings, "lora", None), MODELS[model_type].lora_layers
    if lora is not None and (unknown := [name for name in lora.targets.split(",") if name not in layers]):
        raise ValueError(f"targets={lora.targets!r:.80}: {unknown[0]!r:.40} is not one of {', '.join(layers)}.")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return the value if it is of its kind (int, float, bool, str, or settings within settings);
    whole numbers must be at least 1.
    """
    inner = next(filter(is_dataclass, get_args(kind)), None)
    if inner is not None and value is None:
        return None
    if inner is not None and isinstance(value, Mapping):
        return _checked(inner, value, of=name)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # isinstance would take True for a size of 1
        expected = "a mapping" if inner is not None else kind.__name__
        raise ValueError(f"{name}={value!r:.80}: expected {expected}, got {type(value).__name__}.")
    if kind is int and value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1.")
    return value


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters; a tied tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_count(model: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def training_bytes(model: Model, batch_size: int, *, bytes_per_value: int, processes: int = 1) -> int:
    """Return about how much memory a training step of this model needs, in bytes: a basis for a warning, right within
    1.5x.

    Weights take 4 bytes each, and those that are trained 12 more for the gradient and AdamW's two moments, sharded over
    `processes`. bytes_per_value is 4 for float32 activations and 2 under autocast.
    """
    activations = model.activation_bytes(batch_size, bytes_per_value=bytes_per_value)
    return (4 * parameter_count(model) + 12 * trained_count(model)) // processes + activations
