"""The entry of every script: the processes that torchrun started, and errors as one sentence and an exit code."""

import contextlib
import errno
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from milepost import ckpt, config
from milepost.config import Config, ConfigError
from milepost.files import in_words
from milepost.lazy import FirstUse
from milepost.locks import Reports, RunHeldElsewhereError, RunLockedError
from milepost.runtime import distributed, hardware
from milepost.runtime.distributed import ElsewhereError, World
from milepost.runtime.errors import DeviceFaultError, TrainingError
from milepost.runtime.interrupt import INTERRUPTED, ending_at_once, raise_on_signal, stopping_signals, was_interrupted
from milepost.runtime.progress import Log
from milepost.screen import flush_streams, harmless, ignore, report_lost
from milepost.text import tokenization
from milepost.text.addresses import masked
from milepost.text.errors import DataError

# Seconds for which a mistake that every process finds keeps the others from ending before rank 0 has reported it:
# torchrun ends all processes as soon as one has ended.
GRACE = 2.0
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2), (hardware.DeviceError, 2), (tokenization.UnknownCharacters, 2), (tokenization.IncompleteTokenizer, 2),
    (ckpt.CheckpointError, 3), (DataError, 4), (DeviceFaultError, 7), (RunHeldElsewhereError, 10),
)  # fmt: skip


def guarded(
    action: Callable[[Config, Log], int], settings: Config, *, log: Log | None = None, reports: bool = False
) -> int:
    """Run `action` and return its exit code. Log an error as one sentence, with a traceback only if DEBUG is exactly 1.

    The code after a signal is 130, unless the action returned 0. An action that only `reports` fails with 1 if stdout could not
    be written, as GNU's commands do.
    """
    log = log or Log()
    torchrun: dict[str, int] = {}
    try:
        raise_on_signal()
        FirstUse.block, Reports.line = ending_at_once, log
        torchrun = config.torchrun()
        log.rank, log.local_rank = torchrun.get("rank", 0), torchrun.get("local_rank", 0)
        for note in (*settings.notes, *config.no_effect(settings, Path(sys.argv[0]).name)):
            log(note)
        code = action(settings, log)
        code = INTERRUPTED if code and was_interrupted() else code or int(reports and report_lost())
    except (KeyboardInterrupt, Exception) as error:
        if torchrun:  # it signals the other processes as soon as one has failed
            for number in stopping_signals():
                signal.signal(number, signal.SIG_IGN)
            if log.rank and isinstance(error, ConfigError | DataError):
                time.sleep(GRACE)
        code = stopped(error, log)
    finally:
        log.close()
        flush_streams()
    return distributed.ended(code)


def stopped(error: BaseException, log: Log) -> int:
    """Log why an action stopped; return the exit code.

    An error that came before torchrun's signal is reported instead of the signal.
    """
    cause = error
    while isinstance(cause, KeyboardInterrupt) and cause.__context__ is not None:
        cause = cause.__context__
    if distributed.lost(cause):
        error = cause
    elif was_interrupted() or not isinstance(error, Exception):  # a library may have converted the exception
        log("interrupted")
        notify(error, log)
        return INTERRUPTED
    assert isinstance(error, Exception)
    notify(error, log)
    if config.debug():
        raise error
    return report(error, log)


def notify(error: BaseException, log: Log, *, more: str = "") -> None:
    """Send to the webhook of a training why it ends, and `more`."""
    if was_interrupted() or not isinstance(error, Exception):
        log.notices.send("interrupted", more or "before its first step")
    elif not isinstance(error, ElsewhereError):
        log.notices.send("failed", f"{sentence(error)}{'; ' * bool(more)}{more}")


def report(error: Exception, log: Log) -> int:
    """Log the error, unless another process logs it; return the exit code."""
    code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
    if not isinstance(error, ElsewhereError):
        log.error(sentence(error), expected=code > 1 or isinstance(error, TrainingError))
    return code


def sentence(error: Exception) -> str:
    """Return one sentence with the error and its remedy."""
    if hardware.is_out_of_memory(error):
        remedy = "lower BATCH_SIZE (and raise GRADIENT_ACCUMULATION_STEPS to match), BLOCK_SIZE, or N_LAYER and N_EMBD"
        return f"error: out of memory: {remedy}"
    if distributed.lost(error):
        remedy = "RESUME=auto resumes the last checkpoint"
        return f"error: another process of this training is gone, so this process ends too; {remedy}"
    if isinstance(error, ConfigError):  # a line for each mistake
        return f"error: {error}"
    known = isinstance(error, TrainingError | RunLockedError | OSError) or any(
        isinstance(error, kind) for kind, _ in EXIT_CODES
    )
    return (
        f"error: {harmless(str(error), one_line=True)}"
        if known
        else f"error: {type(error).__name__}: {error} (unexpected; DEBUG=1 shows where)"
    )


@contextlib.contextmanager
def naming_output(folder: Path) -> Iterator[None]:
    """Raise ConfigError naming OUTPUT if the folder that a script writes to cannot be written.

    A full disk is not a mistake in the settings: its error is raised as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        remedy = "fix its permissions, or set another OUTPUT"
        raise ConfigError([f"OUTPUT: {folder} cannot be written ({in_words(error)}): {remedy}"]) from error


# ---------------------------------------------------------------------------------------------------------------------
# The processes that torchrun starts.


@contextlib.contextmanager
def processes(settings: Config, log: Log) -> Iterator[World]:
    """Yield the group of processes that torchrun started; only rank 0 prints.

    Without torchrun the group is this process.
    """
    torchrun = config.torchrun()
    local = {name: torchrun[name] for name in ("local_rank", "local_size") if torchrun}
    device = hardware.choose_device(settings.device, **local)
    # While torch waits for the other processes, no Python signal handler runs: use the default ones.
    waiting = stopping_signals() if torchrun else []
    before = {number: signal.signal(number, signal.SIG_DFL) for number in waiting}
    world = distributed.join(torchrun, accelerator=device.type)
    for number, handler in before.items():
        signal.signal(number, handler)
    if world.size > 1:
        check_alike(config.shared_settings(settings) | {"DEVICE": device.type}, world)
        prepare_processes(settings, log, world)
    elif settings.is_set("DISTRIBUTED"):
        log(f"DISTRIBUTED={settings.distributed} is not used with one process; torchrun --nproc_per_node starts more")
    yield world
    distributed.leave()


def check_alike(values: dict[str, Any], world: World) -> None:
    """Raise ConfigError if a setting here differs from rank 0's, ElsewhereError if one differs in another process."""
    rank0 = world.broadcast(values)
    wrong = [name for name, value in values.items() if value != rank0.get(name)]
    if not world.any(bool(wrong)):
        return
    if not wrong:
        raise ElsewhereError
    raise ConfigError(
        [
            f"{name} is {_shown(values[name])} here and {_shown(rank0.get(name))} on rank 0: set the same value everywhere"
            for name in wrong
        ]
    )


def _shown(value: object) -> str:
    return f"{masked(value) if isinstance(value, str) else value!r:.60}"


def prepare_processes(settings: Config, log: Log, world: World) -> None:
    """Silence every process but rank 0, and split this machine's processor cores between its processes."""
    if not world.is_rank0:
        ignore(sys.stdout)
    if config.omp_threads_is_one() and world.local_size > 1:  # for a single process torchrun leaves it as it is
        count = f"{hardware.share_threads(world.local_size)} threads for each of the {world.local_size} processes here"
        log(
            f"OMP_NUM_THREADS is 1, as torchrun sets it: using {count}; OMP_THREAD_LIMIT=1 keeps it at 1, a higher number is kept"
        )
    if not config.max_restarts():
        return
    if settings.resume == "never":
        log("torchrun's restarts would begin at step 0; set RESUME=auto and ENABLE_CHECKPOINTS=true to resume instead")
    elif settings.resume_step is not None or settings.resume not in ("auto", "latest"):
        named = "RESUME" if settings.resume_step is None else "RESUME_STEP"
        remedy = "once the run has saved a newer one, RESUME=auto without RESUME_STEP takes the latest instead"
        log(f"torchrun's restarts would begin at the checkpoint that {named} names again; {remedy}")
