"""Locate the weights, the config and the progress in another program's checkpoint, under any of the names in use.

Pure functions over the loaded content. No value in a file is trusted: every failure is a CheckpointError.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from milepost.ckpt.dtypes import FLOATS, name_of
from milepost.ckpt.record import EARLIER, LARGEST, CheckpointError, Json
from milepost.ckpt.tensors import NAME_LIMIT, check_dense, same_tensor
from milepost.lazy import Tensor, torch

SHOWN = 10  # names listed in a message
DEPTH_LIMIT = 64  # of nested dicts and lists
NODE_LIMIT = 1_000_000
CORRECT = "correct it there"  # the remedy for a wrong value in a config

WEIGHTS = ("model_state_dict", "state_dict", "model", "model_state", "weights", "net", "network", "module")
CONFIGS = (
    *("model_args", "hyper_parameters", "config", "hyperparameters", "model_config", "args", "hparams", "cfg"),
    *("gpt_config", "model_cfg", "settings"),
)
LOSSES = ("validation_loss", "val_loss", "best_val_loss")
STEPS = ("step", "global_step", "iter_num", "iteration", "it", "iter", "steps", "global_steps", "current_step")
WRAPPERS = r"(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
ROOTS = ("wte.weight", "token_embedding_table.weight")  # a model of which all names share a prefix has one of them
SIZES = {  # our name: the names in use for it
    "vocab_size": ("vocab_size",),
    "block_size": ("block_size", "n_positions", "n_ctx", "context_length", "max_seq_len"),
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers"),
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
    "n_embd": ("n_embd", "d_model", "hidden_size", "embed_dim"),
}
KNOWN_SIZES = {word for words in SIZES.values() for word in words}


# ---------------------------------------------------------------------------------------------------------------------
# The weights and their names.


def weights_of(content: Mapping[Any, Any], *, where: str, whole: bool = True) -> tuple[str, dict[str, Tensor]]:
    """Return the key of the weights ("" if `content` is a bare state dict) and the weights by flat name.

    Raise CheckpointError listing the keys if none holds weights, or if two hold different weights. If not `whole`,
    compare only the first row of each tensor.
    """
    if not isinstance(content, Mapping):
        problem = f"holds {type(content).__name__}, expected a dictionary with model_state_dict"
        raise CheckpointError(where, problem, kind="not understood")
    keys = [key for key in WEIGHTS if isinstance(content.get(key), Mapping) and _holds_tensors(content[key], where)]
    found = {key: flattened(state_of(content[key]), where=f"{where}: {key}") for key in keys}
    if not found:
        leaves = [value for _, value in _leaves(content, where)]
        bare = leaves and all(isinstance(leaf, Tensor) for leaf in leaves)
        found = {"": flattened(content, where=where)} if bare else _under_any_key(content, where)
    if not found:
        problem = f"does not contain model_state_dict (keys seen: {keys_seen(content)})"
        remedy = "save the weights as tensors under one key: torch.save({'model': model.state_dict()}, path)"
        raise CheckpointError(where, problem, remedy, kind="not understood")
    first, *others = found
    for other in others:
        if not _equal_states(found[first], found[other], where, whole=whole):
            problem = f"{first} and {other} both hold weights, but different ones"
            raise CheckpointError(where, problem, "delete one of the two keys", kind="not understood")
    return first, found[first]


def _under_any_key(content: Mapping[Any, Any], where: str) -> dict[str, dict[str, Tensor]]:
    """Return the weights under an unknown key if they are the only named tensors; empty if there are none or several."""
    found = {}
    for key, value in content.items():
        state = state_of(value) if isinstance(key, str) and isinstance(value, Mapping) else {}
        if state and "param_groups" not in state and all(isinstance(leaf, Tensor) for _, leaf in _leaves(state, where)):
            found[key] = state
    if "_modules" in content:  # a whole module was saved
        found = {"_modules": state_of(content)}
    return {key: flattened(state, where=where) for key, state in found.items()} if len(found) == 1 else {}


def state_of(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the state dict of a whole torch module, which is read as the dictionary of its fields; else `value`."""
    if not isinstance(value.get("_modules"), Mapping) or not isinstance(value.get("_parameters"), Mapping):
        return value
    own = {**value["_parameters"], **(value.get("_buffers") or {})}
    unsaved = value.get("_non_persistent_buffers_set") or ()
    state = {name: tensor for name, tensor in own.items() if tensor is not None and name not in unsaved}
    inner = {name: state_of(module) for name, module in value["_modules"].items() if isinstance(module, Mapping)}
    return state | {name: module for name, module in inner.items() if module}


def flattened(nested: Any, *, where: str) -> dict[str, Tensor]:
    """Return nested dicts and lists of tensors, as MLX writes them, by dotted name: `h.0.attn.c_attn.weight`.

    Raise CheckpointError for any other value, for a repeated name, and for cyclic or too deep nesting.
    """
    found: dict[str, Tensor] = {}
    for name, value in _leaves(nested, where):
        if not isinstance(value, Tensor):
            problem = f"{name} is {type(value).__name__}, expected a tensor"
            raise CheckpointError(where, problem, kind="not understood")
        if name in found:
            problem = f"{name} is there twice, {_shape(found[name])} and {_shape(value)}"
            raise CheckpointError(where, problem, EARLIER, kind="damaged")
        found[name] = value
    return found


def _leaves(nested: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of every leaf in order. The limits stop at cycles as well as at large trees."""
    waiting: list[tuple[str, int, Any]] = [("", 0, nested)]
    nodes = 0
    while waiting:
        prefix, depth, value = waiting.pop()
        if not isinstance(value, Mapping | list | tuple):
            yield prefix, value
            continue
        nodes += len(value)
        if depth >= DEPTH_LIMIT or nodes > NODE_LIMIT:
            problem = f"is nested deeper than {DEPTH_LIMIT} or has more than {NODE_LIMIT} parts"
            raise CheckpointError(where, f"{problem}, expected tensors by name", kind="not understood")
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        named = isinstance(value, Mapping)
        waiting += [(_joined(prefix, key, named, where), depth + 1, item) for key, item in reversed(items)]


def _joined(prefix: str, key: Any, named: bool, where: str) -> str:
    name = f"{prefix}.{key}" if prefix else f"{key}" if isinstance(key, int | str) else ""
    if isinstance(key, str) is not named or not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
        problem = f"{name or str(type(key))!r:.80} is not a tensor name"
        raise CheckpointError(where, problem, kind="not understood")
    return name


def _holds_tensors(nested: Any, where: str) -> bool:
    return any(isinstance(value, Tensor) for _, value in _leaves(nested, where))


def keys_seen(content: Mapping[Any, Any]) -> str:
    """Return the first keys of `content`, for a message."""
    shown = (f"{key!r:.60}" if isinstance(key, str | int) else type(key).__name__ for key in list(content)[:SHOWN])
    return ", ".join(shown) or "none"


def _equal_states(first: dict[str, Tensor], second: dict[str, Tensor], where: str, *, whole: bool) -> bool:
    first, second = strip_prefixes(first, where=where), strip_prefixes(second, where=where)
    if first.keys() != second.keys():
        return False
    for state in (first, second):
        for name, tensor in state.items():
            check_dense(tensor, where, name, dtypes=(*FLOATS, name_of(tensor.dtype)))  # a mask may have any dtype
    return all(same_tensor(tensor, second[name], whole=whole) for name, tensor in first.items())


def strip_prefixes(state: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    """Return `state` without the name prefixes of torch.compile, DDP, FSDP, Lightning and nanoGPT, in any order.

    Strip `model.`, or another name of a module, only if all names have it. Raise CheckpointError if two names become
    equal.
    """
    for name in state:
        if not isinstance(name, str) or not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
            raise CheckpointError(where, f"{name!r:.80} is not a tensor name", kind="not understood")
    bare = {name: _without_wrappers(name) for name in state}
    while prefix := _common_prefix(list(bare.values())):
        bare = {name: _without_wrappers(own.removeprefix(prefix)) for name, own in bare.items()}
    taken: dict[str, str] = {}
    for name, own in bare.items():
        if own in taken:
            both = f"{described(taken[own], state[taken[own]])} and {described(name, state[name])}"
            problem = f"{both} are both {own:.80} without their prefixes"
            raise CheckpointError(where, problem, "keep one of the two", kind="not understood")
        taken[own] = name
    return {own: state[name] for own, name in taken.items()}


def _common_prefix(names: list[str]) -> str:
    """Return the first word of all names, with its dot, if it is not part of a model's own names; else ""."""
    prefix = names[0][: names[0].find(".") + 1] if names else ""
    if not prefix or not all(name.startswith(prefix) for name in names):
        return ""
    inside = any(name.endswith(f".{root}") for root in ROOTS for name in names)
    return prefix if prefix == "model." or inside else ""


def _without_wrappers(name: str) -> str:
    return re.sub(r"^(?:(?:module|transformer)\.)+", "", unwrapped(name))


def unwrapped(name: str) -> str:
    """Return a tensor's name without what torch.compile, DDP and FSDP put into it."""
    return re.sub(r"^(?:module\.)+", "", re.sub(rf"(?<![^.]){WRAPPERS}", "", name))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def described(name: str, value: Any) -> str:
    """Return name and shape of a tensor, for a message."""
    return f"{name:.80} {_shape(value)}"


def more(listed: Sequence[Any] | Mapping[Any, Any]) -> str:
    """Return " and N more" for the part of `listed` that a message leaves out."""
    return f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""


# ---------------------------------------------------------------------------------------------------------------------
# The values beside the weights.


def config_of(content: Mapping[Any, Any]) -> dict[str, Json]:
    """Return the config of the model as JSON values, without values that JSON cannot hold; empty if there is none.

    Sizes at the top of `content` add what the config lacks.
    """
    configs = configs_of(content)
    chosen = next((values for values in configs if KNOWN_SIZES & _lower(values)), configs[0] if configs else {})
    top = {name: value for name, value in content.items() if isinstance(name, str) and name.lower() in KNOWN_SIZES}
    pairs = ((name, plain(value)) for name, value in [*top.items(), *list(chosen.items())[:1000]] if _is_word(name))
    return {name: value for name, (fits, value) in pairs if fits}


def configs_of(content: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """Return every config in `content`, outer ones first."""
    outer = [content[word] for word in CONFIGS if isinstance(content.get(word), Mapping)]
    inner = [values[word] for values in outer for word in (*CONFIGS, "model") if isinstance(values.get(word), Mapping)]
    return [*outer, *inner]


def _lower(values: Mapping[Any, Any]) -> set[str]:
    return {name.lower() for name in values if isinstance(name, str)}


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= 128 and name.isprintable()


def plain(value: Any) -> tuple[bool, Json]:
    """Return whether JSON can hold `value`, and the value as JSON has it."""
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
    """Merge both configs; values `inside` the checkpoint take precedence. Raise CheckpointError if sizes differ."""
    for size in SIZES:
        first, second = (size_of(config, size, where=where) for config in (inside, beside))
        if None not in (first, second) and first != second:
            problem = f"{size} is {first} inside, but {second} in the config.json beside it"
            raise CheckpointError(where, problem, "take the config.json that was saved with it", kind="not understood")
    return beside | inside


def size_of(config: Mapping[str, Json], size: str, *, where: str) -> int | None:
    """Return a size in `config` under any of its names, None if it is absent; raise CheckpointError if invalid."""
    words = [spelled for word in SIZES[size] for spelled in (word, word.upper())]
    values = {word: config[word] for word in words if config.get(word) is not None}
    for word, value in values.items():
        if type(value) is not int or not 0 < value < 2**31:
            problem = f"{word} is {short(value)} in its config, expected a positive whole number"
            raise CheckpointError(where, problem, CORRECT, kind="not understood")
    if len(set(values.values())) > 1:
        listed = " and ".join(f"{word} {value}" for word, value in values.items())
        problem = f"its config says {listed}, which are two words for one thing"
        raise CheckpointError(where, problem, CORRECT, kind="not understood")
    return next(iter(values.values()), None)


def short(value: Any) -> str:
    """Return `value` for a message; only the type of anything but a scalar, whose repr could be large."""
    return f"{value!r:.80}" if _plain_scalar(value) else type(value).__name__


def step_of(content: Mapping[Any, Any], *, where: str) -> int:
    """Return the optimizer steps done, 0 if it records none; raise CheckpointError if it is not a whole number."""
    for word in STEPS:
        value = number_of(content.get(word))
        if value is not None and not isinstance(value, Mapping):
            if type(value) is not int or not 0 <= value <= LARGEST:
                problem = f"the file is damaged: {word} is {short(value)}, expected a whole number of at least 0"
                raise CheckpointError(where, problem, EARLIER, kind="damaged")
            return value
    return 0


def number_of(value: Any) -> Any:
    """Return the number in a tensor of one number, a whole one as int; any other value as it is."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not dense or value.numel() != 1 or value.is_complex() or value.is_quantized or value.dtype == torch.bool:
        return value
    number = value.item()
    return int(number) if isinstance(number, float) and number.is_integer() else number


def epoch_of(content: Mapping[Any, Any], *, where: str) -> float | None:
    """Return the epochs done, None if it records none; raise CheckpointError if it is not a number."""
    value: Any = content.get("epoch")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= LARGEST:
        problem = f"the file is damaged: epoch is {short(value)}, expected a number of at least 0"
        raise CheckpointError(where, problem, EARLIER, kind="damaged")
    return float(value)


def validation_loss_of(content: Mapping[Any, Any]) -> float | None:
    """Return the validation loss in nats per token; None if it records none, or 1e9, nanoGPT's initial value.

    Without one of its own, it is the score of Lightning's ModelCheckpoint, if that monitors a loss.
    """
    value: Any = next((content[word] for word in LOSSES if content.get(word) is not None), None)
    value = _monitored_loss(content.get("callbacks")) if value is None else value
    if (
        isinstance(value, Tensor)
        and value.shape == ()
        and name_of(value.dtype) in FLOATS
        and value.device.type == "cpu"
    ):
        value = float(value)
    if type(value) not in (int, float) or not 0 < value < 1e9:
        return None
    return float(value)


def _monitored_loss(callbacks: Any) -> Any:
    for name, values in callbacks.items() if isinstance(callbacks, Mapping) else ():
        monitor = values.get("monitor") if isinstance(values, Mapping) else None
        if isinstance(name, str) and name.startswith("ModelCheckpoint") and isinstance(monitor, str):
            scores = (values.get("current_score"), values.get("best_model_score"))
            if "loss" in monitor and "train" not in monitor:
                return next((score for score in scores if score is not None), None)
    return None
