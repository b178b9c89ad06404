"""Atomic, durable writing: write under a temporary dot-name, fsync, reveal by one rename, fsync the folder."""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

TEMPORARY = ".tmp-"  # nothing that begins so is ever read; what a crash leaves is removed under the folder's lock
FOLDER_LOCK = ".lock"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a binary file that appears as `path`, whole and durable, when the block ends; on an error nothing appears.

    Raises FileExistsError if `path` is there already: a visible name is never replaced. Raises OSError if the disk refuses,
    also where the writer hid that behind an error of its own.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "x+b") as file:  # readable too: a zip archive is added to by reading its directory
            yield file
            flush_to_disk(file)
        reveal(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if refusal := _refusal_behind(error):
            raise OSError(refusal.errno, refusal.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def _refusal_behind(error: BaseException) -> OSError | None:
    """The disk's own error behind a RuntimeError: torch.save closes its archive after a failed write, and that fails too."""
    cause: BaseException | None = error if isinstance(error, RuntimeError) else None
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def flush_to_disk(file: IO[bytes]) -> None:
    """Returns when the file's bytes are on the device. macOS needs F_FULLFSYNC: its fsync stops at the drive's cache."""
    file.flush()
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
        return
    os.fsync(file.fileno())


def reveal(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, which must not exist; the caller holds the folder's lock."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable. Windows has no such call, and some file systems answer EINVAL."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # The new name is visible but not proved durable: worse than hoped, yet no reason to lose the file.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the folder for one writer: names, numbers and clean-up are decided under it. Waits; the system frees a dead holder's."""
    with FileLock(folder / FOLDER_LOCK):
        yield


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what killed writers left; returns it. Under the folder's lock no temporary file has a living writer."""
    leftovers = list(folder.glob(f"{TEMPORARY}*"))
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return leftovers


def prepare_folder(folder: Path) -> None:
    """Makes the folder and proves that it can be written, so that a run fails before its first step and not at its first save.

    Raises OSError if it cannot, NotImplementedError if its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        remove_leftovers(folder)
        probe = folder / f"{TEMPORARY}probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()


class RunLockedError(Exception):
    """Another living process trains the same run."""


class RunLock:
    """Held by the one living process of a run, from its start to its end; the system frees it when the process dies."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._lock = FileLock(folder / f".run-{run_id}.lock")
        self._owner = folder / f".run-{run_id}.owner"  # beside the lock: opening a lock file empties it
        self._run_id = run_id

    def acquire(self) -> None:
        """Raises RunLockedError naming pid and host if another process trains this run."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(
                f"run {self._run_id} is being trained by {self._holder()}: wait for it or stop it first"
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._owner.write_text(json.dumps(owner), encoding="utf-8")

    def _holder(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    def release(self) -> None:
        """Gives the run free again."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()
