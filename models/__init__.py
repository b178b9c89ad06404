"""The models by name, and how to build one from plain values such as a checkpoint's JSON."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

from torch import nn

from models.bigram import Bigram, BigramSettings
from models.gpt2 import GPT2, GPT2Settings

__all__ = ["MODELS", "Model", "Settings", "build", "parameter_count", "settings_from", "training_bytes"]

Model = Bigram | GPT2
Settings = BigramSettings | GPT2Settings

MODELS: Final[dict[str, tuple[type[Settings], type[Model]]]] = {
    "bigram": (BigramSettings, Bigram),
    "gpt2": (GPT2Settings, GPT2),
}


def build(model_type: str, settings: Mapping[str, object]) -> Model:
    """A freshly initialised float32 model, drawn from torch's global generator, with `.settings` and `.model_type`.

    Raises ValueError, naming field and value, for an unknown model, for fields that are unknown, missing or of
    the wrong type, and for sizes that make no model.
    """
    checked = settings_from(model_type, settings)
    return Bigram(checked) if isinstance(checked, BigramSettings) else GPT2(checked)


def settings_from(model_type: str, values: Mapping[str, object]) -> Settings:
    """A model's settings from plain values, checked as build() says; nothing is allocated yet."""
    if model_type not in MODELS:
        raise ValueError(f"model_type={model_type!r}: expected one of {', '.join(MODELS)}.")
    kind = MODELS[model_type][0]
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name}={value!r}: the {model_type} model has {', '.join(known)} and no such setting.")
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in values]:
        raise ValueError(f"{', '.join(missing)}: missing from the {model_type} model's settings.")
    return kind(**{name: _typed(name, value, known[name].type) for name, value in values.items()})


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value if it is of its kind (int, float, bool or str); whole numbers must be at least 1."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # isinstance would take True for a size of 1
        raise ValueError(f"{name}={value!r}: expected {kind.__name__}, got {type(value).__name__}.")
    if kind is int and value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1.")
    return value


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model learns; a tied tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_bytes(model: Model, batch_size: int, *, bytes_per_value: int) -> int:
    """About how much memory a training step of this model needs, in bytes: a basis for a warning, right within 2x.

    Weights take 4 bytes each, and those that are trained 12 more for the gradient and AdamW's two moments.
    bytes_per_value is 4 for float32 activations and 2 under autocast.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = model.activation_bytes(batch_size, bytes_per_value=bytes_per_value)
    return 4 * parameter_count(model) + 12 * trained + activations
