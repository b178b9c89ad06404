"""A torch archive: a zip file of a pickle, of tensors, and of one JSON member, so that what it is can be told without unpickling.

Each member carries its CRC-32. Written here rather than by torch.save, because that keeps the interpreter's lock while it writes,
reads every byte twice and goes through the page cache; torch.load opens the result like its own.
"""

import collections
import functools
import io
import json
import os
import pickle
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from milepost.ckpt import pickles
from milepost.ckpt.manifest import JSON_LIMIT, parse_json
from milepost.ckpt.record import CheckpointError, Json
from milepost.files import CHUNK

SUFFIXES = (".pt", ".pth", ".ckpt")
ROOT = "archive"
MEMBER = f"{ROOT}/milepost.json"
PICKLE = "/data.pkl"  # below a folder of any name
PICKLE_LIMIT = JSON_LIMIT  # bytes; the metadata is in the pickle too
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
SEEN = 4096  # files of which it is remembered what they are
ALIGNMENT = 64  # bytes; torch's own, so that a mapped tensor begins where its element may

Found = TypeVar("Found")

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
    return _glance(path, _stamp(path))[0]


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
    values, strings = _glance(path, stamp)
    return values.get("half") if isinstance(values, dict) else None, strings


@functools.lru_cache(maxsize=2)  # a file is asked what it is, and then for its metadata
def _glance(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str]]:
    with _open_archive(path) as archive:
        values = _metadata_member(archive, path)
        strings = _of_pickle(pickles.words, archive, path) if values is None else frozenset()
    return values, strings


def load(path: Path) -> tuple[dict[Any, Any], Json]:
    """The pickled dict, its tensors mapped from the file, and the JSON member or None. Never runs code from the file.

    Raises CheckpointError in one sentence for whatever is wrong with it.
    """
    with _open_archive(path) as archive:
        values = _metadata_member(archive, path)
        _check_pickle(archive, path)
    return _load_archive(path), values


def verify(path: Path) -> list[str]:
    """What is wrong with the file's bytes, one sentence each; empty if every member agrees with its CRC-32."""
    try:
        with _open_archive(path) as archive:
            damaged = archive.testzip()
    except CheckpointError as error:
        return [str(error)]
    except Exception as error:  # zipfile raises whatever a flipped bit in a header leads it to
        return [f"{path}: is damaged ({_first_line(error)}): take an earlier checkpoint"]
    return [f"{path}: is damaged: the bytes of {damaged} do not agree with their checksum"] if damaged else []


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
            _add(
                archive, MEMBER.removeprefix(f"{ROOT}/"), json.dumps(metadata, allow_nan=False, sort_keys=True).encode()
            )
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


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is no regular file, expected a checkpoint")
        archive = zipfile.ZipFile(path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile raises whatever a flipped bit in a header leads it to
        raise CheckpointError(_not_an_archive(path, error)) from error
    problem = _odd_members(archive)
    if path.suffix == ".safetensors":  # torch.load goes by this name, not by what is inside
        problem = "a torch archive under another format's name: rename it to .pt"
    if problem:
        archive.close()
        raise CheckpointError(f"{path}: is {problem}")
    return archive


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


def _odd_members(archive: zipfile.ZipFile) -> str | None:
    """What the archive is instead of one that torch wrote; torch should not see it then."""
    names, listed = archive.namelist(), archive.infolist()
    if len(set(names)) != len(names):  # torch would silently take the last of the two
        return "damaged: two members of its archive have one name"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, which is never run"
    for member in listed:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1:
            return f"no checkpoint: the member {member.filename!r:.80} is compressed or encrypted"
        if member.filename.startswith("/") or ".." in member.filename.split("/"):
            return f"no checkpoint: the member {member.filename!r:.80} points outside the archive"
    if len([name for name in names if name.endswith(PICKLE)]) != 1:
        return "no checkpoint: a zip archive without torch's data.pkl, or with more than one"
    # Python and torch place members differently if something stands before the first, and so would not see the same file.
    if min(member.header_offset for member in listed) != 0:
        return "damaged: it does not begin with its archive"
    if sum(member.file_size for member in listed) > archive.start_dir:
        return "damaged: its members claim more bytes than it holds"
    return None


def _metadata_member(archive: zipfile.ZipFile, path: Path) -> Json:
    if MEMBER not in archive.namelist():
        return None
    return parse_json(_member(archive, MEMBER, path, limit=JSON_LIMIT), path, part=MEMBER)


def _member(archive: zipfile.ZipFile, name: str, path: Path, *, limit: int) -> bytes:
    if archive.getinfo(name).file_size > limit:
        raise CheckpointError(f"{path}: its {name} is larger than {limit} bytes: the file is damaged")
    try:
        return archive.read(name)
    except Exception as error:  # zipfile raises whatever a flipped bit in a header leads it to
        raise CheckpointError(
            f"{path}: its {name} is damaged ({_first_line(error)}): take an earlier checkpoint"
        ) from error


def _check_pickle(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises CheckpointError listing what the pickle asks for beyond tensors and plain values; nothing is executed."""
    foreign = _of_pickle(pickles.asked_for, archive, path)
    if foreign:
        listed = ", ".join(f"{wanted!r:.60}".strip("'") for wanted in foreign[:8])
        raise CheckpointError(
            f"{path}: asks for Python objects that a checkpoint never needs ({listed}) and was not opened"
        )


def _of_pickle(read: Callable[[bytes], Found], archive: zipfile.ZipFile, path: Path) -> Found:
    """What `read` finds in the archive's pickle; raises CheckpointError if it is damaged."""
    (name,) = (name for name in archive.namelist() if name.endswith(PICKLE))
    pickled = _member(archive, name, path, limit=PICKLE_LIMIT)
    try:
        return read(pickled)
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{path}: is damaged ({_first_line(error)}): take an earlier checkpoint") from error


def _load_archive(path: Path) -> dict[Any, Any]:
    """The pickled dict with its tensors memory-mapped: only what is used is ever read from disk."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's doubts about a strange file are no sentence of ours
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{path}: is damaged ({_first_line(error)}): take an earlier checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a dictionary with model_state_dict")
    return content


def _first_line(error: Exception) -> str:
    """An error in a few words. Never torch's advice to load the file again with weights_only=False."""
    text = (str(error).splitlines() or [""])[0]
    return type(error).__name__ if not text or "weights" in text.lower() else f"{type(error).__name__}: {text:.120}"
