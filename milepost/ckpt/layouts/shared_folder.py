"""The part of a `consolidated` checkpoint to share, as a folder of its own, read only: `consolidated.safetensors` or, for
adapters without their base, `lora.safetensors`; `config.json` and `tokenizer.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.ckpt.layouts.foreign_layout import ForeignLayout, ForeignReader
from milepost.ckpt.manifest import is_regular
from milepost.ckpt.tensors import read_safetensors
from milepost.ckpt.weight_files import has_weights

WEIGHTS, ADAPTERS, CONFIG = "consolidated.safetensors", "lora.safetensors", "config.json"


def _weights(path: Path) -> Path:
    return path / (WEIGHTS if is_regular(path / WEIGHTS) else ADAPTERS)


def _claims(path: Path) -> bool:
    """Whether `path` is a folder with the weights and their config.

    Under its own name, `consolidated`, it is part of the folder around it, which the consolidated layout reads. Beside weights
    of transformers the file is Mistral's second copy of them.
    """
    if path.name == "consolidated" or not path.is_dir() or has_weights(path):
        return False
    return is_regular(_weights(path)) and is_regular(path / CONFIG)


def _content(path: Path, optimizer: bool) -> Mapping[str, Any]:
    return {"model": read_safetensors(_weights(path))}


LAYOUT = ForeignLayout(
    name="shared_folder",
    members=(WEIGHTS, ADAPTERS, CONFIG, "tokenizer.json"),
    suffixes=(),
    claims=_claims,
    reader=ForeignReader(layout="consolidated", content=_content, source=_weights, checksums=None),
)
