"""The GPT and bigram model of Karpathy's lecture in `model.pt`, `config.json`, `tokenizer.json`, `training_state.json`.

https://github.com/karpathy/ng-video-lecture/blob/master/gpt.py: a Linear without bias for query, key and value of each
head, ReLU, and a head with a bias that is not tied to the embedding.
"""

from pathlib import Path

import torch
from torch import Tensor

from milepost.ckpt import archive
from milepost.ckpt.exports.common import (
    HERE_ONLY,
    Proof,
    cannot_represent,
    check_additions,
    elsewhere,
    not_the_same,
    proved,
    with_biases,
)
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import Checkpoint, Json
from milepost.files import new_folder, write_json, written

NAME = "lecture"
MODEL, CONFIG, TOKENIZER, STATE = "model.pt", "config.json", "tokenizer.json", "training_state.json"
TABLE = "token_embedding_table.weight"
OUTER = {"wte": "token_embedding_table", "wpe": "position_embedding_table", "ln_f": "ln_f", "lm_head": "lm_head"}
INNER = {  # of our h.N: of blocks.N
    "ln_1": "ln1", "attn.c_proj": "sa.proj", "ln_2": "ln2", "mlp.c_fc": "ffwd.net.0", "mlp.c_proj": "ffwd.net.2",
}  # fmt: skip
KINDS = ("query", "key", "value")  # in the order of c_attn's rows


class Lecture:
    """Implements ckpt.exports.Export: a folder of four files."""

    name = NAME
    needs: tuple[str, ...] = ()
    trains = False
    run_stem = ""

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the folder, which has the model's name."""
        return [folder / stem]

    def how(self, path: Path) -> str:
        """Return the statement that loads the weights into the lecture's model."""
        statement = f"model.load_state_dict(torch.load({str(path / 'model.pt')!r}))"
        return f"in Python: {statement}, where model has the sizes of its config.json"

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the folder. Raises CheckpointError for what the lecture's models or tokenizers cannot represent."""
        (path,) = self.targets(folder, stem)
        tokenizer, weights = _their_tokenizer(record), _their_weights(record)
        with new_folder(path) as hidden:
            with written(hidden / MODEL) as file:
                archive.dump(weights, file)
            write_json(hidden / CONFIG, _their_config(record))
            write_json(hidden / TOKENIZER, tokenizer)
            write_json(hidden / STATE, {"step": record.step, "optimizer_file": None})
        return path

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Prove that the folder, read back, has the record's weights and tokens."""
        again = known_layout(path).read(path, verify=True)
        if again.tokenizer != record.tokenizer:
            raise not_the_same(path / TOKENIZER, "tokens", record)
        if record.model_type == "bigram":
            return proved(record, again, expected=record.model_state)
        return proved(record, again, expected={name: _full(record)[name] for name in again.model_state})


def _their_tokenizer(record: Checkpoint) -> dict[str, Json]:
    """Return the tokenizer under the document's names; raise CheckpointError for one that its programs lack."""
    tokenizer = record.tokenizer or {"kind": "no tokenizer"}
    if tokenizer["kind"] not in ("char", "gpt2"):
        problem = (
            f"its tokenizer is {tokenizer['kind']}; the lecture's programs have only characters and GPT-2's tokens"
        )
        raise cannot_represent(record, problem, f"{elsewhere(record)}, or train with TOKENIZER=char or gpt2")
    return {"token_kind": tokenizer["kind"]} | ({"chars": tokenizer["chars"]} if tokenizer["kind"] == "char" else {})


def _their_config(record: Checkpoint) -> dict[str, Json]:
    ours = record.model_settings
    sizes: dict[str, Json] = {
        name: ours[name] for name in ("block_size", "vocab_size", "n_embd", "n_head", "n_layer") if name in ours
    }
    batch_size = record.hyperparameters.get("BATCH_SIZE")
    return {"batch_size": batch_size, **sizes, "dropout": ours.get("dropout", 0.0), "bias": False, "device": "cpu"}


def _full(record: Checkpoint) -> dict[str, Tensor]:
    """Return the weights with zeros for biases that the model lacks, and with a head of its own."""
    weights = with_biases(record)
    bias = weights["wte.weight"].new_zeros(len(weights["wte.weight"]))
    return {"lm_head.weight": weights["wte.weight"], "lm_head.bias": bias} | weights


def _their_weights(record: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict of the lecture's model; raise CheckpointError for a model that it does not compute."""
    if record.model_type == "bigram":
        return {TABLE: record.model_state[TABLE]}
    _check(record)
    ours, settings = _full(record), record.model_settings
    theirs = {
        f"{OUTER[name]}.{end}": ours[f"{name}.{end}"]
        for name in OUTER
        for end in ("weight", "bias")
        if f"{name}.{end}" in ours
    }
    mask = torch.tril(torch.ones(settings["block_size"], settings["block_size"]))  # (T, T), a buffer of each head
    for block in range(settings["n_layer"]):
        for name, their_name in INNER.items():
            for end in ("weight", "bias"):
                theirs[f"blocks.{block}.{their_name}.{end}"] = ours[f"h.{block}.{name}.{end}"]
        for kind, rows in zip(KINDS, ours[f"h.{block}.attn.c_attn.weight"].chunk(3), strict=True):  # each (C, C)
            for head, part in enumerate(rows.chunk(settings["n_head"])):  # each (head size, C)
                theirs[f"blocks.{block}.sa.heads.{head}.{kind}.weight"] = part
                theirs[f"blocks.{block}.sa.heads.{head}.tril"] = mask
    return theirs


def _check(record: Checkpoint) -> None:
    """Raise CheckpointError unless it is a GPT-2 with ReLU whose query, key and value have no bias."""
    if record.model_type != "gpt2":
        problem = f"is a {record.model_type}; the lecture has no such model"
        raise cannot_represent(record, problem, HERE_ONLY)
    check_additions(record, "the lecture")
    activation = record.model_settings.get("activation", "gelu")
    if activation != "relu":
        raise cannot_represent(
            record, f"its activation is {activation}; the lecture's GPT has only ReLU", elsewhere(record)
        )
    biased = [name for name, tensor in record.model_state.items() if name.endswith("attn.c_attn.bias") and tensor.any()]
    if biased:
        problem = f"{biased[0]} is not zero; the lecture's query, key and value have no bias"
        raise cannot_represent(record, problem, elsewhere(record))
