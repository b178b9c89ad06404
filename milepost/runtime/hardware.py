"""Device, dtype and compilation, and everything on the machine that affects bitwise reproducibility."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import tempfile
from typing import TYPE_CHECKING, Any

from milepost.lazy import torch, torch_is_in_use
from milepost.runtime import cgroup
from milepost.splitmix import mix

if TYPE_CHECKING:
    from torch import Tensor, nn

# Embedding dimensions from which bfloat16 pays on a CPU: casts cost time in training, calls in generation.
BFLOAT16_TRAIN_WIDTH, BFLOAT16_DECODE_WIDTH = 128, 256

# Converting all weights takes about as long as bfloat16 saves on this many generated tokens, whatever the model's size: with
# bfloat16 instructions, and with AVX2, where float32 takes more than twice as long.
BFLOAT16_DECODE_TOKENS, BFLOAT16_AVX2_TOKENS = 32, 8

# Parameters of mallopt(3): how many blocks may be mapped singly, and from what size free memory at the top returns to
# the system.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1

UNQUOTED = frozenset(" \t'\"")  # characters that end or open a word in a command line without quotes

# Increased when a change of ours changes the bits of a step on that kind of device. Version 2 has other kernels for
# attention, the head, GELU and Muon; version 3, on CUDA, the head with a padded vocabulary, on
# a CPU fused attention in float32 with AVX2.
KERNELS = {"cpu": 3, "mps": 2, "cuda": 3}

# Entries of a fingerprint that affect the bits of a step.
AFFECTS_BITS = (
    "processes",
    "local_processes",
    "distributed",
    "torch",
    "kernels",
    "device",
    "device_name",
    "threads",
    "cpu_capability",
    "dtype",
    "compile",
    "deterministic",
)
IN_WORDS = {
    "kernels": "the version of milepost's own kernels",
    "local_processes": "the number of processes per machine",
}


class DeviceError(Exception):
    """A device or dtype that this machine does not have. Exit code 2."""


def available_devices() -> list[str]:
    """Return the device types of this machine, the best first."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, here in present.items() if here]


def choose_device(requested: str, *, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Return the requested device, or the best for `auto`. Raise DeviceError listing the available devices.

    Each of several processes takes its own GPU. MPS serves one process only: no library communicates its tensors.
    """
    present = [name for name in available_devices() if local_size == 1 or name != "mps"]
    gpus = [name for name in present if name != "cpu"]
    kind = present[0] if requested == "auto" else gpus[0] if requested == "gpu" and gpus else requested
    if kind not in present:
        raise DeviceError(
            f"DEVICE={kind}: this machine has no {kind} device; available: {', '.join(present)} (DEVICE=auto "
            f"takes the first)"
        )
    if kind != "cuda" or local_size == 1:
        return torch.device(kind)
    if local_size > torch.cuda.device_count():
        raise DeviceError(
            f"{local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs: set "
            f"--nproc_per_node to that, or DEVICE=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def share_threads(local_size: int) -> int:
    """Set the number of threads to this process's share of the processors, and return it.

    torchrun gives every process one thread, however many processors there are.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, usable // local_size))
    return torch.get_num_threads()


def choose_dtype(requested: str, device: torch.device, *, width: int) -> str:
    """Return the dtype of matrix products: a fixed rule on device, processor and embedding dimension, never on timing.

    This is the dtype of autocast. Weights, gradients and the optimizer stay float32.
    """
    if requested == "float16" and device.type == "cpu":
        raise DeviceError("DTYPE=float16 is for cuda and mps; on a CPU use DTYPE=bfloat16 or DTYPE=float32")
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    pays = device.type == "cpu" and multiplies_bfloat16() and width >= BFLOAT16_TRAIN_WIDTH
    return "bfloat16" if pays else "float32"


def decode_dtype(requested: str, device: torch.device, *, width: int, tokens: int, compiled: bool = False) -> str:
    """Return the dtype of the weights to generate `tokens` on a CPU: a fixed rule on processor, embedding dimension, tokens, and
    whether the decoder is compiled.

    Reading the weights takes most of the time, so half the bytes pay where hardware multiplies bfloat16, where PyTorch converts
    it as fast as memory delivers it, which it does for one row with AVX2, and with compiled kernels everywhere; once there are
    enough tokens to make up for converting the weights. Raises DeviceError for float16, which no CPU multiplies.
    """
    if requested != "auto":
        return choose_dtype(requested, device, width=width)
    fewest = BFLOAT16_DECODE_TOKENS
    if not multiplies_bfloat16():
        if not compiled and torch.backends.cpu.get_cpu_capability() != "AVX2":
            return "float32"
        fewest = BFLOAT16_AVX2_TOKENS
    return "bfloat16" if width >= BFLOAT16_DECODE_WIDTH and tokens >= fewest else "float32"


def multiplies_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions: AVX-512 is four times, AMX eight times as fast as
    float32.

    Without them bfloat16 is emulated, and slower than float32.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_compile(requested: str, device: torch.device, *, pays: bool, steps: int) -> tuple[bool, str | None]:
    """Return whether to compile the training step, and a line to log if that is requested and impossible.

    A fixed rule, so that a resume chooses the same. `pays` says whether compiling saves more time than it takes in a
    long run.
    """
    pays_back = device.type == "cuda" and pays and steps >= 1000
    if requested == "false" or (requested == "auto" and not pays_back):
        return False, None
    if _has_compiler(device):
        return True, None
    return (
        False,
        "COMPILE: no working compiler found (torch cannot use one where its own path, the folder for temporary files or "
        "TORCHINDUCTOR_CACHE_DIR has a space or a quote), so the run stays eager",
    )


def _has_compiler(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            from torch.utils._triton import has_triton

            return has_triton()
        if any(UNQUOTED.intersection(place) for place in _compilers_places()):
            return False
        from torch._inductor.cpp_builder import get_cpp_compiler

        return bool(get_cpp_compiler())
    except Exception:  # any failure to find a compiler means that there is none
        return False


def _compilers_places() -> list[str]:
    """Return the folders that torch writes into the compiler's command line as they are, without quotes."""
    from torch._inductor.codecache import cache_dir

    return [torch.__path__[0], tempfile.gettempdir(), cache_dir()]


def compiled(model: nn.Module) -> nn.Module:
    """Return the model compiled for one shape. It shares its parameters with `model`; save,
    evaluate and sample with that.

    On CUDA the compiler would time alternatives, and choose other kernels with other bits in another process: where
    kernels must be deterministic it may not.
    """
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    options = untimed() if on_cuda and torch.are_deterministic_algorithms_enabled() else None
    return torch.compile(model, dynamic=False, options=options)  # type: ignore[return-value]


def untimed() -> dict[str, Any]:
    """Return the compiler's options under which no timing chooses a kernel whose bits differ: products are padded only by
    rules, and reductions split in one way. Versions of torch without such a mode have a fixed way to split already.
    """
    from torch._inductor import config

    return {"deterministic": True} if hasattr(config, "deterministic") else {"shape_padding": False}


def make_deterministic(on: bool, device: torch.device) -> None:
    """Select deterministic kernels and refuse the others. Call before the first use of the device.

    On MPS, which does not promise bit-identical results, torch only warns. On CUDA a warning would not do: the backward
    passes of flash and of memory-efficient attention (float32, masks) are deterministic only where nondeterministic
    kernels are refused. Reading the settings has fixed the workspace of cuBLAS.
    """
    torch.use_deterministic_algorithms(on, warn_only=device.type == "mps")
    # Filling new memory with NaN would only cost time: nothing here reads memory before writing it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a training step frees; elsewhere do nothing.

    By default blocks over 32 MB return to the system at once, and the kernel zeroes their pages in every step: up to a
    third of its time with 124 million parameters. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def seed_step(device: torch.device, seed: int, step: int, *, rank: int = 0) -> None:
    """Seed torch so that every random draw of a step is a function of (seed, step, rank), and no generator state need
    be saved.

    Rank 0 draws as a single process does. torch.manual_seed would spend most of a millisecond on absent devices.
    """
    drawn = mix(seed, step, rank) if rank else mix(seed, step)
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)
    elif device.type == "mps":
        torch.mps.manual_seed(drawn)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of main memory on the device; on CUDA from pinned memory, so that nothing waits for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which matrix products have `dtype`; a null context for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def fingerprint(
    device: torch.device,
    *,
    dtype: str,
    compile_step: bool,
    deterministic: bool,
    processes: int = 1,
    local_processes: int = 1,
    distributed: str = "none",
) -> dict[str, Any]:
    """Return what a checkpoint records of machine and versions, from which a resume decides whether it is bit-exact."""
    return {
        "processes": processes,
        "local_processes": local_processes,
        "distributed": distributed,
        "torch": str(torch.__version__),
        "kernels": KERNELS[device.type],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "dtype": dtype,
        "compile": compile_step,
        "deterministic": deterministic,
    }


def processor_name() -> str:
    """Return the processor's model, if the system reports it: libraries choose kernels by it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    except (OSError, StopIteration, IndexError, UnicodeDecodeError):
        return platform.processor() or platform.machine()


def bit_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the reasons why a step here may not be bit-identical to the checkpoint's steps; none if it is."""
    if not before:
        return ["the machine and versions that trained it are not recorded"]
    before = {
        "kernels": 1,
        "processes": 1,
        "local_processes": 1,
        "distributed": "none",
    } | before  # the first versions did not record these
    differ = [name for name in AFFECTS_BITS if before.get(name) != now.get(name)]
    reasons = [f"{IN_WORDS.get(name, name)} is {now.get(name)}, was {before.get(name)}" for name in differ]
    if "processes" in differ:  # which implies that they share the work differently
        count = now.get("processes")
        others = [
            reason
            for name, reason in zip(differ, reasons, strict=True)
            if name not in ("processes", "local_processes", "distributed")
        ]
        reasons = [f"{count} {'process' if count == 1 else 'processes'}, was {before['processes']}", *others]
    if not differ and _probes_differ(before.get("probe"), now.get("probe")):
        reasons.append("a step of fixed numbers has other bits here: a library or milepost's code computes otherwise")
    if not now.get("deterministic"):
        reasons.append("DETERMINISTIC=false")
    if now.get("device") == "mps":
        reasons.append("mps does not promise bit-identical results")
    return reasons


def _probes_differ(before: Any, now: Any) -> bool:
    """Return whether two probes took the same step and computed different bits. Either may be absent or empty."""
    if not (isinstance(before, dict) and before and now) or before.get("inputs") != now["inputs"]:
        return False
    return bool(before.get("sha256") != now["sha256"])


def all_memory(device: torch.device) -> int | None:
    """Return the device's memory in bytes, free or not; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _lower(_meminfo("MemTotal"), cgroup.memory_limit())


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of the device; None if unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_main_memory()


def free_main_memory() -> int | None:
    """Return the free bytes of main memory, as far as a container or a batch system allows; None if unknown."""
    return _lower(_meminfo("MemAvailable"), cgroup.memory_left())


def _lower(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _meminfo(name: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


# CUDA raises a class of its own; the CPU allocator and MPS raise a RuntimeError with these texts.
OUT_OF_MEMORY_TEXTS = ("not enough memory", "can't allocate memory", "MPS backend out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that memory ran out."""
    if isinstance(error, MemoryError) or (torch_is_in_use() and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
