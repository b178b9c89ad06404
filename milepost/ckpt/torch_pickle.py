"""Build the tensors of a torch pickle as views of their storages, and list the names that such a pickle may ask for.

A tensor must lie within its storage: torch itself would enlarge the storage, or read the bytes that follow it in the
file.
"""

import collections
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milepost.ckpt.pickles import Call, NotUnderstood, build
from milepost.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch import UntypedStorage

DIMENSIONS = 64  # torch's maximum


@dataclass(frozen=True, slots=True)
class StorageKind:
    """A storage class that a pickle names: its dtype, under torch's name, and the bytes of an element."""

    dtype: str
    itemsize: int


STORAGES = {
    "Double": StorageKind("float64", 8),
    "Float": StorageKind("float32", 4),
    "Half": StorageKind("float16", 2),
    "BFloat16": StorageKind("bfloat16", 2),
    "Long": StorageKind("int64", 8),
    "Int": StorageKind("int32", 4),
    "Short": StorageKind("int16", 2),
    "Char": StorageKind("int8", 1),
    "Byte": StorageKind("uint8", 1),
    "Bool": StorageKind("bool", 1),
    "ComplexFloat": StorageKind("complex64", 8),
    "ComplexDouble": StorageKind("complex128", 16),
}


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes of the file as `count` elements of a dtype; `data` has them where tensors are made of them."""

    key: str
    data: Any
    size: int  # bytes
    kind: StorageKind
    count: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a pickle says of a tensor: its dtype and shape, and of its storage the key and the bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes
    storage: str
    storage_size: int


def content_of(pickled: bytes, storage: Callable[[str], "UntypedStorage"], *, objects: bool = False) -> Any:
    """Return the value of a torch pickle, its tensors as views of what `storage` returns for their keys.

    With `objects`, objects of any class are read as plain values, as in another program's pickle. Raise Forbidden if it
    asks for anything else, NotUnderstood if it needs more, any other exception if it is damaged.
    """

    def found(key: str) -> tuple["UntypedStorage", int]:
        data = storage(key)
        return data, data.nbytes()

    dtypes = {f"torch {name}": getattr(torch, name) for name in NAMED_DTYPES}
    return _value(pickled, found, names_of(_view, objects=objects) | dtypes, objects=objects)


def headers_of(pickled: bytes, size: Callable[[str], int], *, objects: bool = False) -> Any:
    """Return what `content_of` returns with a Header in place of each tensor, which needs no torch. `size` returns the
    bytes of the storage of a key.
    """
    dtypes = {f"torch {name}": name for name in NAMED_DTYPES}
    names = names_of(_header, objects=objects) | dtypes
    return _value(pickled, lambda key: (None, size(key)), names, objects=objects)


def _value(pickled: bytes, found: Callable[[str], tuple[Any, int]], names: Mapping[str, Any], *, objects: bool) -> Any:
    """Return the value of a pickle; `found` returns a storage by its key, and its bytes."""
    storages: dict[str, _Storage] = {}

    def reference(wanted: Any) -> Any:
        if (
            objects and type(wanted) is tuple and len(wanted) == 6 and wanted[5] is None
        ):  # before 1.6: no view of another
            wanted = wanted[:5]
        unknown = objects and type(wanted) is tuple and len(wanted) == 5 and isinstance(wanted[1], str)
        return wanted if unknown else _storage(wanted, found, storages)

    return build(pickled, names, reference=reference, objects=objects)


def _storage(wanted: Any, found: Callable[[str], tuple[Any, int]], storages: dict[str, _Storage]) -> _Storage:
    """Return the storage of a persistent id: ("storage", class, key, device, number of elements)."""
    if type(wanted) is not tuple or len(wanted) != 5 or wanted[0] != "storage":
        raise ValueError("a reference in it is not a storage")
    _, kind, key, _, count = wanted
    if type(kind) is not StorageKind or type(key) is not str or type(count) is not int:
        raise ValueError("a reference in it is not a storage")
    if key not in storages:
        data, size = found(key)
        storages[key] = _Storage(key, data, size, kind, count)
    one = storages[key]
    if (one.kind, one.count) != (kind, count):  # torch uses the first for both
        raise ValueError(f"data/{key:.40} is described twice and differently")
    if one.size // kind.itemsize != count:  # torch drops an incomplete last element
        raise ValueError(f"data/{key:.40} claims {count} elements of {kind.itemsize} bytes, but has {one.size} bytes")
    return one


# ---------------------------------------------------------------------------------------------------------------------
# The names that a pickle may ask for.

NAMED_DTYPES = ("float64", "float32", "float16", "bfloat16")


def names_of(make: Callable[..., Any], *, objects: bool) -> dict[str, Any]:
    """Return what a pickle may ask for by name, but for dtypes, and of another program's pickle with `objects`.

    `make` makes a tensor of its storage, offset in elements, size and stride, which are checked.
    """
    tensor = functools.partial(_tensor, make)
    ours: dict[str, Any] = {
        "collections OrderedDict": Call(lambda: collections.OrderedDict()),
        "torch._utils _rebuild_tensor_v2": Call(tensor),
        "torch._utils _rebuild_parameter": Call(_parameter),
        "torch Size": Call(_size),
        "torch device": Call(lambda *arguments: torch.device(*arguments)),
        **{f"torch {name}Storage": kind for name, kind in STORAGES.items()},
    }
    theirs = {
        "torch._utils _rebuild_parameter_with_state": Call(_parameter),
        "torch._tensor _rebuild_from_type_v2": Call(_subclass),
    }
    return ours | (theirs if objects else {})


def _tensor(make: Callable[..., Any], storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """Return the tensor that a pickle describes, without its autograd state."""
    plain = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= DIMENSIONS
    if isinstance(storage, tuple):
        raise NotUnderstood(f"a tensor in it has the unknown storage {storage[1]!s:.40}")
    if type(storage) is not _Storage or not plain or not _are_sizes((offset, *size, *stride)):
        raise ValueError("a tensor in it has an invalid description")
    count = math.prod(size)
    last = offset + (sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if count else 0)
    if count > storage.count or last > storage.count:
        raise ValueError(f"a tensor of shape {tuple(size)} claims more bytes than the file holds for it"[:110])
    return make(storage, offset, tuple(size), tuple(stride))


def _view(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.empty(0, dtype=getattr(torch, storage.kind.dtype)).set_(storage.data, offset, size, stride)


def _header(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Header:
    return Header(storage.kind.dtype, size, math.prod(size) * storage.kind.itemsize, storage.key, storage.size)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _parameter(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, Tensor | Header):
        raise ValueError("a parameter in it is not a tensor")
    return tensor


def _size(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not _are_sizes(values):
        raise ValueError("a shape in it is invalid")
    return torch.Size(values)


def _subclass(make: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Return the plain tensor of a tensor with attributes, or of a subclass."""
    if type(make) is not Call or not isinstance(arguments, tuple):
        raise ValueError("a tensor in it has an invalid description")
    return make.function(*arguments)
