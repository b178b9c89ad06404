"""A folder as Hugging Face transformers writes a GPT-2: `config.json`, `*.safetensors`, tokenizer files. Read only so far.

The pretrained weights of GPT-2 come in this form. Weights are read from safetensors alone, never from a pickle.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ckpt.record import Checkpoint, CheckpointError, Json

NAME = "huggingface"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
JSON_LIMIT = 64 * 2**20  # bytes
PUBLISHED_VOCABULARY = 50257  # GPT-2's own; a folder of that many rows without tokenizer files speaks GPT-2's BPE

# transformers keeps these four as Conv1D, whose weight is (in, out): the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Causal masks that old versions stored beside the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")
# What our GPT-2 computes; another value of any of these is another model.
EXPECTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def detect(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model_type, as transformers' do."""
    if not os.path.isfile(path / CONFIG):
        return False
    try:
        return "model_type" in _read_json(path / CONFIG)
    except CheckpointError:
        return any(path.glob("*.safetensors"))


def peek(path: Path) -> dict[str, Json]:
    """The metadata of the folder: the model's shape; step 0, because transformers records none."""
    return {"model_type": "gpt2", "model_settings": _settings(path), "step": 0}


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the folder: weights in our names and orientation, tokenizer, no optimizer. Raises CheckpointError."""
    settings = _settings(path)
    weights = _read_weights(path)
    model_state = _translate(path, weights)
    _check_head(path, weights, model_state)
    tokenizer, note = _read_tokenizer(path, settings["vocab_size"])
    record = Checkpoint(
        model_state=model_state, model_type="gpt2", model_settings=settings, tokenizer=tokenizer, path=path, layout=NAME
    )
    record.notes += [note] if note else []
    return record


def verify_file(path: Path) -> list[str]:
    """What is wrong with the folder; transformers stores no checksums, so only its structure can be checked."""
    try:
        _settings(path)
        _read_weights(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def _settings(path: Path) -> dict[str, Json]:
    config = _read_json(path / CONFIG)
    for name, allowed in EXPECTED.items():
        if config.get(name, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{path / CONFIG}: {name} is {config[name]!r:.80}, expected {expected}: this is not a GPT-2 that milepost computes"
            )
    sizes = {
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    }
    for field in sizes.values():
        if not isinstance(config.get(field), int) or isinstance(config.get(field), bool) or config[field] < 1:
            raise CheckpointError(
                f"{path / CONFIG}: {field} is {config.get(field)!r:.80}, expected a positive whole number"
            )
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise CheckpointError(f"{path / CONFIG}: n_inner is {config['n_inner']!r:.80}, expected null or 4 * n_embd")
    dropout = config.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise CheckpointError(f"{path / CONFIG}: resid_pdrop is {dropout!r:.80}, expected a number from 0 to below 1")
    return {ours: config[theirs] for ours, theirs in sizes.items()} | {"dropout": float(dropout), "bias": True}


def _read_json(path: Path) -> dict[str, Json]:
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path}: is larger than {JSON_LIMIT} bytes, expected a small JSON file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, expected an object")
    return values


def _read_weights(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open's handle is no dict)
                    if name in weights:
                        raise CheckpointError(f"{file}: {name} is in an earlier shard too")
                    weights[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError, ValueError, AttributeError) as error:  # the last two for a dtype torch lacks
            raise CheckpointError(f"{file}: is damaged ({error!s:.160})") from error
    return weights


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX}: has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{path / INDEX}: names {outside[0]!r:.80}, which lies outside its folder")
        missing = [name for name in names if not os.path.isfile(path / name)]
        if missing:
            raise CheckpointError(f"{path / INDEX}: names {missing[0]!r:.80}, which is not there")
        return [path / name for name in names]
    if not (path / WEIGHTS).is_file():
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:10])
        raise CheckpointError(
            f"{path}: has no {WEIGHTS} (it holds {held}); weights are read from safetensors only, never from a .bin"
        )
    return [path / WEIGHTS]


def _translate(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters under our names and in our orientation, without what is no parameter of ours."""
    model_state: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        name = theirs.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith(BUFFERS):
            continue
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {theirs!r:.80} is {tensor.dtype}, expected floating point weights")
        if name in model_state:
            raise CheckpointError(f"{path}: {name!r:.80} is there twice, with and without `transformer.`")
        model_state[name] = tensor.t().contiguous() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
    return model_state


def _check_head(path: Path, weights: dict[str, Tensor], model_state: dict[str, Tensor]) -> None:
    """The tied head is no parameter of ours: a head stored beside the embedding must be its twin."""
    head = weights.get("lm_head.weight")
    embedding = model_state.get("wte.weight")
    if head is not None and embedding is not None and not (head.shape == embedding.shape and head.equal(embedding)):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from wte.weight; an untied head cannot be kept in a GPT-2"
        )


def _read_tokenizer(path: Path, vocab_size: int) -> tuple[dict[str, Json] | None, str | None]:
    """The folder's tokenizer as JSON values, and a note if it had to be guessed."""
    if (path / "tokenizer.json").is_file():
        return {"kind": "bpe", "tokenizer": _read_json(path / "tokenizer.json")}, None
    if vocab_size == PUBLISHED_VOCABULARY:
        return {
            "kind": "gpt2"
        }, f"{path}: has no tokenizer.json; GPT-2's own is taken, because its vocabulary has {vocab_size} rows"
    return None, f"{path}: has no tokenizer.json, and {vocab_size} rows fit no tokenizer that milepost knows"
