"""Files of a run that change: lines that are added while it lives, and files that are replaced as a whole.

A line that cannot be written now waits in memory and is written later, so that a folder that is away for a while loses
none. Where the file system cannot append, the lines wait until `flush`, which writes the whole file.
"""

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from milepost.files.file_system import APPEND, RENAME, RENAME_ONTO, lacks
from milepost.files.mounting import check_mounted
from milepost.files.reaching import moved
from milepost.files.reading import read_steadily
from milepost.files.writing import flush_to_disk, sync_file
from milepost.paths import is_real_file

MOST_WAITING = 2**18  # lines; then the oldest are lost
NOT_REGULAR = "is not a regular file, and Milepost writes its own file here: remove it"


def own_file(name: str, flags: int) -> int:
    """Open a run's own file for writing, as an `opener` of `open`.

    Raise OSError if a link, a pipe or a device is in its place.
    """
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # O_NONBLOCK: opening a pipe would block
    descriptor = os.open(name, flags | safe, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NOT_REGULAR, name)
    return descriptor


class GrowingFile:
    """A file of lines, each written at once where the file system appends, torn by a kill or a full disk at worst."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._torn = True  # whether the file may end within a line

    @property
    def appends(self) -> bool:
        """Whether lines are written at once."""
        return APPEND not in lacks(self.path.parent)

    def add(self, line: bytes) -> None:
        """Write a line, which ends with a newline, after those that wait.

        Raise OSError on a write error, and once if the file was deleted since the last line: a new file then has the
        line. After an error the line waits.
        """
        self._waiting.append(line)
        if self.appends:
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait. Raise as `add` does."""
        if self._waiting:
            self._append() if self.appends else self._write_whole()

    def _append(self) -> None:
        deleted = False
        try:
            deleted = self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0
            if deleted:
                self._close_file()
            if self._file is None:
                check_mounted(self.path.parent)
                self.path.parent.mkdir(parents=True, exist_ok=True)  # deleted, or another disk is mounted here
                restore(self.path)
                self._file = open(self.path, "ab+", buffering=0, opener=own_file)  # noqa: SIM115  (lives as the run)
            while self._waiting:
                self._write(self._file, self._waiting[0])
                self._waiting.popleft()
        except OSError:
            self._close_file()  # of a folder that comes back, an old descriptor stays dead
            raise
        if deleted:
            raise OSError(errno.ENOENT, "deleted while training; a new file has the lines from now on", str(self.path))

    def _write(self, file: io.FileIO, line: bytes) -> None:
        rest = memoryview(b"\n" + line if self._torn and _ends_within_a_line(file) else line)
        self._torn = True
        while len(rest):
            rest = rest[file.write(rest) :]
        self._torn = False

    def _write_whole(self) -> None:
        check_mounted(self.path.parent)
        before = content_of(self.path) if os.path.lexists(self.path) else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        waiting = list(self._waiting)
        replace_content(self.path, before + b"".join(waiting))
        for _ in waiting:
            self._waiting.popleft()

    def _close_file(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # each line was written, or its refusal raised, at once
                self._file.close()
            self._file = None
            self._torn = True

    def close(self) -> int:
        """Write what waits, and close the file; return how many lines could not be written. Why was raised before."""
        with contextlib.suppress(OSError):
            self.flush()
        self._close_file()
        return len(self._waiting)


def _ends_within_a_line(file: io.FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


# ---------------------------------------------------------------------------------------------------------------------
# Replace a file as a whole. Where no file can be renamed onto another, it is written over, and meanwhile a file beside
# it holds the new content behind its sha256: a reader takes that if it is whole, and the file itself if it is not.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that durably replaces `path` at the end. An exception leaves `path` as it was."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    try:
        yield temporary
        if {RENAME, RENAME_ONTO} & lacks(path.parent):
            _write_over(path, temporary.read_bytes())
        else:
            restore(path)
            sync_file(temporary)
            os.replace(temporary, path)
            moved(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_content(path: Path, content: bytes) -> None:
    """Durably replace a run's own file. Raise OSError if a link, a pipe or a device is in its place.

    The new content goes through one name beside the file, so that what a kill leaves there goes with the next write.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    restore(path)
    if {RENAME, RENAME_ONTO} & lacks(path.parent):
        _write_over(path, content)
        return
    try:
        _write(_beside(path), content)
        os.replace(_beside(path), path)
        moved(_beside(path), path)
    finally:
        _beside(path).unlink(missing_ok=True)


def content_of(path: Path) -> bytes:
    """Return the content of a file that `replace_content` wrote, also if it was killed while it did."""
    return read_steadily(path) if (kept := _kept(path)) is None else kept


def restore(path: Path) -> None:
    """Write a file again whose replacement was killed."""
    if (kept := _kept(path)) is not None:
        _write_over(path, kept)
    elif os.path.lexists(_beside(path)):
        _beside(path).unlink()  # the file itself was not touched yet


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _kept(path: Path) -> bytes | None:
    if not is_real_file(_beside(path)):  # nothing, or what another person put there: reading a pipe would block
        return None
    try:
        digest, _, content = _beside(path).read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest().encode() == digest else None


def _write_over(path: Path, content: bytes) -> None:
    beside = _beside(path)
    _write(beside, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    _write(path, content)
    beside.unlink()


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # some systems let nobody write a file again
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        flush_to_disk(file.fileno())
