"""GGUF, the single file that llama.cpp and the programs built on it open: weights, sizes and tokenizer.

Written and read back with llama.cpp's own package, `gguf`. Names and shapes are those that its GPT-2 expects
(https://github.com/ggml-org/llama.cpp/blob/master/src/models/gpt2.cpp); its linear layers are (out, in), as ours are.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milepost.ckpt.exports.common import (
    Proof,
    as_gpt2,
    check_gpt2,
    proved,
    with_biases,
)
from milepost.ckpt.exports.gguf_tokens import add_tokens, tokens_of
from milepost.ckpt.record import Checkpoint
from milepost.files import new_path

NAME = "gguf"
# Types of the matrices; norms, biases and positions stay float32, as in llama.cpp's converter.
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # ours: llama.cpp's name for such a file
NAMES = {  # ours: theirs
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output", "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
BY_TOKEN = ("wte.weight", "lm_head.weight")  # a row for each token


@dataclass(frozen=True)
class Gguf:
    """Implements ckpt.exports.Export; `type` is one of TYPES."""

    type: str = "f16"
    name = NAME
    needs = ("gguf",)
    how = "llama-completion -m {path} -p 'Dear'"
    trains = False
    run_stem = ""

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the file, with its type in its name as is usual; a stem that is a whole file name stays."""
        return [folder / (stem if stem.endswith(".gguf") else f"{stem}-{self.type}.gguf")]

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the file. Raises CheckpointError for what llama.cpp's GPT-2 or its tokenizers cannot represent."""
        check_gpt2(record, "llama.cpp")
        tokens = tokens_of(record)
        (path,) = self.targets(folder, stem)
        with new_path(path) as hidden:
            writer = _library().GGUFWriter(hidden, "gpt2")
            try:
                _add_sizes(writer, record, file_type=_library().LlamaFileType[TYPES[self.type]])
                add_tokens(writer, tokens)
                self._add_tensors(writer, record, rows=len(tokens.texts))
            finally:
                writer.close()
        return path

    def _add_tensors(self, writer: Any, record: Checkpoint, *, rows: int) -> None:
        """Write all headers first, then tensor after tensor, so that no second copy of the weights is ever in
        memory.
        """
        quants = _library().quants
        weights = dict(self._typed(record, rows=rows))
        for name, (tensor, kind) in weights.items():
            shape = _library().quant_shape_to_byte_shape(tensor.shape, kind) if kind.name == "Q8_0" else tensor.shape
            stored = {"F32": np.float32, "F16": np.float16, "Q8_0": np.uint8}[kind.name]
            size = int(np.prod(shape)) * np.dtype(stored).itemsize
            writer.add_tensor_info(name, shape, np.dtype(stored), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in weights.values():
            writer.write_tensor_data(quants.quantize(tensor.float().contiguous().numpy(), kind))

    def _typed(self, record: Checkpoint, *, rows: int) -> Iterator[tuple[str, tuple[Tensor, Any]]]:
        """Yield name, tensor and type; rows that are not a multiple of Q8_0's blocks of 32 become F16."""
        kinds = _library().GGMLQuantizationType
        for name, tensor in with_biases(record).items():
            if name == "lm_head.bias":  # zeros, by check_gpt2
                continue
            kind = kinds[self.type.upper()] if name != "wpe.weight" and tensor.dim() == 2 else kinds.F32
            if kind == kinds.Q8_0 and tensor.shape[-1] % 32:
                kind = kinds.F16
            yield their_name(name), (_with_rows(tensor, rows) if name in BY_TOKEN else tensor, kind)

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Prove that llama.cpp finds the record's weights, rounded to their type; it computes the tanh GELU."""
        quants = _library().quants
        expected = {
            our_name(name): torch.from_numpy(
                quants.dequantize(quants.quantize(tensor.float().contiguous().numpy(), kind), kind)
            )
            for name, (tensor, kind) in self._typed(record, rows=len(tokens_of(record).texts))
        }
        state, rows = read_tensors(path), record.model_settings["vocab_size"]
        used = {name: tensor[:rows] if name in BY_TOKEN else tensor for name, tensor in state.items()}
        if not record.model_settings.get("tied", True):
            used["lm_head.bias"] = torch.zeros(rows)
        again = as_gpt2(record, path, used, bias=True, activation="gelu")
        rounded = "" if self.type == "f32" else f"its matrices are rounded to {self.type}"
        return proved(record, again, expected=expected, found=state, rounded=rounded)


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """Return a matrix of a row for each token with rows for tokens that the model lacks, each the mean of the others.

    The logit of such a token is the mean of the others, so it is never the largest.
    """
    if len(weight) == rows:
        return weight
    return torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(rows - len(weight), -1)])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file under our names, in float32."""
    library = _library()
    return {
        our_name(tensor.name): torch.from_numpy(np.array(library.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in library.GGUFReader(path).tensors
    }


def their_name(name: str) -> str:
    """`h.0.attn.c_attn.weight` -> `blk.0.attn_qkv.weight`."""
    block, part, end = _split(name, "h")
    return f"{f'blk.{block}.' if block else ''}{NAMES[part]}.{end}"


def our_name(name: str) -> str:
    """`blk.0.attn_qkv.weight` -> `h.0.attn.c_attn.weight`."""
    block, part, end = _split(name, "blk")
    ours = {theirs: ours for ours, theirs in NAMES.items()}
    return f"{f'h.{block}.' if block else ''}{ours[part]}.{end}"


def _split(name: str, blocks: str) -> tuple[str | None, str, str]:
    found = re.fullmatch(rf"(?:{blocks}\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert found is not None
    return found[1], found[2], found[3]


def _library() -> Any:
    """Import llama.cpp's package, an extra; the command line entry checks that it is installed."""
    return importlib.import_module("gguf")


def _add_sizes(writer: Any, record: Checkpoint, *, file_type: int) -> None:
    settings = record.model_settings
    writer.add_name(str(record.data.get("name") or "milepost"))
    writer.add_block_count(settings["n_layer"])
    writer.add_context_length(settings["block_size"])
    writer.add_embedding_length(settings["n_embd"])
    writer.add_feed_forward_length(4 * settings["n_embd"])
    writer.add_head_count(settings["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(file_type)
    writer.add_quantization_version(_library().GGML_QUANT_VERSION)
