"""A folder as Hugging Face transformers writes a GPT-2: `config.json`, `*.safetensors`, tokenizer files.

The pretrained weights of GPT-2 come in this form, in safetensors or in torch archives. What is written here besides is passed over by
transformers: `optimizer.safetensors`, and the manifest `milepost.json`, from which a run goes on exactly. A bigram
model has the same files, but transformers knows no such model.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import models
from milepost.ckpt.foreign.importing import TOKENIZER, files, home, tokenizer_beside
from milepost.ckpt.manifest import (
    JSON_LIMIT,
    file_problems,
    is_regular,
    manifest_metadata,
    read_json,
    read_manifest,
    write_manifest,
)
from milepost.ckpt.record import Checkpoint, CheckpointError, Json, from_metadata
from milepost.ckpt.restore import tokenizer_files, tokenizer_from_file, tokenizer_from_parts
from milepost.ckpt.tensors import optimizer_groups, optimizer_tensors, same_tensor, take_optimizer, write_safetensors
from milepost.ckpt.weight_files import PICKLED, SAFETENSORS, damaged, mapped, read_weights
from milepost.files import NewFile, new_folder, write_json

__all__ = [
    "MEMBERS", "NAME", "RUN_STEM", "detect", "files", "home", "optimizer_file", "peek", "read", "targets", "verify_file", "write",
]  # fmt: skip

NAME = "huggingface"
RUN_STEM = ""
CONFIG, WEIGHTS = "config.json", SAFETENSORS.whole
GENERATION, OPTIMIZER, MANIFEST = "generation_config.json", "optimizer.safetensors", "milepost.json"
VOCAB, MERGES, ADDED, SPECIAL = "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"
INDEXES = (SAFETENSORS.index, PICKLED.index)
MEMBERS = (
    CONFIG,
    GENERATION,
    WEIGHTS,
    PICKLED.whole,
    PICKLED.shards,
    *INDEXES,
    OPTIMIZER,
    MANIFEST,
    "tokenizer.json",
    "tokenizer_config.json",
)

# transformers keeps these four as Conv1D, whose weight is (in, out): the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Causal masks that old versions stored beside the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu": "relu"}  # theirs -> ours
# What our GPT-2 computes; another value of any of these is another model.
EXPECTED: dict[str, tuple[Json, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def detect(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model_type, as transformers' do, and no other layout's weights."""
    if not is_regular(path / CONFIG) or any(
        is_regular(path / name) for name in ("manifest.json", "model.pt", "consolidated.safetensors")
    ):
        return False
    try:
        return "model_type" in read_json(path / CONFIG)
    except CheckpointError:
        return any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))


def optimizer_file(path: Path) -> Path | None:
    """The file to do without for a checkpoint that only generates."""
    return path / OPTIMIZER


def peek(path: Path) -> dict[str, Json]:
    """The metadata of the folder; of transformers' own only the model's shape, and step 0, because it records none."""
    if not os.path.lexists(path / MANIFEST):
        return {"model_type": "gpt2", "model_settings": _settings(path), "step": 0, "parts": ["model"]}
    return manifest_metadata(path, read_manifest(path / MANIFEST), optimizer=OPTIMIZER)


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record of the folder, weights in our names and orientation. Raises CheckpointError."""
    if os.path.lexists(path / MANIFEST):
        return _read_own(path, optimizer=optimizer, verify=verify)
    settings = _settings(path)
    problems = damaged(path) if verify else []
    if problems:
        raise CheckpointError(problems[0])
    _check_head(path, settings)
    model_state = read_weights(path, lambda weights: _translate(path, weights, settings))
    tokenizer, note = _read_tokenizer(path, settings["vocab_size"])
    return Checkpoint(
        model_state=model_state,
        model_type="gpt2",
        model_settings=settings,
        tokenizer=tokenizer,
        path=path,
        layout=NAME,
        owned=True,
        notes=[note] if note and tokenizer else [],
    )


def _read_own(path: Path, *, optimizer: bool, verify: bool) -> Checkpoint:
    """A folder of ours, with everything that transformers has no place for."""
    manifest = read_manifest(path / MANIFEST)
    begins = [WEIGHTS, *[OPTIMIZER] * optimizer]
    problems = file_problems(path, manifest, hashed=verify, begins=begins, optional=[OPTIMIZER])
    if problems:
        raise CheckpointError(f"{problems[0]}; or remove {MANIFEST} to open the folder as transformers would")
    settings, known = manifest["metadata"]["model_settings"], _is_known(manifest["metadata"]["model_type"])
    weights = read_weights(path, lambda found: _translate(path, found, settings) if known else found)
    record = from_metadata(manifest["metadata"], model_state=weights, optimizer_state=None, where=str(path / MANIFEST))
    take_optimizer(record, path / OPTIMIZER, manifest["optimizer_groups"], wanted=optimizer)
    record.path, record.layout, record.owned = path, NAME, True
    return record


def verify_file(path: Path) -> list[str]:
    """What is wrong with the folder; transformers' own has no checksums, so that only its structure can be checked."""
    try:
        if os.path.lexists(path / MANIFEST):
            return file_problems(path, read_manifest(path / MANIFEST), hashed=True, optional=[OPTIMIZER])
        settings = _settings(path)
        if problems := damaged(path):
            return problems
        _check_head(path, settings)
        read_weights(path, lambda weights: _translate(path, weights, settings))
    except CheckpointError as error:
        return [str(error)]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes the folder `folder/stem`, its manifest last; returns it. The caller holds the folder's lock.

    Raises CheckpointError naming what transformers' GPT-2 has no place for.
    """
    (path,) = targets(folder, stem)
    _refuse_adapters(record)
    known = _is_known(record.model_type)
    weights = _their_weights(record) if known else record.model_state
    config = (
        _their_config(record) if known else {"model_type": f"milepost-{record.model_type}", **record.model_settings}
    )
    with new_folder(path) as hidden:
        made: dict[str, NewFile] = {WEIGHTS: write_safetensors(hidden / WEIGHTS, weights)}
        tokens = tokenizer_files(record)
        ends = _ends(tokens)
        texts = {CONFIG: config | ends, GENERATION: {"_from_model_config": True} | ends, **tokens}
        made |= {name: write_json(hidden / name, values) for name, values in texts.items()}
        groups = None
        if record.optimizer_state is not None:
            made[OPTIMIZER] = write_safetensors(hidden / OPTIMIZER, optimizer_tensors(record.optimizer_state))
            groups = optimizer_groups(record.optimizer_state)
        write_manifest(hidden / MANIFEST, record, made, first={"format": "milepost"}, groups=groups)
    return path


def _is_known(model_type: str) -> bool:
    """Return whether transformers has the model."""
    return model_type in models.with_trait("transformers")


def targets(folder: Path, stem: str) -> list[Path]:
    """The path that `write` gives a checkpoint of this stem."""
    return [folder / stem]


def _refuse_adapters(record: Checkpoint) -> None:
    if record.model_settings.get("ttt"):
        problem = f"{record.path or 'checkpoint'}: has TTT layers, which transformers' GPT-2 has no place for"
        raise CheckpointError(f"{problem}: keep it in another layout")
    if record.model_settings.get("lora"):
        problem = f"{record.path or 'checkpoint'}: has LoRA adapters, which transformers' GPT-2 has no place for"
        raise CheckpointError(
            f"{problem}: merge them first (scripts/merge_adapters.py), or CONVERT_TO=peft keeps them apart"
        )


def _their_config(record: Checkpoint) -> dict[str, Json]:
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
        "dtype": str(record.model_state["wte.weight"].dtype).removeprefix("torch."),
    }


def _ends(files: dict[str, Json]) -> dict[str, Json]:
    """The token that ends a text, if there is one: without it transformers' generate() waits for GPT-2's."""
    added = files.get(TOKENIZER, {}).get("added_tokens", ())
    ids = [token["id"] for token in added if token["content"] == "<|endoftext|>"]
    return {"bos_token_id": ids[0], "eos_token_id": ids[0]} if ids else {}


def _their_weights(record: Checkpoint) -> dict[str, Tensor]:
    """The weights under transformers' names and in its orientation; biases that were left out are zeros."""
    weights: dict[str, Tensor] = {}
    for name, tensor in record.model_state.items():
        if name == "lm_head.bias":
            if tensor.any():
                raise CheckpointError(
                    f"lm_head.bias {tuple(tensor.shape)}: transformers' GPT-2 has none, so this model cannot be written as one"
                )
            continue
        theirs = name if name.startswith("lm_head.") else f"transformer.{name}"
        weights[theirs] = tensor.t() if name.endswith(CONV1D) else tensor
        beside = theirs.removesuffix("weight") + "bias"
        if not record.model_settings.get("bias", True) and not theirs.endswith(
            (".wte.weight", ".wpe.weight", "lm_head.weight")
        ):
            weights[beside] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Reading what transformers wrote.

SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def _settings(path: Path) -> dict[str, Json]:
    config = read_json(path / CONFIG)
    for name, allowed in EXPECTED.items():
        if config.get(name, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{path / CONFIG}: {name} is {config[name]!r:.80}, expected {expected}: this is not a GPT-2 that milepost computes"
            )
    for field in SIZES.values():
        if not isinstance(config.get(field), int) or isinstance(config.get(field), bool) or config[field] < 1:
            raise CheckpointError(
                f"{path / CONFIG}: {field} is {config.get(field)!r:.80}, expected a positive whole number"
            )
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise CheckpointError(f"{path / CONFIG}: n_inner is {config['n_inner']!r:.80}, expected null or 4 * n_embd")
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{path / CONFIG}: tie_word_embeddings is {tied!r:.80}, expected true or false")
    dropout = config.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise CheckpointError(f"{path / CONFIG}: resid_pdrop is {dropout!r:.80}, expected a number from 0 to below 1")
    activation = ACTIVATIONS[config.get("activation_function", "gelu_new")]
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    return sizes | {"dropout": float(dropout), "bias": True, "activation": activation, "tied": tied}


def _check_head(path: Path, settings: dict[str, Json]) -> None:
    """Raises CheckpointError for a head that the config ties to the embedding, but that is another."""
    weights = mapped(path)
    head = weights.get("lm_head.weight")
    embedding = next((weights[name] for name in ("wte.weight", "transformer.wte.weight") if name in weights), head)
    if settings["tied"] and head is not None and embedding is not None and not same_tensor(head, embedding):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from wte.weight, but {CONFIG} ties them: set tie_word_embeddings to false there"
        )


def _translate(path: Path, weights: dict[str, Tensor], settings: dict[str, Json]) -> dict[str, Tensor]:
    """The parameters under our names and in our orientation, views of theirs, without what is no parameter of ours."""
    model_state: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        name = theirs.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith(BUFFERS):
            continue
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {theirs!r:.80} is {tensor.dtype}, expected floating point weights")
        if name in model_state:
            raise CheckpointError(f"{path}: {name!r:.80} is there twice, with and without `transformer.`")
        model_state[name] = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
    if not settings.get("bias", True):
        model_state = {name: tensor for name, tensor in model_state.items() if not name.endswith(".bias")}
    head = weights.get("lm_head.weight")
    if not settings.get("tied", True) and head is not None:  # transformers' has no bias
        model_state |= {"lm_head.weight": head, "lm_head.bias": torch.zeros(head.shape[:1], dtype=head.dtype)}
    return model_state


def _read_tokenizer(path: Path, vocab_size: int) -> tuple[dict[str, Json] | None, str | None]:
    """The folder's tokenizer as JSON values, and a note if it had to be guessed."""
    if is_regular(path / TOKENIZER):
        return tokenizer_from_file(read_json(path / TOKENIZER)), None
    if is_regular(path / VOCAB) and is_regular(path / MERGES):
        return _tokenizer_of_two_files(path), None
    return tokenizer_beside(path, vocab_size)


def _tokenizer_of_two_files(path: Path) -> dict[str, Json]:
    """What GPT-2 was published with, and fine-tunes of its first years have: vocab.json and merges.txt, and tokens added to them."""
    added = read_json(path / ADDED) if is_regular(path / ADDED) else {}
    roles = read_json(path / SPECIAL) if is_regular(path / SPECIAL) else {}
    special = [
        role["content"] if isinstance(role, dict) and "content" in role else role for role in _flat(roles.values())
    ]
    try:
        if (path / MERGES).stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path / MERGES}: is larger than {JSON_LIMIT} bytes, expected a list of merges")
        merges = (path / MERGES).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MERGES}: cannot be read ({error})") from error
    return tokenizer_from_parts(
        read_json(path / VOCAB), merges, added, [each for each in special if isinstance(each, str)]
    )


def _flat(roles: Iterable[Json]) -> Iterator[Json]:
    for role in roles:
        yield from role if isinstance(role, list) else [role]
