"""The dtypes of the tensors in a checkpoint, under torch's names. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Dtype(NamedTuple):
    """A dtype: the bytes of an element, its name in safetensors files, and the storage class that torch's pickles name."""

    itemsize: int
    safetensors: str
    storage: str


# In the order of the safetensors library: larger elements first, so that every tensor is aligned for its dtype.
DTYPES = {
    "int64": Dtype(8, "I64", "LongStorage"),
    "float64": Dtype(8, "F64", "DoubleStorage"),
    "float32": Dtype(4, "F32", "FloatStorage"),
    "int32": Dtype(4, "I32", "IntStorage"),
    "bfloat16": Dtype(2, "BF16", "BFloat16Storage"),
    "float16": Dtype(2, "F16", "HalfStorage"),
}
BY_SAFETENSORS = {dtype.safetensors: name for name, dtype in DTYPES.items()}
FLOATS = ("float64", "float32", "bfloat16", "float16")  # allowed for weights and moments


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype of torch: `float32`."""
    return str(dtype).removeprefix("torch.")
