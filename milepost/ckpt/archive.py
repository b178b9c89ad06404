"""A torch archive: a zip file of a pickle, of tensors, and of one JSON member, so that what it is can be told without unpickling.

Each member carries its CRC-32. Written here rather than by torch.save, because that keeps the interpreter's lock while it writes,
reads every byte twice and goes through the page cache; torch.load opens the result like its own. Read here too, and not by torch.load:
the bytes that were checked are the bytes that are opened, and nothing else has a say in what they mean.
"""

import collections
import contextlib
import functools
import io
import json
import mmap
import os
import pickle
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from milepost.ckpt import pickles, torch_pickle, zip_reader
from milepost.ckpt.manifest import JSON_LIMIT, parse_json
from milepost.ckpt.record import CheckpointError, Json
from milepost.ckpt.zip_reader import PICKLE, Member
from milepost.files import CHUNK

SUFFIXES = (".pt", ".pth", ".ckpt")
ROOT = "archive"
MEMBER = "milepost.json"  # in ROOT only: in a folder of another name torch.save has written the rest
PICKLE_LIMIT = JSON_LIMIT  # bytes; the metadata is in the pickle too
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
SEEN = 4096  # files of which it is remembered what they are
ALIGNMENT = 64  # bytes; torch's own, so that a mapped tensor begins where its element may

# What the first bytes of a file that is no torch archive tell about it.
KINDS = (
    (b"", "an empty file"),
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"<", "a web page"),
    (b"{", "JSON text"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a bare pickle, which is never opened"),
)


def is_archive(path: Path) -> bool:
    """Whether `path` is a file whose name or first bytes are those of a torch archive."""
    return not os.path.isdir(path) and (path.suffix in SUFFIXES or head(path).startswith(b"PK\x03\x04"))


def read_metadata(path: Path) -> Json:
    """The JSON member alone, tensors untouched, None if there is none; raises CheckpointError if the file is damaged."""
    return _seen(path, _stamp(path))[0]


def words(path: Path) -> frozenset[str]:
    """The strings in the pickle of an archive without our JSON member: its keys, by which it is known. Nothing is executed.

    Empty if it is one of ours, or damaged.
    """
    try:
        return _marks(path, _stamp(path))[1] if is_archive(path) else frozenset()
    except CheckpointError:
        return frozenset()


def half(path: Path) -> Json:
    """What the JSON member says of which half of a pair this is, None if nothing; raises CheckpointError if the file is damaged."""
    return _marks(path, _stamp(path))[0]


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=SEEN)  # what it is does not change from save to save
def _marks(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str]]:
    values, strings = _seen(path, stamp)
    return values.get("half") if isinstance(values, dict) else None, strings


def _seen(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str]]:
    """The JSON member, and the strings of the pickle if there is none; raises CheckpointError."""
    values, strings, problem = _glance(path, stamp)
    if problem:
        raise CheckpointError(problem)
    return values, strings


@functools.lru_cache(maxsize=2)  # a file is asked what it is, and then for its metadata
def _glance(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str], str | None]:
    """What `_seen` returns, or the problem: every layout asks, and a damaged file may take long to be read."""
    try:
        with _opened(path) as archive:
            values = archive.metadata()
            return values, archive.words() if values is None else frozenset(), None
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):  # which may pass without a change of the file
            raise
        return None, frozenset(), str(error)


def load(path: Path) -> tuple[dict[Any, Any], Json]:
    """The pickled dict, its tensors mapped from the file, and the JSON member or None. Never runs code from the file.

    Raises CheckpointError in one sentence for whatever is wrong with it.
    """
    with _opened(path) as archive:
        return archive.content(), archive.metadata()


def verify(path: Path) -> list[str]:
    """What is wrong with the file, one sentence each; empty if every member agrees with its CRC-32 and `load` would open it."""
    try:
        with _opened(path) as archive:
            if name := zip_reader.damaged(archive.file, archive.members):
                name = f"{archive.folder}/{name}"
                return [f"{path}: is damaged: the bytes of {name:.80} do not agree with their checksum"]
            archive.metadata()
            archive.content()
    except CheckpointError as error:
        return [str(error)]
    return []


def dump(content: Any, file: io.RawIOBase, *, metadata: Json = None) -> list[int]:
    """Writes `content`, tensors and plain values, to `file` as torch.save would, and `metadata` as the JSON member.

    Returns where the bytes of each tensor begin.
    """
    pickler = _Pickler(pickled := io.BytesIO())
    pickler.dump(content)
    with zipfile.ZipFile(cast(Any, file), "w") as archive:
        _add(archive, "data.pkl", pickled.getvalue())
        _add(archive, "byteorder", sys.byteorder.encode())
        begins = [_add(archive, f"data/{key}", bytes_of(tensor)) for key, tensor in enumerate(pickler.tensors)]
        _add(archive, "version", b"3\n")
        if metadata is not None:
            _add(archive, MEMBER, json.dumps(metadata, allow_nan=False, sort_keys=True).encode())
    return begins


STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
}


class _Bytes:
    """Stands in the pickle for the bytes of a tensor, which are a member of their own."""

    def __init__(self, key: int, tensor: Tensor) -> None:
        self.reference = ("storage", STORAGES[tensor.dtype], str(key), "cpu", tensor.numel())


class _Pickler(pickle.Pickler):
    """Torch's form of pickle: a tensor is a call of _rebuild_tensor_v2 on a reference to its bytes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        content, stride = _Bytes(len(self.tensors), value), tuple(torch.empty(value.shape, device="meta").stride())
        self.tensors.append(value)
        arguments: tuple[Any, ...] = (content, 0, tuple(value.shape), stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value: Any) -> Any:
        return value.reference if isinstance(value, _Bytes) else None


def _add(archive: zipfile.ZipFile, name: str, data: Any) -> int:
    """A member whose bytes begin at a multiple of ALIGNMENT, which is returned; written in pieces that stay in the processor's cache."""
    view = memoryview(data).cast("B")
    member = zipfile.ZipInfo(f"{ROOT}/{name}")
    member.file_size = len(view)  # so that zipfile sees whether it needs the fields of a large one
    large = len(view) * 1.05 > zipfile.ZIP64_LIMIT
    header = LOCAL_HEADER + len(member.filename) + 4 + (20 if large else 0)
    start = archive.fp.tell() + header  # type: ignore[union-attr]
    padding = -start % ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(member, "w", force_zip64=large) as file:
        for done in range(0, len(view), CHUNK):
            file.write(view[done : done + CHUNK])
    return start + padding


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor in row-major order as a numpy array, a view of them where they lie so; no thread of torch's is used."""
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:  # numpy has none
        plain = plain.view(torch.int16)
    return np.ascontiguousarray(plain.numpy()).reshape(-1).view(np.uint8)


def head(path: Path) -> bytes:
    """The first bytes of a regular file; a pipe or a device is never opened, because it could wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(32)
    except (OSError, ValueError):
        return b""


@dataclass(frozen=True)
class _Archive:
    """An open archive: all that is read of it is read through this one file, by where its members were found."""

    path: Path
    file: io.BufferedReader
    folder: str
    members: Mapping[str, Member]

    def metadata(self) -> Json:
        """The JSON member; None if there is none."""
        if self.folder != ROOT or MEMBER not in self.members:
            return None
        return parse_json(self._read(MEMBER, limit=JSON_LIMIT), f"{self.path}: {ROOT}/{MEMBER}")

    def words(self) -> frozenset[str]:
        """The strings in the pickle."""
        pickled = self._read(PICKLE, limit=PICKLE_LIMIT)
        with _damage(self.path):
            return pickles.words(pickled)

    def content(self) -> dict[Any, Any]:
        """The pickled dict with its tensors memory-mapped: only what is used is ever read from disk."""
        self._check_byte_order()
        pickled = self._read(PICKLE, limit=PICKLE_LIMIT)
        with _damage(self.path):
            mapped = _map(self.path, file=self.file)
            content = torch_pickle.content_of(pickled, lambda key: _storage(mapped, self.members[f"data/{key}"]))
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise CheckpointError(f"{self.path}: holds {kind}, expected a dictionary with model_state_dict")
        return content

    def _check_byte_order(self) -> None:
        if "byteorder" in self.members and self._read("byteorder", limit=16) != sys.byteorder.encode():
            problem = f"its numbers are not stored {sys.byteorder}-endian, as this machine has them"
            raise CheckpointError(f"{self.path}: cannot be read ({problem}): save it anew with torch on such a machine")

    def _read(self, name: str, *, limit: int) -> bytes:
        member, where = self.members[name], f"{self.path}: its {self.folder}/{name}"
        if member.size > limit:
            raise CheckpointError(f"{where} is larger than {limit} bytes: the file is damaged")
        with _damage(self.path):
            data = zip_reader.bytes_of(self.file, member)
        if data is None:
            raise CheckpointError(
                f"{where} is damaged (it does not agree with its checksum): take an earlier checkpoint"
            )
        return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    """The archive at `path`, its structure checked; raises CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is no regular file, expected a checkpoint")
        file = open(path, "rb")  # noqa: SIM115  (closed below)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with file:
        try:
            folder, members = zip_reader.read_members(file)
        except zip_reader.OddArchive as error:
            raise CheckpointError(f"{path}: is {error}") from error
        except zip_reader.NotAnArchive as error:
            raise CheckpointError(_not_an_archive(path, error)) from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        if path.suffix == ".safetensors":  # other programs go by this name
            raise CheckpointError(f"{path}: is a torch archive under another format's name: rename it to .pt")
        yield _Archive(path, file, folder, members)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns whatever a damaged member leads to into a CheckpointError: a pickle fails in as many ways as there are opcodes."""
    try:
        yield
    except CheckpointError:
        raise
    except pickles.Forbidden as error:
        listed = ", ".join(f"{wanted!r:.60}".strip("'") for wanted in error.names[:8])
        raise CheckpointError(
            f"{path}: asks for Python objects that a checkpoint never needs ({listed}) and was not opened"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise CheckpointError(f"{path}: is damaged ({_first_line(error)}): take an earlier checkpoint") from error


def _map(path: Path, *, file: io.BufferedReader) -> mmap.mmap:
    """The file in memory, private: what a tensor is given to write never reaches the disk."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _storage(mapped: mmap.mmap, member: Member) -> torch.UntypedStorage:
    """The bytes of a member, which keep the file mapped for as long as a tensor uses them."""
    if member.start + member.size > len(mapped):
        raise ValueError("it was cut short while it was read")
    if not member.size:  # torch takes no empty buffer
        return torch.UntypedStorage(0)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=member.start, count=member.size).untyped_storage()


def _not_an_archive(path: Path, error: Exception) -> str:
    first = head(path)
    text = first.lstrip()
    if text.startswith(b"PK"):
        return f"{path}: is damaged or cut short ({error}): take an earlier checkpoint"
    if first[8:9] == b"{":  # eight bytes of length and then JSON
        return f"{path}: is no torch file but a safetensors file: give the folder that holds it and its config.json"
    return f"{path}: is no checkpoint but {kind_of(path) or 'of an unknown kind'}"


def kind_of(path: Path) -> str | None:
    """What the first bytes of a file that is no torch archive tell about it; None if nothing."""
    first = head(path).lstrip()
    return next((kind for start, kind in reversed(KINDS) if first.startswith(start) and (start or not first)), None)


def _first_line(error: Exception) -> str:
    """An error in a few words. Never torch's advice to load the file again with weights_only=False."""
    text = (str(error).splitlines() or [""])[0]
    return type(error).__name__ if not text or "weights" in text.lower() else f"{type(error).__name__}: {text:.120}"
