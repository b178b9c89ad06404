"""The models by name, and how to build one from plain values such as a checkpoint's JSON."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Final, get_args

from torch import nn

from models.bigram import Bigram, BigramSettings
from models.gpt2 import GPT2, GPT2Settings
from models.lora import NAMES, LoraLinear
from models.ttt import TTTMLP, is_ttt

__all__ = [
    "ADAPTERS", "MODELS", "Model", "Settings", "adapter_counts", "adapter_kind", "build", "draw_adapters", "freeze_base", "is_adapter",
    "parameter_count", "plain", "settings_from", "trained_count", "training_bytes",
]  # fmt: skip

Model = Bigram | GPT2
Settings = BigramSettings | GPT2Settings

MODELS: Final[dict[str, tuple[type[Settings], type[Model]]]] = {
    "bigram": (BigramSettings, Bigram),
    "gpt2": (GPT2Settings, GPT2),
}
ADAPTERS: Final = {"lora": "LoRA", "ttt": "TTT"}  # the settings that add adapters to a base, and what people call those


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
    checked: Settings = _checked(MODELS[model_type][0], values, of=f"the {model_type} model")
    return checked


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values, without adapters that are not there: what knows none reads them too."""
    return {name: value for name, value in asdict(settings).items() if value is not None}


def _checked(kind: Any, values: Mapping[str, object], *, of: str) -> Any:
    """The settings of dataclass `kind` from plain values; raises ValueError."""
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name}={value!r:.80}: {of} has {', '.join(known)} and no such setting.")
    if missing := [name for name, f in known.items() if f.default is MISSING and name not in values]:
        raise ValueError(f"{', '.join(missing)}: missing from the settings of {of}.")
    return kind(**{name: _typed(name, value, known[name].type) for name, value in values.items()})


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value if it is of its kind (int, float, bool, str, or settings within settings); whole numbers must be at least 1."""
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


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's, and not the base's."""
    return adapter_kind(name) is not None


def adapter_kind(name: str) -> str | None:
    """Which of ADAPTERS the parameter of this name belongs to."""
    if is_ttt(name):
        return "ttt"
    return "lora" if name.endswith(NAMES) else None


def adapter_counts(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """How many of a model's tensors, given by name and shape, are adapters', and how many elements those have: a text for each kind."""
    counts, sizes = {}, {name: math.prod(shape) for name, shape in shapes.items()}
    for kind, called in ADAPTERS.items():
        own = [size for name, size in sizes.items() if adapter_kind(name) == kind]
        if own:
            counts[kind] = f"{len(own)} {called} tensors, {sum(own):,} elements of {sum(sizes.values()):,}"
    return counts


def draw_adapters(model: nn.Module, missing: Iterable[str]) -> None:
    """Gives the adapters whose parameters are among the `missing` fresh values, from torch's global generator."""
    names = set(missing)
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | TTTMLP) and names & {
            f"{path}.{name}" for name, _ in module.named_parameters()
        }:
            module.draw()


def freeze_base(model: nn.Module) -> None:
    """Lets the adapters alone learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model learns; a tied tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_count(model: nn.Module) -> int:
    """How many numbers of the model a training moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def training_bytes(model: Model, batch_size: int, *, bytes_per_value: int, processes: int = 1) -> int:
    """About how much memory a training step of this model needs, in bytes: a basis for a warning, right within 1.5x.

    Weights take 4 bytes each, and those that are trained 12 more for the gradient and AdamW's two moments, shared by so many `processes`.
    bytes_per_value is 4 for float32 activations and 2 under autocast.
    """
    activations = model.activation_bytes(batch_size, bytes_per_value=bytes_per_value)
    return (4 * parameter_count(model) + 12 * trained_count(model)) // processes + activations
