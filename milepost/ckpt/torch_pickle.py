"""Build the tensors of a torch pickle as views of their storages, and list the names that such a pickle may ask for.

A tensor must lie within its storage: torch itself would enlarge the storage, or read the bytes that follow it in the
file.
"""

import collections
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from milepost.ckpt.pickles import Call, NotUnderstood, build

DIMENSIONS = 64  # torch's maximum
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}


@dataclass(frozen=True, slots=True)
class StorageKind:
    """A storage class that a pickle names."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes of the file as `count` elements of a dtype."""

    data: UntypedStorage
    dtype: torch.dtype
    count: int


def content_of(pickled: bytes, storage: Callable[[str], UntypedStorage], *, objects: bool = False) -> Any:
    """Return the value of a torch pickle, its tensors as views of what `storage` returns for their keys.

    With `objects`, objects of any class are read as plain values, as in another program's pickle. Raise Forbidden if it
    asks for anything else, NotUnderstood if it needs more, any other exception if it is damaged.
    """
    storages: dict[str, _Storage] = {}

    def reference(wanted: Any) -> Any:
        if (
            objects and type(wanted) is tuple and len(wanted) == 6 and wanted[5] is None
        ):  # before 1.6: no view of another
            wanted = wanted[:5]
        unknown = objects and type(wanted) is tuple and len(wanted) == 5 and isinstance(wanted[1], str)
        return wanted if unknown else _storage(wanted, storage, storages)

    return build(pickled, THEIR_NAMES if objects else NAMES, reference=reference, objects=objects)


def _storage(wanted: Any, storage: Callable[[str], UntypedStorage], storages: dict[str, _Storage]) -> _Storage:
    """Return the storage of a persistent id: ("storage", class, key, device, number of elements)."""
    if type(wanted) is not tuple or len(wanted) != 5 or wanted[0] != "storage":
        raise ValueError("a reference in it is not a storage")
    _, kind, key, _, count = wanted
    if type(kind) is not StorageKind or type(key) is not str or type(count) is not int:
        raise ValueError("a reference in it is not a storage")
    if key not in storages:
        storages[key] = _Storage(storage(key), kind.dtype, count)
    found, itemsize = storages[key], kind.dtype.itemsize
    if (found.dtype, found.count) != (kind.dtype, count):  # torch uses the first for both
        raise ValueError(f"data/{key:.40} is described twice and differently")
    size = found.data.nbytes()
    if size // itemsize != count:  # torch drops an incomplete last element
        raise ValueError(f"data/{key:.40} claims {count} elements of {itemsize} bytes, but has {size} bytes")
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return the view of a storage that a pickle describes, without its autograd state."""
    plain = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= DIMENSIONS
    if isinstance(storage, tuple):
        raise NotUnderstood(f"a tensor in it has the unknown storage {storage[1]!s:.40}")
    if type(storage) is not _Storage or not plain or not _are_sizes((offset, *size, *stride)):
        raise ValueError("a tensor in it has an invalid description")
    count = math.prod(size)
    last = offset + (sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if count else 0)
    if count > storage.count or last > storage.count:
        raise ValueError(f"a tensor of shape {tuple(size)} claims more bytes than the file holds for it"[:110])
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, tuple(size), tuple(stride))


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter in it is not a tensor")
    return tensor


def _size(values: Any) -> torch.Size:
    if not isinstance(values, tuple) or not _are_sizes(values):
        raise ValueError("a shape in it is invalid")
    return torch.Size(values)


NAMES: dict[str, Any] = {
    "collections OrderedDict": Call(lambda: collections.OrderedDict()),
    "torch._utils _rebuild_tensor_v2": Call(_tensor),
    "torch._utils _rebuild_parameter": Call(_parameter),
    "torch Size": Call(_size),
    "torch device": Call(torch.device),
    **{f"torch {name}": getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")},
    **{f"torch {name}Storage": StorageKind(dtype) for name, dtype in STORAGES.items()},
}


def _subclass(make: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Return the plain tensor of a tensor with attributes, or of a subclass."""
    if type(make) is not Call or not isinstance(arguments, tuple):
        raise ValueError("a tensor in it has an invalid description")
    return make.function(*arguments)


THEIR_NAMES: Mapping[str, Any] = NAMES | {
    "torch._utils _rebuild_parameter_with_state": Call(_parameter),
    "torch._tensor _rebuild_from_type_v2": Call(_subclass),
}
