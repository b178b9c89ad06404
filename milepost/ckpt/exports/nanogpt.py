"""nanoGPT's `ckpt.pt`, which its sample.py runs and its train.py resumes, and beside it the `meta.pkl` of a character
model.

https://github.com/karpathy/nanoGPT: sample.py reads `model_args` and `model` from out_dir/ckpt.pt and the characters
from data/{dataset}/meta.pkl; without that file it uses GPT-2's tokens.
"""

import pickle
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milepost.ckpt import archive
from milepost.ckpt.exports.common import (
    Proof,
    cannot_represent,
    check_gpt2,
    elsewhere,
    not_the_same,
    proved,
    weight_shapes,
)
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import Checkpoint, Json
from milepost.ckpt.tensor_listing import differing, labelled
from milepost.files import new_folder, written

NAME = "nanogpt"
FILE, META = "ckpt.pt", "meta.pkl"
ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # its state of a parameter
UNKNOWN_LOSS = 1e9  # nanoGPT's value before its first evaluation


class NanoGpt:
    """Implements ckpt.exports.Export: a folder of one or two files."""

    name = NAME
    needs: tuple[str, ...] = ()
    trains = True
    run_stem = ""

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the folder that is nanoGPT's out_dir."""
        return [folder / stem]

    def how(self, path: Path) -> str:
        """Return the commands that sample from it in nanoGPT."""
        copied = shlex.quote(f"data/{path.name}")
        return f"in nanoGPT's folder: cp -r {shlex.quote(str(path))} data/ && python3 sample.py --out_dir={copied} --device=cpu"

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the folder. Raises CheckpointError for what nanoGPT's model or sample.py cannot represent."""
        check_gpt2(record, "nanoGPT")
        (path,) = self.targets(folder, stem)
        meta, weights = _meta(record), _their_weights(record)
        content = {
            "model": weights,
            "optimizer": _their_optimizer(record),
            "model_args": _model_args(record),
            "iter_num": record.step,
            "best_val_loss": UNKNOWN_LOSS if record.validation_loss is None else record.validation_loss,
            "config": {**_their_config(record), "dataset": stem, **_model_args(record)},
        }
        with new_folder(path) as hidden:
            with written(hidden / FILE) as file:
                archive.dump(content, file)
            if meta is not None:
                with written(hidden / META) as file:
                    file.write(pickle.dumps(meta, protocol=4))
        return path

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Prove that nanoGPT finds the record's weights and characters; it computes the exact GELU."""
        again = known_layout(path / FILE).read(path / FILE, verify=True)
        kind = (record.tokenizer or {}).get("kind")
        if kind == "char" and again.tokenizer != record.tokenizer:
            raise not_the_same(path / META, "characters", record)
        if other := differing(*map(_moments, (_taken(record), again))):
            raise not_the_same(path / FILE, "moments", record, ", ".join(list(other)[:3]))
        expected = {name: tensor for name, tensor in record.model_state.items() if not name.startswith("lm_head.")}
        return proved(record, again, expected=expected)


def _their_config(record: Checkpoint) -> dict[str, Json]:
    """Return the settings of the program's own file that the record was imported from; empty for any other record."""
    values = (record.imported or {}).get("values", {})
    config = values.get("config") if "model_args" in values else None
    return config if isinstance(config, dict) else {}


def _their_optimizer(record: Checkpoint) -> dict[str, Any] | None:
    """Return the state of AdamW in the two groups of nanoGPT, with and without weight decay; None if it is another
    optimizer's.

    The parameters of two dimensions come first, then the others, both in the order of the modules.
    """
    if _taken(record).optimizer_state is None:
        return None
    groups = record.optimizer_state["param_groups"] if record.optimizer_state else []
    named = {
        name: (index, group)
        for group in groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    names = list(weight_shapes(record.model_settings))
    matrices = [name for name in names if record.model_state[name].dim() >= 2]
    vectors = [name for name in names if name not in matrices]
    usual = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    theirs, start = [], 0
    for own in (matrices, vectors):
        saved = named[own[0]][1]
        theirs.append(
            {
                **usual,
                **{name: saved[name] for name in usual.keys() & saved.keys()},
                "params": [*range(start, start + len(own))],
            }
        )
        start += len(own)
    state = record.optimizer_state["state"] if record.optimizer_state else {}
    return {
        "state": {place: dict(state[named[name][0]]) for place, name in enumerate(matrices + vectors)},
        "param_groups": theirs,
    }


def _taken(record: Checkpoint) -> Checkpoint:
    """Return the record, without its optimizer state unless that is AdamW's for every parameter."""
    names = set(weight_shapes(record.model_settings)) if record.model_type == "gpt2" else set()
    groups = (record.optimizer_state or {"param_groups": []})["param_groups"]
    state = (record.optimizer_state or {"state": {}})["state"]
    whole = {name for group in groups for name in group["param_names"]} == names
    if names and whole and len(state) == len(names) and all(moments.keys() == ADAMW for moments in state.values()):
        return record
    return replace(record, optimizer_state=None)


def _moments(record: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in labelled(record).items() if name.startswith("optimizer: ")}


def _meta(record: Checkpoint) -> dict[str, Json] | None:
    """Return the content of meta.pkl, None for GPT-2's tokens; raise CheckpointError for another tokenizer."""
    tokenizer = record.tokenizer or {"kind": "no tokenizer"}
    if tokenizer["kind"] == "gpt2":
        return None
    if tokenizer["kind"] != "char":
        problem = f"its tokenizer is {tokenizer['kind']}; nanoGPT's sample.py has only characters and GPT-2's tokens"
        raise cannot_represent(record, problem, f"{elsewhere(record)}, or train with TOKENIZER=char or gpt2")
    chars = tokenizer["chars"]
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {char: i for i, char in enumerate(chars)}}


def _model_args(record: Checkpoint) -> dict[str, Json]:
    usual = {"bias": True, "dropout": 0.0}
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    return {name: record.model_settings.get(name, usual.get(name)) for name in names}


def _their_weights(record: Checkpoint) -> dict[str, Tensor]:
    """Return the weights under nanoGPT's names, with the tied head; raise CheckpointError for an untied one."""
    if not record.model_settings.get("tied", True):
        problem = "has a head of its own; nanoGPT's model ties it to the embedding"
        raise cannot_represent(record, problem, elsewhere(record))
    weights = {f"transformer.{name}": tensor for name, tensor in record.model_state.items()}
    return weights | {"lm_head.weight": record.model_state["wte.weight"]}
