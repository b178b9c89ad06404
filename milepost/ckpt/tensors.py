"""Named tensors: checks of weights, safetensors files, and the optimizer state as named tensors."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milepost.ckpt.archive import bytes_of
from milepost.ckpt.dtypes import DTYPES, FLOATS, name_of
from milepost.ckpt.manifest import is_regular, refuse_pointer, unreachable_behind, unreadable
from milepost.ckpt.record import EARLIER, CheckpointError, Json
from milepost.files import CHUNK, NewFile, bring_in, open_steadily, written
from milepost.lazy import Tensor, import_torch, np, torch

UNQUANTIZED = "save the model again in float32, float16 or bfloat16: quantized weights are not read"
NAME_LIMIT = 512  # characters of a tensor's name
NO_OPTIMIZER_STATE = "its optimizer state is not in the form of torch.optim.Optimizer.state_dict()"
HEADER_LIMIT = 16 * 2**20  # bytes of a safetensors file's header; a hundred thousand tensors fit


def checked_tensors(values: Any, where: str) -> dict[str, Tensor]:
    """Return `values`; raise CheckpointError unless it maps names to dense float tensors within their storage."""
    if not isinstance(values, dict) or not values:
        problem = f"its weights are a {type(values).__name__} of no tensors, expected named tensors"
        raise CheckpointError(where, problem, EARLIER, kind="damaged")
    for name, tensor in values.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_LIMIT:
            raise CheckpointError(where, f"{name!r:.80} is not a tensor name", EARLIER, kind="damaged")
        check_dense(tensor, where, name)
    # Many tensors may share one storage and claim too much together; a tied pair is the most that is needed.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in values.values()}
    if sum(map(_bytes, values.values())) > 2 * sum(storages.values()):
        problem = "its tensors claim more bytes than the file holds"
        raise CheckpointError(where, problem, EARLIER, kind="damaged")
    return values


def check_dense(tensor: Any, where: str, name: str, *, dtypes: Sequence[str] = FLOATS) -> None:
    """Raise CheckpointError unless it is a dense tensor of one of these dtypes, no larger than its storage."""
    if not isinstance(tensor, Tensor):
        problem = f"{name:.80} is {type(tensor).__name__}, expected a tensor"
        raise CheckpointError(where, problem, kind="not understood")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or name_of(tensor.dtype) not in dtypes:
        problem = f"{name:.80} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, expected dense floats"
        raise CheckpointError(where, problem, UNQUANTIZED, kind="not understood")
    # An expanded tensor of stride 0 claims far more than the file holds: copying it would allocate all that.
    if _bytes(tensor) > tensor.untyped_storage().nbytes():
        problem = f"{name:.80} of shape {tuple(tensor.shape)} claims more bytes than the file holds"
        raise CheckpointError(where, problem, EARLIER, kind="damaged")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: its own rows of a DTensor, all of a plain tensor. No communication."""
    to_local = getattr(tensor, "to_local", None)
    return to_local().detach() if to_local else tensor


def same_tensor(first: Tensor, second: Tensor, *, whole: bool = True) -> bool:
    """Whether dtype, shape and values are equal; if not `whole`, compare only the first row of the values."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    # A tied pair shares memory and need not be read.
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
        return True
    return torch.equal(first, second) if whole or not first.dim() else torch.equal(first[:1], second[:1])


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def bring_in_tensors(tensors: Iterable[Tensor], path: Path) -> None:
    """Read mapped tensors in where the folder of `path`, their file, may go away. Raise CheckpointError if it does not
    answer.
    """
    try:
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                bring_in(path, tensor.data_ptr(), tensor.nbytes)
    except OSError as error:
        raise unreadable(path, error) from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of all the tensors, in hex."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        view = memoryview(bytes_of(tensor))
        for start in range(0, len(view), CHUNK):
            total.update(view[start : start + CHUNK])
    return total.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or Inf in this process's part of them.

    Reads in chunks and without torch threads, which training uses meanwhile.
    """
    step = CHUNK // 4
    flat = {name: local(tensor).detach().float().cpu().numpy().reshape(-1) for name, tensor in tensors.items()}
    return [
        name
        for name, values in flat.items()
        if not all(np.isfinite(values[start : start + step]).all() for start in range(0, len(values), step))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: the header length in eight bytes, a JSON header of names, dtypes, shapes and offsets, then the tensors.


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> NewFile:
    """Write the file tensor by tensor, where the library would build it in memory first; return it for the manifest.

    Tensors are ordered by dtype and name, as in the library, so that the bytes equal what it would write.
    """
    rank = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (rank.index(name_of(item[1].dtype)), item[0]))
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[name_of(tensor.dtype)].safetensors
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written(path, hashed=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(bytes_of(tensor))
    return file


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the named tensors, mapped from the file; raise CheckpointError if it is not a valid safetensors file."""
    import_torch()
    return _opened(path, "pt", lambda file, name: file.get_tensor(name))


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor by name, from the header only; raise CheckpointError."""
    return _opened(path, "np", _header_of)  # for numpy, because for torch the library imports it


def _header_of(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    part = file.get_slice(name)
    return part.get_dtype(), tuple(part.get_shape())


def _opened(path: Path, framework: str, take: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Return what `take` takes of each tensor of the open file, by name; raise CheckpointError."""
    from safetensors import SafetensorError, safe_open  # only here are files of this kind read

    check_header(path)
    try:
        with safe_open(path, framework=framework) as file:
            return {name: take(file, name) for name in file.keys()}  # noqa: SIM118  (the handle is not a dict)
    except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        raise _not_read(path, error) from error  # AttributeError: a dtype that torch lacks


def _not_read(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a safetensors file that the library did not open: damaged, or no memory to map it."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return unreadable(path, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    if away := unreachable_behind(error):
        return unreadable(path, away)
    return CheckpointError(path, f"is damaged ({str(error).splitlines()[0]:.160})", EARLIER, kind="damaged")


def check_header(path: Path) -> None:
    """Raise CheckpointError if it is not a regular file, or its header size is impossible or above HEADER_LIMIT."""
    if not is_regular(path):
        raise CheckpointError(path, "is not a regular file, expected a safetensors file", kind="not understood")
    try:
        with open_steadily(path) as file:
            begin = file.read(32)
            length = int.from_bytes(begin[:8], "little")
            size = path.stat().st_size
            file.read(
                min(length, HEADER_LIMIT)
            )  # the library maps it: a page that cannot be read would end the process
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_pointer(begin, path)
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        problem = f"is not a complete safetensors file (its header claims {length} bytes of a file of {size})"
        raise CheckpointError(path, problem, EARLIER, kind="damaged")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer state: torch uses {index: {kind: tensor}}, a safetensors file {"name.kind": tensor}.


def optimizer_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return torch's optimizer state, whose groups carry `param_names`, as `{parameter name}.{kind}` -> tensor."""
    names = optimizer_names(state["param_groups"])
    return {f"{names[index]}.{kind}": value for index, kinds in state["state"].items() for kind, value in kinds.items()}


def optimizer_groups(state: Mapping[str, Any]) -> list[Json]:
    """Return the param_groups as JSON values."""
    return json.loads(json.dumps(state["param_groups"], allow_nan=False))


def optimizer_state(tensors: Mapping[str, Tensor], groups: Any, where: str) -> dict[str, Any]:
    """Return torch's optimizer state from named tensors and param_groups; raise CheckpointError on a mismatch."""
    try:
        indices = {name: index for index, name in optimizer_names(groups).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".")
            state.setdefault(indices[name], {})[kind] = tensor
        return {"state": dict(sorted(state.items())), "param_groups": groups}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"its optimizer state does not match its param_groups ({error!r:.80})"
        raise CheckpointError(where, problem, EARLIER, kind="damaged") from error


def is_optimizer_state(value: Any) -> bool:
    """Return whether a value has the form of what torch.optim.Optimizer.state_dict() returns."""
    if not isinstance(value, dict) or not isinstance(value.get("param_groups"), list):
        return False
    return isinstance(value.get("state"), dict) and all(isinstance(each, dict) for each in value["state"].values())


def optimizer_names(groups: Any) -> dict[int, str]:
    """Return the name of each parameter by its index, from the `param_names` of the groups."""
    return {index: name for group in groups for index, name in zip(group["params"], group["param_names"], strict=True)}
