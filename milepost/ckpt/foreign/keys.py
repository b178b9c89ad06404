"""What another program's file says: where in it the weights are, how they are called, and the words beside them.

Pure functions over what was loaded. What a file claims is not believed: every failure is a CheckpointError in one sentence.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from milepost.ckpt.record import LARGEST, CheckpointError, Json
from milepost.ckpt.tensors import FLOATS, NAME_LIMIT, check_dense, same_tensor

SHOWN = 10  # names that one message lists
DEPTH_LIMIT = 64  # of dicts and lists in each other
NODE_LIMIT = 1_000_000

WEIGHTS = ("model_state_dict", "state_dict", "model")
CONFIGS = ("model_args", "hyper_parameters", "config", "hyperparameters", "model_config")
LOSSES = ("validation_loss", "val_loss", "best_val_loss")
STEPS = ("step", "global_step", "iter_num", "iteration", "it")
SIZES = {  # our word: the words in use for it
    "vocab_size": ("vocab_size",),
    "block_size": ("block_size", "n_positions", "n_ctx", "context_length", "max_seq_len"),
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers"),
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
    "n_embd": ("n_embd", "d_model", "hidden_size", "embed_dim"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights are, and what they are called.


def weights_of(content: Mapping[Any, Any], *, where: str, whole: bool = True) -> tuple[str, dict[str, Tensor]]:
    """The key under which the weights are ("" if `content` is a bare state dict) and the weights by flat name.

    Raises CheckpointError listing the keys seen if there are none, or if two of them hold different weights; if not `whole`, only
    the first row of each is compared.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: holds {type(content).__name__}, expected a dictionary with model_state_dict")
    keys = [key for key in WEIGHTS if isinstance(content.get(key), Mapping) and _holds_tensors(content[key], where)]
    found = {key: flattened(content[key], where=f"{where}: {key}") for key in keys}
    if not found:
        leaves = [value for _, value in _leaves(content, where)]
        found = (
            {"": flattened(content, where=where)} if leaves and all(isinstance(one, Tensor) for one in leaves) else {}
        )
    if not found:
        seen = keys_seen(content)
        raise CheckpointError(
            f"{where}: does not contain model_state_dict (keys seen: {seen}): it may be damaged, or no model's file; try an earlier checkpoint"
        )
    first, *others = found
    for other in others:
        if not _equal_states(found[first], found[other], where, whole=whole):
            raise CheckpointError(
                f"{where}: {first} and {other} both hold weights, and not the same ones: delete one of the two keys"
            )
    return first, found[first]


def flattened(nested: Any, *, where: str) -> dict[str, Tensor]:
    """Nested dicts and lists of tensors, as MLX has them, under dotted names: `h.0.attn.c_attn.weight`.

    Raises CheckpointError for anything else among them, for two tensors of one name, and for what is nested without end.
    """
    found: dict[str, Tensor] = {}
    for name, value in _leaves(nested, where):
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name} is {type(value).__name__}, expected a tensor")
        if name in found:
            raise CheckpointError(f"{where}: {name} is there twice, {_shape(found[name])} and {_shape(value)}")
        found[name] = value
    return found


def _leaves(nested: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all that is no dict and no list, in order. The limits end a cycle as well as a large tree."""
    waiting: list[tuple[str, int, Any]] = [("", 0, nested)]
    nodes = 0
    while waiting:
        prefix, depth, value = waiting.pop()
        if not isinstance(value, Mapping | list | tuple):
            yield prefix, value
            continue
        nodes += len(value)
        if depth >= DEPTH_LIMIT or nodes > NODE_LIMIT:
            raise CheckpointError(
                f"{where}: is nested deeper than {DEPTH_LIMIT} or has more than {NODE_LIMIT} parts, expected tensors by name"
            )
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        named = isinstance(value, Mapping)
        waiting += [(_joined(prefix, key, named, where), depth + 1, one) for key, one in reversed(items)]


def _joined(prefix: str, key: Any, named: bool, where: str) -> str:
    name = f"{prefix}.{key}" if prefix else f"{key}" if isinstance(key, int | str) else ""
    if isinstance(key, str) is not named or not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
        raise CheckpointError(f"{where}: {name or str(type(key))!r:.80} is no name of a tensor")
    return name


def _holds_tensors(nested: Any, where: str) -> bool:
    return any(isinstance(value, Tensor) for _, value in _leaves(nested, where))


def keys_seen(content: Mapping[Any, Any]) -> str:
    """The first keys of what should have held weights, for a message."""
    shown = (f"{key!r:.60}" if isinstance(key, str | int) else type(key).__name__ for key in list(content)[:SHOWN])
    return ", ".join(shown) or "none"


def _equal_states(one: dict[str, Tensor], other: dict[str, Tensor], where: str, *, whole: bool) -> bool:
    one, other = strip_prefixes(one, where=where), strip_prefixes(other, where=where)
    if one.keys() != other.keys():
        return False
    for state in (one, other):
        for name, tensor in state.items():
            check_dense(tensor, where, name, dtypes=(*FLOATS, tensor.dtype))  # a mask may be of any
    return all(same_tensor(tensor, other[name], whole=whole) for name, tensor in one.items())


def strip_prefixes(state: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    """`state` without the prefixes that compile, DDP, Lightning and nanoGPT put before every name, in whatever order they are.

    `model.` comes off only where all names have it. Raises CheckpointError listing those that would get one name.
    """
    for name in state:
        if not isinstance(name, str) or not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
            raise CheckpointError(f"{where}: {name!r:.80} is no name of a tensor")
    bare = {name: _without_wrappers(name) for name in state}
    while bare and all(one.startswith("model.") for one in bare.values()):
        bare = {name: _without_wrappers(one.removeprefix("model.")) for name, one in bare.items()}
    taken: dict[str, str] = {}
    for name, own in bare.items():
        if own in taken:
            both = f"{described(taken[own], state[taken[own]])} and {described(name, state[name])}"
            raise CheckpointError(f"{where}: {both} are both {own:.80} without their prefixes: keep one of the two")
        taken[own] = name
    return {own: state[name] for own, name in taken.items()}


def _without_wrappers(name: str) -> str:
    return re.sub(r"^(?:(?:_orig_mod|module|transformer)\.)+", "", name)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def described(name: str, value: Any) -> str:
    """A tensor for a message, by its name and shape."""
    return f"{name:.80} {_shape(value)}"


def more(listed: Sequence[Any] | Mapping[Any, Any]) -> str:
    """How many of `listed` a message leaves out, in words."""
    return f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""


# ---------------------------------------------------------------------------------------------------------------------
# What the words beside the weights say.


def config_of(content: Mapping[Any, Any]) -> dict[str, Json]:
    """What describes the model, as plain JSON values; empty if nothing does. Values that are no plain ones are left out."""
    outer = [content[word] for word in CONFIGS if isinstance(content.get(word), Mapping)]
    inner = [values[word] for values in outer for word in (*CONFIGS, "model") if isinstance(values.get(word), Mapping)]
    known = {word for words in SIZES.values() for word in words}
    chosen = next((values for values in (*outer, *inner) if known & values.keys()), outer[0] if outer else {})
    pairs = ((name, plain(value)) for name, value in list(chosen.items())[:1000] if _is_word(name))
    return {name: value for name, (fits, value) in pairs if fits}


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= 128 and name.isprintable()


def plain(value: Any) -> tuple[bool, Json]:
    """Whether `value` can stand in JSON, and how."""
    if isinstance(value, list | tuple) and len(value) <= 1000:
        parts = [_plain_scalar(part) for part in value]
        return all(parts), list(value)
    return _plain_scalar(value), value


def _plain_scalar(value: Any) -> bool:
    if type(value) is str:
        return len(value) <= 4096 and value.isprintable()
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) is bool or (type(value) is int and abs(value) <= LARGEST)


def together(inside: dict[str, Json], beside: dict[str, Json], *, where: str) -> dict[str, Json]:
    """Both descriptions as one: what was saved with the weights, and from beside them what that does not say."""
    for size in SIZES:
        said, also = (size_of(config, size, where=where) for config in (inside, beside))
        if None not in (said, also) and said != also:
            raise CheckpointError(
                f"{where}: {size} is {said} inside, but {also} in the config.json beside it: take the config.json that was saved with it"
            )
    return beside | inside


def size_of(config: Mapping[str, Json], size: str, *, where: str) -> int | None:
    """What `config` says of one of SIZES, under whatever word; None if nothing. Raises CheckpointError for what is no size."""
    said = {word: config[word] for word in SIZES[size] if config.get(word) is not None}
    for word, value in said.items():
        if type(value) is not int or not 0 < value < 2**31:
            raise CheckpointError(
                f"{where}: {word} is {short(value)} in its config, expected a positive whole number: correct it there"
            )
    if len(set(said.values())) > 1:
        listed = " and ".join(f"{word} {value}" for word, value in said.items())
        raise CheckpointError(f"{where}: its config says {listed}, which are two words for one thing: correct it there")
    return next(iter(said.values()), None)


def short(value: Any) -> str:
    """`value` for a message; never of more than a plain value, whose repr is as small as it looks."""
    return f"{value!r:.80}" if _plain_scalar(value) else type(value).__name__


def step_of(content: Mapping[Any, Any], *, where: str) -> int:
    """The optimizer updates made, 0 if nothing says; raises CheckpointError for what is no whole number of them."""
    for word in STEPS:
        value = content.get(word)
        if value is not None:
            if type(value) is not int or not 0 <= value <= LARGEST:
                raise CheckpointError(
                    f"{where}: {word} is {short(value)}, expected a whole number of at least 0: the file is damaged"
                )
            return value
    return 0


def epoch_of(content: Mapping[Any, Any], *, where: str) -> float | None:
    """The passes over the data, None if nothing says; raises CheckpointError for what is no number of them."""
    value: Any = content.get("epoch")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= LARGEST:
        raise CheckpointError(f"{where}: epoch is {short(value)}, expected a number of at least 0: the file is damaged")
    return float(value)


def validation_loss_of(content: Mapping[Any, Any]) -> float | None:
    """The loss in nats, a float or a scalar tensor; None if nothing says it, and for the 1e9 with which nanoGPT begins."""
    value: Any = next((content[word] for word in LOSSES if content.get(word) is not None), None)
    if isinstance(value, Tensor) and value.shape == () and value.dtype in FLOATS and value.device.type == "cpu":
        value = float(value)
    if type(value) not in (int, float) or not 0 < value < 1e9:
        return None
    return float(value)
