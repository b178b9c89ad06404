"""Which names in a folder have changed, as Linux reports them (inotify), so that a full folder is not listed at each save.

A folder's modification time cannot tell this: a save changes it itself, and another's change within the same tick of the
clock leaves it equal. The system reports each change before the call that makes it returns, except those that another
computer makes. So only file systems of this computer are watched; elsewhere, and when in doubt, a folder is listed.
"""

import ctypes
import os
import struct
import threading
import weakref
from pathlib import Path

from milepost.files.file_system import kind_of

WATCHED = (
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "overlay",
    "tmpfs",
    "xfs",
    "zfs",
)  # kinds that only this computer writes
CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF = 0x8, 0x40, 0x80, 0x100, 0x200, 0x400
UNMOUNTED, OVERFLOW, IGNORED = 0x2000, 0x4000, 0x8000  # after these, what has changed is unknown
ONLY_FOLDERS = 0x1000000
CHANGES = CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF
EVENT = struct.Struct("iIII")  # number of the watch, what happened, a cookie, bytes of the name that follows
BUFFER = 2**16  # bytes of a read


class Watch:
    """The names in a folder that have changed since they were last asked for. List the folder after making it."""

    def __init__(self, folder: Path) -> None:
        """Begin to watch; raise OSError where the system or the file system does not offer it."""
        if kind_of(folder) not in WATCHED:
            raise OSError(f"the file system of {folder} is not watched")
        self.names: set[str] | None = set()  # None: anything may have changed
        self.folder, self._identity = folder, _identity(folder)
        self._queue = _queue_of_process()
        self._queue.add(self, "")

    def include(self, name: str) -> bool:
        """Report the folder `name` in this one, too, if a name in it changes; return False where that is not offered.

        It is reported once for what may have changed until now.
        """
        inside = _identity(self.folder / name)
        if inside is None or self._identity is None or inside[0] != self._identity[0]:  # a mount of another kind
            return False
        try:
            is_new = self._queue.add(self, name)
        except OSError:  # too many (max_user_watches)
            return False
        if is_new and self.names is not None:
            self.names.add(name)
        return True

    def changed(self) -> set[str] | None:
        """Return the names that were made, deleted, renamed or written since the last call; None if that is unknown."""
        if self._queue.process != os.getpid() or _identity(self.folder) != self._identity:
            return None
        self._queue.read()
        names = self.names
        if names is not None:
            self.names = set()
        return names


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another that takes its name, or is mounted over it; None if there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Queue:
    """The events of all watches of this process: each user has only few queues (max_user_instances)."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._guard = threading.Lock()
        # By number: who asks, and under which name in the folder that is watched; one folder may have two paths.
        self._watches: dict[int, weakref.WeakKeyDictionary[Watch, str]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "inotify_init1"):
            raise OSError("this system has no inotify")
        self._descriptor = self._call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)

    def _call(self, name: str, *arguments: object) -> int:
        answer: int = getattr(self._libc, name)(*arguments)
        if answer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return answer

    def add(self, watch: Watch, inside: str) -> bool:
        """Watch its folder, or the folder `inside` it; return False if that is done already."""
        path = os.fsencode(watch.folder / inside)
        with self._guard:
            number = self._call("inotify_add_watch", self._descriptor, path, ctypes.c_uint32(CHANGES | ONLY_FOLDERS))
            known = self._watches.setdefault(number, weakref.WeakKeyDictionary())
            is_new = known.get(watch) != inside
            known[watch] = inside
            return is_new

    def read(self) -> None:
        """Give every watch the names of its events."""
        with self._guard:
            while data := self._read():
                at = 0
                while at < len(data):
                    number, what, _, length = EVENT.unpack_from(data, at)
                    at += EVENT.size + length
                    self._give(number, what, data[at - length : at].rstrip(b"\0"))

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, BUFFER)
        except BlockingIOError:
            return b""

    def _give(self, number: int, what: int, name: bytes) -> None:
        everywhere, here = what & OVERFLOW, what & (UNMOUNTED | IGNORED | DELETE_SELF)
        places = list(self._watches.values() if everywhere else filter(None, [self._watches.get(number)]))
        for watch, inside in [item for place in places for item in place.items()]:
            if everywhere or (here and not inside):
                watch.names = None
            elif watch.names is not None:
                watch.names.add(inside or os.fsdecode(name))
        if what & IGNORED:
            self._watches.pop(number, None)
        elif number in self._watches and not self._watches[number]:  # nobody asks any more
            self._libc.inotify_rm_watch(self._descriptor, number)


_queues: list[_Queue] = []


def _queue_of_process() -> _Queue:
    """Return the queue; a new one after a fork, because parent and child would take each other's events."""
    if not _queues or _queues[0].process != os.getpid():
        _queues[:] = [_Queue()]
    return _queues[0]
