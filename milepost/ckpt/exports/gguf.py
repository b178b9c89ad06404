"""GGUF, the single file that llama.cpp and the programs built on it open: weights, sizes and tokenizer.

Written and read back with llama.cpp's own package, `gguf`. Names and shapes are those that its models expect: a file for
each of ours, gguf_gpt2.py and gguf_llama.py.
"""

import importlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milepost.ckpt.exports import gguf_gpt2, gguf_llama
from milepost.ckpt.exports.common import Proof, cannot_represent, elsewhere, proved
from milepost.ckpt.exports.gguf_models import GgufModel
from milepost.ckpt.exports.gguf_tokens import add_tokens, tokens_of
from milepost.ckpt.record import Checkpoint
from milepost.ckpt.saved_tokenizer import chat_template
from milepost.files import new_path

NAME = "gguf"
# Types of the matrices; norms, biases and positions stay float32, as in llama.cpp's converter.
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # ours: llama.cpp's name for such a file
# The largest number of a type; those of Q8_0 are at most 127 times a float16.
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}
MODELS = {"gpt2": gguf_gpt2.MODEL, "llama": gguf_llama.MODEL}


@dataclass(frozen=True)
class Gguf:
    """Implements ckpt.exports.Export; `type` is one of TYPES."""

    type: str = "f16"
    name = NAME
    needs = ("gguf",)
    trains = False
    run_stem = ""

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the file, with its type in its name as is usual; a stem that is a whole file name stays."""
        return [folder / (stem if stem.endswith(".gguf") else f"{stem}-{self.type}.gguf")]

    def how(self, path: Path) -> str:
        """Return the command of llama.cpp that continues a text."""
        return f"llama-completion -m {shlex.quote(str(path))} -p 'Dear'"

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the file. Raises CheckpointError for what llama.cpp's models or its tokenizers cannot represent."""
        architecture = _model(record).architecture(record)
        tokens = tokens_of(record)
        self._check_range(record, rows=len(tokens.texts))
        (path,) = self.targets(folder, stem)
        with new_path(path) as hidden:
            writer = _library().GGUFWriter(hidden, architecture)
            try:
                _add_sizes(writer, record, file_type=_library().LlamaFileType[TYPES[self.type]])
                add_tokens(writer, tokens)
                if template := chat_template(record):
                    writer.add_chat_template(template)
                self._add_tensors(writer, record, rows=len(tokens.texts))
            finally:
                writer.close()
        return path

    def _check_range(self, record: Checkpoint, *, rows: int) -> None:
        """Raise CheckpointError if a number would become infinite in its type."""
        for name, (tensor, kind) in self._typed(record, rows=rows):
            largest = float(tensor.abs().max())
            if largest > LARGEST.get(kind.name, float("inf")):
                problem = (
                    f"{name} holds {largest:.3g}, and {kind.name.lower()} no number above {LARGEST[kind.name]:.3g}"
                )
                raise cannot_represent(record, problem, "use GGUF_TYPE=f32, which can represent it")

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
        kinds, model = _library().GGMLQuantizationType, _model(record)
        for name, tensor in model.weights(record).items():
            matrix = tensor.dim() == 2 and name not in model.full_precision
            kind = kinds[self.type.upper()] if matrix else kinds.F32
            if kind == kinds.Q8_0 and tensor.shape[-1] % 32:
                kind = kinds.F16
            yield model.their_name(name), (_with_rows(tensor, rows) if name in model.by_token else tensor, kind)

    def proof(self, record: Checkpoint, path: Path) -> Proof:
        """Prove that llama.cpp finds the record's weights, rounded to their type."""
        quants, model = _library().quants, _model(record)
        expected = {
            name: torch.from_numpy(quants.dequantize(quants.quantize(tensor.float().contiguous().numpy(), kind), kind))
            for name, (tensor, kind) in self._typed(record, rows=len(tokens_of(record).texts))
        }
        state, rows = read_tensors(path), record.model_settings["vocab_size"]
        ours = {model.our_name(name): tensor for name, tensor in state.items()}
        used = {name: tensor[:rows] if name in model.by_token else tensor for name, tensor in ours.items()}
        again = model.opened(record, path, used)
        rounded = "" if self.type == "f32" else f"its matrices are rounded to {self.type}"
        return proved(record, again, expected=expected, found=state, rounded=rounded)


def _model(record: Checkpoint) -> GgufModel:
    """Return how llama.cpp holds a model of the record's type. Raises CheckpointError if it has none."""
    if record.model_type not in MODELS:
        problem = f"is a {record.model_type}; llama.cpp has no such model"
        raise cannot_represent(record, problem, elsewhere(record))
    return MODELS[record.model_type]


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """Return a matrix of a row for each token with rows for tokens that the model lacks, each the mean of the others.

    The logit of such a token is the mean of the others, so it is never the largest.
    """
    if len(weight) == rows:
        return weight
    return torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(rows - len(weight), -1)])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file under their names there, in float32."""
    library = _library()
    return {
        tensor.name: torch.from_numpy(np.array(library.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in library.GGUFReader(path).tensors
    }


def _library() -> Any:
    """Import llama.cpp's package, an extra; the command line entry checks that it is installed."""
    return importlib.import_module("gguf")


def _add_sizes(writer: Any, record: Checkpoint, *, file_type: int) -> None:
    settings = record.model_settings
    writer.add_name(str(record.data.get("name") or "milepost"))
    writer.add_block_count(settings["n_layer"])
    writer.add_context_length(settings["block_size"])
    writer.add_embedding_length(settings["n_embd"])
    writer.add_head_count(settings["n_head"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(_library().GGML_QUANT_VERSION)
    _model(record).add_sizes(writer, record)
