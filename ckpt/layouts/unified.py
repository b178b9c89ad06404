"""The default layout: one `.pt` file, a torch archive with the document's seven keys.

Beside torch's own members the archive holds the record's metadata as one JSON member, so that listing a folder never unpickles.
Each member carries its CRC-32; `verify` checks them all.
"""

import json
import math
import os
import pickletools
import re
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckpt.files import new_file
from ckpt.record import Checkpoint, CheckpointError, Json, check_metadata, from_metadata, metadata

NAME = "unified"
SUFFIXES = (".pt", ".pth", ".ckpt")
MEMBER = "archive/milepost.json"
PICKLE = "/data.pkl"  # below a folder of any name
MEMBER_LIMIT = 64 * 2**20  # bytes of metadata or of the pickle; a 50,000-piece BPE vocabulary takes about 3 MB
NAME_LIMIT = 512  # characters of a tensor's name

# What a pickle of tensors by name asks for. torch's own list for weights_only is longer: it has bytearray and the tensor
# classes, by which a file of a few hundred bytes claims as much memory as it likes.
ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device|b?float\d+|[A-Z]\w*Storage)"
)

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


def detect(path: Path) -> bool:
    """Whether `path` is for this layout to read or to refuse: a file whose name or first bytes are those of a torch archive."""
    if os.path.isdir(path):
        return False
    return path.suffix in SUFFIXES or _head(path).startswith(b"PK\x03\x04")


def peek(path: Path) -> dict[str, Json]:
    """The metadata alone, tensors untouched; raises CheckpointError if the file is damaged or holds none."""
    with _open_archive(path) as archive:
        values = _metadata_member(archive, path)
    if values is None:
        raise CheckpointError(f"{path}: holds no metadata of milepost's: it was written by another program")
    return check_metadata(values, str(path))


def read(path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
    """The record in `path`. `optimizer=False` leaves the optimizer's tensors on disk; `verify=True` checks every byte against its CRC.

    Raises CheckpointError in one sentence for whatever is wrong with the file. Never runs code from it.
    """
    problems = verify_file(path) if verify else []
    if problems:
        raise CheckpointError(problems[0])
    with _open_archive(path) as archive:
        values = _metadata_member(archive, path)
        _check_pickle(archive, path)
    content = _load_archive(path)
    if "model_state_dict" not in content:
        seen = ", ".join(f"{key!r:.60}" for key in list(content)[:12]) or "none"
        raise CheckpointError(
            f"{path}: does not contain model_state_dict (keys seen: {seen}): it may be damaged or another program's; try an earlier checkpoint"
        )
    if values is None:
        values = content.get("metadata")
    if values is None:
        raise CheckpointError(
            f"{path}: its model_state_dict came without milepost's metadata, so the model's shape and tokenizer are unknown"
        )
    model_state = checked_tensors(content["model_state_dict"], f"{path}: model_state_dict")
    optimizer_state = content.get("optimizer_state_dict") if optimizer else None
    record = from_metadata(values, model_state=model_state, optimizer_state=optimizer_state, where=str(path))
    record.path, record.layout = path, NAME
    return record


def write(record: Checkpoint, folder: Path, stem: str) -> Path:
    """Writes `folder/stem.pt`, atomically and durably; returns its path. The caller holds the folder's lock."""
    path = target(folder, stem)
    # Through JSON and back: a str that is secretly of another class would be pickled as that class.
    text = json.dumps(metadata(record), allow_nan=False, sort_keys=True)
    values = json.loads(text)
    content = {
        "model_state_dict": record.model_state,
        "optimizer_state_dict": record.optimizer_state,
        "hyperparameters": values["hyperparameters"],
        "vocab_size": values["model_settings"].get("vocab_size"),
        "block_size": values["model_settings"].get("block_size"),
        "batch_size": values["hyperparameters"].get("BATCH_SIZE"),
        "step": record.step,
        "metadata": values,
    }
    with new_file(path) as file:
        torch.save(content, file)  # a file object, not a name: torch would lose the errno of a full disk
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(MEMBER, text)
    return path


def target(folder: Path, stem: str) -> Path:
    """The path that `write` gives a checkpoint of this stem."""
    return folder / f"{stem}.pt"


def verify_file(path: Path) -> list[str]:
    """What is wrong with the file's bytes, one sentence each; empty if every member agrees with its CRC-32."""
    try:
        with _open_archive(path) as archive:
            damaged = archive.testzip()
    except CheckpointError as error:
        return [str(error)]
    except Exception as error:  # zipfile raises whatever a flipped bit in a header leads it to
        return [f"{path}: is damaged ({_first_line(error)}): take an earlier checkpoint"]
    return [f"{path}: is damaged: the bytes of {damaged} do not agree with their checksum"] if damaged else []


def checked_tensors(values: Any, where: str) -> dict[str, Tensor]:
    """`values` if it is a dict of names to dense float tensors that own what they claim; raises CheckpointError otherwise."""
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{where}: is {type(values).__name__} of no tensors, expected named tensors")
    for name, tensor in values.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_LIMIT:
            raise CheckpointError(f"{where}: {name!r:.80} is no name of a tensor")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where}: {name} is {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise CheckpointError(
                f"{where}: {name} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, expected dense floats"
            )
        # An expanded tensor of stride 0 claims far more than the file holds, and the first copy of it would ask for that memory.
        if _bytes(tensor) > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{where}: {name} of shape {tuple(tensor.shape)} claims more bytes than the file holds"
            )
    # So would a hundred tensors of one storage, where a tied pair is the most that is ever needed.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in values.values()}
    if sum(map(_bytes, values.values())) > 2 * sum(storages.values()):
        raise CheckpointError(f"{where}: its tensors claim more bytes than the file holds")
    return values


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _head(path: Path) -> bytes:
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
    head = _head(path).lstrip()
    if head.startswith(b"PK"):
        return f"{path}: is damaged or cut short ({error}): take an earlier checkpoint"
    if _head(path)[8:9] == b"{":  # eight bytes of length and then JSON
        return f"{path}: is no torch file but a safetensors file: give the folder that holds it and its config.json"
    kind = next(
        (kind for start, kind in reversed(KINDS) if head.startswith(start) and (start or not head)),
        "of an unknown kind",
    )
    return f"{path}: is no checkpoint but {kind}"


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
    try:
        return json.loads(_member(archive, MEMBER, path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata cannot be read ({_first_line(error)}): the file is damaged"
        ) from error


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    if archive.getinfo(name).file_size > MEMBER_LIMIT:
        raise CheckpointError(f"{path}: its {name} is larger than {MEMBER_LIMIT} bytes: the file is damaged")
    try:
        return archive.read(name)
    except Exception as error:  # zipfile raises whatever a flipped bit in a header leads it to
        raise CheckpointError(
            f"{path}: its {name} is damaged ({_first_line(error)}): take an earlier checkpoint"
        ) from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _check_pickle(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises CheckpointError listing what the pickle asks for beyond tensors and plain values; nothing is executed."""
    (name,) = (name for name in archive.namelist() if name.endswith(PICKLE))
    pickled = _member(archive, name, path)
    try:
        asked = {str(wanted) for opcode, wanted, _ in pickletools.genops(pickled) if opcode.name in ("GLOBAL", "INST")}
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{path}: is damaged ({_first_line(error)}): take an earlier checkpoint") from error
    foreign = sorted(wanted.replace(" ", ".") for wanted in asked if not ALLOWED.fullmatch(wanted))
    if foreign:
        listed = ", ".join(f"{wanted!r:.60}".strip("'") for wanted in foreign[:8])
        raise CheckpointError(
            f"{path}: asks for Python objects that a checkpoint never needs ({listed}) and was not opened"
        )


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
