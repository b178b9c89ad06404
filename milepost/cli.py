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
from milepost.runtime.errors import TrainingError
from milepost.runtime.interrupt import INTERRUPTED, raise_on_signal, stopping_signals, was_interrupted
from milepost.runtime.progress import Log, flush_streams, ignore_stdout
from milepost.text import tokenization
from milepost.text.errors import DataError

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2), (hardware.DeviceError, 2), (tokenization.UnknownCharacters, 2), (ckpt.CheckpointError, 3), (DataError, 4),
)  # fmt: skip


def guarded(action: Callable[[Config, Log], int], settings: Config, *, log: Log | None = None) -> int:
    """The exit code of `action`; what it raises is said in one sentence, with a traceback only if DEBUG is exactly 1.

    After a signal it is 130, unless the action was finished all the same.
    """
    log = log or Log()
    torchrun: dict[str, int] = {}
    try:
        raise_on_signal()
        torchrun = config.torchrun()
        log.rank, log.local_rank = torchrun.get("rank", 0), torchrun.get("local_rank", 0)
        code = action(settings, log)
        code = INTERRUPTED if code and was_interrupted() else code
    except (KeyboardInterrupt, Exception) as error:
        if torchrun:  # as soon as one process has failed, it sends a signal to those that are about to end
            for number in stopping_signals():
                signal.signal(number, signal.SIG_IGN)
        code = stopped(error, log)
    finally:
        log.close()
        flush_streams()
    return distributed.ended(code)


def stopped(error: BaseException, log: Log) -> int:
    """Report why an action stopped and return the exit code. torchrun's signal adds nothing to an error that it comes after."""
    cause = error
    while isinstance(cause, KeyboardInterrupt) and cause.__context__ is not None:
        cause = cause.__context__
    if distributed.lost(cause):
        error = cause
    elif was_interrupted() or not isinstance(error, Exception):  # a library may have made another exception of it
        log("interrupted")
        return INTERRUPTED
    assert isinstance(error, Exception)
    if config.debug():
        raise error
    return told(error, log)


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
    waiting = stopping_signals() if torchrun else []
    before = {number: signal.signal(number, signal.SIG_DFL) for number in waiting}
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
