"""What differs between the models in a GGUF file: names, sizes, and the order of some values."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from milepost.ckpt.record import Checkpoint


@dataclass(frozen=True)
class GgufModel:
    """How llama.cpp holds one of our models. A tensor is `blk.0.attn_q.weight` there, a file's values have the order that
    llama.cpp computes with.
    """

    blocks: str  # the list of blocks in our names: `h` in h.0.attn.c_attn.weight
    names: Mapping[str, str]  # our name of a layer, without block and ending: theirs
    by_token: tuple[str, ...]  # our matrices with a row for each token
    full_precision: tuple[str, ...]  # our matrices that stay float32
    architecture: Callable[[Checkpoint], str]  # its name there; raises CheckpointError if llama.cpp has no such model
    add_sizes: Callable[[Any, Checkpoint], None]  # to a GGUFWriter
    weights: Callable[[Checkpoint], dict[str, Tensor]]  # under our names, in their order
    opened: Callable[[Checkpoint, Path, dict[str, Tensor]], Checkpoint]  # the model that these weights are there

    def their_name(self, name: str) -> str:
        """`h.0.attn.c_attn.weight` -> `blk.0.attn_qkv.weight`."""
        block, part, end = _split(name, self.blocks)
        return f"{f'blk.{block}.' if block else ''}{self.names[part]}.{end}"

    def our_name(self, name: str) -> str:
        """`blk.0.attn_qkv.weight` -> `h.0.attn.c_attn.weight`."""
        block, part, end = _split(name, "blk")
        ours = {theirs: ours for ours, theirs in self.names.items()}
        return f"{f'{self.blocks}.{block}.' if block else ''}{ours[part]}.{end}"


def _split(name: str, blocks: str) -> tuple[str | None, str, str]:
    found = re.fullmatch(rf"(?:{blocks}\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert found is not None
    return found[1], found[2], found[3]
