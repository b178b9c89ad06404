"""Read the files that torch wrote before version 1.6: five pickles one after another, then the bytes of the tensors.

The pickles are a magic number, a protocol version, facts about the machine, the content, and the keys of the storages in
the order of their bytes. Each storage is preceded by its number of elements in eight bytes. There are no checksums.
"""

import io
import mmap
import pickletools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from milepost.ckpt import pickles, torch_pickle
from milepost.ckpt.pickles import Call, NotUnderstood
from milepost.ckpt.torch_pickle import StorageKind
from milepost.lazy import torch

if TYPE_CHECKING:
    from torch import UntypedStorage

BEGIN = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number
PROTOCOL = 1001


class Parts(NamedTuple):
    """The pickle of the content, the keys of its storages in order, and the offset of the first storage."""

    content: bytes
    keys: list[str]
    start: int


def read_parts(file: io.BufferedReader, *, limit: int) -> Parts:
    """Return the parts of a file that begins with BEGIN; raise NotUnderstood, or any exception if it is damaged.

    `limit` is the most bytes of all its pickles.
    """
    file.seek(0)
    stream = io.BytesIO(file.read(limit))
    found = [_next(stream) for _ in range(5)]
    if _plain(found[1]) != PROTOCOL:
        raise NotUnderstood("it has an unknown version of torch's format before 1.6")
    machine = _plain(found[2])
    if not isinstance(machine, dict) or machine.get("little_endian") is not (sys.byteorder == "little"):
        raise NotUnderstood("its numbers are stored in another byte order")
    keys = _plain(found[4])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it does not list its storages")
    return Parts(found[3], keys, stream.tell())


def _next(stream: io.BytesIO) -> bytes:
    """Return the bytes of the next pickle in `stream`, which stands behind it then."""
    start = stream.tell()
    for count, _ in enumerate(pickletools.genops(stream)):
        if count > pickles.LIMIT:
            raise NotUnderstood(f"it has more than {pickles.LIMIT} opcodes")
    end = stream.tell()
    return stream.getbuffer()[start:end].tobytes()


def _plain(pickled: bytes) -> Any:
    def reference(_: Any) -> Any:
        raise ValueError("a reference in it is not a storage")

    return pickles.build(pickled, {}, reference=reference)


def content_of(parts: Parts, mapped: mmap.mmap) -> Any:
    """Return the value of the content, its tensors as views of the mapped file."""
    places = _places(parts, mapped)

    def storage(key: str) -> "UntypedStorage":
        start, size = places[key]
        if not size:
            return torch.UntypedStorage(0)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=size).untyped_storage()

    return torch_pickle.content_of(parts.content, storage, objects=True)


def headers_of(parts: Parts, mapped: mmap.mmap) -> Any:
    """Return the value of the content with a `torch_pickle.Header` in place of each tensor."""
    places = _places(parts, mapped)
    return torch_pickle.headers_of(parts.content, lambda key: places[key][1], objects=True)


def _places(parts: Parts, mapped: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Return offset and size in bytes of each storage; raise ValueError if they are not those of the file."""
    sizes = _element_sizes(parts.content)
    places, at = {}, parts.start
    for key in parts.keys:
        count = int.from_bytes(mapped[at : at + 8], "little")
        size = count * sizes[key]
        at += 8
        if key in places or at + size > len(mapped):
            raise ValueError("it is cut short, or its storages overlap")
        places[key], at = (at, size), at + size
    if at != len(mapped):
        raise ValueError("bytes follow its storages")
    return places


def _element_sizes(pickled: bytes) -> dict[str, int]:
    """Return the bytes of an element of each storage that the content refers to, without making a tensor."""
    sizes: dict[str, int] = {}

    def reference(wanted: Any) -> None:
        if type(wanted) is not tuple or len(wanted) != 6 or type(wanted[2]) is not str:
            raise ValueError("a reference in it is not a storage")
        if not isinstance(wanted[1], StorageKind) or wanted[5] is not None:
            raise NotUnderstood("a tensor in it has an unknown storage")
        sizes[wanted[2]] = wanted[1].itemsize

    names = torch_pickle.names_of(_nothing, objects=True)
    names |= {name: Call(_nothing) for name in names if name.startswith("torch._")}
    names |= {f"torch {name}": name for name in torch_pickle.NAMED_DTYPES}
    pickles.build(pickled, names, reference=reference, objects=True)
    return sizes


def _nothing(*_: Any) -> None:
    return None
