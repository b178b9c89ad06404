"""Read and write torch archives: zip files of a pickle, the tensors, and a JSON member that is read without unpickling.

Each member carries its CRC-32. torch.save is not used, because it holds the GIL while it writes, reads every byte twice
and goes through the page cache; torch.load opens the result like its own. torch.load is not used either: here the bytes
that were checked are the bytes that are opened.
"""

import collections
import contextlib
import errno
import functools
import io
import json
import mmap
import os
import pickle
import stat
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from milepost.ckpt import legacy_archive, pickles, torch_pickle, zip_reader
from milepost.ckpt.dtypes import DTYPES, name_of
from milepost.ckpt.manifest import JSON_LIMIT, parse_json, unreadable
from milepost.ckpt.record import EARLIER, CheckpointError, Json, Kind
from milepost.ckpt.zip_reader import PICKLE, Member
from milepost.files import CHUNK, is_unreachable, open_steadily, steadily
from milepost.lazy import Tensor, import_torch, np, torch

if TYPE_CHECKING:
    from torch import UntypedStorage

SUFFIXES = (".pt", ".pth", ".ckpt")
ROOT = "archive"
MEMBER = "milepost.json"  # valid in ROOT only: torch.save writes a folder of another name
PICKLE_LIMIT = JSON_LIMIT  # bytes; the metadata is in the pickle too
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
SEEN = 4096  # files whose type is cached
SAVE_AGAIN = (  # the remedy for a pickle of another program that is not understood
    "in the program that wrote it, save only the weights and the settings: "
    "torch.save({'model': model.state_dict(), 'config': {...}}, path)"
)
ALIGNMENT = 64  # bytes, as in torch: mapped tensors are aligned for their dtype

SAVE_AGAIN = "load it in the program that wrote it, and save its weights there: torch.save(model.state_dict(), path)"
# First bytes of files that are not torch archives, what they are, and what to do.
KINDS = (
    (b"", "an empty file", EARLIER),
    (b"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull`"),
    (b"<", "a web page", "download the file again: this is what a server sent in its place"),
    (b"{", "JSON text", "name the weights, or the folder that holds both"),
    (b"GGUF", "a GGUF file", "name the checkpoint that it was exported from"),
    (b"\x89HDF", "an HDF5 file", SAVE_AGAIN),
    (b"\x80", "a bare pickle, which is never opened", SAVE_AGAIN),
)


def is_archive(path: Path) -> bool:
    """Whether `path` is a file whose name or first bytes are those of a torch archive."""
    begins = (b"PK\x03\x04", legacy_archive.BEGIN)
    return not os.path.isdir(path) and (path.suffix in SUFFIXES or first_bytes(path).startswith(begins))


def is_legacy(path: Path) -> bool:
    """Whether `path` is a file of torch before 1.6."""
    return first_bytes(path).startswith(legacy_archive.BEGIN)


def read_metadata(path: Path) -> Json:
    """Return the JSON member without reading tensors; None if there is none. Raise CheckpointError if damaged."""
    return _seen(path, _stamp(path))[0]


def pickle_strings(path: Path) -> frozenset[str]:
    """Return the strings in the pickle of another program's archive, which identify its layout. Executes nothing.

    Return an empty set for an archive of this program, and for a damaged one.
    """
    try:
        return _marks(path, _stamp(path))[1] if is_archive(path) else frozenset()
    except CheckpointError:
        return frozenset()


def pair_role(path: Path) -> Json:
    """Return which file of a pair this is by its JSON member; None for others. Raise CheckpointError if damaged."""
    return _marks(path, _stamp(path))[0]


def _stamp(path: Path) -> tuple[int, ...]:
    """Return inode, size in bytes and modification time: they change with the file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=SEEN)  # the type of a file does not change from save to save
def _marks(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str]]:
    values, strings = _seen(path, stamp)
    return values.get("half") if isinstance(values, dict) else None, strings


def _seen(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str]]:
    """Return the JSON member, and the strings of the pickle if there is none; raise CheckpointError."""
    values, strings, error = _cached(path, stamp)
    if error:
        raise CheckpointError(path, error.problem, error.remedy, kind=error.kind)
    return values, strings


@functools.lru_cache(maxsize=2)  # first the layout is identified, then the metadata is read
def _cached(path: Path, stamp: tuple[int, ...]) -> tuple[Json, frozenset[str], CheckpointError | None]:
    """Return what `_seen` returns, or the error: every layout asks, and reading a damaged file may take long."""
    try:
        with _opened(path) as archive:
            values = archive.metadata()
            return values, archive.strings() if values is None else frozenset(), None
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):  # may go away although the file stays the same
            raise
        return None, frozenset(), CheckpointError(path, error.problem, error.remedy, kind=error.kind)  # holds no frames


def load(path: Path) -> tuple[dict[Any, Any], Json]:
    """Return the pickled dict, its tensors mapped from the file, and the JSON member or None.

    Never runs code from the file.

    Raise CheckpointError if anything is wrong with it.
    """
    with _opened(path) as archive:
        return archive.content(), archive.metadata()


def headers(path: Path) -> dict[Any, Any]:
    """Return the pickled dict, each of its tensors as a `torch_pickle.Header`, as `load` checks it. Needs no torch."""
    with _opened(path) as archive:
        return archive.headers()


def verify(path: Path, *, spared: Collection[str] = ()) -> list[CheckpointError]:
    """Return what is wrong with the file; an empty list if every CRC-32 matches and `load` would open it.

    The storages `spared`, named as in `headers`, are not read.
    """
    try:
        with _opened(path) as archive:
            with _damage(path):
                left_out = {f"data/{storage}" for storage in spared}
                read = {name: member for name, member in archive.members.items() if name not in left_out}
                name = zip_reader.damaged(archive.file, read)
            if name:
                name = f"{archive.folder}/{name}"
                problem = f"is damaged: the bytes of {name:.80} do not match their checksum"
                return [CheckpointError(path, problem, EARLIER, kind="damaged")]
            archive.metadata()
            archive.content()
    except CheckpointError as error:
        return [error]
    return []


def dump(content: Any, file: io.RawIOBase, *, metadata: Json = None) -> list[int]:
    """Write `content`, tensors and plain values, to `file` as torch.save would, and `metadata` as the JSON member.

    Return the offset in bytes of each tensor.
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


class _Bytes:
    """Placeholder in the pickle for the bytes of a tensor, which are a separate member."""

    def __init__(self, key: int, tensor: Tensor) -> None:
        kind = getattr(torch, DTYPES[name_of(tensor.dtype)].storage)
        self.reference = ("storage", kind, str(key), "cpu", tensor.numel())


class _Pickler(pickle.Pickler):
    """Pickle a tensor as torch does: a call of _rebuild_tensor_v2 with a reference to its bytes."""

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
    """Write a member aligned to ALIGNMENT, in pieces that fit into the CPU cache; return the offset of its bytes."""
    view = memoryview(data).cast("B")
    member = zipfile.ZipInfo(f"{ROOT}/{name}")
    member.file_size = len(view)  # zipfile decides by it whether to use zip64
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
    """Return the row-major bytes of a tensor, (bytes,) uint8: a view if contiguous. Uses no torch threads."""
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:  # numpy has no bfloat16
        plain = plain.view(torch.int16)
    return np.ascontiguousarray(plain.numpy()).reshape(-1).view(np.uint8)


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a regular file; never open a pipe or a device, which could block forever.

    Raise CheckpointError if it does not answer.
    """
    try:
        if not stat.S_ISREG(steadily(path.stat).st_mode):
            return b""
        with open_steadily(path) as file:
            return file.read(32)
    except (OSError, ValueError) as error:
        if is_unreachable(error):
            raise unreadable(path, error) from error
        return b""


@dataclass(frozen=True)
class _Archive:
    """An open archive. Everything is read through this one open file, at the offsets that were checked."""

    path: Path
    file: io.BufferedReader
    folder: str
    members: Mapping[str, Member]

    @property
    def is_ours(self) -> bool:
        """Whether it has the JSON member of this program."""
        return self.folder == ROOT and MEMBER in self.members

    def metadata(self) -> Json:
        """Return the JSON member; None if there is none."""
        if not self.is_ours:
            return None
        return parse_json(self._read(MEMBER, limit=JSON_LIMIT), self.path, part=f"{ROOT}/{MEMBER}")

    def strings(self) -> frozenset[str]:
        """Return the strings in the pickle."""
        pickled = self._read(PICKLE, limit=PICKLE_LIMIT)
        with _damage(self.path):
            return pickles.strings(pickled)

    def content(self) -> dict[Any, Any]:
        """Return the pickled dict, its tensors memory-mapped: only those that are used are read from disk."""
        import_torch()
        self._check_byte_order()
        pickled = self._read(PICKLE, limit=PICKLE_LIMIT)
        with _damage(self.path):
            mapped = _map(self.path, file=self.file)
            content = torch_pickle.content_of(
                pickled, lambda key: _storage(mapped, self.members[f"data/{key}"]), objects=not self.is_ours
            )
        return _dictionary(self.path, content)

    def headers(self) -> dict[Any, Any]:
        """Return what `content` does, with headers in place of the tensors."""
        self._check_byte_order()
        pickled = self._read(PICKLE, limit=PICKLE_LIMIT)
        with _damage(self.path):
            sizes = {name.removeprefix("data/"): member.size for name, member in self.members.items()}
            content = torch_pickle.headers_of(pickled, sizes.__getitem__, objects=not self.is_ours)
        return _dictionary(self.path, content)

    def _check_byte_order(self) -> None:
        if "byteorder" in self.members and self._read("byteorder", limit=16) != sys.byteorder.encode():
            problem = f"cannot be read (its numbers are not stored {sys.byteorder}-endian)"
            remedy = "load and save it with torch on a machine of its own byte order"
            raise CheckpointError(self.path, problem, remedy, kind="not understood")

    def _read(self, name: str, *, limit: int) -> bytes:
        member, part = self.members[name], f"its {self.folder}/{name}"
        if member.size > limit:
            problem = f"{part} is larger than {limit} bytes: the file is damaged"
            raise CheckpointError(self.path, problem, EARLIER, kind="damaged")
        with _damage(self.path):
            data = zip_reader.bytes_of(self.file, member)
        if data is None:
            raise CheckpointError(
                self.path, f"{part} is damaged (its checksum does not match)", EARLIER, kind="damaged"
            )
        return data


def _dictionary(path: Path, content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        problem = f"holds {type(content).__name__}, expected a dictionary with model_state_dict"
        raise CheckpointError(path, problem, kind="not understood")
    return content


@dataclass(frozen=True)
class _Legacy:
    """An open file of torch before 1.6, with what `_Archive` offers of another program's."""

    path: Path
    file: io.BufferedReader
    members: Mapping[str, Member] = field(default_factory=dict)  # it has no checksums
    folder: str = ""

    def metadata(self) -> Json:
        """Return None: this program never wrote such a file."""
        return None

    def strings(self) -> frozenset[str]:
        """Return the strings in the pickle."""
        with _damage(self.path):
            return pickles.strings(self._parts().content)

    def content(self) -> dict[Any, Any]:
        """Return the pickled dict, its tensors memory-mapped."""
        import_torch()
        with _damage(self.path):
            content = legacy_archive.content_of(self._parts(), _map(self.path, file=self.file))
        return _dictionary(self.path, content)

    def headers(self) -> dict[Any, Any]:
        """Return what `content` does, with headers in place of the tensors."""
        with _damage(self.path):
            content = legacy_archive.headers_of(self._parts(), _map(self.path, file=self.file))
        return _dictionary(self.path, content)

    def _parts(self) -> legacy_archive.Parts:
        return legacy_archive.read_parts(self.file, limit=PICKLE_LIMIT)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive | _Legacy]:
    """Yield the archive at `path` after checking its structure; raise CheckpointError."""
    try:
        if not stat.S_ISREG(steadily(path.stat).st_mode):
            raise CheckpointError(path, "is not a regular file, expected a checkpoint", kind="not understood")
        file = open_steadily(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    with file:
        folder: str | None
        try:
            folder, members = zip_reader.read_members(file)
        except zip_reader.OddArchive as error:
            kind: Kind = "damaged" if isinstance(error, zip_reader.DamagedArchive) else "refused"
            raise CheckpointError(path, f"is {error}", kind=kind) from error
        except zip_reader.NotAnArchive as error:
            if not is_legacy(path):
                raise _not_an_archive(path, error) from error
            folder = None
        except OSError as error:
            raise unreadable(path, error) from error
        if folder is None:
            yield _Legacy(path, file)
            return
        if path.suffix == ".safetensors":  # other programs choose the format by this suffix
            problem = "is a torch archive under another format's name"
            raise CheckpointError(path, problem, "rename it to .pt", kind="refused")
        yield _Archive(path, file, folder, members)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn every error of a damaged member into a CheckpointError: a damaged pickle can raise any exception."""
    try:
        yield
    except CheckpointError:
        raise
    except pickles.Forbidden as error:
        listed = ", ".join(f"{wanted!r:.60}".strip("'") for wanted in error.names[:8])
        problem = f"asks for Python objects that a checkpoint never needs ({listed}) and was not opened"
        raise CheckpointError(path, problem, SAVE_AGAIN, kind="refused") from error
    except pickles.NotUnderstood as error:
        problem = f"holds more than tensors and plain values ({error})"
        raise CheckpointError(path, problem, SAVE_AGAIN, kind="not understood") from error
    except MemoryError as error:
        raise unreadable(path, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:
        raise CheckpointError(path, f"is damaged ({_first_line(error)})", EARLIER, kind="damaged") from error


def _map(path: Path, *, file: io.BufferedReader) -> mmap.mmap:
    """Map the file privately: writes to a tensor never reach the disk."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _storage(mapped: mmap.mmap, member: Member) -> "UntypedStorage":
    """Return the bytes of a member as a storage; it keeps the file mapped while a tensor uses it."""
    if member.start + member.size > len(mapped):
        raise ValueError("it was truncated while it was read")
    if not member.size:  # torch rejects an empty buffer
        return torch.UntypedStorage(0)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=member.start, count=member.size).untyped_storage()


def _not_an_archive(path: Path, error: Exception) -> CheckpointError:
    first = first_bytes(path)
    if first.lstrip().startswith(b"PK"):
        return CheckpointError(path, f"is damaged or cut short ({error})", EARLIER, kind="damaged")
    if first[8:9] == b"{":  # eight bytes of length and then JSON
        remedy = "name the folder that holds it and its config.json"
        return CheckpointError(path, "is a safetensors file, not a torch file", remedy, kind="not understood")
    kind, remedy = kind_of(path) or ("of an unknown kind", SAVE_AGAIN)
    return CheckpointError(path, f"is not a checkpoint but {kind}", remedy, kind="not understood")


def kind_of(path: Path) -> tuple[str, str] | None:
    """Return the kind of a file that is not a torch archive by its first bytes, and what to do; None if it is unknown."""
    first = first_bytes(path).lstrip()
    found = (row for row in reversed(KINDS) if first.startswith(row[0]) and (row[0] or not first))
    return next((row[1:] for row in found), None)


def _first_line(error: Exception) -> str:
    """Return an error as a short text, but never torch's advice to load the file again with weights_only=False."""
    text = (str(error).splitlines() or [""])[0]
    return type(error).__name__ if not text or "weights" in text.lower() else f"{type(error).__name__}: {text:.120}"
