"""A lock for file systems without locks: a file that only one process can create, and that its holder keeps fresh.

It names host, process and a number drawn at random. A holder that has died is noticed by its process, on the same host,
or by a file that has not been touched for STALE seconds. Clocks of hosts and servers differ and jump, so what they say
is only a suspicion: such a file is watched for a while, and counts as a dead holder's if nobody touches it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from milepost.files.file_system import discard, hidden_name
from milepost.files.reaching import steadily
from milepost.paths import check_file

FRESH = 10.0  # seconds between two touches
STALE = 60.0  # seconds without a touch after which a holder on another host is suspected to be dead
PAUSE = 0.1  # seconds between two attempts
ALIVE, SILENT, GONE = "alive", "silent", "gone"  # of a holder; SILENT: by the clocks it has not touched its file


class OwnerFile:
    """A lock that is a file. Raise OSError if anything else has its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = b""
        self._released: threading.Event | None = None

    def acquire(self, *, patience: float) -> bool:
        """Acquire the lock; return False if it is held elsewhere for `patience` seconds."""
        check_file(self.path)
        until = time.monotonic() + patience
        while not (self._create(self.path) or self._take_over()):
            if time.monotonic() >= until:
                return False
            time.sleep(PAUSE)
        self._released = threading.Event()
        threading.Thread(target=self._keep_fresh, args=(self._released,), daemon=True, name="owner file").start()
        return True

    def release(self) -> None:
        """Release the lock, if it is still this process's."""
        if self._released is not None:
            self._released.set()
            self._released = None
            with contextlib.suppress(OSError):
                if self.path.read_bytes() == self._content:
                    self.path.unlink()

    def _create(self, path: Path) -> bool:
        """Create the file if there is none; return whether this process has."""
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.time(),
            "started": started(os.getpid()),
        }
        content = json.dumps({**owner, "number": os.urandom(8).hex()}).encode()
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        self._content = content
        return True

    def _take_over(self) -> bool:
        """Replace the file of a dead holder. Only the process that creates a second file may, so that two never do."""
        if self._holder(self.path) == ALIVE:
            return False
        guard = self.path.with_name(f"{self.path.name}.next")
        if self._holder(guard) != ALIVE:
            discard(guard)
        if not self._create(guard):
            return False
        try:
            holder = self._holder(self.path) if os.path.lexists(self.path) else GONE
            if holder == ALIVE or (
                holder == SILENT and not _stays(self.path)
            ):  # another process was faster, or it lives
                return False
            self.path.unlink(missing_ok=True)
            return self._create(self.path)
        finally:
            discard(guard)

    def _holder(self, path: Path) -> str:
        """Return what is known of the holder of a file; ALIVE if there is no file."""
        try:
            touched, content = path.stat().st_mtime, steadily(path.read_bytes)
        except FileNotFoundError:
            return ALIVE
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            owner = json.loads(content)
            if owner["host"] == socket.gethostname() and (now := started(int(owner["pid"]))) is not None:
                return ALIVE if now == owner.get("started") else GONE
            if owner["host"] == socket.gethostname() and started(os.getpid()) is not None:
                return GONE  # this host lists its processes, and that one is not among them
        return SILENT if self._now(path) - touched > STALE else ALIVE

    def _now(self, path: Path) -> float:
        """Return the present time of the file system: the time of a new file."""
        probe = hidden_name(path.with_name("time"))
        try:
            with open(probe, "xb") as file:
                file.write(b".")
            return probe.stat().st_mtime
        finally:
            discard(probe)

    def _keep_fresh(self, released: threading.Event) -> None:
        """Touch the file until it is released, as long as it is this process's."""
        while not released.wait(FRESH):
            with contextlib.suppress(OSError):  # the folder may be away for a while
                if self.path.read_bytes() != self._content:
                    return
                if not released.is_set():
                    self._touch()

    def _touch(self) -> None:
        try:
            os.utime(self.path)
        except OSError:  # a file system that sets no times
            descriptor = os.open(self.path, os.O_WRONLY | os.O_TRUNC)  # never creates it: it may be released by now
            try:
                os.write(descriptor, self._content)
            finally:
                os.close(descriptor)


def _stays(path: Path) -> bool:
    """Watch a file for three of its holder's touches; return whether none came. A file that is gone has changed."""
    until = time.monotonic() + 3 * FRESH
    with contextlib.suppress(FileNotFoundError):
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:
            if time.monotonic() >= until:
                return True
            time.sleep(PAUSE)
    return False


def started(process: int) -> str | None:
    """Return when a process of this host started, as its system counts; None if there is no such process, or no list."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
