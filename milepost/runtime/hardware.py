"""Which device, which number format, and everything that decides bits on them."""

import contextlib
import ctypes
import os
import platform
from typing import Any

import torch
from torch import nn

from milepost.splitmix import mix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# On a CPU, bfloat16 pays once the matrices are this wide: in training, where casting costs, and in generating, where calls do.
WIDE_ENOUGH_TO_TRAIN, WIDE_ENOUGH_TO_DECODE = 128, 256

# Converting all weights takes about as long as bfloat16 saves on so many generated tokens, whatever the model's size.
ENOUGH_TO_CONVERT = 32

# What mallopt(3) calls the most blocks that are mapped one by one, and the size of a free end that goes back to the system.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1

# Raised when a change of ours gives a step other bits: 2 has attention, the head, GELU and Muon by other kernels than 1.
KERNELS = 2

# Everything of the machine and the versions that can change the bits of a step.
DECIDES_BITS = (
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
CALLED = {
    "kernels": "the version of milepost's own kernels",
    "local_processes": "the number of processes on a machine",
}  # what has another name in a sentence


class DeviceError(Exception):
    """A device or number format that this machine does not have. Exit code 2 at the door."""


def available_devices() -> list[str]:
    """The device types of this machine, best first."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, here in present.items() if here]


def choose_device(wish: str, *, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device that DEVICE means: the best one for `auto`. Raises DeviceError listing the devices there are.

    Of several processes on a machine each takes a GPU of its own. MPS, which no library sends tensors from, is not for them.
    """
    present = [name for name in available_devices() if local_size == 1 or name != "mps"]
    wish = present[0] if wish == "auto" else wish
    if wish not in present:
        raise DeviceError(
            f"DEVICE={wish}: this machine has no {wish} device; available: {', '.join(present)} (DEVICE=auto takes the first)"
        )
    if wish != "cuda" or local_size == 1:
        return torch.device(wish)
    if local_size > torch.cuda.device_count():
        raise DeviceError(
            f"{local_size} processes on this machine have {torch.cuda.device_count()} GPUs: set --nproc_per_node to that, or DEVICE=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def share_threads(local_size: int) -> int:
    """Gives each of `local_size` processes on this machine its share of the processors; returns how many threads that makes.

    torchrun leaves every process with one, however many processors there are.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, usable // local_size))
    return torch.get_num_threads()


def choose_dtype(wish: str, device: torch.device, *, width: int) -> str:
    """The number format of matrix products: a fixed rule on device, processor and model width, never on timing.

    Weights, their gradients and the optimizer stay float32 throughout; this is the format that autocast multiplies in.
    """
    if wish == "float16" and device.type == "cpu":
        raise DeviceError("DTYPE=float16 is for cuda and mps; on a CPU use DTYPE=bfloat16 or DTYPE=float32")
    if wish != "auto":
        return wish
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    pays = device.type == "cpu" and multiplies_bfloat16() and width >= WIDE_ENOUGH_TO_TRAIN
    return "bfloat16" if pays else "float32"


def decode_dtype(wish: str, device: torch.device, *, width: int, tokens: int) -> str:
    """The format of the weights for generating `tokens` on a CPU: a fixed rule on processor, width and their number.

    Reading the weights is most of the time, so half the bytes pay wherever bfloat16 is multiplied by hardware, once
    there are as many tokens as converting the weights costs. Raises DeviceError for float16, which no CPU multiplies.
    """
    if wish != "auto":
        return choose_dtype(wish, device, width=width)
    pays = multiplies_bfloat16() and width >= WIDE_ENOUGH_TO_DECODE and tokens >= ENOUGH_TO_CONVERT
    return "bfloat16" if pays else "float32"


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it: AVX-512's multiply it four times, AMX tiles eight times as fast as float32.

    Without either it is imitated, and slower than float32.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_compile(wish: str, device: torch.device, *, pays: bool, steps: int) -> tuple[bool, str | None]:
    """Return whether to compile the training step, and a line to log if that is requested and impossible.

    A fixed rule, so that a resume chooses the same. `pays` says whether compiling saves more time than it takes in a long run.
    """
    pays_back = device.type == "cuda" and pays and steps >= 1000
    if wish == "false" or (wish == "auto" and not pays_back):
        return False, None
    if _has_compiler(device):
        return True, None
    return False, "COMPILE: no working compiler here, so the run stays eager"


def _has_compiler(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            from torch.utils._triton import has_triton

            return has_triton()
        from torch._inductor.cpp_builder import get_cpp_compiler

        return bool(get_cpp_compiler())
    except Exception:  # any failure to find one means the same thing: there is none
        return False


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled for one shape. It shares its parameters with `model`, which stays the one to save, evaluate and sample."""
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def make_deterministic(on: bool, device: torch.device) -> None:
    """Selects kernels that give the same bits at every run, and refuses those that cannot. Call before the device's first use.

    On MPS, which promises no equal bits, it only warns. (To warn alone would be wrong on CUDA: flash attention's backward pass is
    deterministic only where the others are refused.)
    """
    torch.use_deterministic_algorithms(on, warn_only=device.type == "mps")
    # Filling fresh memory with NaN would only cost time: nothing here reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Has the C library keep what a training step frees for the next one, where it can (glibc); elsewhere nothing changes.

    By default blocks over 32 MB go back to the system at once, and every step has their pages zeroed anew: with 124 million
    parameters up to a third of it. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc here
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def seed_step(device: torch.device, seed: int, step: int, *, rank: int = 0) -> None:
    """Makes every random draw of a step a function of (seed, step, rank), so that no generator's state needs keeping.

    The first process draws as the only one would. Only the generators that the step draws from: torch.manual_seed would spend most of a millisecond on absent devices.
    """
    drawn = mix(seed, step, rank) if rank else mix(seed, step)
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)
    elif device.type == "mps":
        torch.mps.manual_seed(drawn)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """The context that multiplies in `dtype`; nothing at all for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


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
    """What a checkpoint records of machine and versions, to tell later whether a resume can be bit-exact."""
    return {
        "processes": processes,
        "local_processes": local_processes,
        "distributed": distributed,
        "torch": str(torch.__version__),
        "kernels": KERNELS,
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
    """The processor's model, where the system tells: libraries choose kernels by it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    except (OSError, StopIteration, IndexError, UnicodeDecodeError):
        return platform.processor() or platform.machine()


def bit_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why a step here may give other bits than the steps of a checkpoint did, one reason each; empty if it cannot."""
    if not before:
        return ["on what machine and versions it was trained is not recorded"]
    before = {
        "kernels": 1,
        "processes": 1,
        "local_processes": 1,
        "distributed": "none",
    } | before  # the first did not say
    differ = [name for name in DECIDES_BITS if before.get(name) != now.get(name)]
    reasons = [f"{CALLED.get(name, name)} is {now.get(name)}, was {before.get(name)}" for name in differ]
    if "processes" in differ:  # how they share the work is no reason of its own then
        count = now.get("processes")
        others = [
            reason
            for name, reason in zip(differ, reasons, strict=True)
            if name not in ("processes", "local_processes", "distributed")
        ]
        reasons = [f"{count} {'process' if count == 1 else 'processes'}, was {before['processes']}", *others]
    if not now.get("deterministic"):
        reasons.append("DETERMINISTIC=false")
    if now.get("device") == "mps":
        reasons.append("mps promises no equal bits")
    return reasons


def all_memory(device: torch.device) -> int | None:
    """Bytes that the device has, free or not; None where the system does not tell."""
    return (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _of_main_memory("MemTotal")
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where the system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_main_memory()


def free_main_memory() -> int | None:
    """Bytes of main memory that can still be had; None where the system does not tell."""
    return _of_main_memory("MemAvailable")


def _of_main_memory(what: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith(f"{what}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


# CUDA has a class for it; the CPU's allocator and MPS have only words.
MEMORY_RAN_OUT = ("not enough memory", "can't allocate memory", "MPS backend out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_RAN_OUT)
