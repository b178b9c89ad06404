"""Read files whose folder may not answer for a moment: each read is tried again, from the file opened anew.

What is mapped instead of read ends the process with SIGBUS where a page cannot be read, so it is read in first.
"""

import contextlib
import ctypes
import errno
import io
import mmap
import os
from pathlib import Path
from typing import Any

from milepost.files.reaching import is_unreachable, steadily

POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14


class _SteadyFile(io.RawIOBase):
    """A file to read. While its folder does not answer, each read is tried again, from the file opened anew."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = steadily(self._opened)

    def _opened(self) -> io.FileIO:
        return open(self._path, "rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int | None:
        at = self._file.tell()

        def read() -> int | None:
            try:
                return self._file.readinto(buffer)
            except OSError as error:
                if is_unreachable(error):
                    self._open_again(at)
                raise

        return steadily(read)

    def _open_again(self, at: int) -> None:
        """Open the file anew, since an old descriptor may stay stale; keep the old one if it is another file now."""
        with contextlib.suppress(OSError):
            new = self._opened()
            if _identity(new) != _identity(self._file):
                new.close()
                return
            self._file.close()
            self._file = new
        with contextlib.suppress(OSError):
            self._file.seek(at)

    def close(self) -> None:
        self._file.close()
        super().close()


def _identity(file: io.FileIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_steadily(path: Path) -> io.BufferedReader:
    """Open a file to read; opening it, and each read, is tried again for a while where its folder does not answer."""
    return io.BufferedReader(_SteadyFile(path))  # type: ignore[arg-type]


def read_steadily(path: Path) -> bytes:
    """Return the content of a file, read as `open_steadily` does."""
    with open_steadily(path) as file:
        return file.read()


def bring_in(path: Path, address: int, size: int) -> None:
    """Read the pages of memory that is mapped from `path`, if its folder may go away. Raise OSError if it does not answer.

    Without this, the first use of a page that cannot be read ends the process with SIGBUS. A disk of this computer has a
    device number of its own and is left out: there it would cost memory and save nothing.
    """
    if os.name != "posix" or os.major(os.stat(path).st_dev):
        return
    begin = address - address % mmap.PAGESIZE

    def populate() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), POPULATE_READ)
        if failed and ctypes.get_errno() == errno.EFAULT:  # what would have been SIGBUS
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    steadily(populate)
