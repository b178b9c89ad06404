"""Locks: one writer per folder, one process per run. The system releases the locks of a dead process.

While a lock is held, a file beside it names the holder, so that whoever waits can say for whom.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from milepost.files import LOCKS, OwnerFile, check_mounted, lacks
from milepost.paths import check_file
from milepost.screen import show

FOLDER_LOCK = ".lock"
CLEANING = 0.5  # seconds for which another process may hold the lock of a run only to see whether it is free
QUIET = 5.0  # seconds of waiting for a folder before it is reported
PATIENCE = 600.0  # seconds of waiting for a folder at most: a large model on a slow disk is saved in less


def _to_stderr(line: str) -> None:
    show(line, sys.stderr)


class Reports:
    """Where a wait for a lock is reported: stderr, until a script sets its log."""

    line: Callable[[str], None] = staticmethod(_to_stderr)


class OwnedLock:
    """A lock file, and beside it, while it is held, a file that names the holder.

    The lock file has the write permissions of its folder: whoever may write there may lock it. Where the file system
    has no locks, the file that names the holder is the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner = path.with_name(f"{path.name.removesuffix('.lock')}.owner")
        self._lock: FileLock | OwnerFile | None = None

    def acquire(self, *, patience: float) -> bool:
        """Acquire the lock; return False if it is held elsewhere for `patience` seconds.

        Raise OSError if anything but a lock file has its name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if LOCKS in lacks(self.path.parent):
            held = OwnerFile(self._owner)
            self._lock = held if held.acquire(patience=patience) else None
            return self._lock is not None
        check_file(self.path)
        mode = stat.S_IMODE(os.stat(self.path.parent).st_mode) & 0o666 | 0o600
        lock = FileLock(self.path)  # without a mode, which some file systems refuse to set
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return False
        self._lock = lock
        with contextlib.suppress(OSError):  # another user's, or refused
            if stat.S_IMODE(os.lstat(self.path).st_mode) != mode:
                self.path.chmod(mode)
        self._name_owner()
        return True

    def _name_owner(self) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without it
            if os.path.lexists(self._owner):  # of a dead process, or a link, which is not followed
                self._owner.unlink()
            with open(self._owner, "x", encoding="utf-8") as file:
                file.write(json.dumps(owner))

    def owner(self) -> str:
        """Return who holds the lock, in words."""
        try:
            check_file(self._owner)  # reading a pipe would block
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"

    def release(self, *, remove: bool) -> None:
        """Release the lock; with `remove`, delete its file first, while no other process can hold it."""
        if self._lock is None:
            return
        owner = [] if isinstance(self._lock, OwnerFile) else [self._owner]  # else `release` deletes it
        for path in (*owner, *([self.path] if remove else [])):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._lock.release()
        self._lock = None


class FolderHeldError(OSError):
    """Another process has been writing in the folder for too long. The folder itself answers."""


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock under which names and save numbers are chosen and leftovers removed; wait for it.

    Report a wait of more than QUIET seconds. Raise OSError if it is held for PATIENCE seconds, as by a stopped process,
    if anything but a lock file has its name, or if the folder was unmounted while this process ran.
    """
    check_mounted(folder)
    lock = OwnedLock(folder / FOLDER_LOCK)
    if not lock.acquire(patience=QUIET):
        holder = lock.owner()
        Reports.line(f"waiting for {holder}, which is writing in {folder}; if it is stopped or hangs, end it")
        if not lock.acquire(patience=PATIENCE - QUIET):
            problem = f"{lock.owner()} has been writing in the folder for {PATIENCE:.0f} s: resume it or end it"
            raise FolderHeldError(errno.ETIMEDOUT, problem, str(folder))
    try:
        yield
    finally:
        lock.release(remove=False)


class RunLockedError(Exception):
    """Another process is training the same run."""


class RunHeldElsewhereError(RunLockedError):
    """Another process, perhaps on another machine, holds the run in the store that both copy it to."""


class RunLock:
    """The lock of a run, held by its process from start to end. Its file does not outlive it."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._lock = OwnedLock(folder / f".run-{run_id}.lock")
        self._run_id = run_id

    def acquire(self, *, patience: float = 0) -> None:
        """Acquire the lock; raise RunLockedError with pid and host if another process holds it for `patience` seconds.

        Raise OSError if anything but a lock file has its name.
        """
        if not self._lock.acquire(patience=max(patience, CLEANING)):
            holder = self._lock.owner()
            raise RunLockedError(f"run {self._run_id} is being trained by {holder}: wait for it or stop it first")

    def release(self) -> None:
        """Release the lock."""
        self._lock.release(remove=True)


def remove_free_locks(folder: Path) -> None:
    """Delete the empty locks of runs that no process holds: those that killed processes left.

    The caller holds the folder's lock.
    """
    found = [*folder.glob(".run-*.lock"), *folder.glob(".run-*.owner")]
    for path in sorted({path.with_suffix(".lock") for path in found}):
        with contextlib.suppress(OSError):
            lock = OwnedLock(path)
            if (not path.exists() or path.lstat().st_size == 0) and lock.acquire(patience=0):
                lock.release(remove=True)


def is_trained(folder: Path, run_id: str) -> bool:
    """Whether a process trains the run at this moment, as far as this process may look."""
    if not any((folder / f".run-{run_id}.{kind}").exists() for kind in ("lock", "owner")):
        return False
    with contextlib.suppress(OSError, RunLockedError), hold_run(folder, run_id):
        return False
    return True


def seems_trained(folder: Path, run_id: str) -> bool:
    """Whether the lock of the run is held at this moment. Unlike `is_trained` it does not wait, so that a process that only
    looks counts too, and it changes nothing where this process may not write.
    """
    path = folder / f".run-{run_id}.lock"
    if not (path.exists() or path.with_suffix(".owner").exists()):
        return False
    with contextlib.suppress(OSError):
        if (lock := OwnedLock(path)).acquire(patience=0):
            lock.release(remove=True)
            return False
    return True


@contextlib.contextmanager
def hold_run(folder: Path, run_id: str) -> Iterator[None]:
    """Hold the lock of a run, so that no process trains it meanwhile. Raise RunLockedError if one does."""
    lock = RunLock(folder, run_id)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
