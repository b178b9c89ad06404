"""What is needed to read and write a model as Hugging Face transformers stores it: one `Architecture` for each of ours."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from milepost.ckpt.record import Checkpoint, CheckpointError, Json
from milepost.ckpt.tensors import UNQUANTIZED
from milepost.lazy import Tensor

CONFIG = "config.json"
Weights = dict[str, Tensor]


class Architecture(NamedTuple):
    """One of our models, in transformers' words."""

    model_type: str  # ours
    kinds: tuple[str, ...]  # the `model_type` of those config.json that describe it
    prefix: str  # of the names of all weights but the head's
    transposed: bool  # whether transformers stores its linear layers as Conv1D, whose weight is (in, out)
    embedding: tuple[str, ...]  # the names that the token embedding, which a tied head shares, may have there
    # Our settings by the values of config.json in a folder; raises CheckpointError unless ours computes that model.
    settings: Callable[[Path, Mapping[str, Any]], dict[str, Json]]
    # Views of a folder's weights under our names and in our orientation, without what is no parameter of ours.
    ours: Callable[[Path, Weights, Mapping[str, Any]], Weights]
    # Names of weights in the order in which transformers' model, and with it its optimizer, numbers them.
    order: Callable[[Iterable[str]], list[str]]
    # The values of config.json for a record, and its weights under transformers' names and in its orientation; both raise
    # CheckpointError for what transformers cannot hold.
    config: Callable[[Checkpoint], dict[str, Json]]
    theirs: Callable[[Checkpoint], Weights]


def size(path: Path, config: Mapping[str, Any], name: str) -> int:
    """Return a size of config.json. Raise CheckpointError unless it is a positive whole number."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise not_ours(path, name, value, "a positive whole number")
    return value


def check_expected(path: Path, config: Mapping[str, Any], expected: Mapping[str, tuple[Json, ...]], model: str) -> None:
    """Raise CheckpointError if a value of config.json makes it another model; one that is absent counts as the first."""
    for name, allowed in expected.items():
        if config.get(name, allowed[0]) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise not_ours(path, name, config[name], f"{wanted}: this is not a {model} that milepost computes")


def boolean(path: Path, config: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """Return a value of config.json. Raise CheckpointError unless it is true or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise not_ours(path, name, value, "true or false")
    return value


def probability(path: Path, config: Mapping[str, Any], name: str, *, default: float) -> float:
    """Return a value of config.json. Raise CheckpointError unless it is a number from 0 to below 1."""
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise not_ours(path, name, value, "a number from 0 to below 1")
    return float(value)


def not_ours(path: Path, name: str, value: Json, expected: str) -> CheckpointError:
    """Return the error of a value in config.json that ours cannot have."""
    return CheckpointError(path / CONFIG, f"{name} is {value!r:.80}, expected {expected}", kind="not understood")


def renamed(path: Path, weights: Weights, prefix: str, left_out: tuple[str, ...]) -> Weights:
    """Return the weights without `prefix`, and without the head and names that end as `left_out` says."""
    state: Weights = {}
    for theirs, tensor in weights.items():
        name = theirs.removeprefix(prefix)
        if name == "lm_head.weight" or name.endswith(left_out):
            continue
        if not tensor.is_floating_point():
            problem = f"{theirs!r:.80} is {tensor.dtype}, expected floating point weights"
            raise CheckpointError(path, problem, UNQUANTIZED, kind="not understood")
        if name in state:
            problem = f"{name!r:.80} is there twice, with and without `{prefix}`"
            raise CheckpointError(path, problem, kind="not understood")
        state[name] = tensor
    return state


def dtype_of(record: Checkpoint, name: str) -> str:
    """Return the dtype of a record's tensor as config.json names it."""
    return str(record.model_state[name].dtype).removeprefix("torch.")
