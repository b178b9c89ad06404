"""Who may write: one at a time into a folder, and one process for each run. The system frees a dead holder's."""

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
    """Holds the folder for one writer: names, numbers and clean-up are decided under it. Waits; the system frees a dead holder's.

    Raises OSError if something other than a lock file lies in its place: opening a lock empties it.
    """
    check_file(folder / FOLDER_LOCK)
    with FileLock(folder / FOLDER_LOCK):
        yield


class RunLockedError(Exception):
    """Another living process trains the same run."""


class RunLock:
    """Held by the one living process of a run, from its start to its end; the system frees it when the process dies."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._lock = FileLock(folder / f".run-{run_id}.lock")
        self._owner = folder / f".run-{run_id}.owner"  # beside the lock: opening a lock file empties it
        self._run_id = run_id

    def acquire(self, *, patience: float = 0) -> None:
        """Raises RunLockedError naming pid and host if another process trains this run, and still does after `patience` seconds.

        Raises OSError if something other than a lock file lies in its place.
        """
        check_file(Path(self._lock.lock_file))
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise RunLockedError(
                f"run {self._run_id} is being trained by {self._holder()}: wait for it or stop it first"
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._owner.unlink(missing_ok=True)  # a dead holder's, or a link, which is not followed
        with open(self._owner, "x", encoding="utf-8") as file:
            file.write(json.dumps(owner))

    def _holder(self) -> str:
        try:
            check_file(self._owner)  # a pipe would be waited for
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Gives the run free again."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()
