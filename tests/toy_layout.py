"""A layout from outside the package: a folder with one safetensors file per tensor, for test_extending_layout.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from milepost.ckpt.layouts.manifest_layout import Locate, Made, ManifestLayout
from milepost.ckpt.tensors import read_safetensors, write_safetensors


@dataclass(frozen=True)
class FilePerTensor:
    """Each tensor in `folder/{name}.safetensors`."""

    folder: str
    single: bool = False

    @property
    def pattern(self) -> str:
        return f"{self.folder}/*.safetensors"

    def write(self, locate: Locate, tensors: Mapping[str, Tensor]) -> Made:
        files = {name: f"{self.folder}/{name}.safetensors" for name in tensors}
        return {file: write_safetensors(locate(file), {name: tensors[name]}) for name, file in files.items()}

    def read(self, locate: Locate, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: tensor for file in names for name, tensor in read_safetensors(locate(file)).items()}


LAYOUT = ManifestLayout(
    name="per_tensor",
    members=("weights/*.safetensors", "optimizer/*.safetensors", "index.json"),
    manifest="index.json",
    weights=FilePerTensor("weights"),
    optimizer=FilePerTensor("optimizer"),
)
