"""Our GPT-2 as llama.cpp's (https://github.com/ggml-org/llama.cpp/blob/master/src/models/gpt2.cpp).

Its linear layers are (out, in), as ours are. It has every bias but the head's, and computes GELU's tanh form.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milepost.ckpt.exports.common import as_gpt2, check_gpt2, with_biases
from milepost.ckpt.exports.gguf_models import GgufModel
from milepost.ckpt.record import Checkpoint

NAMES = {  # ours: theirs
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output", "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip


def _architecture(record: Checkpoint) -> str:
    check_gpt2(record, "llama.cpp")
    return "gpt2"


def _add_sizes(writer: Any, record: Checkpoint) -> None:
    settings = record.model_settings
    writer.add_feed_forward_length(4 * settings["n_embd"])
    writer.add_layer_norm_eps(1e-5)


def _weights(record: Checkpoint) -> dict[str, Tensor]:
    """Return all weights but the head's bias, which is zeros, by check_gpt2."""
    return {name: tensor for name, tensor in with_biases(record).items() if name != "lm_head.bias"}


def _opened(record: Checkpoint, path: Path, state: dict[str, Tensor]) -> Checkpoint:
    if not record.model_settings.get("tied", True):
        state = state | {"lm_head.bias": torch.zeros(len(state["lm_head.weight"]))}
    return as_gpt2(record, path, state, bias=True, activation="gelu")


MODEL = GgufModel(
    blocks="h",
    names=NAMES,
    by_token=("wte.weight", "lm_head.weight"),
    full_precision=("wpe.weight",),
    architecture=_architecture,
    add_sizes=_add_sizes,
    weights=_weights,
    opened=_opened,
)
