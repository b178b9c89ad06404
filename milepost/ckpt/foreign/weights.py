"""Translate another program's weights by their names and shapes, and by its config where shapes do not suffice.

Supported: nanoGPT (https://github.com/karpathy/nanoGPT), minGPT (https://github.com/karpathy/minGPT), the GPT-2 of
transformers, the two models of Karpathy's lecture (https://github.com/karpathy/ng-video-lecture), and this program's own
names without its metadata. Never loads a part of a model. In the shapes below C = n_embd, H = n_head, hs = C / H, T = block_size and V = vocab_size.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import models
from milepost.ckpt.foreign.keys import CORRECT, SHOWN, SIZES, described, more, short, size_of, strip_prefixes
from milepost.ckpt.record import EARLIER, CheckpointError, Json
from milepost.ckpt.tensors import checked_tensors, same_tensor
from milepost.lazy import Tensor, torch

# Activations by name. Others call torch's nn.GELU() gelu, which is the exact form; our `gelu` is GPT-2's tanh form.
OUR_ACTIVATIONS = {
    "gelu": "gelu", "gelu_erf": "gelu_erf", "gelu_new": "gelu", "gelu_tanh": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu",
}  # fmt: skip
THEIR_ACTIVATIONS = OUR_ACTIVATIONS | {"gelu": "gelu_erf"}

# transformers stores these as Conv1D, whose weight is (in, out): the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The published GPT-2: (n_layer, n_embd) and its n_head. Each has 50257 rows or more and 1024 positions.
GPT2_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}

TABLE, POSITIONS = "token_embedding_table.weight", "position_embedding_table.weight"
LECTURE_BLOCK_SIZE = 8  # of the lecture's bigram model; its weights do not determine it

Translation = tuple[str, dict[str, Json], dict[str, Tensor], list[str]]


def translated(state: Mapping[Any, Any], config: Mapping[str, Json], *, where: str, whole: bool = True) -> Translation:
    """Return model type, settings, weights under our names (in the order of nanoGPT's parameters) and notes.

    Names and shapes determine the model; `config` adds n_head, dropout and block_size and must not contradict them.
    The settings lack `n_head` if neither the weights nor `config` determine it.
    Raise CheckpointError listing names and shapes if any tensor cannot be translated. If not `whole`, only the head's
    bias and first row are read, and tensors that would be computed have shapes but no memory.
    """
    bare = strip_prefixes(state, where=where)
    theirs = {name: tensor for name, tensor in bare.items() if not _is_mask(name, tensor)}
    _check_weights(theirs, where)
    if theirs.keys() == {TABLE}:
        return _from_bigram(theirs[TABLE], config, where)
    if TABLE in theirs and POSITIONS in theirs:
        return _from_lecture(theirs, config, where, whole=whole)
    if "wte.weight" in theirs and "wpe.weight" in theirs:
        program = _program(state, bare, theirs, config)
        if program == "transformers":
            theirs = {name: _turned(name, tensor, whole=whole) for name, tensor in theirs.items()}
        return _from_gpt2(theirs, config, where, program=program, whole=whole)
    listed = ", ".join(described(name, tensor) for name, tensor in list(theirs.items())[:SHOWN])
    problem = f"its weights are of no model that milepost knows: {listed}{more(theirs)}"
    expected = "expected those of nanoGPT, of the lecture's models or of milepost"
    raise CheckpointError(where, f"{problem}; {expected}", _remedy(theirs), kind="not understood")


def _remedy(names: Iterable[str]) -> str:
    """Return what to do with weights that are of no known model, by their names."""
    if any("lora_" in name.lower() for name in names):
        return (
            "these are adapters: merge them into their base in the program that trained them, then save the whole model"
        )
    if any(name.endswith(("embed_tokens.weight", "tok_embeddings.weight", "norm_1.weight")) for name in names):
        return "a Llama opens from a folder of transformers: let its save_pretrained() write one, and name that"
    return "save the whole model's state_dict() again, under the names of one of these, with torch.save"


def of_ours(
    state: Mapping[Any, Any], config: Mapping[str, Json], *, where: str
) -> tuple[str, dict[str, Json], dict[str, Json] | None] | None:
    """Return model type, settings and base of weights under our names beside our config.json; None if it is not ours.

    Such a folder is the part of a checkpoint to share: `consolidated/`, whose manifest lies in the folder above.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in models.MODELS:
        return None
    if "lm_head.weight" in state and config.get("tied"):
        return None
    if strip_prefixes(state, where=where).keys() != state.keys():
        return None
    fields = dataclasses.fields(models.load(model_type).settings_type)
    settings = {field.name: config[field.name] for field in fields if field.name in config}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    own = {"activation", "tied"} <= settings.keys() or required == {field.name for field in fields}
    if not own or not required <= settings.keys():
        return None
    for size in ("vocab_size", "block_size"):
        if type(settings.get(size)) is not int or settings[size] < 1:
            problem = f"{size} is {short(settings.get(size))} in its config, expected a positive whole number"
            raise CheckpointError(where, problem, CORRECT, kind="not understood")
    checked_tensors(state, where)
    base = config.get("base")
    return model_type, settings, base if isinstance(base, dict) else None


def trained(state: Mapping[Any, Any], *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of its parameters by bare name, in the order in which its optimizer numbers them.

    That is the order of the weights, without masks and without the head of a tied model. Weights in alphabetical order
    were sorted by whoever saved them: those of a GPT-2 are returned in its own order.
    """
    theirs = {name: tensor for name, tensor in strip_prefixes(state, where="").items() if not _is_mask(name, tensor)}
    if tied:
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("lm_head.")}
    if list(theirs) == sorted(theirs) and "wte.weight" in theirs:
        layers = 1 + max((int(name.split(".")[1]) for name in theirs if re.match(r"h\.[0-9]{1,6}\.", name)), default=0)
        sizes = {"vocab_size": 0, "block_size": 0, "n_embd": 0, "n_layer": layers}
        theirs = {name: theirs[name] for name in _gpt2_shapes(sizes, bias=True, tied=False) if name in theirs}
    return {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def _program(
    state: Mapping[Any, Any], bare: Mapping[str, Any], theirs: Mapping[str, Tensor], config: Mapping[str, Json]
) -> str:
    """Return whose GPT-2 these weights are, by orientation, names, masks and head: they compute different GELUs."""
    C = theirs["wte.weight"].shape[-1]
    wide = [t.shape for name, t in theirs.items() if name.endswith((CONV1D[0], CONV1D[2])) and t.dim() == 2]
    if wide and all(rows == C and columns in (3 * C, 4 * C) for rows, columns in wide):
        return "transformers"
    if {"lm_head.weight", "lm_head.bias"} <= theirs.keys():
        return "milepost"
    if not any("transformer." in name for name in state) and "lm_head.weight" not in theirs:
        return "milepost"
    # nanoGPT ties its head, and its config has `dropout`; minGPT's has `resid_pdrop` and two more.
    masked = any(name.endswith(".attn.bias") and name not in theirs for name in bare)
    head = theirs.get("lm_head.weight")
    own_head = head is not None and not same_tensor(head, theirs["wte.weight"], whole=False)
    return "minGPT" if masked and own_head and "dropout" not in config else "nanoGPT"


def _turned(name: str, tensor: Tensor, *, whole: bool) -> Tensor:
    if not name.endswith(CONV1D) or tensor.dim() != 2:
        return tensor
    return tensor.t().contiguous() if whole else tensor.t()


def _is_mask(name: str, tensor: Any) -> bool:
    """Whether it is a causal mask or its fill value, which some programs save with the weights."""
    if not isinstance(tensor, Tensor):
        return False
    if re.fullmatch(r"h\.[0-9]+\.attn\.bias", name):
        return tensor.dim() == 4 and tensor.shape[:2] == (1, 1)
    if re.fullmatch(r"h\.[0-9]+\.attn\.masked_bias", name):
        return tensor.dim() == 0
    return tensor.dim() == 2 and re.fullmatch(r"blocks\.[0-9]+\.sa\.heads\.[0-9]+\.tril", name) is not None


def _check_weights(state: dict[str, Any], where: str) -> None:
    if not state:
        raise CheckpointError(where, "holds no weights, expected those of a model", EARLIER, kind="lacking")
    for name, tensor in checked_tensors(state, where).items():
        if not tensor.numel():
            raise CheckpointError(
                where, f"{described(name, tensor)} is empty, expected weights", EARLIER, kind="damaged"
            )


def _from_bigram(table: Tensor, config: Mapping[str, Json], where: str) -> Translation:
    if table.dim() != 2 or table.shape[0] != table.shape[1]:
        problem = f"{described(TABLE, table)} is no bigram model's: expected as many columns as rows"
        raise CheckpointError(where, problem, kind="not understood")
    block_size = size_of(config, "block_size", where=where)
    notes = []
    if block_size is None:
        block_size = LECTURE_BLOCK_SIZE
        notes.append(
            f"{where}: records no block_size; {block_size} is used, which only sets the length of training sequences"
        )
    settings: dict[str, Json] = {"vocab_size": table.shape[0], "block_size": block_size}
    _check_sizes(settings, config, where)
    return "bigram", settings, {TABLE: table}, notes


def _from_gpt2(
    theirs: dict[str, Tensor], config: Mapping[str, Json], where: str, *, program: str, whole: bool
) -> Translation:
    """Translate nanoGPT's names, which are ours too: (out, in) weights; query, key and value in one."""
    sizes = _table_sizes(theirs, "wte.weight", "wpe.weight", where)
    layers = {found[1] for name in theirs if (found := re.match(r"h\.(0|[1-9][0-9]{0,5})\.", name))}
    tied, head, notes = _head(theirs, theirs["wte.weight"], config, where, whole=whole)
    ours = {name: tensor for name, tensor in theirs.items() if not name.startswith("lm_head.")} | head
    bias = "ln_f.bias" in theirs
    settings: dict[str, Json] = sizes | {"n_layer": max(1, len(layers))}
    shapes = _gpt2_shapes(settings, bias=bias, tied=tied)
    _check_fit(shapes, ours, where)
    n_head, note = _n_head(config, settings, where)
    settings |= {"n_head": n_head} if n_head else {}
    settings |= {"dropout": _dropout(config, where), "bias": bias}
    usual = "gelu_erf" if program == "nanoGPT" else "gelu"
    words = OUR_ACTIVATIONS if program == "milepost" else THEIR_ACTIVATIONS
    settings |= {"activation": _activation(config, words, usual, where), "tied": tied}
    _check_sizes(settings, config, where)
    if type(config.get("bias")) is bool and config["bias"] is not bias:
        problem = f"bias is {config['bias']} in its config, but {bias} by its weights"
        raise CheckpointError(where, problem, CORRECT, kind="not understood")
    _check_computed(config, where)
    if not any(word in config for word in ACTIVATION):
        notes += [f"{where}: {note}" for note in (READ_AS.get(program),) if note]
    notes += [f"{where}: {note}"] if note else []
    return "gpt2", settings, {name: ours[name] for name in shapes}, notes


ACTIVATION = ("activation", "activation_function", "activation_fn", "act_fn", "hidden_act")
COMPUTED: dict[str, Json] = {  # what shapes do not show: value of our GPT-2
    "layer_norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
READ_AS = {
    "nanoGPT": "read as nanoGPT's, with the exact GELU that it computes since May 2023",
    "minGPT": "read as minGPT's, with the tanh form of GELU that it computes",
    "transformers": "read as transformers', with the tanh form of GELU that its GPT-2 computes",
}


def _check_computed(config: Mapping[str, Json], where: str) -> None:
    """Raise CheckpointError if a value in `config` makes the same weights another model."""
    for word, ours in COMPUTED.items():
        value = config.get(word)
        if value is not None and value != ours:
            problem = f"{word} is {short(value)} in its config, expected {ours}: another model is computed"
            raise CheckpointError(where, problem, kind="not understood")


def _table_sizes(theirs: Mapping[str, Tensor], tokens: str, positions: str, where: str) -> dict[str, Json]:
    """Return vocab_size, block_size and n_embd from the two embeddings, (V, C) and (T, C)."""
    for name in (tokens, positions):
        if theirs[name].dim() != 2:
            problem = f"{described(name, theirs[name])} is not an embedding, expected two dimensions"
            raise CheckpointError(where, problem, kind="not understood")
    vocab_size, n_embd = theirs[tokens].shape
    return {"vocab_size": vocab_size, "block_size": theirs[positions].shape[0], "n_embd": n_embd}


def _head(
    theirs: Mapping[str, Tensor], embedding: Tensor, config: Mapping[str, Json], where: str, *, whole: bool
) -> tuple[bool, dict[str, Tensor], list[str]]:
    """Return whether the head is tied to the embedding, the tensors of an untied head, and a note if unusual."""
    weight, bias = theirs.get("lm_head.weight"), theirs.get("lm_head.bias")
    twin = weight is None or same_tensor(weight, embedding, whole=whole)
    unbiased = bias is None or (bias.shape == embedding.shape[:1] and not bias.any())
    tied = config["tied"] if type(config.get("tied")) is bool else twin and unbiased
    if tied:
        if not (twin and unbiased):
            problem = "tied is True in its config, but its lm_head is not its embedding"
            raise CheckpointError(where, problem, EARLIER, kind="damaged")
        return True, {}, []
    # A head equal to the embedding may share its memory.
    head = {} if weight is None else {"lm_head.weight": weight.clone() if twin and whole else weight}
    head["lm_head.bias"] = embedding.new_zeros(embedding.shape[0]) if bias is None else bias
    missing = "lm_head.weight differs from the token embedding and is kept as a head of its own"
    return False, head, [f"{where}: {missing}"] if bias is None and weight is not None else []


def _gpt2_shapes(sizes: Mapping[str, Any], *, bias: bool, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return our names and shapes in the order of nanoGPT's named_parameters()."""
    V, T, C = sizes["vocab_size"], sizes["block_size"], sizes["n_embd"]
    layer: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    shapes |= {f"h.{n}.{name}": shape for n in range(sizes["n_layer"]) for name, shape in layer.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    shapes = {name: shape for name, shape in shapes.items() if bias or not name.endswith("bias")}
    return shapes if tied else shapes | {"lm_head.weight": (V, C), "lm_head.bias": (V,)}


def _check_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: str, *, optional: str = "\0"
) -> None:
    """Raise CheckpointError listing unknown, missing (unless named `*optional`) and wrongly shaped tensors."""
    problems = [f"{described(name, tensor)} is not known" for name, tensor in found.items() if name not in expected]
    problems += [
        f"{name} {shape} is missing"
        for name, shape in expected.items()
        if name not in found and not name.endswith(optional)
    ]
    wrong = {name: shape for name, shape in expected.items() if name in found and tuple(found[name].shape) != shape}
    problems += [f"{name} is {tuple(found[name].shape)}, expected {shape}" for name, shape in wrong.items()]
    if not problems:
        return
    turned = any(tuple(found[name].shape) == shape[::-1] for name, shape in wrong.items() if len(shape) == 2)
    problem = f"its weights cannot be translated, and none were: {'; '.join(problems[:SHOWN])}{more(problems)}"
    remedy = "transposed weights are Hugging Face's; name the folder that save_pretrained() wrote" if turned else None
    raise CheckpointError(where, problem, remedy, kind="not understood")


def _check_sizes(settings: Mapping[str, Json], config: Mapping[str, Json], where: str) -> None:
    """Raise CheckpointError if `config` contradicts the shapes of the weights."""
    for size in SIZES.keys() & settings.keys():
        value = size_of(config, size, where=where)
        if value is not None and value != settings[size]:
            problem = f"{size} is {value} in its config, but {settings[size]} by its weights"
            raise CheckpointError(where, problem, "take the config that was saved with them", kind="not understood")


def _n_head(config: Mapping[str, Json], settings: Mapping[str, Any], where: str) -> tuple[int | None, str | None]:
    """Return n_head and a note on where it comes from, if not from the config; None if it is not known."""
    n_head, note = size_of(config, "n_head", where=where), None
    shape, published = (settings["n_layer"], settings["n_embd"]), settings["block_size"] == 1024
    if n_head is None and published and shape in GPT2_HEADS:
        n_head = GPT2_HEADS[shape]
        note = f"records no n_head; {n_head} is used, that of the published GPT-2 of {shape[0]} layers and width {shape[1]}"
    if n_head is not None and settings["n_embd"] % n_head:
        problem = f"n_head is {n_head} in its config, which does not divide n_embd={settings['n_embd']}"
        raise CheckpointError(where, problem, CORRECT, kind="not understood")
    return n_head, note


def _dropout(config: Mapping[str, Json], where: str) -> float:
    value = config.get("dropout", config.get("resid_pdrop"))
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not 0 <= value < 1:
        problem = f"dropout is {short(value)} in its config, expected a number from 0 to below 1"
        raise CheckpointError(where, problem, CORRECT, kind="not understood")
    return float(value)


def _activation(config: Mapping[str, Json], words: Mapping[str, str], usual: str, where: str) -> str:
    value = next((config[word] for word in ACTIVATION if config.get(word) is not None), None)
    if value is None:
        return usual
    if not isinstance(value, str) or value not in words:
        problem = f"activation is {short(value)} in its config, expected one of {', '.join(words)}"
        raise CheckpointError(where, problem, kind="not understood")
    return words[value]


# The lecture's GPT (https://github.com/karpathy/ng-video-lecture/blob/master/gpt.py): a Linear without bias for query,
# key and value of each head, an untied head, ReLU.

LECTURE_PARTS = {  # of blocks.N : of our h.N
    "ln1": "ln_1",
    "sa.proj": "attn.c_proj",
    "ln2": "ln_2",
    "ffwd.net.0": "mlp.c_fc",
    "ffwd.net.2": "mlp.c_proj",
}


def _from_lecture(theirs: dict[str, Tensor], config: Mapping[str, Json], where: str, *, whole: bool) -> Translation:
    sizes = _table_sizes(theirs, TABLE, POSITIONS, where)
    found = [re.match(r"blocks\.(0|[1-9][0-9]{0,5})\.(?:sa\.heads\.(0|[1-9][0-9]{0,5})\.)?", name) for name in theirs]
    n_layer = max(1, len({match[1] for match in found if match}))
    n_head = max(1, len({match[2] for match in found if match and match[2]}))
    if 3 * n_layer * n_head > len(theirs) or sizes["n_embd"] % n_head:
        model = f"{n_layer} blocks of {n_head} heads"
        problem = (
            f"its weights cannot be translated: {len(theirs)} tensors with n_embd={sizes['n_embd']} are not {model}"
        )
        raise CheckpointError(where, problem, kind="not understood")
    settings: dict[str, Json] = sizes | {"n_layer": n_layer, "n_head": n_head}
    _check_fit(_lecture_shapes(settings), theirs, where, optional=".bias")
    tied, head, _ = _head(theirs, theirs[TABLE], config, where, whole=whole)
    settings |= {"dropout": _dropout(config, where), "bias": True}
    settings |= {"activation": _activation(config, THEIR_ACTIVATIONS, "relu", where), "tied": tied}
    _check_sizes(settings, config, where)
    _check_computed(config, where)
    if not whole:  # concatenating would read them
        theirs = {name: tensor.to("meta") for name, tensor in theirs.items()}
    joined = _joined_lecture(theirs, settings) | head
    shapes = _gpt2_shapes(settings, bias=True, tied=tied)
    weight = theirs[TABLE]
    state = {name: joined[name] if name in joined else weight.new_zeros(shape) for name, shape in shapes.items()}
    return "gpt2", settings, state, []


def _lecture_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    V, T, C = sizes["vocab_size"], sizes["block_size"], sizes["n_embd"]
    hs = C // sizes["n_head"]
    pairs = {"ln1": (C,), "sa.proj": (C, C), "ln2": (C,), "ffwd.net.0": (4 * C, C), "ffwd.net.2": (C, 4 * C)}
    pairs |= {f"sa.heads.{n}.{kind}": (hs, C) for n in range(sizes["n_head"]) for kind in ("key", "query", "value")}
    weights = {f"blocks.{n}.{name}": shape for n in range(sizes["n_layer"]) for name, shape in pairs.items()}
    weights |= {"ln_f": (C,), "lm_head": (V, C)}
    shapes: dict[str, tuple[int, ...]] = {TABLE: (V, C), POSITIONS: (T, C)}
    shapes |= {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def _joined_lecture(theirs: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all weights but the head under our names; query, key and value of all heads joined, (3C, C)."""
    ours = {"wte.weight": theirs[TABLE], "wpe.weight": theirs[POSITIONS]}
    renamed = {f"blocks.{n}.{a}": f"h.{n}.{b}" for n in range(settings["n_layer"]) for a, b in LECTURE_PARTS.items()}
    for theirs_name, our_name in (renamed | {"ln_f": "ln_f"}).items():
        for end in (".weight", ".bias"):
            if theirs_name + end in theirs:
                ours[our_name + end] = theirs[theirs_name + end]
    hs = settings["n_embd"] // settings["n_head"]
    for n in range(settings["n_layer"]):
        heads = [f"blocks.{n}.sa.heads.{h}" for h in range(settings["n_head"])]
        parts = [f"{head}.{kind}" for kind in ("query", "key", "value") for head in heads]
        ours[f"h.{n}.attn.c_attn.weight"] = torch.cat([theirs[f"{part}.weight"] for part in parts])
        zeros = theirs[TABLE].new_zeros(hs)
        ours[f"h.{n}.attn.c_attn.bias"] = torch.cat([theirs.get(f"{part}.bias", zeros) for part in parts])
    return ours
