"""Named tensors: what may pass for weights, safetensors files, and an optimizer's state as named tensors."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from milepost.ckpt.archive import bytes_of
from milepost.ckpt.manifest import is_regular
from milepost.ckpt.record import CheckpointError, Json
from milepost.files import CHUNK, NewFile, written

NAME_LIMIT = 512  # characters of a tensor's name
HEADER_LIMIT = 16 * 2**20  # bytes of a safetensors file's header; a hundred thousand tensors fit
# In the order in which the safetensors library lays them out: larger elements first, so that every tensor begins where its element may.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what weights and moments may be


def checked_tensors(values: Any, where: str) -> dict[str, Tensor]:
    """`values` if it is a dict of names to dense float tensors that own what they claim; raises CheckpointError otherwise."""
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{where}: is {type(values).__name__} of no tensors, expected named tensors")
    for name, tensor in values.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_LIMIT:
            raise CheckpointError(f"{where}: {name!r:.80} is no name of a tensor")
        check_dense(tensor, where, name)
    # A hundred tensors of one storage would claim too much as well, where a tied pair is the most that is ever needed.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in values.values()}
    if sum(map(_bytes, values.values())) > 2 * sum(storages.values()):
        raise CheckpointError(f"{where}: its tensors claim more bytes than the file holds")
    return values


def check_dense(tensor: Any, where: str, name: str, *, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raises CheckpointError unless it is a dense tensor of one of these dtypes that owns what it claims."""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{where}: {name:.80} is {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{where}: {name:.80} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, expected dense floats"
        )
    # An expanded tensor of stride 0 claims far more than the file holds, and the first copy of it would ask for that memory.
    if _bytes(tensor) > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{where}: {name:.80} of shape {tuple(tensor.shape)} claims more bytes than the file holds"
        )


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of a plain one, its own rows of a DTensor. Nothing is sent between processes."""
    to_local = getattr(tensor, "to_local", None)
    return to_local().detach() if to_local else tensor


def same_tensor(one: Tensor, other: Tensor, *, whole: bool = True) -> bool:
    """Whether dtype, shape and values are equal; if not `whole`, of the values only the first row is looked at."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # One piece of memory, as torch stores a tied pair, need not be read.
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return torch.equal(one, other) if whole or not one.dim() else torch.equal(one[:1], other[:1])


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all the tensors, in hex."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        view = memoryview(bytes_of(tensor))
        for start in range(0, len(view), CHUNK):
            total.update(view[start : start + CHUNK])
    return total.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity, in what this process has of them.

    Piece by piece, and without torch's threads: training has them.
    """
    step = CHUNK // 4
    flat = {name: local(tensor).detach().float().cpu().numpy().reshape(-1) for name, tensor in tensors.items()}
    return [
        name
        for name, values in flat.items()
        if not all(np.isfinite(values[start : start + step]).all() for start in range(0, len(values), step))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: eight bytes of length, a JSON header of names, dtypes, shapes and offsets, and the bytes one after another.


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> NewFile:
    """Writes the file piece by piece, where the library would build all of it in memory first; returns it for the manifest.

    Ordered by dtype and then by name, as the library does, so that the bytes are those that it would write.
    """
    rank = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (rank.index(item[1].dtype), item[0]))
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written(path, hashed=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(bytes_of(tensor))
    return file


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, mapped from it; raises CheckpointError if it is no sound safetensors file."""
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open's handle is no dict)
    except (
        SafetensorError,
        OSError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:  # some for a dtype torch lacks
        raise CheckpointError(f"{path}: is damaged ({str(error).splitlines()[0]:.160})") from error


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor, by name, from the header alone; raises CheckpointError."""
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is damaged ({str(error).splitlines()[0]:.160})") from error


def check_header(path: Path) -> None:
    """Raises CheckpointError if the file is none, or its header claims more than a header ever needs."""
    if not is_regular(path):
        raise CheckpointError(f"{path}: is no regular file, expected a safetensors file")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        problem = f"its header claims {length} bytes of a file of {size}"
        raise CheckpointError(f"{path}: is no whole safetensors file ({problem}): take an earlier checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# An optimizer's state: torch's own form keeps {index: {kind: tensor}}, a safetensors file {"name.kind": tensor}.


def optimizer_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """`{parameter name}.{kind}` -> tensor of torch's optimizer state, whose groups carry `param_names`."""
    names = optimizer_names(state["param_groups"])
    return {f"{names[index]}.{kind}": value for index, kinds in state["state"].items() for kind, value in kinds.items()}


def optimizer_groups(state: Mapping[str, Any]) -> list[Json]:
    """The param_groups as JSON values."""
    return json.loads(json.dumps(state["param_groups"], allow_nan=False))


def optimizer_state(tensors: Mapping[str, Tensor], groups: Any, where: str) -> dict[str, Any]:
    """Torch's own form from what `optimizer_tensors` and `optimizer_groups` gave; raises CheckpointError if they do not fit."""
    try:
        indices = {name: index for index, name in optimizer_names(groups).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".")
            state.setdefault(indices[name], {})[kind] = tensor
        return {"state": dict(sorted(state.items())), "param_groups": groups}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: its optimizer state does not fit its param_groups ({error!r:.80})") from error


def optimizer_names(groups: Any) -> dict[int, str]:
    """The name of each parameter by its index, of param_groups that carry `param_names`."""
    return {index: name for group in groups for index, name in zip(group["params"], group["param_names"], strict=True)}
