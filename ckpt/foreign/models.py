"""Another program's weights as a model of ours: by names and shapes, with what its config says where shapes cannot tell.

Known are nanoGPT (https://github.com/karpathy/nanoGPT), the two models of Karpathy's lecture
(https://github.com/karpathy/ng-video-lecture), and our own names without our metadata. Nothing is loaded in part. In the shapes below
C = n_embd, H = n_head, hs = C / H, T = block_size and V = vocab_size.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ckpt.foreign.words import SHOWN, SIZES, described, more, short, size_of, strip_prefixes
from ckpt.record import CheckpointError, Json
from ckpt.tensors import checked_tensors, same_tensor

# What each word for an activation computes: torch's nn.GELU(), which others call gelu, is the exact one, our `gelu` is GPT-2's.
OUR_ACTIVATIONS = {"gelu": "gelu", "gelu_erf": "gelu_erf", "gelu_new": "gelu", "gelu_tanh": "gelu", "relu": "relu"}
THEIR_ACTIVATIONS = OUR_ACTIVATIONS | {"gelu": "gelu_erf"}

TABLE, POSITIONS = "token_embedding_table.weight", "position_embedding_table.weight"
LECTURE_BLOCK_SIZE = 8  # of the lecture's bigram model, whose weights do not show it

Translation = tuple[str, dict[str, Json], dict[str, Tensor], list[str]]


def translated(state: Mapping[Any, Any], config: Mapping[str, Json], *, where: str, whole: bool = True) -> Translation:
    """Model type, settings, weights under our names (in the order of nanoGPT's parameters) and notes.

    Names and shapes decide what it is; `config` gives n_head, dropout and block_size where shapes cannot, and must not
    contradict them. Raises CheckpointError listing names and shapes if it is none of ours, or not wholly. If not `whole`, the
    weights stay unread, but for a head's bias and first row: those that would be made anew have shapes only.
    """
    theirs = {name: tensor for name, tensor in strip_prefixes(state, where=where).items() if not _is_mask(name, tensor)}
    _check_weights(theirs, where)
    if theirs.keys() == {TABLE}:
        return _from_bigram(theirs[TABLE], config, where)
    if TABLE in theirs and POSITIONS in theirs:
        return _from_lecture(theirs, config, where, whole=whole)
    if "wte.weight" in theirs and "wpe.weight" in theirs:
        untied_by_us = {"lm_head.weight", "lm_head.bias"} <= theirs.keys()
        nanogpt = any("transformer." in name for name in state) or ("lm_head.weight" in theirs and not untied_by_us)
        return _from_gpt2(theirs, config, where, nanogpt=nanogpt, whole=whole)
    listed = ", ".join(described(name, tensor) for name, tensor in list(theirs.items())[:SHOWN])
    raise CheckpointError(
        f"{where}: its weights are of no model that milepost knows: {listed}{more(theirs)}; expected those of nanoGPT, of the lecture's models or of milepost"
    )


def _is_mask(name: str, tensor: Any) -> bool:
    """Whether it is a causal mask or its fill value, which some programs store beside the weights."""
    if not isinstance(tensor, Tensor):
        return False
    if re.fullmatch(r"h\.[0-9]+\.attn\.bias", name):
        return tensor.dim() == 4 and tensor.shape[:2] == (1, 1)
    if re.fullmatch(r"h\.[0-9]+\.attn\.masked_bias", name):
        return tensor.dim() == 0
    return tensor.dim() == 2 and re.fullmatch(r"blocks\.[0-9]+\.sa\.heads\.[0-9]+\.tril", name) is not None


def _check_weights(state: dict[str, Any], where: str) -> None:
    if not state:
        raise CheckpointError(f"{where}: holds no weights, expected those of a model: try an earlier checkpoint")
    for name, tensor in checked_tensors(state, where).items():
        if not tensor.numel():
            raise CheckpointError(f"{where}: {described(name, tensor)} is empty, expected weights")


def _from_bigram(table: Tensor, config: Mapping[str, Json], where: str) -> Translation:
    if table.dim() != 2 or table.shape[0] != table.shape[1]:
        raise CheckpointError(
            f"{where}: {described(TABLE, table)} is no bigram model's: expected as many columns as rows"
        )
    block_size = size_of(config, "block_size", where=where)
    notes = []
    if block_size is None:
        block_size = LECTURE_BLOCK_SIZE
        notes.append(
            f"{where}: says no block_size; {block_size} is taken, which only sets how long training windows are"
        )
    settings: dict[str, Json] = {"vocab_size": table.shape[0], "block_size": block_size}
    _check_sizes(settings, config, where)
    return "bigram", settings, {TABLE: table}, notes


def _from_gpt2(
    theirs: dict[str, Tensor], config: Mapping[str, Json], where: str, *, nanogpt: bool, whole: bool
) -> Translation:
    """Our own names, which are nanoGPT's too: both have nn.Linear's orientation and query, key, value in one."""
    sizes = _table_sizes(theirs, "wte.weight", "wpe.weight", where)
    layers = {found[1] for name in theirs if (found := re.match(r"h\.(0|[1-9][0-9]{0,5})\.", name))}
    tied, head, notes = _head(theirs, theirs["wte.weight"], config, where, whole=whole)
    ours = {name: tensor for name, tensor in theirs.items() if not name.startswith("lm_head.")} | head
    bias = "ln_f.bias" in theirs
    settings: dict[str, Json] = sizes | {"n_layer": max(1, len(layers))}
    shapes = _gpt2_shapes(settings, bias=bias, tied=tied)
    _check_fit(shapes, ours, where)
    settings |= {"n_head": _n_head(config, sizes["n_embd"], where), "dropout": _dropout(config, where), "bias": bias}
    words, usual = (THEIR_ACTIVATIONS, "gelu_erf") if nanogpt else (OUR_ACTIVATIONS, "gelu")
    settings |= {"activation": _activation(config, words, usual, where), "tied": tied}
    _check_sizes(settings, config, where)
    if type(config.get("bias")) is bool and config["bias"] is not bias:
        raise CheckpointError(
            f"{where}: bias is {config['bias']} in its config, but {bias} by its weights: correct it there"
        )
    if nanogpt and config.get("activation") is None:
        notes.append(f"{where}: read as nanoGPT's, with the exact GELU that it computes since May 2023")
    return "gpt2", settings, {name: ours[name] for name in shapes}, notes


def _table_sizes(theirs: Mapping[str, Tensor], tokens: str, positions: str, where: str) -> dict[str, Json]:
    """vocab_size, block_size and n_embd by the two embeddings, (V, C) and (T, C)."""
    for name in (tokens, positions):
        if theirs[name].dim() != 2:
            raise CheckpointError(f"{where}: {described(name, theirs[name])} is no embedding, expected two dimensions")
    vocab_size, n_embd = theirs[tokens].shape
    return {"vocab_size": vocab_size, "block_size": theirs[positions].shape[0], "n_embd": n_embd}


def _head(
    theirs: Mapping[str, Tensor], embedding: Tensor, config: Mapping[str, Json], where: str, *, whole: bool
) -> tuple[bool, dict[str, Tensor], list[str]]:
    """Whether the head is the embedding again; if it is not, the head's own tensors; and a note where that may surprise."""
    weight, bias = theirs.get("lm_head.weight"), theirs.get("lm_head.bias")
    twin = weight is None or same_tensor(weight, embedding, whole=whole)
    unbiased = bias is None or (bias.shape == embedding.shape[:1] and not bias.any())
    tied = config["tied"] if type(config.get("tied")) is bool else twin and unbiased
    if tied:
        if not (twin and unbiased):
            raise CheckpointError(
                f"{where}: tied is True in its config, but its lm_head is not its embedding: it is damaged"
            )
        return True, {}, []
    head = (
        {} if weight is None else {"lm_head.weight": weight.clone() if twin and whole else weight}
    )  # twins may share memory
    head["lm_head.bias"] = embedding.new_zeros(embedding.shape[0]) if bias is None else bias
    missing = "lm_head.weight differs from the token embedding and is kept as a head of its own"
    return False, head, [f"{where}: {missing}"] if bias is None and weight is not None else []


def _gpt2_shapes(sizes: Mapping[str, Any], *, bias: bool, tied: bool) -> dict[str, tuple[int, ...]]:
    """Our names and shapes, in the order in which nanoGPT's named_parameters() has them."""
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
    """Raises CheckpointError listing what is unknown, missing (unless its name ends in `optional`) or of another shape."""
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
    hint = "; transposed weights are Hugging Face's: give the folder that save_pretrained() wrote" if turned else ""
    raise CheckpointError(
        f"{where}: its weights cannot be translated, and none were: {'; '.join(problems[:SHOWN])}{more(problems)}{hint}"
    )


def _check_sizes(settings: Mapping[str, Json], config: Mapping[str, Json], where: str) -> None:
    """Raises CheckpointError where `config` contradicts what the weights show."""
    for size in SIZES.keys() & settings.keys():
        said = size_of(config, size, where=where)
        if said is not None and said != settings[size]:
            raise CheckpointError(
                f"{where}: {size} is {said} in its config, but {settings[size]} by its weights: take the config that was saved with them"
            )


def _n_head(config: Mapping[str, Json], n_embd: int, where: str) -> int:
    n_head = size_of(config, "n_head", where=where)
    if n_head is None:
        raise CheckpointError(
            f'{where}: n_head cannot be told from shapes, and nothing says it; put it in config.json beside the file: {{"n_head": 6}}'
        )
    if n_embd % n_head:
        raise CheckpointError(
            f"{where}: n_head is {n_head} in its config, which does not divide its width n_embd={n_embd}: correct it there"
        )
    return n_head


def _dropout(config: Mapping[str, Json], where: str) -> float:
    value = config.get("dropout")
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise CheckpointError(
            f"{where}: dropout is {short(value)} in its config, expected a number from 0 to below 1: correct it there"
        )
    return float(value)


def _activation(config: Mapping[str, Json], words: Mapping[str, str], usual: str, where: str) -> str:
    value = config.get("activation")
    if value is None:
        return usual
    if not isinstance(value, str) or value not in words:
        raise CheckpointError(
            f"{where}: activation is {short(value)} in its config, expected one of {', '.join(words)}: no other is computed here"
        )
    return words[value]


# The lecture's GPT (https://github.com/karpathy/ng-video-lecture/blob/master/gpt.py): a Linear without bias for query, key and
# value of each head, an untied head, ReLU.

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
    n_layer = max(1, len({one[1] for one in found if one}))
    n_head = max(1, len({one[2] for one in found if one and one[2]}))
    if 3 * n_layer * n_head > len(theirs) or sizes["n_embd"] % n_head:
        raise CheckpointError(
            f"{where}: its weights cannot be translated: {n_layer} blocks of {n_head} heads make no model of {len(theirs)} tensors and a width of {sizes['n_embd']}"
        )
    settings: dict[str, Json] = sizes | {"n_layer": n_layer, "n_head": n_head}
    _check_fit(_lecture_shapes(settings), theirs, where, optional=".bias")
    tied, head, _ = _head(theirs, theirs[TABLE], config, where, whole=whole)
    settings |= {"dropout": _dropout(config, where), "bias": True}
    settings |= {"activation": _activation(config, THEIR_ACTIVATIONS, "relu", where), "tied": tied}
    _check_sizes(settings, config, where)
    if not whole:  # joining them would read them
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
    """What is there of our names but the head, query, key and value of all heads joined: their rows in this order, (3C, C)."""
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
        none = theirs[TABLE].new_zeros(hs)
        ours[f"h.{n}.attn.c_attn.bias"] = torch.cat([theirs.get(f"{part}.bias", none) for part in parts])
    return ours
