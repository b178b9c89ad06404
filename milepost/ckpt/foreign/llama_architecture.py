"""Our Llama as Hugging Face transformers' LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM, and back.

A Mistral without a sliding window is a Llama too.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import models
from milepost.ckpt.foreign.architecture import (
    CONFIG,
    Architecture,
    boolean,
    check_expected,
    dtype_of,
    not_ours,
    probability,
    renamed,
    size,
)
from milepost.ckpt.record import Checkpoint, CheckpointError, Json
from milepost.lazy import Tensor

PREFIX = "model."
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
KINDS = (*CLASSES, "mistral")
BUFFERS = ("rotary_emb.inv_freq",)  # of each layer or of the model, which old versions stored beside the weights
SIZES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
}
SCALING = {  # ours -> theirs
    "factor": "factor",
    "low_factor": "low_freq_factor",
    "high_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
ROTARY: dict[str, tuple[Json, ...]] = {"partial_rotary_factor": (1.0, None)}
EXPECTED: dict[str, tuple[Json, ...]] = {"hidden_act": ("silu",), **ROTARY}
MISTRAL_WINDOW = 4096  # where its config does not say, as its first version had it
# Of the modules of the whole model and of a block, as transformers declares them.
ORDER = (
    "embed_tokens", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm", "norm", "lm_head",
)  # fmt: skip
BIASES = ("qkv_bias", "output_bias", "mlp_bias")


def _settings(path: Path, config: Mapping[str, Any]) -> dict[str, Json]:
    check_expected(path, config, EXPECTED, "Llama")
    sizes = {ours: size(path, config, theirs) for ours, theirs in SIZES.items()}
    _check_windows(path, config, sizes["block_size"])
    if config.get("num_key_value_heads") is not None:
        sizes["n_kv_head"] = size(path, config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        sizes["head_size"] = size(path, config, "head_dim")
    elif config["model_type"] == "qwen3":
        sizes["head_size"] = 128  # the default of its class
    values = {
        **sizes,
        **_biases(path, config),
        **_rotary(path, config),
        "dropout": probability(path, config, "attention_dropout", default=0.0),
        "norm_eps": _positive(path, config, "rms_norm_eps", default=1e-6),
        "qk_norm": config["model_type"] == "qwen3",
        "tied": boolean(path, config, "tie_word_embeddings", default=False),
    }
    try:
        return models.plain(models.settings_from("llama", values))  # with what follows from the rest
    except ValueError as error:
        raise CheckpointError(path / CONFIG, f"describes no model ({error})", kind="not understood") from error


def _check_windows(path: Path, config: Mapping[str, Any], block_size: int) -> None:
    """Raise CheckpointError if some tokens would not see all tokens before them."""
    mistral = config["model_type"] == "mistral"
    window = config.get("sliding_window", MISTRAL_WINDOW if mistral else None)
    if not config.get("use_sliding_window", mistral):
        window = None
    if window is not None and (type(window) is not int or window < block_size):
        raise not_ours(path, "sliding_window", window, "null: a window is not computed")
    types = config.get("layer_types") or []
    if not isinstance(types, list):
        raise not_ours(path, "layer_types", types, "a list with the kind of each layer")
    if other := next((kind for kind in types if kind != "full_attention"), None):
        raise not_ours(path, "layer_types", other, "full_attention alone: a window is not computed")


def _biases(path: Path, config: Mapping[str, Any]) -> dict[str, Json]:
    if config["model_type"] == "qwen2":
        return {"qkv_bias": True, "output_bias": False, "mlp_bias": False}
    attention = boolean(path, config, "attention_bias", default=False)
    inner = boolean(path, config, "mlp_bias", default=False)
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": inner}


def _rotary(path: Path, config: Mapping[str, Any]) -> dict[str, Json]:
    """Return base and scaling, which transformers 5 stores together as rope_parameters, and earlier versions apart.

    Where a file has both, transformers takes the scaling (modeling_rope_utils.py, convert_rope_params_to_dict).
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise not_ours(path, "rope_scaling", rope, "null or its settings")
    if of_kind := next((name for name, value in rope.items() if isinstance(value, Mapping)), None):
        raise not_ours(path, "rope_parameters", {of_kind: "..."}, "one setting for all layers")
    check_expected(path, rope, ROTARY, "Llama")
    theta = _positive(path, {**config, **rope}, "rope_theta", default=10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise not_ours(path, "rope_type", kind, "default, linear or llama3")
    names = SCALING if kind == "llama3" else {"factor": "factor"}
    values: dict[str, Json] = {ours: _positive(path, rope, theirs) for ours, theirs in names.items()}
    if "original_length" in values:
        values["original_length"] = size(path, rope, SCALING["original_length"])
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **values}}  # type: ignore[dict-item]


def _positive(path: Path, config: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise not_ours(path, name, value, "a number above 0")
    return float(value)


def _ours(path: Path, weights: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    state = renamed(path, weights, PREFIX, BUFFERS)
    if not settings.get("tied", True) and "lm_head.weight" in weights:
        state["lm_head.weight"] = weights["lm_head.weight"]
    return state


def _order(names: Iterable[str]) -> list[str]:
    """Return the names in transformers' order: embedding, blocks, norm, head; a module's weight before its bias."""
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, int, str]:
    bare = name.removeprefix(PREFIX)
    block = re.match(r"layers\.([0-9]{1,6})\.", bare)
    module, _, kind = bare[block.end() if block else 0 :].rpartition(".")
    at = ORDER.index(module) if module in ORDER else len(ORDER)
    return (int(block[1]) if block else -1 if at == 0 else 10**6), at, "" if kind == "weight" else kind


def _config(record: Checkpoint) -> dict[str, Json]:
    ours = record.model_settings
    kind = _kind(record)
    biased = {} if kind == "qwen2" else {"attention_bias": ours["qkv_bias"]}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **{theirs: ours[name] for name, theirs in SIZES.items()},
        "num_key_value_heads": ours["n_kv_head"],
        "head_dim": ours["head_size"],
        "hidden_act": "silu",
        **biased,
        **({"mlp_bias": ours["mlp_bias"]} if kind == "llama" else {}),
        "attention_dropout": ours["dropout"],
        "rms_norm_eps": ours["norm_eps"],
        "rope_theta": ours["rope_theta"],
        "rope_scaling": _their_scaling(ours),
        "tie_word_embeddings": ours["tied"],
        "dtype": dtype_of(record, "embed_tokens.weight"),
    }


def _kind(record: Checkpoint) -> str:
    """Return the model of transformers that has the record's biases and norms; raise CheckpointError if none has."""
    ours = record.model_settings
    biases = tuple(ours[name] for name in BIASES)
    if ours["qk_norm"] and biases in ((False, False, False), (True, True, False)):
        return "qwen3"
    if not ours["qk_norm"] and biases[0] == biases[1]:
        return "llama"
    if not ours["qk_norm"] and biases == (True, False, False):
        return "qwen2"
    problem = "has biases and norms together that no model of transformers has"
    raise CheckpointError(record.path or "checkpoint", problem, "keep it in another layout", kind="refused")


def _their_scaling(ours: Mapping[str, Any]) -> Json:
    scaling = ours.get("rope_scaling")
    if scaling is None:
        return None
    names = SCALING if scaling["kind"] == "llama3" else {"factor": "factor"}
    return {"rope_type": scaling["kind"], **{theirs: scaling[ours] for ours, theirs in names.items()}}  # type: ignore[return-value]


def _theirs(record: Checkpoint) -> dict[str, Tensor]:
    state = record.model_state.items()
    return {name if name.startswith("lm_head.") else f"{PREFIX}{name}": tensor for name, tensor in state}


ARCHITECTURE = Architecture(
    model_type="llama",
    kinds=KINDS,
    prefix=PREFIX,
    transposed=False,
    embedding=("embed_tokens.weight", f"{PREFIX}embed_tokens.weight"),
    settings=_settings,
    ours=_ours,
    order=_order,
    config=_config,
    theirs=_theirs,
)
