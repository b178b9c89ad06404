"""The door of every script: which process this is among those of its training, and every refusal in one sentence with an exit code."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from milepost import ckpt, config
from milepost.config import Config, ConfigError
from milepost.locks import RunLockedError
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import ElsewhereError, World
from milepost.runtime.interrupt import INTERRUPTED
from milepost.runtime.progress import Log, ignore_stdout
from milepost.text import tokenization
from milepost.text.corpus import DataError


class TrainingError(Exception):
    """Training that cannot go on: a loss or a gradient that is not finite. Exit code 1 at the door."""


EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2), (hardware.DeviceError, 2), (tokenization.UnknownCharacters, 2), (ckpt.CheckpointError, 3), (DataError, 4),
)  # fmt: skip


def guarded(action: Callable[[Config, Log], int], settings: Config, *, log: Log | None = None) -> int:
    """The exit code of `action`; what it raises is said in one sentence, with a traceback only if DEBUG is exactly 1."""
    log = log or Log()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # before the loop, both stop at once
            signal.signal(number, signal.default_int_handler)
        torchrun = config.torchrun()
        log.rank, log.local_rank = torchrun.get("rank", 0), torchrun.get("local_rank", 0)
        code = action(settings, log)
    except KeyboardInterrupt:
        log("interrupted")
        code = INTERRUPTED
    except Exception as error:
        if config.debug():
            raise
        code = told(error, log)
    finally:
        log.close()
    return distributed.ended(code)


def told(error: Exception, log: Log) -> int:
    """Says what went wrong, unless another process does; returns the exit code."""
    code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
    if not isinstance(error, ElsewhereError):
        log.error(sentence(error), expected=code > 1 or isinstance(error, TrainingError))
    return code


def sentence(error: Exception) -> str:
    """What to tell of an error, and what to do about it."""
    if hardware.is_out_of_memory(error):
        return "error: out of memory: lower BATCH_SIZE (and raise GRADIENT_ACCUMULATION_STEPS to match), BLOCK_SIZE, or N_LAYER and N_EMBD"
    if distributed.lost(error):
        return "error: another process of this training is gone, so this one ends too; RESUME=auto goes on from what was saved"
    known = isinstance(error, TrainingError | RunLockedError | OSError) or any(
        isinstance(error, kind) for kind, _ in EXIT_CODES
    )
    return f"error: {error}" if known else f"error: {type(error).__name__}: {error} (unexpected; DEBUG=1 shows where)"


# ---------------------------------------------------------------------------------------------------------------------
# The processes that torchrun starts.


@contextlib.contextmanager
def processes(settings: Config, log: Log) -> Iterator[World]:
    """This process among those that torchrun started, which end together; the first alone is heard. Without torchrun, it is alone."""
    torchrun = config.torchrun()
    local = {name: torchrun[name] for name in ("local_rank", "local_size") if torchrun}
    device = hardware.choose_device(settings.device, **local)
    # While it waits for the others, a handler of Python's would not be reached.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    world = distributed.join(torchrun, accelerator=device.type)
    for number, handler in before.items():
        signal.signal(number, handler)
    if world.size > 1:
        check_alike(config.shared_settings(settings) | {"DEVICE": device.type}, world)
        prepare_processes(settings, log, world)
    elif settings.is_set("DISTRIBUTED"):
        log(f"DISTRIBUTED={settings.distributed} is not used: one process alone; torchrun --nproc_per_node starts more")
    yield world
    distributed.leave()


def check_alike(values: dict[str, Any], world: World) -> None:
    """Raises ConfigError if a value of these settings is another than the first process's, ElsewhereError if so on another machine."""
    firsts = world.broadcast(values)
    wrong = [name for name, value in values.items() if value != firsts.get(name)]
    if not world.any(bool(wrong)):
        return
    if not wrong:
        raise ElsewhereError
    told = [f"{name} is {values[name]!r:.60} here and {firsts.get(name)!r:.60} on the first machine" for name in wrong]
    raise ConfigError([f"{each}: set it alike" for each in told])


def prepare_processes(settings: Config, log: Log, world: World) -> None:
    """Silences all but the first, shares out this machine's processors, and says so."""
    if not world.is_rank0:
        ignore_stdout()
    if config.omp_threads_is_one():
        count = f"{hardware.share_threads(world.local_size)} for each of the {world.local_size} processes here"
        log(f"OMP_NUM_THREADS is 1, as torchrun leaves it: {count}; set it for another number")
    if config.max_restarts() and settings.resume == "never":
        log("torchrun's restarts would begin anew each time; RESUME=auto and ENABLE_CHECKPOINTS=true go on instead")
