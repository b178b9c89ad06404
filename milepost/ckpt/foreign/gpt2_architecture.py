"""Our GPT-2 as Hugging Face transformers' GPT2LMHeadModel, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
from milepost.ckpt.foreign.architecture import (
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
from milepost.lazy import Tensor, torch

PREFIX = "transformer."
# transformers stores these four as Conv1D, whose weight is (in, out): the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Causal masks that old versions stored beside the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu": "relu"}  # theirs -> ours
SIZES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# What our GPT-2 computes; with another value of any of these it is another model.
EXPECTED: dict[str, tuple[Json, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _settings(path: Path, config: Mapping[str, Any]) -> dict[str, Json]:
    check_expected(path, config, EXPECTED, "GPT-2")
    sizes = {ours: size(path, config, theirs) for ours, theirs in SIZES.items()}
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise not_ours(path, "n_inner", config["n_inner"], "null or 4 * n_embd")
    tied = boolean(path, config, "tie_word_embeddings", default=True)
    dropout = probability(path, config, "resid_pdrop", default=0.1)
    activation = ACTIVATIONS[config.get("activation_function", "gelu_new")]
    return sizes | {"dropout": dropout, "bias": True, "activation": activation, "tied": tied}


def _ours(path: Path, weights: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    state = {
        name: tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
        for name, tensor in renamed(path, weights, PREFIX, BUFFERS).items()
        if settings.get("bias", True) or not name.endswith(".bias")
    }
    head = weights.get("lm_head.weight")
    if not settings.get("tied", True) and head is not None:  # transformers' has no bias
        state |= {"lm_head.weight": head, "lm_head.bias": torch.zeros(head.shape[:1], dtype=head.dtype)}
    return state


def _config(record: Checkpoint) -> dict[str, Json]:
    ours = record.model_settings
    sizes = {theirs: ours[name] for name, theirs in SIZES.items()}
    dropout = {f"{part}_pdrop": ours.get("dropout", 0.0) for part in ("resid", "embd", "attn")}
    theirs = next(theirs for theirs, name in ACTIVATIONS.items() if name == ours.get("activation", "gelu"))
    return {
        "architectures": [models.MODELS[record.model_type].transformers],
        "model_type": "gpt2",
        **sizes,
        "n_ctx": ours["block_size"],
        **dropout,
        "activation_function": theirs,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": ours.get("tied", True),
        "dtype": dtype_of(record, "wte.weight"),
    }


def _theirs(record: Checkpoint) -> dict[str, Tensor]:
    """Return the weights, with zeros for biases that the model lacks."""
    weights: dict[str, Tensor] = {}
    for name, tensor in record.model_state.items():
        if name == "lm_head.bias":
            if tensor.any():
                problem = f"lm_head.bias {tuple(tensor.shape)}: transformers' GPT-2 has none"
                remedy = "keep it in another layout"
                raise CheckpointError(record.path or "checkpoint", problem, remedy, kind="refused")
            continue
        theirs = name if name.startswith("lm_head.") else f"{PREFIX}{name}"
        weights[theirs] = tensor.t() if name.endswith(CONV1D) else tensor
        bias = theirs.removesuffix("weight") + "bias"
        has_bias = not theirs.endswith((".wte.weight", ".wpe.weight", "lm_head.weight"))
        if has_bias and not record.model_settings.get("bias", True):
            weights[bias] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return weights


ARCHITECTURE = Architecture(
    model_type="gpt2",
    kinds=("gpt2",),
    prefix=PREFIX,
    transposed=True,
    embedding=("wte.weight", f"{PREFIX}wte.weight"),
    settings=_settings,
    ours=_ours,
    order=list,  # `trained` has them in this order
    config=_config,
    theirs=_theirs,
)
