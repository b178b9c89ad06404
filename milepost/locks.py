"""Locks: one writer per folder, one process per run. The system releases the locks of a dead process."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from milepost.paths import check_file

FOLDER_LOCK = ".lock"


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock under which names and save numbers are chosen and leftovers removed; wait for it.

    Raise OSError if anything but a lock file has its name: opening a lock file empties it.
    """
    check_file(folder / FOLDER_LOCK)
    with FileLock(folder / FOLDER_LOCK):
        yield


class RunLockedError(Exception):
    """Another process is training the same run."""


class RunLock:
    """The lock of a run, held by its process from start to end."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._lock = FileLock(folder / f".run-{run_id}.lock")
        self._owner = folder / f".run-{run_id}.owner"  # beside the lock: opening a lock file empties it
        self._run_id = run_id

    def acquire(self, *, patience: float = 0) -> None:
        """Acquire the lock; raise RunLockedError with pid and host if another process holds it for `patience` seconds.

        Raise OSError if anything but a lock file has its name.
        """
        check_file(Path(self._lock.lock_file))
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise RunLockedError(
                f"run {self._run_id} is being trained by {self._holder()}: wait for it or stop it first"
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._owner.unlink(missing_ok=True)  # of a dead process, or a link, which is not followed
        with open(self._owner, "x", encoding="utf-8") as file:
            file.write(json.dumps(owner))

    def _holder(self) -> str:
        try:
            check_file(self._owner)  # reading a pipe would block
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Release the lock."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()


@contextlib.contextmanager
def hold_run(folder: Path, run_id: str) -> Iterator[None]:
    """Hold the lock of a run, so that no process trains it meanwhile. Raise RunLockedError if one does."""
    lock = RunLock(folder, run_id)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
