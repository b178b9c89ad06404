"""nanoGPT's `ckpt.pt`, which its sample.py runs, and beside it the `meta.pkl` of a character model.

https://github.com/karpathy/nanoGPT: sample.py reads `model_args` and `model` from out_dir/ckpt.pt and the characters
from data/{dataset}/meta.pkl; without that file it uses GPT-2's tokens.
"""

import pickle
from pathlib import Path

from torch import Tensor

from milepost.ckpt import archive
from milepost.ckpt.exports.common import Proof, cannot_represent, check_gpt2, elsewhere, not_the_same, proved
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import Checkpoint, Json
from milepost.files import new_folder, written

NAME = "nanogpt"
FILE, META = "ckpt.pt", "meta.pkl"
UNKNOWN_LOSS = 1e9  # nanoGPT's value before its first evaluation


class NanoGpt:
    """Implements ckpt.exports.Export: a folder of one or two files."""

    name = NAME
    needs: tuple[str, ...] = ()
    run_stem = ""
    how = "in nanoGPT's folder: cp -r {path} data/ && python3 sample.py --out_dir=data/{name} --device=cpu"

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the folder that is nanoGPT's out_dir."""
        return [folder / stem]

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the folder. Raises CheckpointError for what nanoGPT's model or sample.py cannot represent."""
        check_gpt2(record, "nanoGPT")
        (path,) = self.targets(folder, stem)
        meta, weights = _meta(record), _their_weights(record)
        content = {
            "model": weights,
            "optimizer": None,
            "model_args": _model_args(record),
            "iter_num": record.step,
            "best_val_loss": UNKNOWN_LOSS if record.validation_loss is None else record.validation_loss,
            "config": {"dataset": stem, **_model_args(record)},
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
        expected = {name: tensor for name, tensor in record.model_state.items() if not name.startswith("lm_head.")}
        return proved(record, again, expected=expected)


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
