"""Our Llama as llama.cpp's llama, qwen2 or qwen3 (https://github.com/ggml-org/llama.cpp/tree/master/src/models).

Its `llama` turns neighbouring values of a head by one angle, where ours, as transformers', turns value i with value
i + hs / 2: the rows of query and key stand in another order there. Its `qwen2` and `qwen3` turn them as ours does.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import models
from milepost.ckpt.exports.common import cannot_represent, check_adapters, elsewhere
from milepost.ckpt.exports.gguf_models import GgufModel
from milepost.ckpt.record import Checkpoint
from models.llama import LlamaSettings, frequencies

NAMES = {  # ours: theirs
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "rope_freqs": "rope_freqs",
}  # fmt: skip
TURNED = (".q_proj.weight", ".q_proj.bias", ".k_proj.weight", ".k_proj.bias")
FACTORS = "rope_freqs.weight"  # by what each frequency is divided; computed, not learned


def _architecture(record: Checkpoint) -> str:
    check_adapters(record, "llama.cpp's Llama")
    ours = _settings(record)
    biases = (ours.qkv_bias, ours.output_bias, ours.mlp_bias)
    if not ours.qk_norm and biases != (True, False, False):
        return "llama"  # any of its biases may be there
    kind = "qwen3" if ours.qk_norm else "qwen2"
    if (ours.qk_norm and any(biases)) or _factors(ours) is not None:
        problem = f"has biases or a scaling of rotary positions that llama.cpp's {kind} has not"
        raise cannot_represent(record, problem, elsewhere(record))
    return kind


def _settings(record: Checkpoint) -> LlamaSettings:
    settings = models.settings_from("llama", record.model_settings)
    assert isinstance(settings, LlamaSettings)
    return settings


def _add_sizes(writer: Any, record: Checkpoint) -> None:
    ours = _settings(record)
    writer.add_feed_forward_length(ours.n_inner)
    writer.add_head_count_kv(ours.n_kv_head)
    writer.add_key_length(ours.head_size)
    writer.add_value_length(ours.head_size)
    writer.add_rope_dimension_count(ours.head_size)
    writer.add_rope_freq_base(ours.rope_theta)
    writer.add_layer_norm_rms_eps(ours.norm_eps)
    if ours.rope_scaling is not None and ours.rope_scaling.kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(ours.rope_scaling.factor)


def _factors(ours: LlamaSettings) -> Tensor | None:
    """Return the factors (hs / 2,) of Llama 3's scaling; the linear one is a single number."""
    if ours.rope_scaling is None or ours.rope_scaling.kind == "linear":
        return None
    return frequencies(replace(ours, rope_scaling=None)) / frequencies(ours)


def _weights(record: Checkpoint) -> dict[str, Tensor]:
    ours, turn = _settings(record), _architecture(record) == "llama"
    weights = {
        name: _neighbours(tensor, ours.head_size) if turn and name.endswith(TURNED) else tensor
        for name, tensor in record.model_state.items()
    }
    factors = _factors(ours)
    return weights if factors is None else weights | {FACTORS: factors}


def _opened(record: Checkpoint, path: Path, state: dict[str, Tensor]) -> Checkpoint:
    size, turn = _settings(record).head_size, _architecture(record) == "llama"
    weights = {
        name: _halves(tensor, size) if turn and name.endswith(TURNED) else tensor
        for name, tensor in state.items()
        if name != FACTORS
    }
    return replace(record, model_state=weights, path=path)


def _neighbours(rows: Tensor, head_size: int) -> Tensor:
    """Return the rows (H hs, ...) of all heads so that those of a pair, hs / 2 apart, follow each other."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _halves(rows: Tensor, head_size: int) -> Tensor:
    """Return the rows as they were before _neighbours()."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


MODEL = GgufModel(
    blocks="layers",
    names=NAMES,
    by_token=("embed_tokens.weight", "lm_head.weight"),
    full_precision=(),
    architecture=_architecture,
    add_sizes=_add_sizes,
    weights=_weights,
    opened=_opened,
)
